// The kernel of decode_step.cu, where its formula, grid, memory and order stand.
#pragma once

#include "cuda/decode_step/attend.h"
#include "cuda/decode_step/block.h"
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
  memory = page(p.pool, b);
  if (memory == nullptr || (p.valid != nullptr && !p.valid[b])) return clear();
  seen = *less::seen(memory);
  if constexpr (kMerges) joining = joiner();
  const int tiles = (n + plan.tile - 1) / plan.tile;
  victim = {0, 0, S, 0.0f};
  // Keys are asked for first; which values there are is only known from what load() brings.
  const int first_asked = min(tiles, Tile::kStages - 1);
#pragma unroll 1
  for (int i = 0; i < Tile::kStages; ++i) {
    if (i == first_asked) {
      load();
      __syncthreads();
      if (R > 0 && (plan.cluster || alone())) ask_for_state();
      continue;
    }
    ask(i < first_asked ? i : i - 1, tiles);
    copy_async_commit();
  }
  // Features of the queries while slots are on their way, and then, should one leave, of its key:
  // one loop, because a map's code is long.
#pragma unroll 1
  for (int turn = 0; turn < 2; ++turn) {
    if (turn == 1) {
      attend(tiles);
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
      const FeatureMaps maps = turn == 0 ? p.maps.phi : p.maps.psi;
      share_of_maps(maps, turn == 0 ? head * G : head, turn == 0 ? G : 1,
                    turn == 0 ? s.q() : s.victim_key(), turn == 0 ? split : rank,
                    turn == 0 ? plan.splits : ranks, s.maps(),
                    turn == 0 ? s.part() + at.feature : s.psi_share());
    }
    if (turn == 1) Leaver::end(*this);
  }
  if constexpr (kPacked) {
    move_in(victim.slot);
  } else {
    take(victim.slot);
  }
  count();
}

// A row without a token or a page: zeros.
template <typename Case>
LESS_DEVICE void DecodeBlock<Case>::clear() {
  const float zero[4] = {0.0f, 0.0f, 0.0f, 0.0f};
  if (split != 0) return;
#pragma unroll 1
  for (int i = t * 4; i < G * kD; i += kDecodeThreads * 4) {
    // narrow: four 16-bit elements a lane, of the one token
    store_four(p.out.data, p.out.dtype, query(p.out, i / kD) + i % kD, zero);
  }
}

// Blocks that an SM holds at least: three where the registers of a third spill on no architecture.
template <typename T, int kD, bool kMma>
constexpr int decode_blocks() {
  const bool bytes = sizeof(T) == 1 && !kMma;  // queries and sums of 16 elements
  return (kD == 64 || kD == 128) && !bytes ? 3 : 2;
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
