// The low-rank state of one head: a part of a softmax to queries, a sum to those who leave.
#pragma once

#include <algorithm>
#include <cmath>

#include "cpu/simd.h"

namespace less::cpu::LESS_ISA {

// The state as one more part of a query's softmax, with log-mass log(phi z) and value phi H / phi
// z.
//
// out [D], padded to whole vectors, holds sum e^(l - top) v / total of the kept tokens and becomes
// the attention over both; every exponent is <= 0. A state without mass counts nothing; NaN
// in its mass, or in its H, is NaN in out. Returns the state's share of the mass.
LESS_INLINE float merge_state(const float* phi, const float* H, const float* z, int64_t R,
                              int64_t D, float top, float total, float* out) {
  float low = 0.0f;
  for (int64_t r = 0; r < R; ++r) low += phi[r] * z[r];
  float kept = 1.0f, share = 0.0f, factor = 0.0f;
  if (!(low <= 0.0f)) {
    const float log_low = std::log(low);
    const float both = std::max(top, log_low);
    const float kept_mass = std::exp(top - both) * total;
    const float low_mass = std::exp(log_low - both);
    const float inverse = 1.0f / (kept_mass + low_mass);
    kept = kept_mass * inverse;  // out is already divided by total
    share = low_mass * inverse;
    factor = share / low;
  }
  const Vec kept_part(kept), low_part(factor);
  constexpr int kVecs = 4;
  int64_t d = 0;
  for (; d + kVecs * Vec::kSize <= D; d += kVecs * Vec::kSize) {
    Vec a[kVecs];
    for (int j = 0; j < kVecs; ++j) a[j] = Vec(0.0f);
    for (int64_t r = 0; r < R; ++r) {
      const Vec weight(phi[r]);
      for (int j = 0; j < kVecs; ++j) {
        a[j] = fma(weight, Vec::load(H + r * D + d + j * Vec::kSize), a[j]);
      }
    }
    for (int j = 0; j < kVecs; ++j) {
      float* o = out + d + j * Vec::kSize;
      fma(a[j], low_part, Vec::load(o) * kept_part).store(o);
    }
  }
  for (; d < D; d += Vec::kSize) {
    const int n = int(std::min<int64_t>(Vec::kSize, D - d));
    Vec a(0.0f);
    for (int64_t r = 0; r < R; ++r) {
      const float* h = H + r * D + d;
      a = fma(Vec(phi[r]), n == Vec::kSize ? Vec::load(h) : Vec::load(h, n), a);
    }
    fma(a, low_part, Vec::load(out + d) * kept_part).store(out + d);
  }
  return share;
}

// H [R, D] += psi v^T, z [R] += psi.
LESS_INLINE void fold_token(const float* psi, const float* v, int64_t R, int64_t D, float* H,
                            float* z) {
  for (int64_t r = 0; r < R; ++r) {
    z[r] += psi[r];
    const Vec weight(psi[r]);
    float* h = H + r * D;
    int64_t d = 0;
    for (; d + Vec::kSize <= D; d += Vec::kSize) {
      fma(weight, Vec::load(v + d), Vec::load(h + d)).store(h + d);
    }
    if (d < D) {
      const int tail = int(D - d);
      fma(weight, Vec::load(v + d, tail), Vec::load(h + d, tail)).store(h + d, tail);
    }
  }
}

}  // namespace less::cpu::LESS_ISA
