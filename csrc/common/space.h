// The space of a layer's rows; less/layer/space.py is the same in Python.
//
//   k' = W ((k - key_mean) key_in)    q' = W (q query_in)    v' = W ((v - value_mean) value_in)
//   out = W (out') value_out + value_mean,  W: the butterflies of a Hadamard matrix, blockwise
//
// Order: length 1, 2, 4, ... below the block; every pair (i, i + length) becomes its sum and its
// difference. Each operation is one float rounding.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace less {

// Float [K, D] each; null where rows are stored as they come.
struct Space {
  const float* key_mean;
  const float* key_in;
  const float* query_in;
  const float* value_mean;
  const float* value_in;
  const float* value_out;
};

// Numbers that one Hadamard matrix mixes.
LESS_HD constexpr int64_t hadamard_block(int64_t D) { return D & -D; }

// What a row is taken through.
// `rounded_query` is of packed formats: rounded to 8 bits with a scale each, as a row of i8.
enum class Rotation : int32_t { query = 0, key = 1, value = 2, output = 3, rounded_query = 4 };

// How queries enter the space of a layer whose values are of a dtype.
LESS_HD constexpr Rotation query_rotation(DType v_dtype) {
  return packed(v_dtype) ? Rotation::rounded_query : Rotation::query;
}

}  // namespace less
