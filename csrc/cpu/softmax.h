// The inner loops of a softmax over one row of logits.
#pragma once

#include <cmath>
#include <cstdint>

#include "cpu/simd.h"

namespace less::cpu::LESS_ISA {

LESS_INLINE int64_t padded(int64_t n) { return (n + Vec::kSize - 1) / Vec::kSize * Vec::kSize; }

// A logit held within +-cap.
LESS_INLINE Vec soft_cap(Vec x, float cap) { return Vec(cap) * tanh(x / Vec(cap)); }

// x[0..n) = e^(x - largest); the sum. x may hold -inf; largest is finite.
LESS_INLINE float exp_and_sum(float* x, int64_t n, float largest) {
  const Vec top(largest);
  Vec total(0.0f);
  int64_t i = 0;
  for (; i + Vec::kSize <= n; i += Vec::kSize) {
    const Vec e = exp(Vec::load(x + i) - top);
    e.store(x + i);
    total = total + e;
  }
  if (i < n) {
    const int tail = int(n - i);
    const Vec e = exp(Vec::load(x + i, tail, -kInfinity) - top);
    e.store(x + i, tail);
    total = total + e;
  }
  return sum(total);
}

// The same where every x counts as many times as counts [S] says, and those after the Sth once. n:
// a multiple of Vec::kSize.
LESS_INLINE float exp_and_sum(float* x, int64_t n, float largest, const whole16* counts,
                              int64_t S) {
  const Vec top(largest);
  Vec total(0.0f);
  for (int64_t i = 0; i < n; i += Vec::kSize) {
    Vec e = exp(Vec::load(x + i) - top);
    if (i + Vec::kSize <= S) {
      e = e * Vec::load(counts + i);
    } else if (i < S) {
      e = e * Vec::load(counts + i, int(S - i), 1.0f);
    }
    e.store(x + i);
    total = total + e;
  }
  return sum(total);
}

// What a score keeps after so many tokens.
inline float power(float decay, int64_t tokens) {
  return decay == 1.0f ? 1.0f : float(std::pow(double(decay), double(tokens)));
}

LESS_INLINE float largest_of(const float* x, int64_t n) {
  Vec top(-kInfinity);
  int64_t i = 0;
  for (; i + Vec::kSize <= n; i += Vec::kSize) top = max(top, Vec::load(x + i));
  if (i < n) top = max(top, Vec::load(x + i, int(n - i), -kInfinity));
  return max_of(top);
}

}  // namespace less::cpu::LESS_ISA
