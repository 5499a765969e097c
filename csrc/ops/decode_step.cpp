// less::decode_step: schema and checks; see ops/library.h.
#include "ops/library.h"
#include "ops/maps.h"
#include "ops/slots.h"

namespace less::ops {
namespace {

constexpr const char* kOp = "decode_step";

#ifndef LESS_LAUNCHES
void run(const DecodeStepParams& p) {
  // Multiply-adds of a head: slots, phi of its group, psi of its victim.
  const int64_t G = p.Q / p.K, R = p.R, E = p.phi.E, D = p.D;
  const int64_t work = G * 2 * p.slots.S * D + (G + 1) * (E * (D + R) + R * D);
  torch::stable::parallel_for(0, p.B * p.K, grain(work),
                              [&](int64_t begin, int64_t end) { cpu::decode_step(p, begin, end); });
  if (p.victim == Victim::none) return;
  // Only now: every kv head of a row counts from the same number.
  for (int64_t b = 0; b < p.B; ++b) p.seen[b] += p.valid == nullptr || p.valid[b];
}
#endif

void decode_step(Tensor q, Tensor k, Tensor v, OptionalTensor valid, Tensor out, Tensor slot_k,
                 Tensor slot_v, OptionalTensor slot_k_scale, OptionalTensor slot_v_scale,
                 Tensor position, Tensor score, Tensor weight, Tensor seen, OptionalTensor H,
                 OptionalTensor z, OptionalTensor share, [[maybe_unused]] OptionalTensor workspace,
                 OptionalTensor q_w1, OptionalTensor q_w2, OptionalTensor q_w1_scale,
                 OptionalTensor q_w2_scale, OptionalTensor q_bias, OptionalTensor k_w1,
                 OptionalTensor k_w2, OptionalTensor k_w1_scale, OptionalTensor k_w2_scale,
                 OptionalTensor k_bias, OptionalTensor k_mix, OptionalTensor k_scale,
                 OptionalTensor k_mix_scale, int64_t kind, double scale, double softcap,
                 double decay, bool scores, int64_t recent, int64_t sinks, bool by_score,
                 bool per_age, int64_t victim, bool dependent) {
  check_dim(kOp, "q", q, 4, "[B, Q, 1, D]");
  check_dim(kOp, "k", k, 4, "[B, K, 1, D]");
  const int64_t B = q.size(0), Q = q.size(1), D = q.size(3), K = k.size(1);
  const DType q_dtype = slot_dtype(kOp, "q", q), kv_dtype = slot_dtype(kOp, "k", k);
  if (K == 0 || Q % K != 0) fail(kOp, ": q's heads must be a multiple of ", K, ", got ", Q);
  const Arguments arguments{kOp, "q", q};
  arguments.check("q", q, q.scalar_type(), {B, Q, 1, D});
  arguments.check("k", k, k.scalar_type(), {B, K, 1, D});
  arguments.check("v", v, k.scalar_type(), {B, K, 1, D});
  arguments.check("out", out, q.scalar_type(), {B, Q, 1, D});
  arguments.check("valid", valid, ScalarType::Bool, {B, 1});
  const Slots slots = check_slots(arguments, B, K, D, slot_k, slot_v, slot_k_scale, slot_v_scale,
                                  position, score, weight);
  arguments.check("seen", seen, ScalarType::Long, {B});
  if (slots.S < 1) fail(kOp, ": slot_k must have at least one slot, got ", slots.S);
  if (recent < 0) fail(kOp, ": recent must be 0 or more, got ", recent);
  if (sinks < 0) fail(kOp, ": sinks must be 0 or more, got ", sinks);
  check_softcap(kOp, softcap);
  const bool state = bool(H);
  if (bool(z) != state || bool(share) != state || bool(q_w1) != state || bool(q_w2) != state ||
      bool(k_w1) != state || bool(k_w2) != state) {
    fail(kOp, ": H, z, share, q_w1, q_w2, k_w1 and k_w2 must be given together");
  }
  if (victim < int64_t(Victim::none) || victim > int64_t(Victim::fold)) {
    fail(kOp, ": victim must be 0 (none), 1 (forget) or 2 (fold), got ", victim);
  }
  FeatureMaps phi{}, psi{};
  if (state) {
    phi = feature_maps(arguments, Q, D, *q_w1, *q_w2, q_w1_scale, q_w2_scale, q_bias, {}, {}, {},
                       kind);
    psi = feature_maps(arguments, K, D, *k_w1, *k_w2, k_w1_scale, k_w2_scale, k_bias, k_mix,
                       k_scale, k_mix_scale, kind);
    if (phi.R != psi.R) fail(kOp, ": k_w2 must have the rank of q_w2, ", phi.R, ", got ", psi.R);
  }
  arguments.check("H", H, ScalarType::Float, {B, K, phi.R, D});
  arguments.check("z", z, ScalarType::Float, {B, K, phi.R});
  arguments.check("share", share, ScalarType::Double, {B, K});
  DecodeStepParams params{
      .q = q.const_data_ptr(),
      .k = k.const_data_ptr(),
      .v = v.const_data_ptr(),
      .valid = valid ? valid->const_data_ptr<bool>() : nullptr,
      .seen = seen.mutable_data_ptr<int64_t>(),
      .slots = slots,
      .H = H ? H->mutable_data_ptr<float>() : nullptr,
      .z = z ? z->mutable_data_ptr<float>() : nullptr,
      .share = share ? share->mutable_data_ptr<double>() : nullptr,
      .workspace = nullptr,
      .phi = phi,
      .psi = psi,
      .out = out.mutable_data_ptr(),
      .rule = {recent, sinks, by_score, per_age},
      .victim = !state && victim == int64_t(Victim::fold) ? Victim::forget : Victim(victim),
      .q_dtype = q_dtype,
      .kv_dtype = kv_dtype,
      .scores = scores,
      .dependent = dependent,
      .scale = float(scale),
      .softcap = float(softcap),
      .decay = float(decay),
      .B = B,
      .Q = Q,
      .K = K,
      .D = D,
      .R = phi.R,
  };
#ifdef LESS_LAUNCHES
  check_head_dim(kOp, "q", D);
  const OptionalTensor held = scratch(arguments, workspace, cuda::decode_step_workspace(params));
  params.workspace = pointer(held);
  launch(arguments, cuda::decode_step, params, {{"q", q}, {"slot_k", slot_k}});
#else
  run(params);
#endif
}

// Bytes of the workspace for these slots, Q query heads and a state of rank R, 0 for none, whose
// maps have width E.
int64_t decode_step_workspace([[maybe_unused]] Tensor slot_k, [[maybe_unused]] int64_t Q,
                              [[maybe_unused]] int64_t R, [[maybe_unused]] int64_t E) {
#ifdef LESS_LAUNCHES
  DecodeStepParams params{};
  float state = 0.0f;  // there is one: its address is looked at, not read
  params.H = R > 0 ? &state : nullptr;
  params.slots.dtype = row_dtype("decode_step_workspace", "slot_k", slot_k);
  params.slots.S = slot_k.size(2);
  params.phi.D = params.psi.D = params.D = slot_k.size(3);
  params.phi.E = params.psi.E = E;
  params.phi.R = params.psi.R = params.R = R;
  params.B = slot_k.size(0);
  params.Q = Q;
  params.K = slot_k.size(1);
  return cuda::decode_step_workspace(params);
#else
  return 0;
#endif
}

}  // namespace
}  // namespace less::ops

LESS_OP(decode_step,
        "decode_step(Tensor q, Tensor k, Tensor v, Tensor? valid, Tensor(a!) out, "
        "Tensor(b!) slot_k, Tensor(c!) slot_v, Tensor(d!)? slot_k_scale, "
        "Tensor(e!)? slot_v_scale, Tensor(f!) position, Tensor(g!) score, Tensor(h!) weight, "
        "Tensor(i!) seen, Tensor(j!)? H, Tensor(k!)? z, Tensor(l!)? share, "
        "Tensor(m!)? workspace, Tensor? q_w1, Tensor? q_w2, Tensor? q_w1_scale, "
        "Tensor? q_w2_scale, Tensor? q_bias, Tensor? k_w1, Tensor? k_w2, Tensor? k_w1_scale, "
        "Tensor? k_w2_scale, Tensor? k_bias, Tensor? k_mix, Tensor? k_scale, "
        "Tensor? k_mix_scale, int kind, float scale, float softcap, float decay, bool scores, "
        "int recent, int sinks, bool by_score, bool per_age, int victim, "
        "bool dependent) -> ()")

LESS_OP(decode_step_workspace, "decode_step_workspace(Tensor slot_k, int Q, int R, int E) -> int")
