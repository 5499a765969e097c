// less::page_offsets: where csrc/common/layout.h finds the fields of a layer's pages, for the test
// that holds less/layer/layout.py to it.
#include "ops/layer.h"
#include "ops/library.h"

namespace less::ops {
namespace {

// int64 [K, 11]: where each head begins in its page, its nine fields in the order in which they lie
// (-1: it has none such), and its end.
Tensor page_offsets(Tensor layer) {
  const LayerArguments of = read_layer("page_offsets", layer, DType::fp8);
  const Layout& layout = of.layout;
  Tensor offsets = torch::stable::new_empty(layer, {layout.K, 11}, ScalarType::Long);
  int64_t* out = offsets.mutable_data_ptr<int64_t>();
  // Addresses are offsets in a page that begins at `page`; nothing is read there.
  alignas(kFieldAlign) static unsigned char page[kFieldAlign];
  const auto offset = [](const void* field) -> int64_t {
    if (field == nullptr) return -1;
    return int64_t(reinterpret_cast<uintptr_t>(field) - reinterpret_cast<uintptr_t>(page));
  };
  for (int64_t h = 0; h < layout.K; ++h) {
    const Span span = head_span(layout, page, h);
    const auto [slots, state] = head(layout, page, h);
    const int64_t begin = offset(span.data);
    for (const int64_t at :
         {begin, offset(slots.position), offset(slots.k), offset(slots.k_scale),
          offset(slots.weight), offset(slots.v), offset(slots.v_scale), offset(state.z),
          offset(state.H), offset(slots.score), begin + span.nbytes}) {
      *out++ = at;
    }
  }
  return offsets;
}

}  // namespace
}  // namespace less::ops

LESS_OP(page_offsets, "page_offsets(Tensor layer) -> Tensor")
