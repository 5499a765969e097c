// Maps by centroids (cpu/features.h has the formula), for every kernel that evaluates them: the
// products of a row in shared memory with R centroids and, of psi, with its weight, and what
// becomes of them.
#pragma once

#include "cuda/convert.h"
#include "cuda/features.h"

namespace less::cuda {

// Element i of a map's matrix.
LESS_DEVICE float map_element(DType dtype, const void* w, int64_t i) {
  // narrow: a lane an element of a matrix, side by side
  if (dtype == DType::f32) return static_cast<const float*>(w)[i];
  // narrow: a lane an element of a matrix, side by side
  if (dtype == DType::i8) return float(static_cast<const int8_t*>(w)[i]);
  // narrow: a lane an element of a matrix, side by side
  const uint16_t bits = static_cast<const uint16_t*>(w)[i];
  return dtype == DType::bf16 ? bits_of<float>(uint32_t(bits) << 16)
                              : __half2float(bits_of<__half>(bits));
}

// Numbers that a row is multiplied into: one of each centroid and, of psi, that of its mass.
LESS_HD int centroid_numbers(const FeatureMaps& m) { return int(m.R) + (m.weight != nullptr); }

// Product i of row x [D] in shared memory, of the dims d0, d0 + step, ...
LESS_DEVICE float centroid_product(const FeatureMaps& m, int64_t head, int i, const float* x,
                                   int d0, int step) {
  const int D = int(m.D), R = int(m.R);
  const bool mass = i == R;
  const void* const w = mass ? m.weight : m.w1;
  const DType dtype = mass ? DType::f32 : m.w_dtype;
  const int64_t first = mass ? head * D : head / m.group * D * R + i;
  const int row = mass ? 1 : R;
  float sum = 0.0f;
#pragma unroll 4
  for (int d = d0; d < D; d += step) sum = fmaf(x[d], map_element(dtype, w, first + d * row), sum);
  return sum;
}

// From product i: phi's feature; or psi's logit, and its mass where i is R.
LESS_DEVICE float centroid_number(const FeatureMaps& m, int64_t head, int i, float product) {
  const int R = int(m.R);
  // narrow: one number of a head, alone
  if (i == R) return exp_clamped(clamped(product + m.offset[head]));
  // narrow: a lane a feature, side by side
  if (m.w1_scale != nullptr) product *= m.w1_scale[head / m.group * R + i];
  // narrow: a lane a feature, side by side
  const float logit = fmaf(product, m.factor[head], m.bias[head * R + i]);
  return m.weight == nullptr ? exp_clamped(clamped(logit)) : logit;
}

// Feature r of psi from the R + 1 numbers of a row.
LESS_DEVICE float centroid_psi(const float* numbers, int R, int r) {
  float top = numbers[0], total = 0.0f;
#pragma unroll 1
  for (int i = 1; i < R; ++i) top = fmaxf(top, numbers[i]);
#pragma unroll 1
  for (int i = 0; i < R; ++i) total += expf(numbers[i] - top);
  return expf(numbers[r] - top) * (numbers[R] / total);
}

// A key [D] in shared memory leaves its space, without the space's mean. Thread t of `threads`
// that call it, which sync() orders; ends with x visible to all of them.
template <typename Sync>
LESS_DEVICE void key_out_of_space(const Space& space, int64_t head, int D, int t, int threads,
                                  const Sync& sync, float* x) {
  const int block = int(hadamard_block(D));
#pragma unroll 1
  for (int length = 1; length < block; length *= 2) {
#pragma unroll 1
    for (int i = t; i < D / 2; i += threads) {
      float* const pair = x + i / length * 2 * length + i % length;
      const float a = pair[0], b = pair[length];
      pair[0] = __fadd_rn(a, b);
      pair[length] = __fsub_rn(a, b);
    }
    sync();
  }
  const float factor = hadamard_factor(D);
#pragma unroll 1
  for (int d = t; d < D; d += threads) {
    // narrow: a lane a dim, side by side
    const float scale = widened(bits_of<__half>(space.key_scale[head * D + d]));
    x[d] = __fmul_rn(x[d], __fdiv_rn(factor, scale));
  }
  sync();
}

}  // namespace less::cuda
