// Between the element types of tensors and float, exactly as csrc/common/half.h rounds.
//
// DType is a value here: what is read or written once per token, not per slot, branches on it.
#pragma once

#include "cuda/device.h"
#include "params.h"

namespace less::cuda {

template <typename To, typename From>
LESS_DEVICE To bits_of(From x) {
  static_assert(sizeof(To) == sizeof(From), "the same bits");
  To y;
  memcpy(static_cast<void*>(&y), &x, sizeof y);
  return y;
}

// The DType of an element type.
template <typename T>
constexpr DType dtype_of() {
  return std::is_same_v<T, float>           ? DType::f32
         : std::is_same_v<T, __nv_bfloat16> ? DType::bf16
         : std::is_same_v<T, __half>        ? DType::fp16
         : std::is_same_v<T, int8_t>        ? DType::i8
                                            : DType::fp8;
}

// What 4 bytes of T say, in ascending order.
LESS_DEVICE void widen4(uint32_t w, float (&x)[1], float) { x[0] = bits_of<float>(w); }

LESS_DEVICE void widen4(uint32_t w, float (&x)[2], __half) {
  const float2 f = __half22float2(bits_of<__half2>(w));
  x[0] = f.x;
  x[1] = f.y;
}

LESS_DEVICE void widen4(uint32_t w, float (&x)[2], __nv_bfloat16) {
  x[0] = bits_of<float>(w << 16);
  x[1] = bits_of<float>(w & 0xffff0000u);
}

LESS_DEVICE void widen4(uint32_t w, float (&x)[4], int8_t) {
  for (int i = 0; i < 4; ++i) x[i] = float(int8_t(w >> (8 * i) & 0xffu));
}

LESS_DEVICE void widen4(uint32_t w, float (&x)[4], __nv_fp8_e4m3) {
  const __half2 low(__nv_cvt_fp8x2_to_halfraw2(__nv_fp8x2_storage_t(w & 0xffffu), __NV_E4M3));
  const __half2 high(__nv_cvt_fp8x2_to_halfraw2(__nv_fp8x2_storage_t(w >> 16), __NV_E4M3));
  const float2 a = __half22float2(low), b = __half22float2(high);
  x[0] = a.x;
  x[1] = a.y;
  x[2] = b.x;
  x[3] = b.y;
}

// What 16 bytes of T say, in ascending order.
template <typename T>
LESS_DEVICE void widen16(uint4 w, float (&x)[16 / sizeof(T)]) {
  constexpr int kN = 4 / int(sizeof(T));
  const uint32_t word[4] = {w.x, w.y, w.z, w.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    float part[kN];
    widen4(word[i], part, T());
#pragma unroll
    for (int j = 0; j < kN; ++j) x[i * kN + j] = part[j];
  }
}

// To the nearest, of ties the even; int8 and e4m3 saturate.
template <typename T>
LESS_DEVICE T narrowed(float x) {
  if constexpr (std::is_same_v<T, __half>) {
    return __float2half_rn(x);
  } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return __float2bfloat16_rn(x);
  } else if constexpr (std::is_same_v<T, int8_t>) {
    return int8_t(rintf(fminf(fmaxf(x, -127.0f), 127.0f)));
  } else if constexpr (std::is_same_v<T, __nv_fp8_e4m3>) {
    return bits_of<__nv_fp8_e4m3>(__nv_cvt_float_to_fp8(x, __NV_SATFINITE, __NV_E4M3));
  } else {
    return x;
  }
}

template <typename T>
LESS_DEVICE float widened(T x) {
  if constexpr (sizeof(T) == 4) {
    return x;
  } else if constexpr (sizeof(T) == 2) {
    float two[2];
    widen4(uint32_t(bits_of<uint16_t>(x)), two, x);
    return two[0];
  } else {
    float four[4];
    widen4(uint32_t(bits_of<uint8_t>(x)), four, x);
    return four[0];
  }
}

// Elements i .. i + 3 of a float tensor as they are stored, 16 bytes or 8; i is a multiple of 4.
LESS_DEVICE uint4 load_four_stored(const void* x, DType dtype, int64_t i) {
  if (dtype == DType::f32) return load16(static_cast<const float*>(x) + i);
  const uint2 w = load8(static_cast<const uint16_t*>(x) + i);
  return make_uint4(w.x, w.y, 0, 0);
}

LESS_DEVICE void widen_four(uint4 stored, DType dtype, float (&four)[4]) {
  if (dtype == DType::f32) return widen16<float>(stored, four);
  float low[2], high[2];
  if (dtype == DType::bf16) {
    widen4(stored.x, low, __nv_bfloat16());
    widen4(stored.y, high, __nv_bfloat16());
  } else {
    widen4(stored.x, low, __half());
    widen4(stored.y, high, __half());
  }
  four[0] = low[0];
  four[1] = low[1];
  four[2] = high[0];
  four[3] = high[1];
}

LESS_DEVICE void load_four(const void* x, DType dtype, int64_t i, float (&four)[4]) {
  widen_four(load_four_stored(x, dtype, i), dtype, four);
}

template <typename T>
LESS_DEVICE uint32_t two_narrowed(float low, float high) {
  return uint32_t(bits_of<uint16_t>(narrowed<T>(low))) |
         uint32_t(bits_of<uint16_t>(narrowed<T>(high))) << 16;
}

LESS_DEVICE void store_four(void* x, DType dtype, int64_t i, const float (&four)[4]) {
  if (dtype == DType::f32) {
    store16(static_cast<float*>(x) + i,
            make_uint4(bits_of<uint32_t>(four[0]), bits_of<uint32_t>(four[1]),
                       bits_of<uint32_t>(four[2]), bits_of<uint32_t>(four[3])));
  } else if (dtype == DType::bf16) {
    store8(static_cast<uint16_t*>(x) + i,
           make_uint2(two_narrowed<__nv_bfloat16>(four[0], four[1]),
                      two_narrowed<__nv_bfloat16>(four[2], four[3])));
  } else {
    store8(static_cast<uint16_t*>(x) + i, make_uint2(two_narrowed<__half>(four[0], four[1]),
                                                     two_narrowed<__half>(four[2], four[3])));
  }
}

}  // namespace less::cuda
