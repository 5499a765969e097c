// less::decode_step: schema and checks; see ops/library.h.
#include "ops/layer.h"
#include "ops/library.h"
#include "ops/reset.h"

namespace less::ops {
namespace {

constexpr const char* kOp = "decode_step";

#ifdef LESS_LAUNCHES
// The rows of a step in the layer's space, float32, in the workspace: that of the step itself comes
// first. `bytes`: of both.
struct RowsInSpace {
  HeadRows q, k, v, out;
  int64_t bytes;

  RowsInSpace(const LayerSpec& spec, int64_t B, int64_t own, void* workspace) : bytes(own) {
    const auto take = [&](int64_t heads) {
      const int64_t at = (bytes + 255) / 256 * 256;
      bytes = at + 4 * B * heads * spec.D;
      return contiguous_rows(reinterpret_cast<void*>(reinterpret_cast<uintptr_t>(workspace) + at),
                             DType::f32, heads, 1, spec.D);
    };
    q = take(spec.Q);
    k = take(spec.K);
    v = take(spec.K);
    out = take(spec.Q);
  }
};

// q, k and v go into the space, the step is one of such rows, and its output comes back.
void run_in_space(const Arguments& arguments, const DecodeStepParams& p, const RowsInSpace& rows,
                  std::initializer_list<Named> tensors) {
  const int64_t Q = p.spec.Q, K = p.spec.K;
  const auto job = [&](Rotation rotation, const HeadRows& x, int64_t heads, const HeadRows& y) {
    return cuda::RotateJob{.params = {.space = p.maps.space,
                                      .x = x,
                                      .y = nullptr,
                                      .valid = p.valid,
                                      .rotation = rotation,
                                      .B = p.B,
                                      .heads = heads,
                                      .K = K,
                                      .T = 1,
                                      .D = p.spec.D},
                           .y = y,
                           .pool = p.pool};
  };
  const cuda::RotateJobs in{
      {job(query_rotation(p.layout.v_dtype), p.q, Q, rows.q), job(Rotation::key, p.k, K, rows.k),
       job(Rotation::value, p.v, K, rows.v)},
      3};
  launch(arguments, cuda::rotate_rows, in, tensors);
  DecodeStepParams step = p;
  step.q = rows.q;
  step.k = rows.k;
  step.v = rows.v;
  step.out = rows.out;
  launch(arguments, cuda::decode_step, step, tensors);
  const cuda::RotateJobs out{{job(Rotation::output, rows.out, Q, p.out)}, 1};
  launch(arguments, cuda::rotate_rows, out, tensors);
}
#else
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
  check_rows(kOp, of);
#ifdef LESS_LAUNCHES
  if (packed(of.layout.v_dtype) && of.layout.call_dtype != DType::i8) {
    fail(kOp, ": hot rows of packed formats must be int8 on a GPU");
  }
#endif
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
  int64_t bytes = cuda::decode_step_workspace(params);
  const int64_t own = bytes;
  if (of.has_space()) bytes = RowsInSpace(of.spec, B, own, nullptr).bytes;
  const OptionalTensor held = scratch(arguments, workspace, bytes);
  params.workspace = pointer(held);
  reset_fresh(arguments, of.layout, params.pool, B);
  if (of.has_space()) {
    const RowsInSpace in_space(of.spec, B, own, params.workspace);
    run_in_space(arguments, params, in_space, {{"q", q}, {"pool", pool}});
  } else {
    launch(arguments, cuda::decode_step, params, {{"q", q}, {"pool", pool}});
  }
#else
  reset_fresh(arguments, of.layout, params.pool, B);
  writing(kOp, [&] { run(params); });
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
  const int64_t own = cuda::decode_step_workspace(params);
  return of.has_space() ? RowsInSpace(of.spec, B, own, nullptr).bytes : own;
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
