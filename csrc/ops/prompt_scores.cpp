// less::prompt_scores: schema and checks; see ops/library.h.
#include "ops/library.h"

namespace less::ops {
namespace {

constexpr const char* kOp = "prompt_scores";

#ifndef LESS_LAUNCHES
void run(const PromptScoresParams& params) {
  const int64_t blocks = (params.T + kAttentionBlock - 1) / kAttentionBlock;
  const int64_t work = kAttentionBlock * (params.T / 2 + 1) * params.D;  // of a block and a head
  if (!params.lse_given) {
    torch::stable::parallel_for(
        0, params.B * params.Q * blocks, grain(work),
        [&](int64_t begin, int64_t end) { cpu::prompt_masses(params, begin, end); });
  }
  torch::stable::parallel_for(
      0, params.B * params.K * blocks, grain(work * (params.Q / params.K)),
      [&](int64_t begin, int64_t end) { cpu::prompt_scores(params, begin, end); });
}
#endif

Tensor prompt_scores(Tensor q, Tensor k, OptionalTensor k_scale, OptionalTensor valid,
                     OptionalTensor lse, [[maybe_unused]] OptionalTensor workspace, double scale,
                     double softcap, double decay) {
  check_dim(kOp, "q", q, 4, "[B, Q, T, D]");
  check_dim(kOp, "k", k, 4, "[B, K, T, D]");
  const int64_t B = q.size(0), Q = q.size(1), T = q.size(2), D = q.size(3), K = k.size(1);
  const DType q_dtype = slot_dtype(kOp, "q", q), k_dtype = row_dtype(kOp, "k", k);
  if (K == 0 || Q % K != 0) fail(kOp, ": q's heads must be a multiple of ", K, ", got ", Q);
  const Arguments arguments{kOp, "q", q};
  arguments.check("q", q, q.scalar_type(), {B, Q, T, D});
  arguments.check("k", k, k.scalar_type(), {B, K, T, D});
  if (bool(k_scale) != has_scale(k_dtype)) {
    fail(kOp, ": k_scale belongs to a k of 8 bits, and must be given with it");
  }
  arguments.check("k_scale", k_scale, ScalarType::Float, {B, K, T});
  arguments.check("valid", valid, ScalarType::Bool, {B, T});
  arguments.check("lse", lse, ScalarType::Float, {B, Q, T});
  check_softcap(kOp, softcap);
  const bool lse_given = bool(lse);
  if (!lse_given) lse = arguments.output("lse", ScalarType::Float, {B, Q, T});
  Tensor score = arguments.output("score", ScalarType::Float, {B, K, T});
  PromptScoresParams params{
      .q = q.const_data_ptr(),
      .k = k.const_data_ptr(),
      .k_scale = optional_floats(k_scale),
      .valid = valid ? valid->const_data_ptr<bool>() : nullptr,
      .lse = lse->mutable_data_ptr<float>(),
      .score = score.mutable_data_ptr<float>(),
      .workspace = nullptr,
      .q_dtype = q_dtype,
      .k_dtype = k_dtype,
      .lse_given = lse_given,
      .scale = float(scale),
      .softcap = float(softcap),
      .decay = float(decay),
      .B = B,
      .Q = Q,
      .K = K,
      .T = T,
      .D = D,
  };
#ifdef LESS_LAUNCHES
  check_head_dim(kOp, "q", D);
  const OptionalTensor held = scratch(arguments, workspace, cuda::prompt_scores_workspace(params));
  params.workspace = pointer(held);
  launch(arguments, cuda::prompt_scores, params, {{"q", q}, {"k", k}});
#else
  run(params);
#endif
  return score;
}

}  // namespace
}  // namespace less::ops

LESS_OP(prompt_scores,
        "prompt_scores(Tensor q, Tensor k, Tensor? k_scale, Tensor? valid, Tensor? lse, "
        "Tensor(a!)? workspace, float scale, float softcap, float decay) -> Tensor")
