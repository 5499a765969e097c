// One row through the space of a layer's rows (common/space.h).
#pragma once

#include <algorithm>

#include "common/space.h"
#include "cpu/features.h"
#include "cpu/simd.h"

namespace less::cpu::LESS_ISA {

// x [D] times the Hadamard matrix of +-1, blockwise, in place; the order is that of space.h.
LESS_INLINE void butterflies(float* x, int64_t D) {
  const int64_t block = hadamard_block(D);
  for (int64_t length = 1; length < block; length *= 2) {
    for (int64_t first = 0; first < D; first += 2 * length) {
      for (int64_t i = first; i < first + length; ++i) {
        const float a = x[i], b = x[i + length];
        x[i] = a + b;
        x[i + length] = a - b;
      }
    }
  }
}

// x [D] of kv head `head` becomes what the rotation makes of it.
LESS_INLINE void rotate_row(const Space& space, Rotation rotation, int64_t head, int64_t D,
                            float* x) {
  const int64_t at = head * D;
  const auto into = [&](const float* mean, const float* factor) {
    for_each(x, D, [=](Vec a, int64_t d, int n) {
      if (mean != nullptr) a = a - load_some(mean + at + d, n);
      return a * load_some(factor + at + d, n);
    });
    butterflies(x, D);
  };
  const auto out = [&](const float* factor, const float* mean) {
    butterflies(x, D);
    for_each(x, D, [=](Vec a, int64_t d, int n) {
      return a * load_some(factor + at + d, n) + load_some(mean + at + d, n);
    });
  };
  switch (rotation) {
    case Rotation::query:
      return into(nullptr, space.query_in);
    case Rotation::key:
      return into(space.key_mean, space.key_in);
    case Rotation::value:
      return into(space.value_mean, space.value_in);
    case Rotation::output:
      return out(space.value_out, space.value_mean);
  }
}

// A key back out of the space.
LESS_INLINE void key_out_of_space(const Space& space, int64_t head, int64_t D, float* x) {
  butterflies(x, D);
  for_each(x, D, [&](Vec a, int64_t d, int n) {
    return a * load_some(space.query_in + head * D + d, n) +
           load_some(space.key_mean + head * D + d, n);
  });
}

}  // namespace less::cpu::LESS_ISA
