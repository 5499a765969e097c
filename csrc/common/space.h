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
  const float* key_shift;  // scale q'.key_shift is what the logits of a query lack
  const float* value_mean;
  const float* value_in;
  const float* value_out;
};

// Numbers that one Hadamard matrix mixes.
LESS_HD constexpr int64_t hadamard_block(int64_t D) { return D & -D; }

// What a row is taken through.
enum class Rotation : int32_t { query = 0, key = 1, value = 2, output = 3 };

}  // namespace less
