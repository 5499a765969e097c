// less::fold: schema, checks, and its CPU and CUDA implementations.
//
// This file is compiled into less._C, and once more, with LESS_CUDA_HALF, into less._cuda.
#include "ops/check.h"

#ifndef LESS_CUDA_HALF
#include "cpu/kernels.h"
#endif

namespace less::ops {
namespace {

[[maybe_unused]] FoldParams fold_params(const Tensor& H, const Tensor& z, const Tensor& psi_k,
                                        const Tensor& v, const std::optional<Tensor>& keep) {
  check_dim("fold", "H", H, 4, "[B, K, R, D]");
  check_dim("fold", "psi_k", psi_k, 4, "[B, K, N, R]");
  const int64_t B = H.size(0), K = H.size(1), R = H.size(2), D = H.size(3);
  const int64_t N = psi_k.size(2);
  const DType v_dtype = slot_dtype("fold", "v", v);
  check("fold", "H", H, ScalarType::Float, {B, K, R, D});
  check("fold", "z", z, ScalarType::Float, {B, K, R});
  check("fold", "psi_k", psi_k, ScalarType::Float, {B, K, N, R});
  check("fold", "v", v, v.scalar_type(), {B, K, N, D});
  check_device("fold", "z", z, "H", H);
  check_device("fold", "psi_k", psi_k, "H", H);
  check_device("fold", "v", v, "H", H);
  if (keep) {
    check("fold", "keep", *keep, ScalarType::Bool, {B, K, N});
    check_device("fold", "keep", *keep, "H", H);
  }
  return FoldParams{
      .H = H.mutable_data_ptr<float>(),
      .z = z.mutable_data_ptr<float>(),
      .psi_k = psi_k.const_data_ptr<float>(),
      .v = v.const_data_ptr(),
      .keep = keep ? keep->const_data_ptr<bool>() : nullptr,
      .v_dtype = v_dtype,
      .heads = B * K,
      .N = N,
      .R = R,
      .D = D,
  };
}

#ifndef LESS_CUDA_HALF
void fold_cpu(Tensor H, Tensor z, Tensor psi_k, Tensor v, std::optional<Tensor> keep) {
  const FoldParams params = fold_params(H, z, psi_k, v, keep);
  torch::stable::parallel_for(0, params.heads, 1,
                              [&](int64_t begin, int64_t end) { cpu::fold(params, begin, end); });
}
#endif

}  // namespace
}  // namespace less::ops

#ifndef LESS_CUDA_HALF
STABLE_TORCH_LIBRARY_FRAGMENT(less, m) {
  m.def("fold(Tensor(a!) H, Tensor(b!) z, Tensor psi_k, Tensor v, Tensor? keep=None) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(less, CPU, m) { m.impl("fold", TORCH_BOX(&less::ops::fold_cpu)); }
#endif
