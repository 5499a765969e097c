// The AVX-512 intrinsics that the kernels use, said in AVX2 and plain loops, so that the tests can
// run the avx512 level on a machine without it. The compiler splits the vectors of sixteen by
// itself.
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

// f(i, a, b) for element i of 64 bytes of T.
template <typename T, typename F>
LESS_EMULATED_INTRINSIC __m512i each(__m512i a, __m512i b, F f) {
  constexpr int kCount = 64 / sizeof(T);
  T x[kCount], y[kCount], z[kCount];
  std::memcpy(x, &a, sizeof x);
  std::memcpy(y, &b, sizeof y);
  for (int i = 0; i < kCount; ++i) z[i] = f(i, x, y);
  std::memcpy(&a, z, sizeof z);
  return a;
}
template <typename T>
LESS_EMULATED_INTRINSIC __m512i all(T x) {
  return each<T>(__m512i{}, __m512i{}, [x](int, const T*, const T*) { return x; });
}
// Elements of a and b by turns, of the lower or upper halves of each 16 bytes.
template <typename T>
LESS_EMULATED_INTRINSIC __m512i unpack(__m512i a, __m512i b, int half) {
  constexpr int kLane = 16 / sizeof(T);
  return each<T>(a, b, [half](int i, const T* x, const T* y) {
    const int from = i / kLane * kLane + half * kLane / 2 + i % kLane / 2;
    return i % 2 == 0 ? x[from] : y[from];
  });
}
// Quarters of a, a, b, b.
LESS_EMULATED_INTRINSIC __m512i quarters(__m512i a, __m512i b, int which) {
  return each<int64_t>(a, b, [which](int i, const int64_t* x, const int64_t* y) {
    return (i < 4 ? x : y)[2 * (which >> i / 2 * 2 & 3) + i % 2];
  });
}
LESS_EMULATED_INTRINSIC __m512i maddubs(__m512i a, __m512i b) {
  return each<int16_t>(a, b, [](int i, const int16_t* x, const int16_t* y) {
    const auto* const u = reinterpret_cast<const uint8_t*>(x + i);
    const auto* const s = reinterpret_cast<const int8_t*>(y + i);
    const int sum = u[0] * s[0] + u[1] * s[1];
    return int16_t(sum > INT16_MAX ? INT16_MAX : sum < INT16_MIN ? INT16_MIN : sum);
  });
}
LESS_EMULATED_INTRINSIC __m512i madd(__m512i a, __m512i b) {
  return each<int32_t>(a, b, [](int i, const int32_t* x, const int32_t* y) {
    return int32_t(int16_t(x[i])) * int16_t(y[i]) + (x[i] >> 16) * (y[i] >> 16);
  });
}
LESS_EMULATED_INTRINSIC __m512i load_bytes(uint64_t mask, const void* p) {
  return each<uint8_t>(__m512i{}, __m512i{}, [mask, p](int i, const uint8_t*, const uint8_t*) {
    return mask >> i & 1 ? static_cast<const uint8_t*>(p)[i] : uint8_t(0);
  });
}

LESS_EMULATED_INTRINSIC __m512i insert_quarter(__m512i a, __m128i quarter, int which) {
  std::memcpy(reinterpret_cast<char*>(&a) + which * sizeof quarter, &quarter, sizeof quarter);
  return a;
}

LESS_EMULATED_INTRINSIC __m512 permute(__m512i at, __m512 a) {
  const __m512i x = each<int32_t>(
      at, (__m512i)a, [](int i, const int32_t* n, const int32_t* x) { return x[n[i] & 15]; });
  return (__m512)x;
}

}  // namespace less::emulated

#define LESS_EMULATED_AVX512 1

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
#define _mm512_castsi128_si512(a) less::emulated::insert_quarter(__m512i{}, a, 0)
#define _mm512_inserti32x4(a, quarter, which) less::emulated::insert_quarter(a, quarter, which)
#define _mm512_setzero_si512() (__m512i{})
#define _mm512_set1_epi8(x) less::emulated::all<int8_t>(x)
#define _mm512_set1_epi16(x) less::emulated::all<int16_t>(x)
#define _mm512_set1_epi32(x) less::emulated::all<int32_t>(x)
#define _mm512_and_si512(a, b) ((a) & (b))
#define _mm512_add_epi32(a, b) \
  less::emulated::each<uint32_t>(a, b, [](int i, auto* x, auto* y) { return x[i] + y[i]; })
#define _mm512_sub_epi32(a, b) \
  less::emulated::each<uint32_t>(a, b, [](int i, auto* x, auto* y) { return x[i] - y[i]; })
#define _mm512_slli_epi32(a, n) \
  less::emulated::each<uint32_t>(a, a, [](int i, auto* x, auto*) { return x[i] << n; })
#define _mm512_srli_epi16(a, n) \
  less::emulated::each<uint16_t>(a, a, [](int i, auto* x, auto*) { return uint16_t(x[i] >> n); })
#define _mm512_unpacklo_epi8(a, b) less::emulated::unpack<int8_t>(a, b, 0)
#define _mm512_unpackhi_epi8(a, b) less::emulated::unpack<int8_t>(a, b, 1)
#define _mm512_unpacklo_epi16(a, b) less::emulated::unpack<int16_t>(a, b, 0)
#define _mm512_unpackhi_epi16(a, b) less::emulated::unpack<int16_t>(a, b, 1)
#define _mm512_unpacklo_epi32(a, b) less::emulated::unpack<int32_t>(a, b, 0)
#define _mm512_unpackhi_epi32(a, b) less::emulated::unpack<int32_t>(a, b, 1)
#define _mm512_unpacklo_epi64(a, b) less::emulated::unpack<int64_t>(a, b, 0)
#define _mm512_unpackhi_epi64(a, b) less::emulated::unpack<int64_t>(a, b, 1)
#define _mm512_shuffle_i64x2(a, b, which) less::emulated::quarters(a, b, which)
#define _mm512_maddubs_epi16(a, b) less::emulated::maddubs(a, b)
#define _mm512_madd_epi16(a, b) less::emulated::madd(a, b)
#define _mm512_loadu_si512(p) less::emulated::load_bytes(~uint64_t(0), p)
#define _mm512_maskz_loadu_epi8(mask, p) less::emulated::load_bytes(mask, p)
#define _mm512_permutexvar_ps(at, a) less::emulated::permute(at, a)
