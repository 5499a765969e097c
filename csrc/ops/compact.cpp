// less::compact: schema and checks; see ops/library.h.
#include "ops/library.h"
#include "ops/maps.h"
#include "ops/slots.h"

namespace less::ops {
namespace {

constexpr const char* kOp = "compact";

#ifndef LESS_LAUNCHES
void run(const CompactParams& p) {
  // Once per token that leaves: psi and the fold; and a look at every candidate.
  const int64_t per_token = p.psi.E * (p.D + p.R) + p.R * p.D + p.D;
  const int64_t work = (p.slots.S + p.T) * 8 + p.T * per_token;
  torch::stable::parallel_for(0, p.B * p.K, grain(work),
                              [&](int64_t begin, int64_t end) { cpu::compact(p, begin, end); });
  // Only now: every kv head of a row counts from the same number.
  for (int64_t b = 0; b < p.B; ++b) {
    for (int64_t t = 0; t < p.T; ++t) {
      p.seen[b] += p.valid == nullptr || p.valid[b * p.T + t];
    }
  }
}
#endif

void compact(Tensor k, Tensor v, OptionalTensor chunk_k_scale, OptionalTensor chunk_v_scale,
             Tensor chunk_score, Tensor slot_score, OptionalTensor valid, OptionalTensor rank,
             Tensor slot_k, Tensor slot_v, OptionalTensor slot_k_scale, OptionalTensor slot_v_scale,
             Tensor position, Tensor score, Tensor weight, Tensor seen, OptionalTensor H,
             OptionalTensor z, [[maybe_unused]] OptionalTensor workspace, OptionalTensor w1,
             OptionalTensor w2, OptionalTensor w1_scale, OptionalTensor w2_scale,
             OptionalTensor bias, OptionalTensor mix, OptionalTensor scale,
             OptionalTensor mix_scale, int64_t kind, int64_t recent, int64_t sinks, bool by_score,
             bool per_age) {
  check_dim(kOp, "k", k, 4, "[B, K, T, D]");
  const int64_t B = k.size(0), K = k.size(1), T = k.size(2), D = k.size(3);
  const Arguments arguments{kOp, "k", k};
  const Slots slots = check_slots(arguments, B, K, D, slot_k, slot_v, slot_k_scale, slot_v_scale,
                                  position, score, weight);
  const int64_t S = slots.S;
  check_rows(arguments, B, K, T, D, slot_k.scalar_type(), k, v, chunk_k_scale, chunk_v_scale);
  arguments.check("chunk_score", chunk_score, ScalarType::Float, {B, K, T});
  arguments.check("slot_score", slot_score, ScalarType::Float, {B, K, S});
  arguments.check("seen", seen, ScalarType::Long, {B});
  arguments.check("valid", valid, ScalarType::Bool, {B, T});
  arguments.check("rank", rank, ScalarType::Float, {B, K, S + T});
  if (S < 1) fail(kOp, ": slot_k must have at least one slot, got ", S);
  if (recent < 0) fail(kOp, ": recent must be 0 or more, got ", recent);
  if (sinks < 0) fail(kOp, ": sinks must be 0 or more, got ", sinks);
  if (bool(H) != bool(z) || bool(H) != bool(w1) || bool(H) != bool(w2)) {
    fail(kOp, ": H, z, w1 and w2 must be given together");
  }
  FeatureMaps psi{};
  if (H) {
    psi = feature_maps(arguments, K, D, *w1, *w2, w1_scale, w2_scale, bias, mix, scale, mix_scale,
                       kind);
  }
  arguments.check("H", H, ScalarType::Float, {B, K, psi.R, D});
  arguments.check("z", z, ScalarType::Float, {B, K, psi.R});
  CompactParams params{
      .k = k.const_data_ptr(),
      .v = v.const_data_ptr(),
      .k_scale = optional_floats(chunk_k_scale),
      .v_scale = optional_floats(chunk_v_scale),
      .chunk_score = chunk_score.const_data_ptr<float>(),
      .slot_score = slot_score.const_data_ptr<float>(),
      .valid = valid ? valid->const_data_ptr<bool>() : nullptr,
      .rank = optional_floats(rank),
      .slots = slots,
      .seen = seen.mutable_data_ptr<int64_t>(),
      .H = H ? H->mutable_data_ptr<float>() : nullptr,
      .z = z ? z->mutable_data_ptr<float>() : nullptr,
      .workspace = nullptr,
      .psi = psi,
      .rule = {.recent = recent, .sinks = sinks, .by_score = by_score, .per_age = per_age},
      .B = B,
      .K = K,
      .T = T,
      .D = D,
      .R = psi.R,
  };
#ifdef LESS_LAUNCHES
  check_any_head_dim(kOp, "k", D);
  const OptionalTensor held = scratch(arguments, workspace, cuda::compact_workspace(params));
  params.workspace = pointer(held);
  launch(arguments, cuda::compact, params, {{"k", k}, {"slot_k", slot_k}});
#else
  run(params);
#endif
}

// Bytes of the workspace for a call of these keys over these slots and a state of rank R, 0 for
// none.
int64_t compact_workspace([[maybe_unused]] Tensor k, [[maybe_unused]] Tensor slot_k,
                          [[maybe_unused]] int64_t R) {
#ifdef LESS_LAUNCHES
  CompactParams params{};
  float state = 0.0f;  // there is one: its address is looked at, not read
  params.H = R > 0 ? &state : nullptr;
  params.slots.dtype = row_dtype("compact_workspace", "slot_k", slot_k);
  params.slots.S = slot_k.size(2);
  params.B = k.size(0);
  params.K = k.size(1);
  params.T = k.size(2);
  params.D = k.size(3);
  params.R = R;
  return cuda::compact_workspace(params);
#else
  return 0;
#endif
}

}  // namespace
}  // namespace less::ops

LESS_OP(compact,
        "compact(Tensor k, Tensor v, Tensor? chunk_k_scale, Tensor? chunk_v_scale, "
        "Tensor chunk_score, Tensor slot_score, Tensor? valid, Tensor? rank, Tensor(a!) slot_k, "
        "Tensor(b!) slot_v, Tensor(i!)? slot_k_scale, Tensor(j!)? slot_v_scale, "
        "Tensor(c!) position, Tensor(d!) score, Tensor(e!) weight, Tensor(f!) seen, "
        "Tensor(g!)? H, Tensor(h!)? z, Tensor(k!)? workspace, Tensor? w1, Tensor? w2, "
        "Tensor? w1_scale, Tensor? w2_scale, Tensor? bias, Tensor? mix, Tensor? scale, "
        "Tensor? mix_scale, int kind, int recent, int sinks, bool by_score, bool per_age) -> ()")

LESS_OP(compact_workspace, "compact_workspace(Tensor k, Tensor slot_k, int R) -> int")
