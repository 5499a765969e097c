#pragma once
#include <cmath>
#include <vector>
#include "common/codec.h"
#include "common/half.h"
#include "cpu/simd.h"
namespace less::cpu::LESS_ISA {
inline float ordered(const float* x, int64_t D) {
  float a[16] = {};
  for (int64_t d = 0; d < D; ++d) a[d % 16] = d < 16 ? x[d] : a[d % 16] + x[d];
  for (int h = 8; h > 0; h /= 2) for (int i = 0; i < h; ++i) a[i] = a[i] + a[i + h];
  return a[0];
}
inline uint16_t encode_packed(DType dtype, const float* x, int64_t D, uint8_t* row) {
  const Levels& L = levels_of(dtype);
  std::vector<float> t(D); std::vector<int> c(D);
  for (int64_t d = 0; d < D; ++d) t[d] = x[d] * x[d];
  const float rms = std::sqrt(ordered(t.data(), D) / float(D));
  for (int64_t d = 0; d < D; ++d) { c[d] = 0; for (int i = 0; i + 1 < L.count; ++i) c[d] += x[d] > rms * L.threshold[i]; }
  for (int64_t d = 0; d < D; ++d) t[d] = x[d] * L.value[c[d]];
  const float a = ordered(t.data(), D);
  for (int64_t d = 0; d < D; ++d) t[d] = L.value[c[d]] * L.value[c[d]];
  float s = a / ordered(t.data(), D); if (s > 65504.0f) s = 65504.0f;
  for (int64_t i = 0; i < row_bytes(dtype, D); ++i) row[i] = packed_byte(dtype, D, i, [&](int64_t d) { return c[d]; });
  return from_float<fp16>(s).bits;
}
inline void decode_packed(DType dtype, const uint8_t* row, uint16_t half, int64_t D, float* out) {
  const float s = to_float(fp16{half});
  for (int64_t d = 0; d < D; ++d) out[d] = levels_of(dtype).value[code_at(dtype, row, D, d)] * s;
}
}
