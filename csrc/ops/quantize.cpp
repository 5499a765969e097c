// less::quantize: schema, checks, and its CPU and CUDA implementations.
//
// This file is compiled into less._C, and once more, with LESS_CUDA_HALF, into less._cuda.
#include <tuple>

#include "ops/check.h"

#ifndef LESS_CUDA_HALF
#include "cpu/kernels.h"

namespace less::ops {
namespace {

std::tuple<Tensor, Tensor> quantize_cpu(Tensor x) {
  constexpr const char* op = "quantize";
  check_dim(op, "x", x, 4, "[B, K, T, D]");
  const int64_t B = x.size(0), K = x.size(1), T = x.size(2), D = x.size(3);
  const DType x_dtype = slot_dtype(op, "x", x);
  check(op, "x", x, x.scalar_type(), {B, K, T, D});
  Tensor eight = torch::stable::new_empty(x, {B, K, T, D}, ScalarType::Char);
  Tensor scale = torch::stable::new_empty(x, {B, K, T}, ScalarType::Float);
  const QuantizeParams params{
      .x = x.const_data_ptr(),
      .eight = eight.mutable_data_ptr<int8_t>(),
      .scale = scale.mutable_data_ptr<float>(),
      .x_dtype = x_dtype,
      .rows = B * K * T,
      .D = D,
  };
  torch::stable::parallel_for(0, params.rows, grain(2 * D), [&](int64_t begin, int64_t end) {
    cpu::quantize(params, begin, end);
  });
  return {eight, scale};
}

}  // namespace
}  // namespace less::ops

STABLE_TORCH_LIBRARY_FRAGMENT(less, m) { m.def("quantize(Tensor x) -> (Tensor, Tensor)"); }

STABLE_TORCH_LIBRARY_IMPL(less, CPU, m) { m.impl("quantize", TORCH_BOX(&less::ops::quantize_cpu)); }
#endif
