// The space of a layer's rows; less/layer/space.py is the same in Python.
//
//   k' = W ((k - key_mean) (key_scale f))        q' = W (q (f / key_scale))
//   v' = W ((v - value_mean) (value_scale f))    out = W (out') (f / value_scale) + value_mean
//   W: the butterflies of a Hadamard matrix, blockwise; f: the root of 1 / block
//
// Order: length 1, 2, 4, ... below the block; every pair (i, i + length) becomes its sum and its
// difference. Each operation is one float rounding.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace less {

// The bits of fp16 [K, D] each; null where rows are stored as they come. Scales have the signs of
// the dims.
struct Space {
  const uint16_t* key_mean;
  const uint16_t* key_scale;
  const uint16_t* value_mean;
  const uint16_t* value_scale;
};

// Numbers that one Hadamard matrix mixes.
LESS_HD constexpr int64_t hadamard_block(int64_t D) { return D & -D; }

// What makes the butterflies orthogonal.
LESS_HD constexpr float hadamard_factor(int64_t D) {
  float factor = 1.0f;
  int64_t block = hadamard_block(D);
  for (; block >= 4; block /= 4) factor *= 0.5f;
  return block == 2 ? factor * 0.70710678118654752f : factor;
}

// What a row is taken through.
// `rounded_query` is of packed formats: rounded to 8 bits with a scale each, as a row of i8.
enum class Rotation : int32_t { query = 0, key = 1, value = 2, output = 3, rounded_query = 4 };

// How queries enter the space of a layer whose values are of a dtype.
LESS_HD constexpr Rotation query_rotation(DType v_dtype) {
  return packed(v_dtype) ? Rotation::rounded_query : Rotation::query;
}

}  // namespace less
