// less::feature_map: schema and checks; see ops/library.h.
#include "ops/layer.h"
#include "ops/library.h"

namespace less::ops {
namespace {

constexpr const char* kOp = "feature_map";

Tensor feature_map(Tensor x, Tensor maps, Tensor layer, bool query) {
  check_dim(kOp, "x", x, 4, "[B, heads, T, D]");
  const DType x_dtype = slot_dtype(kOp, "x", x);
  const LayerArguments of = read_layer(kOp, layer);
  const int64_t B = x.size(0), T = x.size(2), heads = query ? of.spec.Q : of.spec.K;
  const Arguments arguments{kOp, "x", x};
  const HeadRows rows = head_rows(arguments, "x", x, x_dtype, {B, heads, T, of.spec.D});
  const Maps both = read_maps(arguments, of, maps);
  const FeatureMaps& map = query ? both.phi : both.psi;
  Tensor y = arguments.output("y", ScalarType::Float, {B, heads, T, map.R});
  const FeatureMapParams params{
      .maps = map,
      .x = rows,
      .y = y.mutable_data_ptr<float>(),
      .B = B,
      .heads = heads,
      .T = T,
  };
#ifdef LESS_LAUNCHES
  check_any_head_dim(kOp, "x", of.spec.D);
  launch(arguments, cuda::feature_map, params, {{"x", x}});
#else
  const int64_t work = map.E * (map.D + (map.w2 == nullptr ? 0 : map.R));  // multiply-adds per row
  torch::stable::parallel_for(0, B * heads * T, grain(work), [&](int64_t begin, int64_t end) {
    cpu::feature_map(params, begin, end);
  });
#endif
  return y;
}

}  // namespace
}  // namespace less::ops

LESS_OP(feature_map, "feature_map(Tensor x, Tensor maps, Tensor layer, bool query) -> Tensor")
