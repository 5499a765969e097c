// less::compact: schema, checks, and its CPU and CUDA implementations.
//
// This file is compiled into less._C, and once more, with LESS_CUDA_HALF, into less._cuda.
#include "ops/maps.h"
#include "ops/slots.h"

#ifndef LESS_CUDA_HALF
#include "cpu/kernels.h"

namespace less::ops {
namespace {

void compact_cpu(Tensor k, Tensor v, OptionalTensor chunk_k_scale, OptionalTensor chunk_v_scale,
                 Tensor chunk_score, Tensor slot_score, OptionalTensor valid, OptionalTensor rank,
                 Tensor slot_k, Tensor slot_v, OptionalTensor slot_k_scale,
                 OptionalTensor slot_v_scale, Tensor position, Tensor score, Tensor weight,
                 Tensor seen, OptionalTensor H, OptionalTensor z, OptionalTensor w1,
                 OptionalTensor w2, OptionalTensor w1_scale, OptionalTensor w2_scale,
                 OptionalTensor bias, OptionalTensor mix, OptionalTensor scale,
                 OptionalTensor mix_scale, int64_t kind, int64_t recent, int64_t sinks,
                 bool by_score, bool per_age) {
  constexpr const char* op = "compact";
  check_dim(op, "k", k, 4, "[B, K, T, D]");
  const int64_t B = k.size(0), K = k.size(1), T = k.size(2), D = k.size(3);
  const Slots slots = check_slots(op, "k", k, B, K, D, slot_k, slot_v, slot_k_scale, slot_v_scale,
                                  position, score, weight);
  const int64_t S = slots.S;
  check_rows(op, "k", k, B, K, T, D, slot_k, k, v, chunk_k_scale, chunk_v_scale);
  check(op, "chunk_score", chunk_score, ScalarType::Float, {B, K, T});
  check(op, "slot_score", slot_score, ScalarType::Float, {B, K, S});
  check(op, "seen", seen, ScalarType::Long, {B});
  if (valid) check(op, "valid", *valid, ScalarType::Bool, {B, T});
  if (rank) check(op, "rank", *rank, ScalarType::Float, {B, K, S + T});
  if (S < 1) fail(op, ": slot_k must have at least one slot, got ", S);
  if (recent < 0) fail(op, ": recent must be 0 or more, got ", recent);
  if (sinks < 0) fail(op, ": sinks must be 0 or more, got ", sinks);
  if (bool(H) != bool(z) || bool(H) != bool(w1) || bool(H) != bool(w2)) {
    fail(op, ": H, z, w1 and w2 must be given together");
  }
  FeatureMaps psi{};
  if (H) {
    psi = feature_maps(op, "k", k, K, D, *w1, *w2, w1_scale, w2_scale, bias, mix, scale, mix_scale,
                       kind);
    check(op, "H", *H, ScalarType::Float, {B, K, psi.R, D});
    check(op, "z", *z, ScalarType::Float, {B, K, psi.R});
  }
  const CompactParams params{
      .k = k.const_data_ptr(),
      .v = v.const_data_ptr(),
      .k_scale = optional_floats(chunk_k_scale),
      .v_scale = optional_floats(chunk_v_scale),
      .chunk_score = chunk_score.const_data_ptr<float>(),
      .slot_score = slot_score.const_data_ptr<float>(),
      .valid = valid ? valid->const_data_ptr<bool>() : nullptr,
      .rank = optional_floats(rank),
      .slots = slots,
      .seen = seen.const_data_ptr<int64_t>(),
      .H = H ? H->mutable_data_ptr<float>() : nullptr,
      .z = z ? z->mutable_data_ptr<float>() : nullptr,
      .psi = psi,
      .rule = {.recent = recent, .sinks = sinks, .by_score = by_score, .per_age = per_age},
      .B = B,
      .K = K,
      .T = T,
      .D = D,
      .R = psi.R,
  };
  // Once per token that leaves: psi and the fold; and a look at every candidate.
  const int64_t work = (S + T) * 8 + T * (psi.E * (D + psi.R) + psi.R * D + D);
  torch::stable::parallel_for(
      0, B * K, grain(work), [&](int64_t begin, int64_t end) { cpu::compact(params, begin, end); });
  // Only now: every kv head of a row counts from the same number.
  int64_t* count = seen.mutable_data_ptr<int64_t>();
  for (int64_t b = 0; b < B; ++b) {
    for (int64_t t = 0; t < T; ++t) {
      count[b] += params.valid == nullptr || params.valid[b * T + t];
    }
  }
}

}  // namespace
}  // namespace less::ops

STABLE_TORCH_LIBRARY_FRAGMENT(less, m) {
  m.def(
      "compact(Tensor k, Tensor v, Tensor? chunk_k_scale, Tensor? chunk_v_scale, "
      "Tensor chunk_score, Tensor slot_score, Tensor? valid, Tensor? rank, Tensor(a!) slot_k, "
      "Tensor(b!) slot_v, Tensor(i!)? slot_k_scale, Tensor(j!)? slot_v_scale, "
      "Tensor(c!) position, Tensor(d!) score, "
      "Tensor(e!) weight, Tensor(f!) seen, Tensor(g!)? H, Tensor(h!)? z, Tensor? w1, Tensor? w2, "
      "Tensor? w1_scale, Tensor? w2_scale, "
      "Tensor? bias, Tensor? mix, Tensor? scale, Tensor? mix_scale, int kind, int recent, "
      "int sinks, bool by_score, bool per_age) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(less, CPU, m) { m.impl("compact", TORCH_BOX(&less::ops::compact_cpu)); }
#endif
