// less::decode_step: schema, checks, and its CPU and CUDA implementations.
//
// This file is compiled into less._C, and once more, with LESS_CUDA_HALF, into less._cuda.
#include "ops/maps.h"
#include "ops/slots.h"

#ifndef LESS_CUDA_HALF
#include "cpu/kernels.h"

namespace less::ops {
namespace {

void decode_step_cpu(Tensor q, Tensor k, Tensor v, OptionalTensor valid, Tensor out, Tensor slot_k,
                     Tensor slot_v, OptionalTensor slot_k_scale, OptionalTensor slot_v_scale,
                     Tensor position, Tensor score, Tensor weight, Tensor seen, OptionalTensor H,
                     OptionalTensor z, OptionalTensor share, OptionalTensor q_w1,
                     OptionalTensor q_w2, OptionalTensor q_w1_scale, OptionalTensor q_w2_scale,
                     OptionalTensor q_bias, OptionalTensor k_w1, OptionalTensor k_w2,
                     OptionalTensor k_w1_scale, OptionalTensor k_w2_scale, OptionalTensor k_bias,
                     OptionalTensor k_mix, OptionalTensor k_scale, OptionalTensor k_mix_scale,
                     int64_t kind, double scale, double decay, bool scores, int64_t recent,
                     int64_t sinks, bool by_score, bool per_age, int64_t victim) {
  constexpr const char* op = "decode_step";
  check_dim(op, "q", q, 4, "[B, Q, 1, D]");
  check_dim(op, "k", k, 4, "[B, K, 1, D]");
  const int64_t B = q.size(0), Q = q.size(1), D = q.size(3), K = k.size(1);
  const DType q_dtype = slot_dtype(op, "q", q), kv_dtype = slot_dtype(op, "k", k);
  if (K == 0 || Q % K != 0) fail(op, ": q's heads must be a multiple of ", K, ", got ", Q);
  check(op, "q", q, q.scalar_type(), {B, Q, 1, D});
  check(op, "k", k, k.scalar_type(), {B, K, 1, D});
  check(op, "v", v, k.scalar_type(), {B, K, 1, D});
  check(op, "out", out, q.scalar_type(), {B, Q, 1, D});
  if (valid) check(op, "valid", *valid, ScalarType::Bool, {B, 1});
  const Slots slots = check_slots(op, "q", q, B, K, D, slot_k, slot_v, slot_k_scale, slot_v_scale,
                                  position, score, weight);
  check(op, "seen", seen, ScalarType::Long, {B});
  if (slots.S < 1) fail(op, ": slot_k must have at least one slot, got ", slots.S);
  if (recent < 0) fail(op, ": recent must be 0 or more, got ", recent);
  if (sinks < 0) fail(op, ": sinks must be 0 or more, got ", sinks);
  const bool state = bool(H);
  if (bool(z) != state || bool(share) != state || bool(q_w1) != state || bool(q_w2) != state ||
      bool(k_w1) != state || bool(k_w2) != state) {
    fail(op, ": H, z, share, q_w1, q_w2, k_w1 and k_w2 must be given together");
  }
  if (victim < int64_t(Victim::none) || victim > int64_t(Victim::fold)) {
    fail(op, ": victim must be 0 (none), 1 (forget) or 2 (fold), got ", victim);
  }
  FeatureMaps phi{}, psi{};
  if (state) {
    phi = feature_maps(op, "q", q, Q, D, *q_w1, *q_w2, q_w1_scale, q_w2_scale, q_bias, {}, {}, {},
                       kind);
    psi = feature_maps(op, "q", q, K, D, *k_w1, *k_w2, k_w1_scale, k_w2_scale, k_bias, k_mix,
                       k_scale, k_mix_scale, kind);
    if (phi.R != psi.R) fail(op, ": k_w2 must have the rank of q_w2, ", phi.R, ", got ", psi.R);
    check(op, "H", *H, ScalarType::Float, {B, K, phi.R, D});
    check(op, "z", *z, ScalarType::Float, {B, K, phi.R});
    check(op, "share", *share, ScalarType::Double, {B, K});
  }
  const DecodeStepParams params{
      .q = q.const_data_ptr(),
      .k = k.const_data_ptr(),
      .v = v.const_data_ptr(),
      .valid = valid ? valid->const_data_ptr<bool>() : nullptr,
      .seen = seen.const_data_ptr<int64_t>(),
      .slots = slots,
      .H = H ? H->mutable_data_ptr<float>() : nullptr,
      .z = z ? z->mutable_data_ptr<float>() : nullptr,
      .share = share ? share->mutable_data_ptr<double>() : nullptr,
      .phi = phi,
      .psi = psi,
      .out = out.mutable_data_ptr(),
      .rule = {recent, sinks, by_score, per_age},
      .victim = !state && victim == int64_t(Victim::fold) ? Victim::forget : Victim(victim),
      .q_dtype = q_dtype,
      .kv_dtype = kv_dtype,
      .scores = scores,
      .scale = float(scale),
      .decay = float(decay),
      .B = B,
      .Q = Q,
      .K = K,
      .D = D,
      .R = phi.R,
  };
  // Multiply-adds of a head: slots, phi of its group, psi of its victim.
  const int64_t G = Q / K, R = phi.R, E = phi.E;
  const int64_t work = G * 2 * slots.S * D + (G + 1) * (E * (D + R) + R * D);
  torch::stable::parallel_for(0, B * K, grain(work), [&](int64_t begin, int64_t end) {
    cpu::decode_step(params, begin, end);
  });
  if (params.victim == Victim::none) return;
  // Only now: every kv head of a row counts from the same number.
  int64_t* count = seen.mutable_data_ptr<int64_t>();
  for (int64_t b = 0; b < B; ++b) count[b] += params.valid == nullptr || params.valid[b];
}

}  // namespace
}  // namespace less::ops

STABLE_TORCH_LIBRARY_FRAGMENT(less, m) {
  m.def(
      "decode_step(Tensor q, Tensor k, Tensor v, Tensor? valid, Tensor(a!) out, "
      "Tensor(b!) slot_k, Tensor(c!) slot_v, Tensor(d!)? slot_k_scale, Tensor(e!)? slot_v_scale, "
      "Tensor(f!) position, Tensor(g!) score, Tensor(h!) weight, Tensor(i!) seen, Tensor(j!)? H, "
      "Tensor(k!)? z, Tensor(l!)? share, Tensor? q_w1, Tensor? q_w2, Tensor? q_w1_scale, "
      "Tensor? q_w2_scale, Tensor? q_bias, Tensor? k_w1, Tensor? k_w2, Tensor? k_w1_scale, "
      "Tensor? k_w2_scale, Tensor? k_bias, Tensor? k_mix, Tensor? k_scale, Tensor? k_mix_scale, "
      "int kind, float scale, float decay, bool scores, int recent, int sinks, bool by_score, "
      "bool per_age, int victim) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(less, CPU, m) {
  m.impl("decode_step", TORCH_BOX(&less::ops::decode_step_cpu));
}
#endif
