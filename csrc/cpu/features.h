// One row through a feature map, by the kernels that evaluate maps.
//
//   hidden = gelu(x W1)     paper: y = gelu(hidden W2); psi: |h + (h A) s2|, h = |s1| y; phi: |y|
//                           exp:   y = exp(clamp(hidden W2 + bias, +-15))
//   centroid: l = factor x C + bias; phi: exp(clamp(l, +-15))
//             psi: softmax(l) exp(clamp(x weight + offset, +-15))
//
// Order: d, e and r ascending in four interleaved sums, the same for every row and any batch.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>

#include "cpu/simd.h"
#include "cpu/types.h"
#include "params.h"

namespace less::cpu::LESS_ISA {

constexpr float kExpClamp = 15.0f;

// kVecs vectors of out from column c on: sum_i x[i] w[i, c..), w row-major [count, n].
template <int kVecs, typename W>
LESS_INLINE void row_times_columns(const float* x, const W* w, int64_t count, int64_t n, int64_t c,
                                   float* out) {
  Vec a[kVecs];
  for (int j = 0; j < kVecs; ++j) a[j] = Vec(0.0f);
  for (int64_t i = 0; i < count; ++i) {
    const Vec xi(x[i]);
    const W* row = w + i * n + c;
    for (int j = 0; j < kVecs; ++j) a[j] = fma(xi, Vec::load(row + j * Vec::kSize), a[j]);
  }
  for (int j = 0; j < kVecs; ++j) a[j].store(out + c + j * Vec::kSize);
}

// out[0..n) = sum_i x[i] w[i, 0..n), w row-major [count, n].
template <typename W>
LESS_INLINE void row_times_matrix(const float* x, const W* w, int64_t count, int64_t n,
                                  float* out) {
  constexpr int kVec = Vec::kSize;
  int64_t c = 0;
  for (; c + 8 * kVec <= n; c += 8 * kVec) row_times_columns<8>(x, w, count, n, c, out);
  for (; c + 4 * kVec <= n; c += 4 * kVec) row_times_columns<4>(x, w, count, n, c, out);
  for (; c < n; c += kVec) {
    const int width = n - c < kVec ? int(n - c) : kVec;
    Vec a[4] = {Vec(0.0f), Vec(0.0f), Vec(0.0f), Vec(0.0f)};
    int64_t i = 0;
    if (width == kVec) {
      for (; i + 4 <= count; i += 4) {
        for (int j = 0; j < 4; ++j) {
          a[j] = fma(Vec(x[i + j]), Vec::load(w + (i + j) * n + c), a[j]);
        }
      }
    } else {
      for (; i + 4 <= count; i += 4) {
        for (int j = 0; j < 4; ++j) {
          a[j] = fma(Vec(x[i + j]), Vec::load(w + (i + j) * n + c, width), a[j]);
        }
      }
    }
    for (; i < count; ++i) a[0] = fma(Vec(x[i]), Vec::load(w + i * n + c, width), a[0]);
    const Vec total = (a[0] + a[1]) + (a[2] + a[3]);
    total.store(out + c, width);
  }
}

template <typename F>
LESS_INLINE void for_each(float* x, int64_t n, F f) {
  int64_t i = 0;
  for (; i + Vec::kSize <= n; i += Vec::kSize) f(Vec::load(x + i), i, Vec::kSize).store(x + i);
  if (i < n) {
    const int tail = int(n - i);
    f(Vec::load(x + i, tail), i, tail).store(x + i, tail);
  }
}

// e^x of numbers within +-kExpClamp; NaN stays NaN.
LESS_INLINE Vec exp_clamped(Vec x) { return exp(min(Vec(kExpClamp), max(Vec(-kExpClamp), x))); }

// sum_i x[i] w[i]
LESS_INLINE float dot(const float* x, const float* w, int64_t n) {
  Vec total(0.0f);
  for (int64_t i = 0; i < n; i += Vec::kSize) {
    const int some = int(std::min<int64_t>(Vec::kSize, n - i));
    total = fma(load_some(x + i, some), load_some(w + i, some), total);
  }
  return sum(total);
}

template <typename W>
void centroid_features(const FeatureMaps& m, int64_t head, const float* x, float* y) {
  const int64_t shared = head / m.group;
  row_times_matrix(x, static_cast<const W*>(m.w1) + shared * m.D * m.R, m.D, m.R, y);
  if constexpr (std::is_same_v<W, int8_t>) {
    const float* s = m.w1_scale + shared * m.R;
    for_each(y, m.R, [s](Vec a, int64_t i, int n) { return a * load_some(s + i, n); });
  }
  const Vec factor(m.factor[head]);
  const float* bias = m.bias + head * m.R;
  const bool phi = m.weight == nullptr;
  for_each(y, m.R, [=](Vec a, int64_t i, int n) {
    a = fma(a, factor, load_some(bias + i, n));
    return phi ? exp_clamped(a) : a;
  });
  if (phi) return;
  float top = y[0], total = 0.0f;
  for (int64_t r = 1; r < m.R; ++r) top = std::max(top, y[r]);
  for_each(y, m.R, [top](Vec a, int64_t, int) { return exp(a - Vec(top)); });
  for (int64_t r = 0; r < m.R; ++r) total += y[r];
  float mass = dot(x, m.weight + head * m.D, m.D) + m.offset[head];
  exp_clamped(Vec(mass)).store(&mass, 1);
  const Vec each(mass / total);
  for_each(y, m.R, [each](Vec a, int64_t, int) { return a * each; });
}

template <typename W>
void features_of(const FeatureMaps& m, int64_t head, const float* x, float* scratch, float* y) {
  if (m.kind == MapKind::centroid) return centroid_features<W>(m, head, x, y);
  float* hidden = scratch;
  row_times_matrix(x, static_cast<const W*>(m.w1) + head * m.D * m.E, m.D, m.E, hidden);
  if constexpr (std::is_same_v<W, int8_t>) {
    const float* s = m.w1_scale + head * m.E;
    for_each(hidden, m.E, [s](Vec a, int64_t i, int n) { return a * load_some(s + i, n); });
  }
  for_each(hidden, m.E, [](Vec a, int64_t, int) { return gelu(a); });
  row_times_matrix(hidden, static_cast<const W*>(m.w2) + head * m.E * m.R, m.E, m.R, y);
  if constexpr (std::is_same_v<W, int8_t>) {
    const float* s = m.w2_scale + head * m.R;
    for_each(y, m.R, [s](Vec a, int64_t i, int n) { return a * load_some(s + i, n); });
  }
  if (m.kind == MapKind::exp) {
    const float* bias = m.bias == nullptr ? nullptr : m.bias + head * m.R;
    for_each(y, m.R, [bias](Vec a, int64_t i, int n) {
      if (bias != nullptr) a = a + load_some(bias + i, n);
      return exp_clamped(a);
    });
    return;
  }
  if (m.mix == nullptr) {
    for_each(y, m.R, [](Vec a, int64_t, int) { return abs(gelu(a)); });
    return;
  }
  const float* s1 = m.scale + head * m.R;
  const float* s2 = m.mix_scale + head * m.R;
  for_each(y, m.R, [s1](Vec a, int64_t i, int n) { return abs(load_some(s1 + i, n)) * gelu(a); });
  float* mixed = scratch + m.E;
  row_times_matrix(y, m.mix + head * m.R * m.R, m.R, m.R, mixed);
  for_each(y, m.R, [s2, mixed](Vec h, int64_t i, int n) {
    return abs(fma(load_some(mixed + i, n), load_some(s2 + i, n), h));
  });
}

// y [R] = map of head `head` at x [D]; scratch holds features_scratch() floats.
inline void features(const FeatureMaps& m, int64_t head, const float* x, float* scratch, float* y) {
  with_type<RowTypes>(m.w_dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    features_of<T>(m, head, x, scratch, y);
  });
}

inline int64_t features_scratch(const FeatureMaps& m) { return m.E + 2 * m.R; }

// out[0..n) = x[0..n), widened.
template <typename T>
LESS_INLINE void widen(const T* x, int64_t n, float* out) {
  int64_t i = 0;
  for (; i + Vec::kSize <= n; i += Vec::kSize) Vec::load(x + i).store(out + i);
  for (; i < n; ++i) out[i] = to_float(x[i]);
}

// The numbers that a row of slots stands for; `scale` is that of an int8 row.
template <typename T>
LESS_INLINE void widen_row(const T* x, float scale, int64_t n, float* out) {
  widen(x, n, out);
  if constexpr (std::is_same_v<T, int8_t>) {
    for_each(out, n, [scale](Vec a, int64_t, int) { return a * Vec(scale); });
  }
}

inline void widen(const void* x, DType dtype, int64_t offset, int64_t n, float* out) {
  with_type<FloatTypes>(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    widen(static_cast<const T*>(x) + offset, n, out);
  });
}

template <typename T>
LESS_INLINE void narrow(const float* x, int64_t n, T* out) {
  int64_t i = 0;
  for (; i + Vec::kSize <= n; i += Vec::kSize) Vec::load(x + i).store(out + i);
  for (; i < n; ++i) out[i] = from_float<T>(x[i]);
}

inline void narrow(const float* x, int64_t n, DType dtype, int64_t offset, void* out) {
  with_type<FloatTypes>(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    narrow(x, n, static_cast<T*>(out) + offset);
  });
}

// A row of heads becomes 0.
inline void clear_row(const HeadRows& rows, int64_t b, int64_t h, int64_t t, int64_t D) {
  const int64_t bytes = bytes_of(rows.dtype);
  std::memset(static_cast<char*>(rows.data) + offset(rows, b, h, t) * bytes, 0, D * bytes);
}

}  // namespace less::cpu::LESS_ISA
