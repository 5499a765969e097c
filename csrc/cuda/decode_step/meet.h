// Where the blocks of a head meet in decode_step's kernel, and the softmax over all their parts.
#pragma once

#include "cuda/decode_step/block.h"

namespace less::cuda {

// Makes the parts known to those who finish; false: this block does not.
template <typename Case>
LESS_DEVICE bool DecodeBlock<Case>::meet() {
  if (plan.cluster) {
    cluster_sync();
    return true;
  }
  if (alone()) {
    __syncthreads();
    return true;
  }
#pragma unroll 1
  for (int i = 3 * G + G * R + t; i < at.value; i += kDecodeThreads) s.part()[i] = 0.0f;
  __syncthreads();
  float* const part = plan.parts + (row * plan.splits + split()) * plan.part;  // of its one range
#pragma unroll 1
  for (int i = t * 4; i < plan.part; i += kDecodeThreads * 4) {
    store16(part + i, load16_shared(s.part() + i));
  }
  if (p.spec.scores) {
    float* const masses = plan.masses + (row * plan.splits + split()) * G * plan.per;
    const int padded = (n() + 15) / 16 * 16;
#pragma unroll 1
    for (int i = t * 4; i < G * padded; i += kDecodeThreads * 4) {
      const int g = i / padded, slot = i % padded;
      store16(masses + g * plan.per + slot, load16_shared(s.mass() + g * stride + slot));
    }
  }
  // One thread's fences speak for the block: the barriers order the others before and after them.
  __syncthreads();
  if (t == 0) {
    fence_gpu();
    *s.last() = atomic_add(plan.head_count + row, 1) == plan.splits - 1;
    fence_gpu();
  }
  __syncthreads();
  if (*s.last() == 0) return false;
  if (t == 0) store(plan.head_count + row, 0);
  if (R == 0) return true;
  ask_for_state();
  copy_async_commit();
  copy_async_wait<0>();
  __syncthreads();
  return true;
}

// Where the block that has a range keeps its part, as an address of this block's own.
template <typename Case>
LESS_DEVICE float* DecodeBlock<Case>::own_part(int of) const {
  const int block = alone() ? 0 : of * plan.block_of >> 6;
  return s.take<float>(plan.layout.part) + (of - block * plan.ranges) * plan.part;
}

template <typename Case>
LESS_DEVICE float DecodeBlock<Case>::part_float(int of, int i) const {
  if (plan.cluster) return load_cluster(own_part(of) + i, of * plan.block_of >> 6);
  // narrow: a lane a number of a part, side by side
  return alone() ? own_part(of)[i] : plan.parts[(row * plan.splits + of) * plan.part + i];
}

template <typename Case>
LESS_DEVICE float4 DecodeBlock<Case>::part_four(int of, int i) const {
  if (plan.cluster) {
    return load_cluster(reinterpret_cast<const float4*>(own_part(of) + i), of * plan.block_of >> 6);
  }
  return bits_of<float4>(alone() ? load16_shared(own_part(of) + i)
                                 : load16(plan.parts + (row * plan.splits + of) * plan.part + i));
}

// The parts' factors, the state's, and what each part received of the whole.
template <typename Case>
LESS_DEVICE void DecodeBlock<Case>::weigh_parts() {
  // A warp asks for the numbers of each query head, the others for shares of features, all at once.
#pragma unroll 1
  for (int i = t; warp == 0 && i < plan.splits * G; i += 32) {
    const int of = i / G, g = i % G;
    const float top = part_float(of, at.top + g), sum = part_float(of, at.sum + g);
    const float token = part_float(plan.splits - 1, at.token + g);
    s.top()[i] = top;
    s.sum()[i] = sum;
    if (of == 0) s.token_mass()[g] = token;
  }
#pragma unroll 1
  for (int i = t - 32; warp > 0 && i < G * R; i += kDecodeThreads - 32) {
    float y = 0.0f;
#pragma unroll 1
    for (int of0 = 0; of0 < plan.splits; of0 += kDecodeCluster) {
      float share[kDecodeCluster];
#pragma unroll
      for (int j = 0; j < kDecodeCluster; ++j) {
        share[j] = part_float(min(of0 + j, plan.splits - 1), at.feature + i);
      }
#pragma unroll
      for (int j = 0; j < kDecodeCluster; ++j) {
        if (of0 + j < plan.splits) y += share[j];
      }
    }
    s.feature()[i] = feature(p.maps.phi, s.phi_numbers()[i], y);
  }
  __syncthreads();
  // Eight lanes a query head, which take the splits and the features in turns.
  constexpr int kTurns = 8;
  const int turn = lane % kTurns;
#pragma unroll 1
  for (int g0 = 0; g0 < G; g0 += kDecodeThreads / kTurns) {
    const int g = g0 + t / kTurns;
    const int splits = g < G ? plan.splits : 0, features = g < G ? R : 0;
    float top = -kInfinity, total = 0.0f, low = 0.0f;
#pragma unroll 1
    for (int of = turn; of < splits; of += kTurns) top = fmaxf(top, s.top()[of * G + g]);
#pragma unroll 1
    for (int r = turn; r < features; r += kTurns) {
      low = fmaf(s.feature()[g * R + r], s.z()[r], low);
    }
#pragma unroll
    for (int step = 1; step < kTurns; step *= 2) {
      top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, step));
      low += __shfl_xor_sync(0xffffffffu, low, step);
    }
#pragma unroll 1
    for (int of = turn; of < splits; of += kTurns) {
      total = fmaf(s.sum()[of * G + g], expf(s.top()[of * G + g] - top), total);
    }
#pragma unroll
    for (int step = 1; step < kTurns; step *= 2) {
      total += __shfl_xor_sync(0xffffffffu, total, step);
    }
    const float inverse = 1.0f / total;
    float kept = inverse, low_kept = 0.0f, share = 0.0f;
    if (!(low <= 0.0f)) {  // NaN too: out shows it
      const float log_low = logf(low), both = fmaxf(top, log_low);
      const float kept_mass = expf(top - both) * total, low_mass = expf(log_low - both);
      const float whole = 1.0f / (kept_mass + low_mass);
      kept = expf(top - both) * whole;
      low_kept = low_mass * whole / low;
      share = low_mass * whole;
    }
    if (g < G && turn == 0) {
      s.low()[g] = low_kept;
      s.share()[g] = share;
      s.token_mass()[g] = expf(s.token_mass()[g] - top) * inverse;
    }
#pragma unroll 1
    for (int of = turn; of < splits; of += kTurns) {
      const float mass = expf(s.top()[of * G + g] - top);
      s.top()[of * G + g] = mass * kept;
      s.sum()[of * G + g] = mass * inverse;
    }
  }
  __syncthreads();
}

template <typename Case>
LESS_DEVICE void DecodeBlock<Case>::write_out() {
  constexpr int kFours = 8;  // of parts, under way at once
  const int column = first_column(), width = columns(), fours = width / 4;
#pragma unroll 1
  for (int i = t; i < G * fours; i += kDecodeThreads) {
    const int g = i / fours, c = i % fours * 4;
    float four[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll 1
    for (int of0 = 0; of0 < plan.splits; of0 += kFours) {
      float4 v[kFours];
#pragma unroll
      for (int j = 0; j < kFours; ++j) {
        v[j] = part_four(min(of0 + j, plan.splits - 1), at.value + g * kD + column + c);
      }
#pragma unroll
      for (int j = 0; j < kFours; ++j) {
        if (of0 + j == plan.splits) break;
        const float factor = s.top()[(of0 + j) * G + g];
        four[0] = fmaf(factor, v[j].x, four[0]);
        four[1] = fmaf(factor, v[j].y, four[1]);
        four[2] = fmaf(factor, v[j].z, four[2]);
        four[3] = fmaf(factor, v[j].w, four[3]);
      }
    }
    const float low = s.low()[g];
#pragma unroll 8
    for (int r = 0; r < R; ++r) {
      const float factor = s.feature()[g * R + r] * low;
      const float4 h = bits_of<float4>(load16_shared(s.H() + r * width + c));
      four[0] = fmaf(factor, h.x, four[0]);
      four[1] = fmaf(factor, h.y, four[1]);
      four[2] = fmaf(factor, h.z, four[2]);
      four[3] = fmaf(factor, h.w, four[3]);
    }
    // narrow: four 16-bit elements a lane, of the one token
    store_four(p.out.data, p.out.dtype, query(p.out, g) + column + c, four);
  }
  if (R > 0 && rank() == 0 && t == 0) {
    double share = 0.0;
#pragma unroll 1
    for (int g = 0; g < G; ++g) share += s.share()[g];
    add_global(state().share, share);
  }
}

// A row without a token or a page: zeros.
template <typename Case>
LESS_DEVICE void DecodeBlock<Case>::clear() {
  const float zero[4] = {0.0f, 0.0f, 0.0f, 0.0f};
  if (blockIdx.x != 0) return;
#pragma unroll 1
  for (int i = t * 4; i < G * kD; i += kDecodeThreads * 4) {
    // narrow: four 16-bit elements a lane, of the one token
    store_four(p.out.data, p.out.dtype, query(p.out, i / kD) + i % kD, zero);
  }
}

}  // namespace less::cuda
