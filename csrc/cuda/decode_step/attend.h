// Attention over a block's ranges of slots in decode_step's kernel, for all query heads of a kv
// head.
#pragma once

#include "cuda/decode_step/integers.h"
#include "cuda/decode_step/packed.h"

namespace less::cuda {

// Keys of all ranges, then their softmax, then values.
template <typename Case>
LESS_DEVICE void DecodeBlock<Case>::attend() {
  if constexpr (kUnits) find_value_units();
#pragma unroll 1
  for (s.range = 0; s.range < ranges(); ++s.range) multiply_keys();
  __syncthreads();
  softmax();
#pragma unroll 1
  for (s.range = 0; s.range < ranges(); ++s.range) {
    if constexpr (kPacked) {
      add_values_packed();
    } else if constexpr (kMma) {
      add_values<kPairs, 4>();
    } else if (G <= 2) {
      add_values<2, Tile::kElements>();
    } else {
      add_values<kHeads, Tile::kElements>();
    }
  }
  copy_async_wait<0>();
  __syncthreads();
  s.range = ranges() - 1;
  add_token();
  s.range = 0;
}

// Of the range at hand.
template <typename Case>
LESS_DEVICE void DecodeBlock<Case>::multiply_keys() {
  if constexpr (kMma || kPacked) {
#pragma unroll 1
    for (int tile = 0; tile < plan.tiles; ++tile) {
      const unsigned char* const rows = receive(tile, false);
      if constexpr (kPacked) {
        multiply_keys_packed(rows, tile * plan.tile);
      } else {
        multiply_keys_mma(rows, tile * plan.tile);
      }
    }
  } else {
    float q[kQueries][kKept];
#pragma unroll 1
    for (int tile = 0; tile < plan.tiles; ++tile) {
      const unsigned char* const rows = receive(tile, false);
#pragma unroll 1
      for (int g0 = 0; g0 < G; g0 += kQueries) {
        if (kKept == kFloats && (tile == 0 || G > kQueries)) keep_queries(g0, q);
        if (kQueries == 1 || g0 + 1 == G) {
          multiply_keys<1>(rows, tile * plan.tile, g0, q);
        } else {
          multiply_keys<kQueries>(rows, tile * plan.tile, g0, q);
        }
      }
    }
  }
}

// Where a tile of the range at hand is, once it is here; asks for the one that takes the place of
// the one before.
template <typename Case>
LESS_DEVICE const unsigned char* DecodeBlock<Case>::receive(int tile, bool values) {
  copy_async_wait<Tile::kStages - 2>();
  __syncthreads();
  ask();
  copy_async_commit();
  const unsigned char* const here = stage(asked);
  if constexpr (kPacked) {
    widen_rows(here, tile, values);
    __syncthreads();
    return s.widened();
  } else {
    return here;
  }
}

// Queries g0 on, the chunks that this lane takes.
template <typename Case>
LESS_DEVICE void DecodeBlock<Case>::keep_queries(int g0, float (&q)[kQueries][kKept]) const {
  constexpr int kE = Tile::kElements;
#pragma unroll
  for (int g = 0; g < kQueries; ++g) {
#pragma unroll
    for (int i = 0; i < kKept / 4; ++i) {
      const int d = (i / (kE / 4) * kLanes + lane % kLanes) * kE + i % (kE / 4) * 4;
      const float4 x = bits_of<float4>(load16_shared(s.q() + min(g0 + g, G - 1) * kD + d));
      q[g][i * 4] = x.x;
      q[g][i * 4 + 1] = x.y;
      q[g][i * 4 + 2] = x.z;
      q[g][i * 4 + 3] = x.w;
    }
  }
}

// mass[g, slot] = q k of the tile's rows, for kN queries from g0 on. A thread takes two rows at
// once; one of those that are not there is another, and is not written.
template <typename Case>
template <int kN>
LESS_DEVICE void DecodeBlock<Case>::multiply_keys(const unsigned char* tile, int slot0, int g0,
                                                  const float (&q)[kQueries][kKept]) {
  constexpr int kE = Tile::kElements, kAtOnce = kDecodeThreads / kLanes, kRows = 2;
  const int rows = min(plan.tile, n() - slot0), turn = lane % kLanes;
#pragma unroll 1
  for (int r0 = t / kLanes; r0 - t / kLanes < rows; r0 += kRows * kAtOnce) {
    float dot[kRows][kN];
#pragma unroll
    for (int j = 0; j < kRows; ++j) {
      const int r = min(r0 + j * kAtOnce, rows - 1);
#pragma unroll
      for (int g = 0; g < kN; ++g) dot[j][g] = 0.0f;
#pragma unroll
      for (int i = 0; i < kTurns; ++i) {
        const int chunk = r * Tile::kChunks + i * kLanes + turn;
        float k[kE];
        widen16<T>(load16_shared(tile + Tile::place(chunk) * 16), k);
#pragma unroll
        for (int g = 0; g < kN; ++g) {
          if constexpr (kKept == kFloats) {
#pragma unroll
            for (int e = 0; e < kE; ++e) dot[j][g] = fmaf(q[g][i * kE + e], k[e], dot[j][g]);
          } else {
            const float* const x = s.q() + (g0 + g) * kD;
            const int d = (i * kLanes + turn) * kE;
#pragma unroll
            for (int e = 0; e < kE; e += 4) {
              const float4 four = bits_of<float4>(load16_shared(x + d + e));
              dot[j][g] = fmaf(four.x, k[e], dot[j][g]);
              dot[j][g] = fmaf(four.y, k[e + 1], dot[j][g]);
              dot[j][g] = fmaf(four.z, k[e + 2], dot[j][g]);
              dot[j][g] = fmaf(four.w, k[e + 3], dot[j][g]);
            }
          }
        }
      }
    }
#pragma unroll
    for (int step = 1; step < kLanes; step *= 2) {
#pragma unroll
      for (int j = 0; j < kRows; ++j) {
#pragma unroll
        for (int g = 0; g < kN; ++g) {
          dot[j][g] += __shfl_xor_sync(0xffffffffu, dot[j][g], step);
        }
      }
    }
#pragma unroll
    for (int j = 0; j < kRows; ++j) {
      const int r = r0 + j * kAtOnce;
      if (turn != 0 || r >= rows) break;
#pragma unroll
      for (int g = 0; g < kN; ++g) s.mass()[(g0 + g) * stride + slot0 + r] = dot[j][g];
    }
  }
}

// mass: q k becomes the logit, then e^(logit - top), of all ranges. A warp has queries of ranges,
// four at once where there are so many; the first tile of values has the barrier after it.
template <typename Case>
LESS_DEVICE void DecodeBlock<Case>::softmax() {
  const int count = ranges() * G;  // query i % G of range i / G
#pragma unroll 1
  for (int i = warp, taken; i < count; i += taken * kDecodeWarps) {
    taken = i + 2 * kDecodeWarps < count ? 4 : 1;
    if (taken == 4) {
      softmax<4>(i, count);
    } else {
      softmax<1>(i, count);
    }
  }
}

// Of queries first, first + kDecodeWarps, ..., those below `count`; one warp. What little is needed
// of each is worked out anew: registers are dearer.
template <typename Case>
template <int kN>
LESS_DEVICE void DecodeBlock<Case>::softmax(int first, int count) {
  float* const masses = s.take<float>(plan.layout.mass) + first * stride;
  const auto mass = [=](int j) { return masses + j * kDecodeWarps * stride; };
  const float inverse = 1.0f / float(G);
  const auto range_of = [=](int j) {  // both numbers are small
    return int((float(first + j * kDecodeWarps) + 0.5f) * inverse);
  };
  const auto query_of = [=](int j) { return first + j * kDecodeWarps - range_of(j) * G; };
  float top[kN], sum[kN];
  int slots[kN], slot0[kN];  // of those that are there, and which of the block's comes first
  [[maybe_unused]] float inverse_unit[kN];  // of values
#pragma unroll
  for (int j = 0; j < kN; ++j) {
    top[j] = -kInfinity;
    sum[j] = 0.0f;
    slots[j] = slot0[j] = 0;
    if (first + j * kDecodeWarps >= count) continue;
    const int range = range_of(j), split = first_range() + range;
    slots[j] = min(plan.per, S - split * plan.per);
    slot0[j] = range * plan.per;
    if constexpr (kPacked) inverse_unit[j] = 1.0f / q_scale()[G + range];
    float token = -kInfinity;
    if (split == plan.splits - 1) {
      float dot = 0.0f;
#pragma unroll 1
      for (int d = lane; d < kD; d += 32) {
        dot = fmaf(s.q()[query_of(j) * kD + d], s.key()[d], dot);
      }
      dot = warp_sum(dot);
      if constexpr (kScaled) dot *= s.token()[0];
      token = top[j] = capped(dot * p.spec.scale);
    }
    if (lane == 0) {
      s.take<float>(plan.layout.part)[range * plan.part + at.token + query_of(j)] = token;
    }
  }
#pragma unroll(kN == 1 ? 4 : 1)
  for (int i = lane; i < plan.per; i += 32) {
#pragma unroll
    for (int j = 0; j < kN; ++j) {
      float dot = i < slots[j] ? mass(j)[i] : 0.0f;
      if constexpr (kScaled) dot *= s.k_scale()[slot0[j] + i];
      if constexpr (kScaled && kMma) dot *= q_scale()[query_of(j)];
      float logit = capped(dot * p.spec.scale);
      if constexpr (kWeights) logit += s.weight()[slot0[j] + i];
      if (s.position()[slot0[j] + i] < 0) logit = -kInfinity;
      if (i < slots[j]) {
        mass(j)[i] = logit;
        top[j] = fmaxf(top[j], logit);
      }
    }
  }
#pragma unroll
  for (int step = 16; step > 0; step /= 2) {
#pragma unroll
    for (int j = 0; j < kN; ++j) {
      top[j] = fmaxf(top[j], __shfl_xor_sync(0xffffffffu, top[j], step));
    }
  }
  // Digits of packed rows' masses are multiplied 32 slots at once.
  const int most = kPacked ? (plan.per + 31) / 32 * 32 : plan.per;
#pragma unroll(kN == 1 ? 4 : 1)
  for (int i = lane; i < most; i += 32) {
#pragma unroll
    for (int j = 0; j < kN; ++j) {
      const float logit = i < slots[j] ? mass(j)[i] : -kInfinity;
      const float e = logit == -kInfinity ? 0.0f : expf(logit - top[j]);
      if (i < (slots[j] + 15) / 16 * 16) mass(j)[i] = e;
      if constexpr (kPacked) {
        if (first + j * kDecodeWarps < count) {
          const float scale = i < slots[j] ? s.v_scale()[slot0[j] + i] : 0.0f;
          keep_digits(first + j * kDecodeWarps, i, e, scale * inverse_unit[j]);
        }
      }
      sum[j] += e;
    }
  }
#pragma unroll
  for (int step = 16; step > 0; step /= 2) {
#pragma unroll
    for (int j = 0; j < kN; ++j) sum[j] += __shfl_xor_sync(0xffffffffu, sum[j], step);
  }
#pragma unroll
  for (int j = 0; j < kN; ++j) {
    if (lane != 0 || slots[j] == 0) continue;
    float* const part = s.take<float>(plan.layout.part) + range_of(j) * plan.part + query_of(j);
    const float token = part[at.token];
    const float e = token == -kInfinity ? 0.0f : expf(token - top[j]);
    mass(j)[plan.per] = e;
    part[at.top] = top[j];
    part[at.sum] = sum[j] + e;
  }
}

// What the scales of a range's values are counted in: the power of two below the largest; a warp a
// range.
template <typename Case>
LESS_DEVICE void DecodeBlock<Case>::find_value_units() {
#pragma unroll 1
  for (int range = warp; range < ranges(); range += kDecodeWarps) {
    uint32_t largest = 0;
#pragma unroll 1
    for (int i = lane; i < plan.per; i += 32) {
      const float scale = s.v_scale()[range * plan.per + i];
      largest = max(largest, bits_of<uint32_t>(scale) & 0x7fffffffu);
    }
    largest = __reduce_max_sync(0xffffffffu, largest);
    if (lane == 0) {
      // Where there is NaN or infinity, all is NaN.
      const bool sound = !kPacked || largest < 0x7f800000u;
      q_scale()[G + range] = sound ? power_below(largest) : bits_of<float>(0x7fc00000u);
    }
  }
}

template <typename Case>
template <int kN, int kM>
LESS_DEVICE void DecodeBlock<Case>::add_values() {
#pragma unroll 1
  for (int pass = 0; pass < decode_passes<T, kD, kMma>(G); ++pass) {
    float acc[kN][kM];
#pragma unroll
    for (int i = 0; i < kN; ++i) {
#pragma unroll
      for (int j = 0; j < kM; ++j) acc[i][j] = 0.0f;
    }
#pragma unroll 1
    for (int tile = 0; tile < plan.tiles; ++tile) {
      multiply_values(receive(tile, true), tile * plan.tile, pass, acc);
    }
    keep_values(pass, acc);
  }
}

// acc[g] += mass[g, slot] v of the tile's rows: a thread has a chunk of every so many rows.
template <typename Case>
template <int kN, int kM>
LESS_DEVICE void DecodeBlock<Case>::multiply_values(const unsigned char* tile, int slot0, int pass,
                                                    float (&acc)[kN][kM]) {
  const int rows = min(plan.tile, n() - slot0);
  if constexpr (kMma) {
    multiply_values_mma(tile, slot0, rows, pass, acc);
  } else {
    constexpr int kAtOnce = kDecodeThreads / Tile::kChunks;
    const int chunk = t % Tile::kChunks;
    const int heads = min(kN, G - pass * kN);
    if (t >= kAtOnce * Tile::kChunks) return;
    const float* const mass = s.mass() + pass * kN * stride + slot0;
#pragma unroll kN <= 2 ? 4 : 1
    for (int r = t / Tile::kChunks; r < rows; r += kAtOnce) {
      float v[kM];
      widen16<T>(load16_shared(tile + Tile::place(r * Tile::kChunks + chunk) * 16), v);
      if constexpr (kScaled) {
        const float scale = s.v_scale()[s.range * plan.per + slot0 + r];
#pragma unroll
        for (int e = 0; e < kM; ++e) v[e] *= scale;
      }
#pragma unroll
      for (int g = 0; g < kN; ++g) {
        if (g >= heads) break;
        const float m = mass[g * stride + r];
#pragma unroll
        for (int e = 0; e < kM; ++e) acc[g][e] = fmaf(m, v[e], acc[g][e]);
      }
    }
  }
}

// The sums of a pass go to the part, over those who took other rows.
template <typename Case>
template <int kN, int kM>
LESS_DEVICE void DecodeBlock<Case>::keep_values(int pass, float (&acc)[kN][kM]) {
  if constexpr (kMma) {
    keep_values_mma(pass, acc);
  } else {
    constexpr int kAtOnce = kDecodeThreads / Tile::kChunks;
    const int heads = min(kN, G - pass * kN);
    if (t < kAtOnce * Tile::kChunks) {
#pragma unroll
      for (int g = 0; g < kN; ++g) {
        if (g >= heads) break;
        float* const to =
            s.sums() + (t / Tile::kChunks * heads + g) * kD + t % Tile::kChunks * Tile::kElements;
#pragma unroll
        for (int e = 0; e < kM; e += 4) {
          store16_shared(to + e, bits_of<uint4>(make_float4(acc[g][e], acc[g][e + 1], acc[g][e + 2],
                                                            acc[g][e + 3])));
        }
      }
    }
    __syncthreads();
#pragma unroll 1
    for (int i = t; i < heads * kD; i += kDecodeThreads) {
      float sum = s.sums()[i];
#pragma unroll
      for (int w = 1; w < kAtOnce; ++w) {
        sum += s.sums()[w * heads * kD + i];
      }
      s.part()[at.value + pass * kN * kD + i] = sum;
    }
  }
}

// The token's own value; it is in the last split.
template <typename Case>
LESS_DEVICE void DecodeBlock<Case>::add_token() {
  if (!last_split()) return;
  float scale = 1.0f;
  if constexpr (kScaled) scale = s.token()[1];
#pragma unroll 1
  for (int i = t; i < G * kD; i += kDecodeThreads) {
    const float mass = s.mass()[i / kD * stride + plan.per];
    s.part()[at.value + i] = fmaf(mass, s.value()[i % kD] * scale, s.part()[at.value + i]);
  }
}

}  // namespace less::cuda
