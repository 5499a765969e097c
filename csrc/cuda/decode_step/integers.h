// decode_step's products with packed rows, which are int8 by then (packed.h), on tensor cores of
// integers.
//
// The other factor, an element of a query or a slot's mass times its value's scale, is a whole
// number of 2^-20 of the power of two at or below the largest, and that is three digits to the base
// of 256, from -128 to 127. Each digit has a column of the product; the fourth of every four is
// zero.
// Products and their sums are exact.
#pragma once

#include "cuda/decode_step/block.h"

namespace less::cuda {

constexpr float kDigitUnit = 1.0f / (1 << 20);

// Digits of x / kDigitUnit, |x| < 4, the first one first, each a byte.
template <typename Case>
LESS_DEVICE void DecodeBlock<Case>::three_digits(float x, uint32_t (&digit)[kDecodeDigits]) {
  int n = __float2int_rn(x * (1.0f / kDigitUnit));
#pragma unroll
  for (int j = kDecodeDigits - 1; j >= 0; --j) {
    digit[j] = uint32_t(n) & 0xffu;
    n = (n + 128) >> 8;
  }
}

// Queries of any size as digits: each is divided by the power of two below its largest element. A
// warp per query; those that complete a pair are zeros.
template <typename Case>
LESS_DEVICE void DecodeBlock<Case>::load_query_digits() {
  auto* const digits = reinterpret_cast<unsigned char*>(s.narrow_q());
#pragma unroll 1
  for (int g = warp; g < (G + 1) / 2 * 2; g += kDecodeWarps) {
    float four[kRowPieces][4] = {};
    uint32_t largest = 0;
#pragma unroll
    for (int j = 0; j < kRowPieces; ++j) {
      const int d = lane * 4 + j * 128;
      if (d >= kD || g >= G) break;
      widen_four(ask_for_query(g * kD + d), p.q.dtype, four[j]);
      store16_shared(s.q() + g * kD + d,
                     bits_of<uint4>(make_float4(four[j][0], four[j][1], four[j][2], four[j][3])));
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        largest = max(largest, bits_of<uint32_t>(four[j][i]) & 0x7fffffffu);
      }
    }
    largest = __reduce_max_sync(0xffffffffu, largest);
    const uint32_t exponent = min(max(largest >> 23, 1u), 253u);
    if (lane == 0 && g < G) {
      const float unit = bits_of<float>(exponent << 23) * kDigitUnit;
      q_scale()[g] = largest < 0x7f800000u ? unit : bits_of<float>(0x7fc00000u);
    }
    const float factor = bits_of<float>((254u - exponent) << 23);
#pragma unroll
    for (int j = 0; j < (kDigitRow + 127) / 128; ++j) {
      const int d = lane * 4 + j * 128;
      if (d >= kDigitRow) break;
      uint32_t word[4] = {0, 0, 0, 0};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (j >= kRowPieces || d >= kD) break;
        uint32_t digit[kDecodeDigits];
        three_digits(four[j < kRowPieces ? j : 0][i] * factor, digit);
#pragma unroll
        for (int of = 0; of < kDecodeDigits; ++of) word[of] |= digit[of] << (i * 8);
      }
#pragma unroll
      for (int of = 0; of < 4; ++of) {
        *reinterpret_cast<uint32_t*>(digits + (g * 4 + of) * kDigitRow + d) = word[of];
      }
    }
  }
}

// Where a slot's digits are in a row: of 16 slots, as a transposed matrix brings their values, 0,
// 1, 8, 9, 2, 3, 10, 11, ...
template <typename Case>
LESS_DEVICE int DecodeBlock<Case>::digit_at(int slot) {
  return (slot & ~15) | (slot & 6) << 1 | (slot & 8) >> 2 | (slot & 1);
}

// item: query of a range.
template <typename Case>
LESS_DEVICE void DecodeBlock<Case>::keep_digits(int item, int slot, float mass, float scale) const {
  uint32_t digit[kDecodeDigits];
  three_digits(mass * scale, digit);
  int8_t* const to = s.digits() + item * kDecodeDigits * plan.digits + digit_at(slot);
#pragma unroll
  for (int of = 0; of < kDecodeDigits; ++of) to[of * plan.digits] = int8_t(digit[of]);
}

// What a thread and its neighbour have of two rows of a product and one query, in units of
// kDigitUnit: of the first row for the even of the two, of the second for the odd.
template <typename Case>
LESS_DEVICE float DecodeBlock<Case>::sum_of_digits(const int32_t (&acc)[4]) {
  const bool odd = threadIdx.x % 2 == 1;
  const float even_first = fmaf(float(acc[0]), 65536.0f, float(acc[1]) * 256.0f);
  const float even_second = fmaf(float(acc[2]), 65536.0f, float(acc[3]) * 256.0f);
  const float first = odd ? float(acc[0]) : even_first;
  const float second = odd ? float(acc[2]) : even_second;
  return (odd ? second : first) + __shfl_xor_sync(0xffffffffu, odd ? first : second, 1);
}

// Where chunk c of row r0 + r is in a tile; r0 is a multiple of 16.
template <typename Case>
LESS_DEVICE int DecodeBlock<Case>::place_at(int r0, int r, int c) {
  static_assert((16 * Tile::kChunks >> Tile::kShift) % (Tile::kMask + 1) == 0,
                "16 rows on, chunks lie in the same order");
  return Tile::place(r * Tile::kChunks + c) + r0 * Tile::kChunks;
}

// Slots are the rows of the product, digits of queries its columns.
template <typename Case>
LESS_DEVICE void DecodeBlock<Case>::multiply_keys_packed(const unsigned char* tile, int slot0) {
  constexpr int kSteps = (Tile::kChunks + 1) / 2;  // of 32 dims; beyond the last, digits are zeros
  const int rows = min(plan.tile, n() - slot0);
  const auto* const digits = reinterpret_cast<const unsigned char*>(s.narrow_q());
#pragma unroll 1
  for (int r0 = warp * 16; r0 < rows; r0 += kDecodeWarps * 16) {
    uint32_t keys[kSteps][4];
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      const int column = min(k * 2 + lane / 16, Tile::kChunks - 1);
      ldmatrix_x4(keys[k], tile + place_at(r0, lane % 16, column) * 16);
    }
#pragma unroll 1
    for (int g0 = 0; g0 < G; g0 += 2) {
      const unsigned char* const row = digits + (g0 * 4 + lane / 4) * kDigitRow + lane % 4 * 4;
      int32_t acc[4] = {0, 0, 0, 0};
#pragma unroll
      for (int k = 0; k < kSteps; ++k) {
        const uint32_t query[2] = {*reinterpret_cast<const uint32_t*>(row + k * 32),
                                   *reinterpret_cast<const uint32_t*>(row + k * 32 + 16)};
        mma_m16n8k32(acc, keys[k], query);
      }
      const float sum = sum_of_digits(acc);
      const int g = g0 + lane % 4 / 2;
      float* const mass = s.mass() + g * stride + slot0 + r0 + lane / 4 + lane % 2 * 8;
#pragma unroll
      for (int half = 0; half < 2; ++half) {  // 32 lanes at once would want banks twice
        if (lane % 4 / 2 == half && g < G) *mass = sum * q_scale()[g];
      }
    }
  }
}

// Of the range at hand.
template <typename Case>
LESS_DEVICE void DecodeBlock<Case>::add_values_packed() {
#pragma unroll 1
  for (int pass = 0; pass < decode_passes<T, kD, false>(G); ++pass) {
    int32_t acc[kPackedBlocks][kPackedPairs][4] = {};
#pragma unroll 1
    for (int tile = 0; tile < plan.tiles; ++tile) {
      multiply_values_packed(receive(tile, true), tile * plan.tile, pass, acc);
    }
    keep_values_packed(pass, acc);
  }
}

// Columns of values are the rows of the product, digits of masses its columns.
template <typename Case>
LESS_DEVICE void DecodeBlock<Case>::multiply_values_packed(
    const unsigned char* tile, int slot0, int pass,
    int32_t (&acc)[kPackedBlocks][kPackedPairs][4]) const {
  const int rows = min(plan.tile, n() - slot0);
  const int8_t* row[kPackedPairs];  // of digits that this lane takes; null: zeros
#pragma unroll
  for (int pair = 0; pair < kPackedPairs; ++pair) {
    const int g = pass * kHeads + pair * 2 + lane / 16, digit = lane / 4 % 4;
    const int index = (s.range * G + g) * kDecodeDigits + digit;
    row[pair] = digit < kDecodeDigits && g < G
                    ? s.digits() + index * plan.digits + slot0 + lane % 4 * 4
                    : nullptr;
  }
#pragma unroll 2
  for (int r0 = 0; r0 < rows; r0 += 32) {
    uint32_t mass[kPackedPairs][2];
#pragma unroll
    for (int pair = 0; pair < kPackedPairs; ++pair) {
      mass[pair][0] = mass[pair][1] = 0;
      if (row[pair] != nullptr) {
        mass[pair][0] = *reinterpret_cast<const uint32_t*>(row[pair] + r0);
        mass[pair][1] = *reinterpret_cast<const uint32_t*>(row[pair] + r0 + 16);
      }
    }
#pragma unroll
    for (int i = 0; i < kPackedBlocks; ++i) {
      const int block = i * kDecodeWarps + warp;
      if (block >= kBlocks) break;
      // Transposed in pairs of columns: a thread has columns 2 i and 2 i + 1 of two slots.
      uint32_t pairs[4];
      ldmatrix_x4_trans(pairs, tile + place_at(r0, lane, block) * 16);
      const uint32_t values[4] = {
          __byte_perm(pairs[0], pairs[1], 0x6420), __byte_perm(pairs[0], pairs[1], 0x7531),
          __byte_perm(pairs[2], pairs[3], 0x6420), __byte_perm(pairs[2], pairs[3], 0x7531)};
#pragma unroll
      for (int pair = 0; pair < kPackedPairs; ++pair) {
        if (pass * kHeads + pair * 2 >= G) break;
        mma_m16n8k32(acc[i][pair], values, mass[pair]);
      }
    }
  }
}

template <typename Case>
LESS_DEVICE void DecodeBlock<Case>::keep_values_packed(
    int pass, const int32_t (&acc)[kPackedBlocks][kPackedPairs][4]) {
  const float unit = *value_unit() * kDigitUnit;
#pragma unroll
  for (int i = 0; i < kPackedBlocks; ++i) {
    const int block = i * kDecodeWarps + warp;
    if (block >= kBlocks) break;
#pragma unroll
    for (int pair = 0; pair < kPackedPairs; ++pair) {
      const float sum = sum_of_digits(acc[i][pair]);
      const int g = pass * kHeads + pair * 2 + lane % 4 / 2;
      const int d = block * 16 + lane / 4 * 2 + lane % 2;
#pragma unroll
      for (int half = 0; half < 2; ++half) {  // 32 lanes at once would want banks twice
        if (lane % 4 / 2 == half && g < G) s.part()[at.value + g * kD + d] = sum * unit;
      }
    }
  }
}

}  // namespace less::cuda
