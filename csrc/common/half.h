// The two 16-bit float types, bits only, and the exact scalar conversions of all element types.
//
// bf16: 1 sign, 8 exponent, 7 mantissa bits, the upper half of a float. fp16: 1, 5, 10, IEEE 754.
// Narrowing rounds to nearest, ties to even; what is too large becomes infinity; NaN stays NaN.
// int8_t is a whole number, saturated at +-127; the scale of its row is applied elsewhere.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace less {

struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};
// A whole number >= 0.
struct whole16 {
  uint16_t bits;
};

inline float bits_to_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

inline uint32_t float_to_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

inline float to_float(float x) { return x; }

inline float to_float(int8_t x) { return float(x); }

inline float to_float(whole16 x) { return float(x.bits); }

inline float to_float(bf16 x) { return bits_to_float(uint32_t{x.bits} << 16); }

inline float to_float(fp16 x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000u) << 16;
  const uint32_t exponent = (x.bits >> 10) & 0x1fu;
  const uint32_t mantissa = x.bits & 0x3ffu;
  if (exponent == 0) {  // zero or subnormal: mantissa * 2^-24, exact
    return bits_to_float(float_to_bits(float(mantissa) * 0x1p-24f) | sign);
  }
  const uint32_t widened = exponent == 31 ? 255u : exponent + 112u;
  return bits_to_float(sign | widened << 23 | mantissa << 13);
}

template <typename T>
T from_float(float x);

template <>
inline float from_float<float>(float x) {
  return x;
}

template <>
inline int8_t from_float<int8_t>(float x) {
  return int8_t(std::nearbyint(x < -127.0f ? -127.0f : x > 127.0f ? 127.0f : x));
}

template <>
inline bf16 from_float<bf16>(float x) {
  const uint32_t u = float_to_bits(x);
  if ((u & 0x7fffffffu) > 0x7f800000u) return {uint16_t((u >> 16) | 0x40u)};
  return {uint16_t((u + 0x7fffu + ((u >> 16) & 1u)) >> 16)};
}

template <>
inline fp16 from_float<fp16>(float x) {
  const uint32_t u = float_to_bits(x);
  const uint32_t sign = (u >> 16) & 0x8000u;
  const uint32_t a = u & 0x7fffffffu;
  uint32_t half;
  if (a > 0x7f800000u) {
    half = 0x7e00u | ((a >> 13) & 0x3ffu);
  } else if (a >= 0x47800000u) {  // 65536 and above
    half = 0x7c00u;
  } else if (a < 0x38800000u) {  // below 2^-14: adding 0.5 rounds at fp16's last subnormal bit
    half = float_to_bits(bits_to_float(a) + 0.5f) - 0x3f000000u;
  } else {
    half = (a - 0x38000000u + 0xfffu + ((a >> 13) & 1u)) >> 13;
  }
  return {uint16_t(sign | half)};
}

template <>
inline whole16 from_float<whole16>(float x) {
  return {uint16_t(x)};
}

}  // namespace less
