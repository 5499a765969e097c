// less::chunk_attention: schema and checks; see ops/library.h.
#include <algorithm>
#include <tuple>

#include "ops/layer.h"
#include "ops/library.h"
#include "ops/reset.h"

namespace less::ops {
namespace {

constexpr const char* kOp = "chunk_attention";

#ifndef LESS_LAUNCHES
void run(ChunkAttentionParams params, const Tensor& like) {
  const int64_t K = params.spec.K, G = params.spec.Q / K, S = params.layout.S, T = params.T;
  const int64_t per_block = std::max<int64_t>(1, kAttentionBlock / G);
  const int64_t strips = std::min(kScoreStrips, (T + per_block - 1) / per_block);
  params.strips = strips;
  OptionalTensor received;
  if (params.spec.scores) {
    received = torch::stable::new_empty(like, {params.B, K, strips, S + T});
    params.received = received->mutable_data_ptr<float>();
  }
  if (T > 0) {
    const int64_t work = (T + strips - 1) / strips * G * (S + T / 2 + 1) * 2 * params.spec.D;
    torch::stable::parallel_for(
        0, params.B * K * strips, grain(work),
        [&](int64_t begin, int64_t end) { cpu::chunk_attention(params, begin, end); });
  }
  torch::stable::parallel_for(
      0, params.B * K, grain((S + T) * strips),
      [&](int64_t begin, int64_t end) { cpu::chunk_scores(params, begin, end); });
}
#endif

std::tuple<Tensor, Tensor> chunk_attention(Tensor q, Tensor k, Tensor v, OptionalTensor scales,
                                           OptionalTensor valid, Tensor out, Tensor pool,
                                           OptionalTensor rows, Tensor layer,
                                           OptionalTensor phi_q) {
  check_dim(kOp, "q", q, 4, "[B, Q, T, D]");
  const LayerArguments of = read_layer(kOp, layer);
  check_rows(kOp, of);
  const int64_t B = q.size(0), T = q.size(2);
  const int64_t Q = of.spec.Q, K = of.spec.K, D = of.spec.D, R = of.layout.R, S = of.layout.S;
  const DType q_dtype = slot_dtype(kOp, "q", q);
  const Arguments arguments{kOp, "q", q};
  if (out.scalar_type() != q.scalar_type()) {
    fail(kOp, ": out must be ", dtype_name(q.scalar_type()), ", got ",
         dtype_name(out.scalar_type()));
  }
  arguments.check("valid", valid, ScalarType::Bool, {B, T});
  if (phi_q && R == 0) fail(kOp, ": phi_q belongs to a layer with a state");
  const bool shifted = of.shifted();
  arguments.check("phi_q", phi_q, ScalarType::Float, {B, Q, T, R + shifted});
  ChunkAttentionParams params{
      .spec = of.spec,
      .layout = of.layout,
      .pool = {},
      .q = head_rows(arguments, "q", q, q_dtype, {B, Q, T, D}),
      .call = call_rows(arguments, of, k, v, scales, B, T),
      .valid = valid ? valid->const_data_ptr<bool>() : nullptr,
      .phi_q = optional_floats(phi_q),
      .shifted = shifted,
      .out = head_rows(arguments, "out", out, q_dtype, {B, Q, T, D}),
      .score = nullptr,
      .share = nullptr,
      .received = nullptr,
      .workspace = nullptr,
      .strips = 0,
      .B = B,
      .T = T,
  };
  params.pool = read_pool(arguments, of, pool, rows, B);
  Tensor score = arguments.output("score", ScalarType::Float, {B, K, S + T});
  Tensor share = arguments.output("share", ScalarType::Float, {B, Q, T});
  params.score = score.mutable_data_ptr<float>();
  params.share = share.mutable_data_ptr<float>();
#ifdef LESS_LAUNCHES
  check_head_dim(kOp, "q", D);
  const OptionalTensor held = scratch(arguments, {}, cuda::chunk_attention_workspace(params));
  params.workspace = pointer(held);
  reset_fresh(arguments, of.layout, params.pool, B);
  launch(arguments, cuda::chunk_attention, params, {{"q", q}, {"pool", pool}});
#else
  reset_fresh(arguments, of.layout, params.pool, B);
  run(params, score);
#endif
  return {score, share};
}

}  // namespace
}  // namespace less::ops

LESS_OP(chunk_attention,
        "chunk_attention(Tensor q, Tensor k, Tensor v, Tensor? scales, Tensor? valid, "
        "Tensor(a!) out, Tensor(b!) pool, Tensor? rows, Tensor layer, Tensor? phi_q) "
        "-> (Tensor, Tensor)")
