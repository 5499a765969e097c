// less::feature_map: schema and checks; see ops/library.h.
#include "ops/library.h"
#include "ops/maps.h"

namespace less::ops {
namespace {

constexpr const char* kOp = "feature_map";

Tensor feature_map(Tensor x, Tensor w1, Tensor w2, OptionalTensor w1_scale, OptionalTensor w2_scale,
                   OptionalTensor bias, OptionalTensor mix, OptionalTensor scale,
                   OptionalTensor mix_scale, int64_t kind) {
  check_dim(kOp, "x", x, 4, "[B, heads, T, D]");
  const int64_t B = x.size(0), heads = x.size(1), T = x.size(2), D = x.size(3);
  const DType x_dtype = slot_dtype(kOp, "x", x);
  const Arguments arguments{kOp, "x", x};
  arguments.check("x", x, x.scalar_type(), {B, heads, T, D});
  const FeatureMaps maps = feature_maps(arguments, heads, D, w1, w2, w1_scale, w2_scale, bias, mix,
                                        scale, mix_scale, kind);
  Tensor y = arguments.output("y", ScalarType::Float, {B, heads, T, maps.R});
  const FeatureMapParams params{
      .maps = maps,
      .x = x.const_data_ptr(),
      .y = y.mutable_data_ptr<float>(),
      .x_dtype = x_dtype,
      .B = B,
      .heads = heads,
      .T = T,
  };
#ifdef LESS_LAUNCHES
  check_any_head_dim(kOp, "x", D);
  launch(arguments, cuda::feature_map, params, {{"x", x}, {"w1", w1}, {"w2", w2}});
#else
  const int64_t work = maps.E * (D + maps.R);  // multiply-adds per row
  torch::stable::parallel_for(0, B * heads * T, grain(work), [&](int64_t begin, int64_t end) {
    cpu::feature_map(params, begin, end);
  });
#endif
  return y;
}

}  // namespace
}  // namespace less::ops

LESS_OP(feature_map,
        "feature_map(Tensor x, Tensor w1, Tensor w2, Tensor? w1_scale, Tensor? w2_scale, "
        "Tensor? bias, Tensor? mix, Tensor? scale, Tensor? mix_scale, int kind) -> Tensor")
