// less::chunk_attention: schema, checks, and its CPU and CUDA implementations.
//
// This file is compiled into less._C, and once more, with LESS_CUDA_HALF, into less._cuda.
#include <algorithm>
#include <tuple>

#include "ops/slots.h"

#ifndef LESS_CUDA_HALF
#include "cpu/kernels.h"

namespace less::ops {
namespace {

constexpr const char* kOp = "chunk_attention";

std::tuple<Tensor, Tensor, Tensor, Tensor> chunk_attention_cpu(
    Tensor q, Tensor k, Tensor v, OptionalTensor chunk_k_scale, OptionalTensor chunk_v_scale,
    OptionalTensor valid, Tensor slot_k, Tensor slot_v, OptionalTensor slot_k_scale,
    OptionalTensor slot_v_scale, Tensor position, Tensor score, Tensor weight, OptionalTensor phi_q,
    OptionalTensor H, OptionalTensor z, double scale, double decay, bool scores) {
  check_dim(kOp, "q", q, 4, "[B, Q, T, D]");
  check_dim(kOp, "slot_k", slot_k, 4, "[B, K, S, D]");
  const int64_t B = q.size(0), Q = q.size(1), T = q.size(2), D = q.size(3);
  const int64_t K = slot_k.size(1), S = slot_k.size(2);
  const DType q_type = slot_dtype(kOp, "q", q);
  if (K == 0 || Q % K != 0) fail(kOp, ": q's heads must be a multiple of ", K, ", got ", Q);
  const Slots slots = check_slots(kOp, "q", q, B, K, D, slot_k, slot_v, slot_k_scale, slot_v_scale,
                                  position, score, weight);
  check(kOp, "q", q, q.scalar_type(), {B, Q, T, D});
  check_rows(kOp, "q", q, B, K, T, D, slot_k, k, v, chunk_k_scale, chunk_v_scale);
  if (valid) check(kOp, "valid", *valid, ScalarType::Bool, {B, T});
  if (bool(phi_q) != bool(H) || bool(phi_q) != bool(z)) {
    fail(kOp, ": phi_q, H and z must be given together");
  }
  int64_t R = 0;
  if (phi_q) {
    check_dim(kOp, "phi_q", *phi_q, 4, "[B, Q, T, R]");
    R = phi_q->size(3);
    check(kOp, "phi_q", *phi_q, ScalarType::Float, {B, Q, T, R});
    check(kOp, "H", *H, ScalarType::Float, {B, K, R, D});
    check(kOp, "z", *z, ScalarType::Float, {B, K, R});
  }
  Tensor out = torch::stable::new_empty(q, {B, Q, T, D});
  Tensor slot_score = torch::stable::new_empty(score, {B, K, S});
  Tensor chunk_score = torch::stable::new_empty(score, {B, K, T});
  Tensor share = torch::stable::new_empty(score, {B, Q, T});
  const int64_t per_block = std::max<int64_t>(1, kAttentionBlock / (Q / K));
  const int64_t strips = std::min(kScoreStrips, (T + per_block - 1) / per_block);
  std::optional<Tensor> received;
  if (scores) received = torch::stable::new_empty(score, {B, K, strips, S + T});
  const ChunkAttentionParams params{
      .q = q.const_data_ptr(),
      .k = k.const_data_ptr(),
      .v = v.const_data_ptr(),
      .k_scale = optional_floats(chunk_k_scale),
      .v_scale = optional_floats(chunk_v_scale),
      .valid = valid ? valid->const_data_ptr<bool>() : nullptr,
      .slots = slots,
      .phi_q = optional_floats(phi_q),
      .H = optional_floats(H),
      .z = optional_floats(z),
      .out = out.mutable_data_ptr(),
      .slot_score = slot_score.mutable_data_ptr<float>(),
      .chunk_score = chunk_score.mutable_data_ptr<float>(),
      .share = share.mutable_data_ptr<float>(),
      .received = received ? received->mutable_data_ptr<float>() : nullptr,
      .q_dtype = q_type,
      .scores = scores,
      .scale = float(scale),
      .decay = float(decay),
      .strips = strips,
      .B = B,
      .Q = Q,
      .K = K,
      .T = T,
      .D = D,
      .R = R,
  };
  if (T > 0) {
    torch::stable::parallel_for(
        0, B * K * strips, grain((T + strips - 1) / strips * (Q / K) * (S + T / 2 + 1) * 2 * D),
        [&](int64_t begin, int64_t end) { cpu::chunk_attention(params, begin, end); });
  }
  torch::stable::parallel_for(0, B * K, grain((S + T) * strips), [&](int64_t begin, int64_t end) {
    cpu::chunk_scores(params, begin, end);
  });
  return {out, slot_score, chunk_score, share};
}

}  // namespace
}  // namespace less::ops

STABLE_TORCH_LIBRARY_FRAGMENT(less, m) {
  m.def(
      "chunk_attention(Tensor q, Tensor k, Tensor v, Tensor? chunk_k_scale, "
      "Tensor? chunk_v_scale, Tensor? valid, Tensor slot_k, Tensor slot_v, Tensor? slot_k_scale, "
      "Tensor? slot_v_scale, Tensor position, Tensor score, Tensor weight, Tensor? phi_q, Tensor? "
      "H, Tensor? z, "
      "float scale, float decay, bool scores) -> (Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(less, CPU, m) {
  m.impl("chunk_attention", TORCH_BOX(&less::ops::chunk_attention_cpu));
}
#endif
