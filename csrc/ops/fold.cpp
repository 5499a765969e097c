// less::fold: schema and checks; see ops/library.h.
#include "ops/library.h"

namespace less::ops {
namespace {

constexpr const char* kOp = "fold";

void fold(Tensor H, Tensor z, Tensor psi_k, Tensor v, OptionalTensor keep) {
  check_dim(kOp, "H", H, 4, "[B, K, R, D]");
  check_dim(kOp, "psi_k", psi_k, 4, "[B, K, N, R]");
  const int64_t B = H.size(0), K = H.size(1), R = H.size(2), D = H.size(3);
  const int64_t N = psi_k.size(2);
  const DType v_dtype = slot_dtype(kOp, "v", v);
  const Arguments arguments{kOp, "H", H};
  arguments.check("H", H, ScalarType::Float, {B, K, R, D});
  arguments.check("z", z, ScalarType::Float, {B, K, R});
  arguments.check("psi_k", psi_k, ScalarType::Float, {B, K, N, R});
  arguments.check("v", v, v.scalar_type(), {B, K, N, D});
  arguments.check("keep", keep, ScalarType::Bool, {B, K, N});
  check_apart(kOp, "H", H, {{"z", z}, {"psi_k", psi_k}, {"v", v}, {"keep", keep}});
  check_apart(kOp, "z", z, {{"psi_k", psi_k}, {"v", v}, {"keep", keep}});
  const FoldParams params{
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
#ifdef LESS_LAUNCHES
  launch(arguments, cuda::fold, params, {{"H", H}, {"psi_k", psi_k}});
#else
  torch::stable::parallel_for(0, params.heads, 1,
                              [&](int64_t begin, int64_t end) { cpu::fold(params, begin, end); });
#endif
}

}  // namespace
}  // namespace less::ops

LESS_OP(fold, "fold(Tensor(a!) H, Tensor(b!) z, Tensor psi_k, Tensor v, Tensor? keep=None) -> ()")
