// What the kernels that evaluate feature maps share: the nonlinearities, and the end of a map.
//
//   paper: phi = |gelu(y)|; psi = |h + (h A) s2|, h = |s1| gelu(y)     exp: e^clamp(y + bias, +-15)
#pragma once

#include "cuda/device.h"
#include "params.h"

namespace less::cuda {

constexpr float kExpClamp = 15.0f;

// x (1 + erf(x / sqrt 2)) / 2, the exact gelu; error at most 4e-7 + an ulp of x.
//
// Written as relu(x) - |x| Q(|x|), Q the upper tail of the normal distribution, so that nothing
// cancels at either end. Q(a) = e^(-a^2/2) t P(t), t = 1 / (1 + 0.35 a); P is a minimax polynomial
// for 0 <= a <= 15, the one of cpu/simd.h. NaN stays NaN: x is added, not compared, last.
LESS_DEVICE float gelu(float x) {
  const float a = fminf(15.0f, fabsf(x));
  const float t = __fdividef(1.0f, fmaf(a, 0.35f, 1.0f));
  float y = -0x1.ddd3dap-6f;
  y = fmaf(y, t, 0x1.270a3ep-3f);
  y = fmaf(y, t, -0x1.060c0cp-2f);
  y = fmaf(y, t, 0x1.4671d6p-3f);
  y = fmaf(y, t, -0x1.7d32a8p-6f);
  y = fmaf(y, t, 0x1.b07058p-4f);
  y = fmaf(y, t, 0x1.eac36p-4f);
  y = fmaf(y, t, 0x1.1e7136p-3f);
  y = fmaf(y, t, 0x1.1df1c0p-3f);
  const float tail = y * t * exp2_approx(a * a * -0.72134752f);
  return fmaf(-a, tail, 0.5f * (x + fabsf(x)));
}

// e^x for |x| <= kExpClamp, error at most 3e-7 of it: what rounding took from the exponent of 2
// comes back as a factor.
LESS_DEVICE float exp_clamped(float x) {
  constexpr float kLog2E = 1.44269502f, kLog2ERest = 1.92596303e-8f, kLn2 = 0.693147181f;
  const float exponent = x * kLog2E;
  const float rest = fmaf(x, kLog2ERest, fmaf(x, kLog2E, -exponent));
  const float y = exp2_approx(exponent);
  return fmaf(y, rest * kLn2, y);
}

// x within +-kExpClamp. NaN stays NaN, which fminf and fmaxf would replace.
LESS_DEVICE float clamped(float x) {
  return x < -kExpClamp ? -kExpClamp : x > kExpClamp ? kExpClamp : x;
}

// What a map has of a feature besides its sum.
struct FeatureNumbers {
  float factor;  // of the sum
  float bias;
  float scale;  // of the result
};

LESS_DEVICE FeatureNumbers feature_numbers(const FeatureMaps& m, int64_t head, int r) {
  const int64_t at = head * m.R + r;
  const bool exp = m.kind == MapKind::exp;
  FeatureNumbers of{1.0f, 0.0f, 1.0f};
  if (m.w2_scale != nullptr) of.factor = m.w2_scale[at];  // narrow: a lane a feature, side by side
  if (exp && m.bias != nullptr) of.bias = m.bias[at];     // narrow: a lane a feature, side by side
  if (!exp && m.mix != nullptr)
    of.scale = fabsf(m.scale[at]);  // narrow: a lane a feature, side by side
  return of;
}

// A feature before the mix: all of it, but for the paper's psi, where it is h_r.
LESS_DEVICE float feature(const FeatureMaps& m, const FeatureNumbers& of, float y) {
  y *= of.factor;
  if (m.kind == MapKind::exp) return exp_clamped(clamped(y + of.bias));
  y = gelu(y);
  return m.mix == nullptr ? fabsf(y) : of.scale * y;
}

LESS_DEVICE float feature(const FeatureMaps& m, int64_t head, int r, float y) {
  return feature(m, feature_numbers(m, head, r), y);
}

// Feature r of the paper's psi from all h of the token.
LESS_DEVICE float mixed_feature(const FeatureMaps& m, int64_t head, int r, const float* h) {
  const float* A = m.mix + head * m.R * m.R + r;
  float sum = 0.0f;
#pragma unroll 4
  // narrow: a lane a feature, side by side
  for (int q = 0; q < m.R; ++q) sum = fmaf(h[q], A[q * m.R], sum);
  // narrow: a lane a feature, side by side
  return fabsf(fmaf(sum, m.mix_scale[head * m.R + r], h[r]));
}

}  // namespace less::cuda
