// less::decode_step: schema and checks; see ops/library.h.
#include "ops/layer.h"
#include "ops/library.h"
#include "ops/reset.h"

namespace less::ops {
namespace {

constexpr const char* kOp = "decode_step";

#ifndef LESS_LAUNCHES
void run(const DecodeStepParams& p) {
  // Multiply-adds of a head: slots, phi of its group, psi of its victim.
  const int64_t G = p.spec.Q / p.spec.K, R = p.layout.R, E = p.maps.phi.E, D = p.spec.D;
  const int64_t work = G * 2 * p.layout.S * D + (G + 1) * (E * (D + R) + R * D);
  torch::stable::parallel_for(0, p.B * p.spec.K, grain(work),
                              [&](int64_t begin, int64_t end) { cpu::decode_step(p, begin, end); });
  if (p.spec.victim == Victim::none) return;
  // Only now: every kv head of a row counts from the same number.
  for (int64_t b = 0; b < p.B; ++b) {
    unsigned char* const own = page(p.pool, b);
    if (own != nullptr) *seen(own) += p.valid == nullptr || p.valid[b];
  }
}
#endif

void decode_step(Tensor q, Tensor k, Tensor v, OptionalTensor valid, Tensor out, Tensor pool,
                 OptionalTensor rows, Tensor layer, OptionalTensor maps,
                 [[maybe_unused]] OptionalTensor workspace) {
  check_dim(kOp, "q", q, 4, "[B, Q, 1, D]");
  const LayerArguments of = read_layer(kOp, layer);
  const int64_t B = q.size(0), Q = of.spec.Q, K = of.spec.K, D = of.spec.D;
  const DType q_dtype = slot_dtype(kOp, "q", q), kv_dtype = slot_dtype(kOp, "k", k);
  const Arguments arguments{kOp, "q", q};
  for (const auto& [name, x, type] :
       {std::tuple{"v", &v, k.scalar_type()}, std::tuple{"out", &out, q.scalar_type()}}) {
    if (x->scalar_type() != type) {
      fail(kOp, ": ", name, " must be ", dtype_name(type), ", got ", dtype_name(x->scalar_type()));
    }
  }
  arguments.check("valid", valid, ScalarType::Bool, {B, 1});
  if (of.spec.victim != Victim::none && !of.has_rule) fail(kOp, ": layer must have a rule");
  if (of.kind < 0 && (of.spec.victim == Victim::fold || of.layout.R > 0)) {
    fail(kOp, ": a layer with a state, or victim 2 (fold), must have maps");
  }
  DecodeStepParams params{
      .spec = of.spec,
      .layout = of.layout,
      .pool = {},
      .maps = read_maps(arguments, of, maps),
      .q = head_rows(arguments, "q", q, q_dtype, {B, Q, 1, D}),
      .k = head_rows(arguments, "k", k, kv_dtype, {B, K, 1, D}),
      .v = head_rows(arguments, "v", v, kv_dtype, {B, K, 1, D}),
      .out = head_rows(arguments, "out", out, q_dtype, {B, Q, 1, D}),
      .valid = valid ? valid->const_data_ptr<bool>() : nullptr,
      .workspace = nullptr,
      .B = B,
  };
  params.pool = read_pool(arguments, of, pool, rows, B);
#ifdef LESS_LAUNCHES
  check_head_dim(kOp, "q", D);
  const OptionalTensor held = scratch(arguments, workspace, cuda::decode_step_workspace(params));
  params.workspace = pointer(held);
  reset_fresh(arguments, of.layout, params.pool, B);
  launch(arguments, cuda::decode_step, params, {{"q", q}, {"pool", pool}});
#else
  reset_fresh(arguments, of.layout, params.pool, B);
  run(params);
#endif
}

// Bytes of the workspace for calls of B rows of this layer, on the device of its pool.
int64_t decode_step_workspace([[maybe_unused]] Tensor pool, [[maybe_unused]] Tensor layer,
                              [[maybe_unused]] int64_t B) {
#ifdef LESS_LAUNCHES
  const LayerArguments of = read_layer("decode_step_workspace", layer);
  DecodeStepParams params{};
  params.spec = of.spec;
  params.layout = of.layout;
  params.maps.phi.D = params.maps.psi.D = of.spec.D;
  params.maps.phi.E = params.maps.psi.E = of.E;
  params.maps.phi.R = params.maps.psi.R = of.layout.R;
  params.B = B;
  return cuda::decode_step_workspace(params);
#else
  return 0;
#endif
}

}  // namespace
}  // namespace less::ops

LESS_OP(decode_step,
        "decode_step(Tensor q, Tensor k, Tensor v, Tensor? valid, Tensor(a!) out, "
        "Tensor(b!) pool, Tensor? rows, Tensor layer, Tensor? maps, Tensor(c!)? workspace) -> ()")

LESS_OP(decode_step_workspace, "decode_step_workspace(Tensor pool, Tensor layer, int B) -> int")
