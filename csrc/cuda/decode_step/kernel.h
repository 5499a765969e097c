// The kernel of decode_step.cu, where its formula, grid, memory and order stand.
#pragma once

#include "cuda/decode_step/attend.h"
#include "cuda/decode_step/block.h"
#include "cuda/decode_step/integers.h"
#include "cuda/decode_step/load.h"
#include "cuda/decode_step/meet.h"
#include "cuda/decode_step/merge.h"
#include "cuda/decode_step/mma.h"
#include "cuda/decode_step/packed.h"
#include "cuda/decode_step/victim.h"

namespace less::cuda {

template <typename Case>
LESS_DEVICE void DecodeBlock<Case>::run() {
  grid_dependency_wait();  // before anything is read
  const bool skipped = p.valid != nullptr && !p.valid[b];
  memory = page(p.pool, b);
  if (memory == nullptr || skipped) return clear();
  seen = *less::seen(memory);
  if constexpr (kMerges) joining = joiner();
  victim = {0, 0, S, 0.0f};
  // Keys are asked for first; which values there are is only known from what load() brings.
  const int first_asked = min(plan.tiles * ranges(), Tile::kStages - 1);
#pragma unroll 1
  for (int i = 0; i < Tile::kStages; ++i) {
    if (i == first_asked) {
      load();
      __syncthreads();
      if (R > 0 && (plan.cluster || alone())) ask_for_state();
      continue;
    }
    ask();
    copy_async_commit();
  }
  // Shares of the queries' features while slots are on their way, one for each range, and then,
  // should a token leave, of its key's: one loop, because a map's code is long.
#pragma unroll 1
  for (int turn = 0; turn < 2; ++turn) {
    const bool phi = turn == 0;
    if (!phi) {
      attend();
      if (!meet()) return;
      weigh_parts();
      write_out();
      grid_launch_dependents();
      if (p.spec.victim == Victim::none) {
        if (plan.cluster) cluster_sync();  // parts may still be read
        return;
      }
      victim = choose(add_scores());
      if (!Leaver::begin(*this)) break;
    }
    if constexpr (kState) {
      const FeatureMaps maps = phi ? p.maps.phi : p.maps.psi;
      const bool all = phi || plan.shares > 1;
      const DecodeMapShares shares{all ? first_range() : 0, all ? ranges() : 1,
                                   all ? plan.splits : 1};
      shares_of_maps(maps, phi ? head * G : head, phi ? G : 1, phi ? s.q() : s.victim_key(), shares,
                     s.maps(), phi ? s.part() + at.feature : s.psi_shares() + shares.first * R,
                     phi ? plan.part : R);
    }
    if (!phi) Leaver::end(*this);
  }
  if constexpr (kPacked) {
    move_in(victim.slot);
  } else {
    take(victim.slot);
  }
  count();
}

// Blocks that an SM holds at least: three where the registers of a third do not spill.
template <typename T, int kD, bool kMma>
constexpr int decode_blocks() {
  bool dear = sizeof(T) == 1 && !kMma && !kFewBits<T>;  // queries and sums of 16 elements
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 890
  dear = dear || std::is_same_v<T, __nv_fp8_e4m3>;  // which instructions do not widen here
#endif
  return (kD == 64 || kD == 128) && !dear ? 3 : 2;
}

template <typename T, int kD, bool kMma, typename Then>
__global__ void __launch_bounds__(kDecodeThreads, decode_blocks<T, kD, kMma>())
    decode_step_kernel(const __grid_constant__ DecodeStepParams p,
                       const __grid_constant__ DecodePlan plan) {
  DYN_SMEM(raw);
  guard_decode_layout<T, kD, kMma>(raw, p, plan);
  DecodeBlock<DecodeCase<T, kD, kMma, Then>>(p, plan, raw).run();
}

}  // namespace less::cuda
