// less::compact: schema and checks; see ops/library.h.
#include "ops/layer.h"
#include "ops/library.h"
#include "ops/reset.h"

namespace less::ops {
namespace {

constexpr const char* kOp = "compact";

#ifndef LESS_LAUNCHES
void run(const CompactParams& p) {
  // Once per token that leaves: psi and the fold; and a look at every candidate.
  const int64_t R = p.layout.R, D = p.spec.D;
  const int64_t per_token = p.maps.psi.E * (D + R) + R * D + D;
  const int64_t work = (p.layout.S + p.T) * 8 + p.T * per_token;
  torch::stable::parallel_for(0, p.B * p.spec.K, grain(work),
                              [&](int64_t begin, int64_t end) { cpu::compact(p, begin, end); });
  // Only now: every kv head of a row counts from the same number.
  for (int64_t b = 0; b < p.B; ++b) {
    unsigned char* const own = page(p.pool, b);
    if (own == nullptr) continue;
    for (int64_t t = 0; t < p.T; ++t) *seen(own) += p.valid == nullptr || p.valid[b * p.T + t];
  }
}
#endif

void compact(Tensor k, Tensor v, OptionalTensor scales, OptionalTensor valid, Tensor score,
             OptionalTensor rank, Tensor pool, OptionalTensor rows, Tensor layer,
             OptionalTensor maps) {
  check_dim(kOp, "k", k, 4, "[B, K, T, D]");
  const LayerArguments of = read_layer(kOp, layer);
  check_rows(kOp, of);
  const int64_t B = k.size(0), T = k.size(2), K = of.spec.K, S = of.layout.S;
  const Arguments arguments{kOp, "k", k};
  arguments.check("score", score, ScalarType::Float, {B, K, S + T});
  arguments.check("rank", rank, ScalarType::Float, {B, K, S + T});
  arguments.check("valid", valid, ScalarType::Bool, {B, T});
  if (!rank && !of.has_rule) fail(kOp, ": rank must be given where the layer has no rule");
  if (of.spec.victim == Victim::none) fail(kOp, ": victim 0 (none) lets no token join");
  if (of.spec.victim == Victim::fold && of.kind < 0) {
    fail(kOp, ": victim 2 (fold) needs a layer with maps");
  }
  CompactParams params{
      .spec = of.spec,
      .layout = of.layout,
      .pool = {},
      .maps = read_maps(arguments, of, maps),
      .call = call_rows(arguments, of, k, v, scales, B, T),
      .valid = valid ? valid->const_data_ptr<bool>() : nullptr,
      .score = score.const_data_ptr<float>(),
      .rank = optional_floats(rank),
      .workspace = nullptr,
      .B = B,
      .T = T,
  };
  params.pool = read_pool(arguments, of, pool, rows, B);
  check_apart(kOp, "pool", pool,
              {{"k", k},
               {"v", v},
               {"scales", scales},
               {"valid", valid},
               {"score", score},
               {"rank", rank},
               {"rows", rows},
               {"maps", maps}});
#ifdef LESS_LAUNCHES
  check_any_head_dim(kOp, "k", of.spec.D);
  const OptionalTensor held = scratch(arguments, {}, cuda::compact_workspace(params));
  params.workspace = pointer(held);
  reset_fresh(arguments, of.layout, params.pool, B);
  launch(arguments, cuda::compact, params, {{"k", k}, {"pool", pool}});
#else
  reset_fresh(arguments, of.layout, params.pool, B);
  writing(kOp, [&] { run(params); });
#endif
}

}  // namespace
}  // namespace less::ops

LESS_OP(compact,
        "compact(Tensor k, Tensor v, Tensor? scales, Tensor? valid, Tensor score, Tensor? rank, "
        "Tensor(a!) pool, Tensor? rows, Tensor layer, Tensor? maps) -> ()")
