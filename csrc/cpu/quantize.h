// One row as int8 with a scale: x = scale * int8, scale = max|x| / 127.
#pragma once

#include "cpu/simd.h"

namespace less::cpu::LESS_ISA {

// The bits of the largest |x|, NaN above infinity: as integers, those of |x| are in order.
template <typename T>
LESS_INLINE uint32_t largest_bits(const T* x, int64_t D) {
  constexpr int kV = Vec::kSize;
  Int top(0);
  int64_t d = 0;
  for (; d + kV <= D; d += kV) {
    const Int a = as_int(abs(Vec::load(x + d)));
    top = select(a > top, a, top);
  }
  if (d < D) {
    const Int a = as_int(abs(Vec::load(x + d, int(D - d))));
    top = select(a > top, a, top);
  }
  float part[kV];
  as_vec(top).store(part);
  uint32_t largest = 0;
  for (int i = 0; i < kV; ++i) {
    const uint32_t bits = float_to_bits(part[i]);
    largest = bits > largest ? bits : largest;
  }
  return largest;
}

// Writes out [D] and returns the scale. To the nearest, of ties the even. NaN or infinity in x
// makes the scale so and out 0, and a row so small that its scale underflows is 0.
template <typename T>
LESS_INLINE float quantize_row(const T* x, int64_t D, int8_t* out) {
  constexpr int kV = Vec::kSize;
  const float scale = bits_to_float(largest_bits(x, D)) / 127.0f;
  if (!(scale > 0.0f && scale < kInfinity)) {
    for (int64_t d = 0; d < D; ++d) out[d] = 0;
    return scale;
  }
  const Vec step(scale);
  int64_t d = 0;
  for (; d + kV <= D; d += kV) (Vec::load(x + d) / step).store(out + d);
  if (d < D) (Vec::load(x + d, int(D - d)) / step).store(out + d, int(D - d));
  return scale;
}

}  // namespace less::cpu::LESS_ISA
