// One token of every row, a layer's whole step in one launch and one pass over its slots:
//
//   out = (phi H + sum e^l v) / (phi z + sum e^l),  l = cap(scale q.k) + weight, slots and token
//   score <- decay score + sum over the group of softmax; the victim has the lowest rank, of equals
//   the lowest position; H += psi(k)^T v, z += psi(k) of the victim, or it becomes part of a slot
//   (decode_step/merge.h); the token takes its slot.
//
// Of packed slots, the token takes a hot slot, and who was there competes for a cold one
// (decode_step/packed.h).
//
// Grid:   (blocks, K, B); a block of 128 threads owns ranges of a head's slots: one where there are
//         few heads; all, or as many as its shared memory holds, where heads alone fill the
//         device. The blocks of a head are a cluster of up to 8, or meet in the workspace
//         (decode_step/plan.h). Neighbouring heads of equal capacity are one launch: as a rule,
//         all.
// Memory: k and v of the slots, position, weight, score, H, z and the maps' weights are read once,
//         score, H, z and the victim's slot written: bandwidth bound. k and v come through a ring
//         of tiles by cp.async; the logits stay in shared memory, so that scores need no second
//         look.
// Order:  keys of all of a block's ranges, then the softmax of each, then values; parts are merged
//         in the order of the splits, which follow from the head's capacity alone; no atomics on
//         floats: a row has the same bits in any batch, at any time.
#include "cuda/decode_step/plan.h"
#include "cuda/kernels.h"
#include "cuda/types.h"

namespace less::cuda {
namespace {

constexpr int kRangeMin = 32;         // slots of a block, at least
constexpr int kPackedRangeMin = 128;  // of packed rows: as many bytes
constexpr int kClusterRange = 1024;   // at most, in a cluster
constexpr int kScratchRange = 512;    // at most, where blocks meet in the workspace
constexpr int kResident = 3;          // blocks that are to fit into an SM side by side

bool half_type(DType dtype) { return dtype == DType::bf16 || dtype == DType::fp16; }

bool float_type(DType dtype) { return dtype == DType::f32 || half_type(dtype); }

bool few_bits(const DecodeStepParams& p) { return packed(p.layout.v_dtype); }

bool supported(const DecodeStepParams& p) {
  const FeatureMaps &phi = p.maps.phi, &psi = p.maps.psi;
  const bool maps =
      phi.R == 0 || (!weighs(p.spec.victim) && phi.R == p.layout.R && psi.R == phi.R &&
                     phi.R <= 64 && phi.D == p.spec.D && psi.D == p.spec.D &&
                     phi.w_dtype != DType::fp8 && psi.w_dtype != DType::fp8);
  const bool head_dim = decode_dispatch<float>(p.spec.D, false, [](auto, auto) {});
  // Hot rows of another dtype, and maps, have no kernel.
  const bool rows = !few_bits(p) || (p.layout.R == 0 && p.layout.call_dtype == DType::i8);
  return head_dim && rows && p.spec.K > 0 && p.spec.Q % p.spec.K == 0 && p.B <= 65535 &&
         p.layout.S >= 1 && p.layout.S <= INT32_MAX / 2 && float_type(p.q.dtype) &&
         float_type(p.k.dtype) && maps;
}

// run(Type) with the kernel's type of the slots.
template <typename Result, typename F>
Result with_slots(const DecodeStepParams& p, Result otherwise, const F& run) {
  if (few_bits(p)) return run(Type<FewBits>{});
  return with_dtype<RowTypes>(p.layout.k_dtype, otherwise, run);
}

// Bytes of a tile as slots store it, of keys or of values.
template <typename T, int kD>
int decode_stage(const DecodeStepParams& p, int tile) {
  if (!kFewBits<T>) return tile * DecodeTile<T, kD>::kBytes;
  const int k = int(row_bytes(p.layout.k_dtype, kD)), v = int(row_bytes(p.layout.v_dtype, kD));
  const int cold = k > v ? k : v, W = hot_slots(p.layout), hot = W < tile ? W : tile;
  return (hot * kD + (tile - hot) * cold + 31) / 16 * 16;  // they begin within 16 bytes
}

template <typename T>
void cut(const DecodeStepParams& p, int per, int ranges, DecodePlan& plan) {
  decode_dispatch<T>(p.spec.D, plan.mma, [&](auto head_dim, auto mma) {
    constexpr int kD = decltype(head_dim)::value;
    constexpr bool kMma = decltype(mma)::value;
    using Tile = DecodeTile<T, kD>;
    const int S = plan.S, G = int(p.spec.Q / p.spec.K), R = int(p.maps.phi.R);
    plan.per = per;
    plan.splits = (S + per - 1) / per;
    plan.ranges = ranges < plan.splits ? ranges : plan.splits;
    plan.blocks = (plan.splits + plan.ranges - 1) / plan.ranges;
    plan.block_of = (64 + plan.ranges - 1) / plan.ranges;
    plan.cluster = plan.clusters && plan.blocks > 1;
    plan.shares = plan.clusters ? plan.splits : 1;
    plan.tile = per < Tile::kRows ? per : Tile::kRows;
    plan.tiles = (per + plan.tile - 1) / plan.tile;
    const int passes = decode_passes<T, kD, kMma>(G);
    const int items = plan.ranges * plan.tiles * (1 + passes);
    plan.ring = items < Tile::kStages ? items : Tile::kStages;
    plan.stage = decode_stage<T, kD>(p, plan.tile);
    plan.digits = decode_digit_row(per);
    plan.part = DecodePart(G, R, kD).floats;
    const int finishers = plan.cluster ? plan.blocks : 1;
    plan.columns = (kD / 16 + finishers - 1) / finishers * 16;
    plan.inverse_per = uint32_t(((int64_t{1} << 32) + per - 1) / per);
    plan.inverse = (65536 + finishers - 1) / finishers;
    SharedCarver measure{nullptr};
    plan.layout = decode_layout<T, kD, kMma>(measure, p, plan);
    plan.shared = int64_t(measure.used);
  });
}

// Heads from `first` on that have equally many slots.
int run_of(const Layout& layout, int first) {
  int next = first + 1;
  while (next < layout.K && layout.slots[next] == layout.slots[first]) ++next;
  return next - first;
}

// Ranges that a block is to have: one, unless the layer's heads have more ranges than blocks fit
// onto the device at once, and a quarter more, which take less time than a second range. Where
// blocks do not meet in a cluster, one or all.
int wanted_ranges(const DecodeStepParams& p, const DecodePlan& plan, int sms) {
  const int64_t held = int64_t(sms) * kResident, heads = p.B * plan.heads;
  if (heads * plan.splits * 4 <= held * 5) return 1;
  const int64_t room = held / heads;
  const int blocks = room < 1 ? 1 : room < plan.splits ? int(room) : plan.splits;
  if (plan.clusters) return (plan.splits + blocks - 1) / blocks;
  return blocks == 1 ? plan.splits : 1;
}

// Gives blocks as many ranges as is wanted, or the most that still let so many blocks fit into an
// SM; where they do not meet in a cluster, all or none.
template <typename T>
void join_ranges(const DecodeStepParams& p, const DeviceLimits& limits, DecodePlan& plan) {
  for (int ranges = wanted_ranges(p, plan, limits.sms); ranges > 1; ranges /= 2) {
    if (!plan.clusters && ranges < plan.splits) return;
    DecodePlan joined = plan;
    cut<T>(p, plan.per, ranges, joined);
    if (joined.shared <= limits.shared / kResident) {
      plan = joined;
      return;
    }
  }
}

// Of the heads from `first` on. Tries a cluster, then shorter and shorter ranges that meet in the
// workspace; last, several ranges a block.
template <typename T>
cudaError_t plan_of(const DecodeStepParams& p, int first, DecodePlan& plan) {
  DeviceLimits limits{};
  const cudaError_t error = device_limits(limits);
  if (error != cudaSuccess) return error;
  plan = {};
  plan.first_head = first;
  plan.heads = run_of(p.layout, first);
  plan.G = int(p.spec.Q / p.spec.K);
  plan.S = p.layout.slots[first];
  plan.at = head_offsets(formats(p.layout), p.layout.D, p.layout.R, plan.S);
  plan.dependent = p.spec.dependent && limits.clusters;
  constexpr bool eight = sizeof(T) == 1;
  plan.mma = !kFewBits<T> && p.spec.Q / p.spec.K > 2 && half_type(p.q.dtype) &&
             (eight || p.q.dtype == p.layout.k_dtype);
  const int eighth = (plan.S + kDecodeCluster - 1) / kDecodeCluster;
  constexpr int kLeast = kFewBits<T> ? kPackedRangeMin : kRangeMin;
  const int range = eighth < kLeast ? kLeast : (eighth + 15) / 16 * 16;
  if (limits.clusters && range <= kClusterRange) {
    plan.clusters = true;
    cut<T>(p, range, 1, plan);
    if (plan.shared <= limits.shared) return join_ranges<T>(p, limits, plan), cudaSuccess;
    plan.clusters = false;
  }
  for (int per = range < kScratchRange ? range : kScratchRange; per >= 16; per = per / 32 * 16) {
    cut<T>(p, per, 1, plan);
    if (plan.shared <= limits.shared) return join_ranges<T>(p, limits, plan), cudaSuccess;
  }
  return cudaErrorInvalidValue;
}

// Lays the workspace out; returns its bytes.
int64_t lay_out(const DecodeStepParams& p, DecodePlan& plan) {
  int64_t used = 0;
  const auto take = [&](int64_t n) {
    void* const at = reinterpret_cast<void*>(reinterpret_cast<uintptr_t>(p.workspace) + used);
    used = (used + 4 * n + 255) / 256 * 256;
    return at;
  };
  const int64_t heads = p.B * p.spec.K;
  plan.row_count = static_cast<int32_t*>(take(p.B));
  if (plan.clusters || plan.splits == 1) return used;
  plan.head_count = static_cast<int32_t*>(take(heads));
  plan.parts = static_cast<float*>(take(heads * plan.splits * plan.part));
  plan.masses = static_cast<float*>(take(heads * plan.splits * (p.spec.Q / p.spec.K) * plan.per));
  return used;
}

// f(plan) for the launches that heads of different capacities take, one after another.
template <typename T, typename F>
cudaError_t for_each_plan(const DecodeStepParams& p, F f) {
  cudaError_t error = cudaSuccess;
  DecodePlan plan;
  for (int first = 0; first < p.layout.K && error == cudaSuccess; first += plan.heads) {
    error = plan_of<T>(p, first, plan);
    if (error == cudaSuccess) error = f(plan);
  }
  return error;
}

}  // namespace

// For queries of any dtype: it decides how a layer is cut.
int64_t decode_step_workspace(const DecodeStepParams& params) {
  int64_t most = 0;
  for (const DType q_dtype : {DType::f32, DType::bf16, DType::fp16}) {
    DecodeStepParams p = params;
    p.q.dtype = q_dtype;
    if (p.B == 0 || p.spec.Q == 0 || !supported(p)) return 0;
    with_slots(p, cudaErrorInvalidValue, [&](auto type) {
      return for_each_plan<typename decltype(type)::type>(p, [&](DecodePlan& plan) {
        const int64_t bytes = lay_out(p, plan);
        most = bytes > most ? bytes : most;
        return cudaSuccess;
      });
    });
  }
  return most;
}

cudaError_t decode_step(const DecodeStepParams& p, cudaStream_t stream) {
  if (p.B == 0 || p.spec.Q == 0) return cudaSuccess;
  if (!supported(p)) return cudaErrorInvalidValue;
  if (!aligned16({p.q.data, p.k.data, p.v.data, p.out.data, p.pool.data, p.workspace})) {
    return cudaErrorMisalignedAddress;
  }
  return with_slots(p, cudaErrorInvalidValue, [&](auto type) {
    using T = typename decltype(type)::type;
    return for_each_plan<T>(p, [&](DecodePlan& plan) {
      lay_out(p, plan);
      DecodeStepParams own = p;
      own.spec.rule = for_slots(p.spec.rule, plan.S);
      return launch_decode<T>(own, plan, stream);
    });
  });
}

}  // namespace less::cuda
