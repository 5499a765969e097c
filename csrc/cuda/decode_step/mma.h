// decode_step's products on tensor cores.
#pragma once

#include "cuda/decode_step/block.h"

namespace less::cuda {

// Slots are the rows of the product, queries its columns.
template <typename Case>
LESS_DEVICE void DecodeBlock<Case>::multiply_keys_mma(const unsigned char* tile, int slot0) {
  const int rows = min(plan.tile, n() - slot0);
#pragma unroll 1
  for (int r0 = warp * 16; r0 < rows; r0 += kDecodeWarps * 16) {
#pragma unroll 1
    for (int g0 = 0; g0 < G; g0 += 8) {
      float acc[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
      for (int k = 0; k < kBlocks; ++k) {
        uint32_t keys[4], queries[2];
        if constexpr (kScaled) {
          // A thread has 4 elements of a row, where the product's order has two and two: the sum
          // over D takes them in this order on both sides.
          uint32_t fours[2];
          const int chunk = (r0 + lane % 16) * Tile::kChunks + k;
          ldmatrix_x2(fours, tile + Tile::place(chunk) * 16);
          keys[0] = two_halves<0, 1>(fours[0]);
          keys[1] = two_halves<0, 1>(fours[1]);
          keys[2] = two_halves<2, 3>(fours[0]);
          keys[3] = two_halves<2, 3>(fours[1]);
          const uint2 q = load8_shared(narrow_q() + (g0 + lane / 4) * kRow + k * 16 + lane % 4 * 4);
          queries[0] = q.x;
          queries[1] = q.y;
        } else {
          const int chunk = (r0 + lane % 16) * Tile::kChunks + k * 2 + lane / 16;
          ldmatrix_x4(keys, tile + Tile::place(chunk) * 16);
          ldmatrix_x2(queries, narrow_q() + (g0 + lane % 8) * kRow + k * 16 + lane / 8 % 2 * 8);
        }
        mma_m16n8k16(acc, keys, queries, Tag());
      }
      // Lanes of a quad take their two heads in different order: 32 different banks.
      const int turn = lane % 4 / 2, g = g0 + lane % 4 * 2;
      float* const mass = s.mass() + slot0 + r0 + lane / 4;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float even = acc[half * 2], odd = acc[half * 2 + 1];
        if (g + turn < G) mass[(g + turn) * stride + half * 8] = turn ? odd : even;
        if (g + 1 - turn < G) mass[(g + 1 - turn) * stride + half * 8] = turn ? even : odd;
      }
    }
  }
}

// Bytes kI and kJ of four int8 or e4m3, as half floats.
template <typename Case>
template <int kI, int kJ>
LESS_DEVICE uint32_t DecodeBlock<Case>::two_halves(uint32_t four) {
  if constexpr (std::is_same_v<T, int8_t>) {
    // x + 128 as the last bits of 1024 + 128 + x.
    const uint32_t biased =
        __byte_perm(four ^ 0x80808080u, 0x64646464u, kI | 0x40 | kJ << 8 | 0x4000);
    return bits_of<uint32_t>(
        __hsub2(bits_of<__half2>(biased), bits_of<__half2>(uint32_t(0x64806480))));
  } else {
    const uint32_t two = __byte_perm(four, 0, kI | kJ << 4 | 0x4400) & 0xffffu;
    return bits_of<uint32_t>(__nv_cvt_fp8x2_to_halfraw2(__nv_fp8x2_storage_t(two), __NV_E4M3));
  }
}

// x = high + low, to twice the bits of Narrow.
template <typename Case>
LESS_DEVICE void DecodeBlock<Case>::split_two(float2 x, uint32_t& high, uint32_t& low) {
  high = two_narrowed<Narrow>(x.x, x.y);
  float rounded[2];
  widen4(high, rounded, Narrow());
  low = two_narrowed<Narrow>(x.x - rounded[0], x.y - rounded[1]);
}

// Masses of two slots, times the scales of their values in units of the range's.
template <typename Case>
LESS_DEVICE float2 DecodeBlock<Case>::two_weights(const float* mass, int slot,
                                                  float inverse) const {
  float2 two = bits_of<float2>(load8_shared(mass + slot));
  if constexpr (kScaled) {
    const float2 scale = bits_of<float2>(load8_shared(s.v_scale() + s.range * plan.per + slot));
    two.x *= scale.x * inverse;
    two.y *= scale.y * inverse;
  }
  return two;
}

// Columns of values are the rows of the product, queries its columns. The masses go in as sums of
// two narrow numbers, so that what they lose by it is below what a sum of floats loses.
template <typename Case>
LESS_DEVICE void DecodeBlock<Case>::multiply_values_mma(const unsigned char* tile, int slot0,
                                                        int rows, int pass,
                                                        float (&acc)[kPairs][4]) {
  const int pairs = min(kTiles, (G + 7) / 8 - pass * kTiles) * kBlocks;
  float inverse = 1.0f;
  if constexpr (kScaled) inverse = 1.0f / *value_unit();
#pragma unroll 1
  for (int r0 = 0; r0 < rows; r0 += 16) {
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      const int pair = i * kDecodeWarps + warp;
      if (pair >= pairs) break;
      const int block = pair % kBlocks;
      const int g = (pass * kTiles + pair / kBlocks) * 8 + lane / 4;
      float2 near = make_float2(0.0f, 0.0f), far = near;
      if (g < G) {
        near = two_weights(s.mass() + g * stride, slot0 + r0 + lane % 4 * 2, inverse);
        far = two_weights(s.mass() + g * stride, slot0 + r0 + lane % 4 * 2 + 8, inverse);
      }
      uint32_t high[2], low[2], values[4];
      split_two(near, high[0], low[0]);
      split_two(far, high[1], low[1]);
      if constexpr (kScaled) {
        // Transposed in pairs of columns: a thread has columns 2 i and 2 i + 1 of two slots.
        uint32_t fours[2];
        const int chunk = (r0 + lane % 16) * Tile::kChunks + block;
        ldmatrix_x2_trans(fours, tile + Tile::place(chunk) * 16);
        values[0] = two_halves<0, 2>(fours[0]);
        values[1] = two_halves<1, 3>(fours[0]);
        values[2] = two_halves<0, 2>(fours[1]);
        values[3] = two_halves<1, 3>(fours[1]);
      } else {
        const int chunk =
            (r0 + lane / 16 * 8 + lane % 8) * Tile::kChunks + block * 2 + lane / 8 % 2;
        ldmatrix_x4_trans(values, tile + Tile::place(chunk) * 16);
      }
      mma_m16n8k16(acc[i], values, high, Tag());
      mma_m16n8k16(acc[i], values, low, Tag());
    }
  }
}

template <typename Case>
LESS_DEVICE void DecodeBlock<Case>::keep_values_mma(int pass, const float (&acc)[kPairs][4]) {
  float unit = 1.0f;
  if constexpr (kScaled) unit = *value_unit();
  const int pairs = min(kTiles, (G + 7) / 8 - pass * kTiles) * kBlocks;
#pragma unroll
  for (int i = 0; i < kPairs; ++i) {
    const int pair = i * kDecodeWarps + warp;
    if (pair >= pairs) break;
    constexpr int kFar = kScaled ? 1 : 8;  // from a thread's first column to its second
    const int d = pair % kBlocks * 16 + lane / 4 * (kScaled ? 2 : 1);
    const int g = (pass * kTiles + pair / kBlocks) * 8 + lane % 4 * 2;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (g + j % 2 >= G) continue;
      s.part()[at.value + (g + j % 2) * kD + d + j / 2 * kFar] = acc[i][j] * unit;
    }
  }
}

}  // namespace less::cuda
