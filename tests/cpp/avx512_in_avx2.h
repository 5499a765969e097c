// The AVX-512 intrinsics that simd.h uses, said in AVX2 and plain loops, so that the tests can run
// the avx512 level on a machine without it. The compiler splits the vectors of sixteen by itself.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace less::emulated {

#define LESS_EMULATED_INTRINSIC inline __attribute__((always_inline))

// The lower or upper half of a vector of 64 bytes, as H; and both as one, as W.
template <typename H, typename W>
LESS_EMULATED_INTRINSIC H half(const W& whole, int which) {
  H x;
  std::memcpy(&x, reinterpret_cast<const char*>(&whole) + which * sizeof x, sizeof x);
  return x;
}
template <typename W, typename H>
LESS_EMULATED_INTRINSIC W join(const H& low, const H& high) {
  W x;
  std::memcpy(&x, &low, sizeof low);
  std::memcpy(reinterpret_cast<char*>(&x) + sizeof low, &high, sizeof high);
  return x;
}

// Elements of `mask` from memory, of the others those of x; or to memory, and no other.
template <typename V, typename T>
LESS_EMULATED_INTRINSIC V load(V x, uint32_t mask, const T* p) {
  T* to = reinterpret_cast<T*>(&x);
  for (size_t i = 0; i < sizeof x / sizeof *p; ++i) {
    if (mask >> i & 1) std::memcpy(to + i, p + i, sizeof *p);
  }
  return x;
}
template <typename V, typename T>
LESS_EMULATED_INTRINSIC void store(T* p, uint32_t mask, V x) {
  const T* from = reinterpret_cast<const T*>(&x);
  for (size_t i = 0; i < sizeof x / sizeof *p; ++i) {
    if (mask >> i & 1) std::memcpy(p + i, from + i, sizeof *p);
  }
}

LESS_EMULATED_INTRINSIC __m512 fmadd_ps(__m512 a, __m512 b, __m512 c) {
  return join<__m512>(_mm256_fmadd_ps(half<__m256>(a, 0), half<__m256>(b, 0), half<__m256>(c, 0)),
                      _mm256_fmadd_ps(half<__m256>(a, 1), half<__m256>(b, 1), half<__m256>(c, 1)));
}
LESS_EMULATED_INTRINSIC __m512 max_ps(__m512 a, __m512 b) {
  return join<__m512>(_mm256_max_ps(half<__m256>(a, 0), half<__m256>(b, 0)),
                      _mm256_max_ps(half<__m256>(a, 1), half<__m256>(b, 1)));
}
LESS_EMULATED_INTRINSIC __m512 min_ps(__m512 a, __m512 b) {
  return join<__m512>(_mm256_min_ps(half<__m256>(a, 0), half<__m256>(b, 0)),
                      _mm256_min_ps(half<__m256>(a, 1), half<__m256>(b, 1)));
}
LESS_EMULATED_INTRINSIC __m512 cvtph_ps(__m256i a) {
  return join<__m512>(_mm256_cvtph_ps(half<__m128i>(a, 0)), _mm256_cvtph_ps(half<__m128i>(a, 1)));
}
template <int kRounding>
LESS_EMULATED_INTRINSIC __m256i cvtps_ph(__m512 a) {
  return join<__m256i>(_mm256_cvtps_ph(half<__m256>(a, 0), kRounding),
                       _mm256_cvtps_ph(half<__m256>(a, 1), kRounding));
}
// Element by element from one integer type to another; the upper bits are cut off or filled in.
template <typename To, typename ToElement, typename FromElement, typename From>
LESS_EMULATED_INTRINSIC To convert(From a) {
  To x;
  FromElement from[16];
  ToElement to[16];
  static_assert(sizeof from == sizeof a && sizeof to == sizeof x);
  std::memcpy(from, &a, sizeof a);
  for (int i = 0; i < 16; ++i) to[i] = ToElement(from[i]);
  std::memcpy(&x, to, sizeof x);
  return x;
}

}  // namespace less::emulated

#define _mm512_fmadd_ps(a, b, c) less::emulated::fmadd_ps(a, b, c)
#define _mm512_max_ps(a, b) less::emulated::max_ps(a, b)
#define _mm512_min_ps(a, b) less::emulated::min_ps(a, b)
#define _mm512_set1_ps(x) ((x) - __m512{})
#define _mm512_castps512_ps256(a) less::emulated::half<__m256>(a, 0)
#define _mm512_extractf32x8_ps(a, which) less::emulated::half<__m256>(a, which)
#define _mm512_cvtph_ps(a) less::emulated::cvtph_ps(a)
#define _mm512_cvtps_ph(a, rounding) less::emulated::cvtps_ph<rounding>(a)
#define _mm512_cvtepu16_epi32(a) less::emulated::convert<__m512i, int32_t, uint16_t>(a)
#define _mm512_cvtepi8_epi32(a) less::emulated::convert<__m512i, int32_t, int8_t>(a)
#define _mm512_cvtepi32_epi16(a) less::emulated::convert<__m256i, uint16_t, int32_t>(a)
#define _mm512_cvtepi32_epi8(a) less::emulated::convert<__m128i, int8_t, int32_t>(a)
#define _mm512_mask_loadu_ps(x, mask, p) less::emulated::load(x, mask, p)
#define _mm256_mask_loadu_epi16(x, mask, p) \
  less::emulated::load(x, mask, reinterpret_cast<const uint16_t*>(p))
#define _mm_mask_loadu_epi8(x, mask, p) less::emulated::load(x, mask, p)
#define _mm512_mask_storeu_ps(p, mask, x) less::emulated::store(p, mask, x)
#define _mm256_mask_storeu_epi16(p, mask, x) \
  less::emulated::store(reinterpret_cast<uint16_t*>(p), mask, x)
#define _mm_mask_storeu_epi8(p, mask, x) less::emulated::store(p, mask, x)
