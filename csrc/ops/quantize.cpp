// less::quantize: schema and checks; see ops/library.h.
#include <tuple>

#include "ops/layer.h"
#include "ops/library.h"

namespace less::ops {
namespace {

constexpr const char* kOp = "quantize";

std::tuple<Tensor, Tensor> quantize(Tensor x, bool fp8) {
  check_dim(kOp, "x", x, 4, "[B, K, T, D]");
  const int64_t B = x.size(0), K = x.size(1), T = x.size(2), D = x.size(3);
  const DType x_dtype = slot_dtype(kOp, "x", x);
  const Arguments arguments{kOp, "x", x};
  const HeadRows rows = head_rows(arguments, "x", x, x_dtype, {B, K, T, D}, false);
#ifndef LESS_LAUNCHES
  if (fp8) fail(kOp, ": dtype must be int8 on a CPU, got float8_e4m3fn");
#endif
  const ScalarType type = fp8 ? ScalarType::Float8_e4m3fn : ScalarType::Char;
  Tensor eight = arguments.output("eight", type, {B, K, T, D});
  Tensor scale = arguments.output("scale", ScalarType::Float, {B, K, T});
  const QuantizeParams params{
      .x = rows,
      .eight = eight.mutable_data_ptr(),
      .scale = scale.mutable_data_ptr<float>(),
      .dtype = fp8 ? DType::fp8 : DType::i8,
      .B = B,
      .heads = K,
      .T = T,
      .D = D,
  };
#ifdef LESS_LAUNCHES
  launch(arguments, cuda::quantize, params, {{"x", x}});
#else
  torch::stable::parallel_for(0, B * K * T, grain(2 * D), [&](int64_t begin, int64_t end) {
    cpu::quantize(params, begin, end);
  });
#endif
  return {eight, scale};
}

}  // namespace
}  // namespace less::ops

LESS_OP(quantize, "quantize(Tensor x, bool fp8=False) -> (Tensor, Tensor)")
