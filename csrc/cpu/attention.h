// The inner loops of attention: rows of queries against a list of keys and values.
//
// Rows that are not float, or whose length is not a multiple of eight, are widened a tile at a time
// into scratch padded with zeros, once for all queries; others are read where they lie.
#pragma once

#include <cstring>
#include <type_traits>
#include <vector>

#include "cpu/features.h"

namespace less::cpu::LESS_ISA {

constexpr int64_t kTile = 64;  // keys or values per tile

LESS_INLINE int64_t padded(int64_t n) { return (n + Vec::kSize - 1) / Vec::kSize * Vec::kSize; }

// Up to kTile rows as float, each readable to padded(D).
template <typename T>
class Tile {
 public:
  explicit Tile(int64_t D) : D_(D), width_(padded(D)) {
    if (!in_place()) scratch_.assign(kTile * width_, 0.0f);
  }

  void load(const T* const* rows, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
      if constexpr (std::is_same_v<T, float>) {
        if (in_place()) {
          row_[i] = rows[i];
          continue;
        }
      }
      float* copy = scratch_.data() + i * width_;
      widen(rows[i], D_, copy);
      row_[i] = copy;
    }
    // A group of four may reach past the end: it reads the last row again, and nobody the result.
    for (int64_t i = count; i % 4 != 0; ++i) row_[i] = row_[count - 1];
  }

  const float* row(int64_t i) const { return row_[i]; }

 private:
  bool in_place() const { return std::is_same_v<T, float> && D_ == width_; }

  int64_t D_;
  int64_t width_;
  std::vector<float> scratch_;
  const float* row_[kTile];
};

// logit[m][n] = q[m] . k[n] for kRows queries and four keys.
template <int kRows>
LESS_INLINE void dot_group(const float* q, int64_t width, const float* const* k, float* logit,
                           int64_t stride, int64_t count) {
  Vec a[kRows][4];
  for (int m = 0; m < kRows; ++m) {
    for (int n = 0; n < 4; ++n) a[m][n] = Vec(0.0f);
  }
  for (int64_t d = 0; d < width; d += Vec::kSize) {
    Vec key[4];
    for (int n = 0; n < 4; ++n) key[n] = Vec::load(k[n] + d);
    for (int m = 0; m < kRows; ++m) {
      const Vec query = Vec::load(q + m * width + d);
      for (int n = 0; n < 4; ++n) a[m][n] = fma(query, key[n], a[m][n]);
    }
  }
  for (int m = 0; m < kRows; ++m) {
    float total[4];
    sum(a[m], total);
    for (int64_t n = 0; n < 4 && n < count; ++n) logit[m * stride + n] = total[n];
  }
}

// logit[m * stride + n] = scale * q[m] . k[n], m < rows, n < N; q padded to `width` with zeros.
template <typename T>
void dots(const float* q, int64_t rows, int64_t width, const T* const* k, int64_t N, float scale,
          Tile<T>& tile, float* logit, int64_t stride) {
  for (int64_t n0 = 0; n0 < N; n0 += kTile) {
    const int64_t count = N - n0 < kTile ? N - n0 : kTile;
    tile.load(k + n0, count);
    for (int64_t n = 0; n < count; n += 4) {
      const float* key[4] = {tile.row(n), tile.row(n + 1), tile.row(n + 2), tile.row(n + 3)};
      float* l = logit + n0 + n;
      int64_t m = 0;
      for (; m + 2 <= rows; m += 2) {
        dot_group<2>(q + m * width, width, key, l + m * stride, stride, count - n);
      }
      if (m < rows) dot_group<1>(q + m * width, width, key, l + m * stride, stride, count - n);
    }
  }
  for (int64_t m = 0; m < rows; ++m) {
    for_each(logit + m * stride, N, [scale](Vec l, int64_t, int) { return l * Vec(scale); });
  }
}

// out[m][d] += sum_n p[m][n] v[n][d] for kRows rows and kVecs vectors of d; n ascending.
template <int kRows, int kVecs>
LESS_INLINE void weighted_group(const float* p, int64_t stride, const float* const* v,
                                int64_t count, int64_t d, float* out, int64_t width) {
  Vec a[kRows][kVecs];
  for (int m = 0; m < kRows; ++m) {
    for (int j = 0; j < kVecs; ++j) a[m][j] = Vec::load(out + m * width + d + j * Vec::kSize);
  }
  for (int64_t n = 0; n < count; ++n) {
    Vec value[kVecs];
    for (int j = 0; j < kVecs; ++j) value[j] = Vec::load(v[n] + d + j * Vec::kSize);
    for (int m = 0; m < kRows; ++m) {
      const Vec weight(p[m * stride + n]);
      for (int j = 0; j < kVecs; ++j) a[m][j] = fma(weight, value[j], a[m][j]);
    }
  }
  for (int m = 0; m < kRows; ++m) {
    for (int j = 0; j < kVecs; ++j) a[m][j].store(out + m * width + d + j * Vec::kSize);
  }
}

template <int kRows>
LESS_INLINE void weighted_rows(const float* p, int64_t stride, const float* const* v, int64_t count,
                               float* out, int64_t width) {
  int64_t d = 0;
  for (; d + 4 * Vec::kSize <= width; d += 4 * Vec::kSize) {
    weighted_group<kRows, 4>(p, stride, v, count, d, out, width);
  }
  for (; d < width; d += Vec::kSize) {
    weighted_group<kRows, 1>(p, stride, v, count, d, out, width);
  }
}

// out[m * width + d] += sum_n p[m * stride + n] v[n][d], m < rows, n < N.
template <typename T>
void weighted_sum(const float* p, int64_t rows, int64_t stride, const T* const* v, int64_t N,
                  Tile<T>& tile, float* out, int64_t width) {
  for (int64_t n0 = 0; n0 < N; n0 += kTile) {
    const int64_t count = N - n0 < kTile ? N - n0 : kTile;
    tile.load(v + n0, count);
    const float* row[kTile];
    for (int64_t i = 0; i < count; ++i) row[i] = tile.row(i);
    int64_t m = 0;
    for (; m + 2 <= rows; m += 2) {
      weighted_rows<2>(p + m * stride + n0, stride, row, count, out + m * width, width);
    }
    if (m < rows) weighted_rows<1>(p + m * stride + n0, stride, row, count, out + m * width, width);
  }
}

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

LESS_INLINE float largest_of(const float* x, int64_t n) {
  Vec top(-kInfinity);
  int64_t i = 0;
  for (; i + Vec::kSize <= n; i += Vec::kSize) top = max(top, Vec::load(x + i));
  if (i < n) top = max(top, Vec::load(x + i, int(n - i), -kInfinity));
  return max_of(top);
}

}  // namespace less::cpu::LESS_ISA
