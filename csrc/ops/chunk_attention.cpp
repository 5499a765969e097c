// less::chunk_attention: schema and checks; see ops/library.h.
#include <algorithm>
#include <tuple>

#include "ops/library.h"
#include "ops/slots.h"

namespace less::ops {
namespace {

constexpr const char* kOp = "chunk_attention";

#ifndef LESS_LAUNCHES
void run(ChunkAttentionParams params, const Tensor& like) {
  const int64_t G = params.Q / params.K, S = params.slots.S, T = params.T;
  const int64_t per_block = std::max<int64_t>(1, kAttentionBlock / G);
  const int64_t strips = std::min(kScoreStrips, (T + per_block - 1) / per_block);
  params.strips = strips;
  OptionalTensor received;
  if (params.scores) {
    received = torch::stable::new_empty(like, {params.B, params.K, strips, S + T});
    params.received = received->mutable_data_ptr<float>();
  }
  if (T > 0) {
    const int64_t work = (T + strips - 1) / strips * G * (S + T / 2 + 1) * 2 * params.D;
    torch::stable::parallel_for(
        0, params.B * params.K * strips, grain(work),
        [&](int64_t begin, int64_t end) { cpu::chunk_attention(params, begin, end); });
  }
  torch::stable::parallel_for(
      0, params.B * params.K, grain((S + T) * strips),
      [&](int64_t begin, int64_t end) { cpu::chunk_scores(params, begin, end); });
}
#endif

std::tuple<Tensor, Tensor, Tensor, Tensor> chunk_attention(
    Tensor q, Tensor k, Tensor v, OptionalTensor chunk_k_scale, OptionalTensor chunk_v_scale,
    OptionalTensor valid, Tensor slot_k, Tensor slot_v, OptionalTensor slot_k_scale,
    OptionalTensor slot_v_scale, Tensor position, Tensor score, Tensor weight, OptionalTensor phi_q,
    OptionalTensor H, OptionalTensor z, [[maybe_unused]] OptionalTensor workspace, double scale,
    double softcap, double decay, bool scores) {
  check_dim(kOp, "q", q, 4, "[B, Q, T, D]");
  check_dim(kOp, "slot_k", slot_k, 4, "[B, K, S, D]");
  const int64_t B = q.size(0), Q = q.size(1), T = q.size(2), D = q.size(3);
  const int64_t K = slot_k.size(1), S = slot_k.size(2);
  const DType q_type = slot_dtype(kOp, "q", q);
  if (K == 0 || Q % K != 0) fail(kOp, ": q's heads must be a multiple of ", K, ", got ", Q);
  const Arguments arguments{kOp, "q", q};
  const Slots slots = check_slots(arguments, B, K, D, slot_k, slot_v, slot_k_scale, slot_v_scale,
                                  position, score, weight);
  arguments.check("q", q, q.scalar_type(), {B, Q, T, D});
  check_rows(arguments, B, K, T, D, slot_k.scalar_type(), k, v, chunk_k_scale, chunk_v_scale);
  arguments.check("valid", valid, ScalarType::Bool, {B, T});
  if (bool(phi_q) != bool(H) || bool(phi_q) != bool(z)) {
    fail(kOp, ": phi_q, H and z must be given together");
  }
  if (phi_q) check_dim(kOp, "phi_q", *phi_q, 4, "[B, Q, T, R]");
  const int64_t R = phi_q ? phi_q->size(3) : 0;
  arguments.check("phi_q", phi_q, ScalarType::Float, {B, Q, T, R});
  arguments.check("H", H, ScalarType::Float, {B, K, R, D});
  arguments.check("z", z, ScalarType::Float, {B, K, R});
  check_softcap(kOp, softcap);
  Tensor out = arguments.output("out", q.scalar_type(), {B, Q, T, D});
  Tensor slot_score = arguments.output("slot_score", ScalarType::Float, {B, K, S});
  Tensor chunk_score = arguments.output("chunk_score", ScalarType::Float, {B, K, T});
  Tensor share = arguments.output("share", ScalarType::Float, {B, Q, T});
  ChunkAttentionParams params{
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
      .received = nullptr,
      .workspace = nullptr,
      .q_dtype = q_type,
      .scores = scores,
      .scale = float(scale),
      .softcap = float(softcap),
      .decay = float(decay),
      .strips = 0,
      .B = B,
      .Q = Q,
      .K = K,
      .T = T,
      .D = D,
      .R = R,
  };
#ifdef LESS_LAUNCHES
  check_head_dim(kOp, "q", D);
  const OptionalTensor held =
      scratch(arguments, workspace, cuda::chunk_attention_workspace(params));
  params.workspace = pointer(held);
  launch(arguments, cuda::chunk_attention, params, {{"q", q}, {"slot_k", slot_k}});
#else
  run(params, score);
#endif
  return {out, slot_score, chunk_score, share};
}

// Bytes of the workspace for a call of these queries over these slots; padded: valid will be given.
int64_t chunk_attention_workspace([[maybe_unused]] Tensor q, [[maybe_unused]] Tensor slot_k,
                                  [[maybe_unused]] bool padded) {
#ifdef LESS_LAUNCHES
  const char* op = "chunk_attention_workspace";
  ChunkAttentionParams params{};
  params.valid = padded ? &padded : nullptr;  // its address is looked at, not read
  params.q_dtype = slot_dtype(op, "q", q);
  params.slots.dtype = row_dtype(op, "slot_k", slot_k);
  params.slots.S = slot_k.size(2);
  params.B = q.size(0);
  params.Q = q.size(1);
  params.K = slot_k.size(1);
  params.T = q.size(2);
  params.D = q.size(3);
  return cuda::chunk_attention_workspace(params);
#else
  return 0;
#endif
}

}  // namespace
}  // namespace less::ops

LESS_OP(chunk_attention,
        "chunk_attention(Tensor q, Tensor k, Tensor v, Tensor? chunk_k_scale, "
        "Tensor? chunk_v_scale, Tensor? valid, Tensor slot_k, Tensor slot_v, "
        "Tensor? slot_k_scale, Tensor? slot_v_scale, Tensor position, Tensor score, "
        "Tensor weight, Tensor? phi_q, Tensor? H, Tensor? z, Tensor(a!)? workspace, float scale, "
        "float softcap, float decay, bool scores) -> (Tensor, Tensor, Tensor, Tensor)")

LESS_OP(chunk_attention_workspace,
        "chunk_attention_workspace(Tensor q, Tensor slot_k, bool padded) -> int")
