// Many tokens into one head's low-rank state.
#pragma once

#include <cstdint>

#include "cpu/panel.h"

namespace less::cpu::LESS_ISA {

// H [R, D] += sum_n psi_n v_n^T, z [R] += sum_n psi_n; psi_n[r] is psi[r * row + n * column] and
// v_n is v + n * stride. n ascends in one chain of fma per element, whatever the split into calls.
template <typename T>
void fold_tokens(const float* psi, int64_t row, int64_t column, const T* v, int64_t stride,
                 int64_t count, int64_t R, int64_t D, float* H, float* z) {
  constexpr int kV = Vec::kSize;
  constexpr int64_t kTokens = 64;  // whose values stay in the first-level cache while r runs
  for (int64_t n0 = 0; n0 < count; n0 += kTokens) {
    const int64_t n = count - n0 < kTokens ? count - n0 : kTokens;
    const float* psi_n = psi + n0 * column;
    const T* v_n = v + n0 * stride;
    const auto columns = [&](auto vecs, int64_t d) {
      constexpr int kVecs = decltype(vecs)::value;
      for_groups<kGroup<kVecs>>(R, [&](auto group, int64_t r) {
        Vec h[group][kVecs];
        float* at = H + r * D + d;
        for (int i = 0; i < group; ++i) {
          for (int j = 0; j < kVecs; ++j) h[i][j] = Vec::load(at + i * D + j * kV);
        }
        add_product<group, kVecs>(psi_n + r * row, row, column, v_n + d, stride, n, h);
        for (int i = 0; i < group; ++i) {
          for (int j = 0; j < kVecs; ++j) h[i][j].store(at + i * D + j * kV);
        }
      });
    };
    int64_t d = 0;
    for (; d + 2 * kV <= D; d += 2 * kV) columns(std::integral_constant<int, 2>{}, d);
    for (; d + kV <= D; d += kV) columns(std::integral_constant<int, 1>{}, d);
    for (int64_t r = 0; d < D && r < R; ++r) {
      const int tail = int(D - d);
      Vec h = Vec::load(H + r * D + d, tail);
      for (int64_t i = 0; i < n; ++i) {
        h = fma(Vec(psi_n[r * row + i * column]), Vec::load(v_n + i * stride + d, tail), h);
      }
      h.store(H + r * D + d, tail);
    }
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t r = 0; r < R; ++r) z[r] += psi_n[r * row + i * column];
    }
  }
}

}  // namespace less::cpu::LESS_ISA
