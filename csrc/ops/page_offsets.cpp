// less::page_offsets: where csrc/common/layout.h finds the fields of a layer's pages, for the test
// that holds less/layer/layout.py to it.
#include "ops/layer.h"
#include "ops/library.h"

namespace less::ops {
namespace {

// int64 [K, 15]: where each head begins in its page, its thirteen fields in the order in which they
// lie
// (-1: it has none such), and its end.
Tensor page_offsets(Tensor layer) {
  const LayerArguments of = read_layer("page_offsets", layer, true);
  const Layout& layout = of.layout;
  Tensor offsets = torch::stable::new_empty(layer, {layout.K, 15}, ScalarType::Long);
  int64_t* out = offsets.mutable_data_ptr<int64_t>();
  // Addresses are offsets in a page that begins at `page`; nothing is read there.
  alignas(kPageAlign) static unsigned char page[kPageAlign];
  const auto offset = [](const void* field) -> int64_t {
    if (field == nullptr) return -1;
    return int64_t(reinterpret_cast<uintptr_t>(field) - reinterpret_cast<uintptr_t>(page));
  };
  const auto scales = [&](const float* floats, const uint16_t* of_packed) {
    return offset(floats == nullptr ? static_cast<const void*>(of_packed) : floats);
  };
  for (int64_t h = 0; h < layout.K; ++h) {
    const Span span = head_span(layout, page, h);
    const auto [slots, state] = head(layout, page, h);
    const int64_t begin = offset(span.data);
    for (const int64_t at :
         {begin, offset(slots.position), offset(slots.hot_k), offset(slots.hot_k_scale),
          offset(slots.k), scales(slots.k_scale, slots.k_half), scales(slots.weight, slots.count),
          offset(slots.hot_v), offset(slots.hot_v_scale), offset(slots.v),
          scales(slots.v_scale, slots.v_half), offset(state.z), offset(state.H),
          scales(slots.score, slots.half), begin + span.nbytes}) {
      *out++ = at;
    }
  }
  return offsets;
}

}  // namespace
}  // namespace less::ops

LESS_OP(page_offsets, "page_offsets(Tensor layer) -> Tensor")
