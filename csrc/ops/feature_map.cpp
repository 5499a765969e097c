// less::feature_map: schema, checks, and its CPU and CUDA implementations.
//
// This file is compiled into less._C, and once more, with LESS_CUDA_HALF, into less._cuda.
#include "ops/maps.h"

#ifndef LESS_CUDA_HALF
#include "cpu/kernels.h"

namespace less::ops {
namespace {

Tensor feature_map_cpu(Tensor x, Tensor w1, Tensor w2, OptionalTensor w1_scale,
                       OptionalTensor w2_scale, OptionalTensor bias, OptionalTensor mix,
                       OptionalTensor scale, OptionalTensor mix_scale, int64_t kind) {
  check_dim("feature_map", "x", x, 4, "[B, heads, T, D]");
  const int64_t B = x.size(0), heads = x.size(1), T = x.size(2), D = x.size(3);
  const DType x_dtype = slot_dtype("feature_map", "x", x);
  check("feature_map", "x", x, x.scalar_type(), {B, heads, T, D});
  const FeatureMaps maps = feature_maps("feature_map", "x", x, heads, D, w1, w2, w1_scale, w2_scale,
                                        bias, mix, scale, mix_scale, kind);
  Tensor y = torch::stable::new_empty(x, {B, heads, T, maps.R}, ScalarType::Float);
  const FeatureMapParams params{
      .maps = maps,
      .x = x.const_data_ptr(),
      .y = y.mutable_data_ptr<float>(),
      .x_dtype = x_dtype,
      .B = B,
      .heads = heads,
      .T = T,
  };
  const int64_t work = maps.E * (D + maps.R);  // multiply-adds per row
  torch::stable::parallel_for(0, B * heads * T, grain(work), [&](int64_t begin, int64_t end) {
    cpu::feature_map(params, begin, end);
  });
  return y;
}

}  // namespace
}  // namespace less::ops

STABLE_TORCH_LIBRARY_FRAGMENT(less, m) {
  m.def(
      "feature_map(Tensor x, Tensor w1, Tensor w2, Tensor? w1_scale, Tensor? w2_scale, Tensor? "
      "bias, Tensor? mix, Tensor? scale, "
      "Tensor? mix_scale, int kind) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(less, CPU, m) {
  m.impl("feature_map", TORCH_BOX(&less::ops::feature_map_cpu));
}
#endif
