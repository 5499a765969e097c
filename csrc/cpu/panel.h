// The product at the bottom of everything that has many rows: C = A B, where B and C are panels.
//
// A panel [n][kLanes] holds a number for each of n things and kLanes rows side by side: one vector
// lane is one row (a query, an evicted token) all the way through, so that maxima, sums, masks and
// functions never cross lanes. A's entries are broadcast. A group of rows of C stays in registers
// while k runs; k ascends in one chain of fma per element, so neither the grouping, nor the other
// lanes, nor how the lanes are split into panels changes a bit.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "cpu/simd.h"

namespace less::cpu::LESS_ISA {

constexpr int kPanelVecs = 2;
constexpr int64_t kLanes = kPanelVecs * Vec::kSize;

// Vectors that fit in registers, less those of B and one of A.
#if defined(LESS_ISA_avx2)
constexpr int kAccumulators = 12;  // of 16 registers
#elif defined(__AVX512F__)
constexpr int kAccumulators = 24;  // of 32
#elif defined(__aarch64__)
constexpr int kAccumulators = 12;  // two registers each, of 32
#else
constexpr int kAccumulators = 4;  // two registers each, of 16
#endif

// Rows of C that are computed together, each kVecs vectors wide.
template <int kVecs>
constexpr int kGroup = kAccumulators / kVecs;

// f(group, i), the group being the constant n, 0 < n <= kMost.
template <int kMost, typename F>
LESS_INLINE void one_group(int64_t n, int64_t i, F f) {
  if (n == kMost) return f(std::integral_constant<int, kMost>{}, i);
  if constexpr (kMost > 1) one_group<kMost - 1>(n, i, f);
}

// f(group, i) for 0 <= i < n in steps of `group`, a constant of at most kMost. The last two share
// what is left, so that neither is too small to keep the fma units busy.
template <int kMost, typename F>
LESS_INLINE void for_groups(int64_t n, F f) {
  int64_t i = 0;
  for (; n - i >= 2 * kMost || n - i == kMost; i += kMost) {
    f(std::integral_constant<int, kMost>{}, i);
  }
  const int64_t left = n - i;
  if (left > kMost) {
    one_group<kMost>((left + 1) / 2, i, f);
    one_group<kMost>(left / 2, i + (left + 1) / 2, f);
  } else if (left > 0) {
    one_group<kMost>(left, i, f);
  }
}

template <int kRows, int kVecs>
LESS_INLINE void zero(Vec (&c)[kRows][kVecs]) {
  for (int i = 0; i < kRows; ++i) {
    for (int j = 0; j < kVecs; ++j) c[i][j] = Vec(0.0f);
  }
}

// c[i][j] += sum_k a[i * row + k * column] b[k * stride + j]; one of row and column should be the
// constant 1.
template <int kRows, int kVecs, typename T>
LESS_INLINE void add_product(const float* a, int64_t row, int64_t column, const T* b,
                             int64_t stride, int64_t count, Vec (&c)[kRows][kVecs]) {
  for (int64_t k = 0; k < count; ++k) {
    Vec lane[kVecs];
    for (int j = 0; j < kVecs; ++j) lane[j] = Vec::load(b + k * stride + j * Vec::kSize);
    for (int i = 0; i < kRows; ++i) {
      const Vec x(a[i * row + k * column]);
      for (int j = 0; j < kVecs; ++j) c[i][j] = fma(x, lane[j], c[i][j]);
    }
  }
}

// c[i * stride + lane] = sum_k a[i * row + k * column] b[k][lane], i < n, k < count. By itself, so
// that what is done with c afterwards takes no register from the product.
[[gnu::noinline]] inline void panel_product(const float* a, int64_t row, int64_t column, int64_t n,
                                            int64_t count, const float* b, float* c,
                                            int64_t stride) {
  for_groups<kGroup<kPanelVecs>>(n, [&](auto group, int64_t i) {
    Vec sums[group][kPanelVecs];
    zero(sums);
    add_product<group, kPanelVecs>(a + i * row, row, column, b, kLanes, count, sums);
    for (int g = 0; g < group; ++g) {
      for (int j = 0; j < kPanelVecs; ++j) sums[g][j].store(c + (i + g) * stride + j * Vec::kSize);
    }
  });
}

// Products in one chain of fma of a dot product that an exponential follows: short, since what a
// logit is off by, its e^l is off by.
constexpr int64_t kChain = 16;

// l[i][j] = sum_k a[i * count + k] b[k][j], in chains.
template <int kRows, int kVecs>
LESS_INLINE void chained_products(const float* a, const float* b, int64_t count,
                                  Vec (&l)[kRows][kVecs]) {
  zero(l);
  for (int64_t k = 0; k < count; k += kChain) {
    Vec part[kRows][kVecs];
    zero(part);
    add_product<kRows, kVecs>(a + k, count, 1, b + k * kLanes, kLanes, std::min(kChain, count - k),
                              part);
    for (int i = 0; i < kRows; ++i) {
      for (int j = 0; j < kVecs; ++j) l[i][j] = l[i][j] + part[i][j];
    }
  }
}

// Writes row x [n] into lane `lane` of a panel [n][kLanes].
LESS_INLINE void put_lane(const float* x, int64_t n, int64_t lane, float* panel) {
  for (int64_t i = 0; i < n; ++i) panel[i * kLanes + lane] = x[i];
}

LESS_INLINE void take_lane(const float* panel, int64_t n, int64_t lane, float* x) {
  for (int64_t i = 0; i < n; ++i) x[i] = panel[i * kLanes + lane];
}

}  // namespace less::cpu::LESS_ISA
