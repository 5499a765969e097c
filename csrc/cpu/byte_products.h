// Products of bytes, added up: whole numbers, the same on every machine.
#pragma once

#include <type_traits>

#include "cpu/simd.h"

namespace less::cpu::LESS_ISA {

typedef uint8_t Octets __attribute__((vector_size(4 * kNative)));
typedef int16_t Pairs __attribute__((vector_size(4 * kNative)));

// Calls f with whether this machine adds four products to a sum in one instruction (AVX512-VNNI).
template <typename F>
LESS_INLINE void with_vnni(F f) {
#if defined(LESS_ISA_avx512) && !defined(LESS_EMULATED_AVX512)
  if (__builtin_cpu_supports("avx512vnni")) return f(std::true_type{});
#endif
  f(std::false_type{});
}

// The products of each two bytes of a, within 0 .. 127, and of b, within -127 .. 127.
LESS_INLINE Pairs pairs_of_products(Octets a, Octets b) {
#if defined(LESS_ISA_avx512)
  return (Pairs)_mm512_maddubs_epi16((__m512i)a, (__m512i)b);
#elif defined(LESS_ISA_avx2)
  return (Pairs)_mm256_maddubs_epi16((__m256i)a, (__m256i)b);
#elif defined(LESS_ISA_neon)
  const int8x16_t x = (int8x16_t)a, y = (int8x16_t)b;
  return vpaddq_s16(vmull_s8(vget_low_s8(x), vget_low_s8(y)),
                    vmull_s8(vget_high_s8(x), vget_high_s8(y)));
#else
  const Pairs x = (Pairs)a, y = (Pairs)b;
  return (x & 255) * ((y << 8) >> 8) + (x >> 8) * (y >> 8);
#endif
}

// The sums of each two.
LESS_INLINE Ints sums_of_pairs(Pairs x) {
#if defined(LESS_ISA_avx512)
  return (Ints)_mm512_madd_epi16((__m512i)x, _mm512_set1_epi16(1));
#elif defined(LESS_ISA_avx2)
  return (Ints)_mm256_madd_epi16((__m256i)x, _mm256_set1_epi16(1));
#elif defined(LESS_ISA_neon)
  return vpaddlq_s16(x);
#else
  return (((Ints)x << 16) >> 16) + ((Ints)x >> 16);
#endif
}

// A sum of products of bytes: each element of four. kSmall: those of two fit in 16 bits, all of
// them added up.
template <bool kVnni, bool kSmall>
class ByteSum {
 public:
  LESS_INLINE void add(Octets a, Octets b) {
#ifdef LESS_ISA_avx512
    if constexpr (kVnni) {
      // Not the intrinsic: this level is compiled for machines without it.
      asm("vpdpbusd %2, %1, %0" : "+v"(sum_) : "v"(a), "vm"(b));
      return;
    }
#endif
    const Pairs pairs = pairs_of_products(a, b);
    if constexpr (kSmall) {
      sum_ = (Ints)((Pairs)sum_ + pairs);
    } else {
      sum_ += sums_of_pairs(pairs);
    }
  }
  LESS_INLINE Ints total() const { return kSmall && !kVnni ? sums_of_pairs((Pairs)sum_) : sum_; }

 private:
  Ints sum_{};
};

// Of four vectors: element 4 r + i is the sum of quarter r of the i-th, a quarter being 16 bytes.
LESS_INLINE Ints sums_of_quarters(Ints a, Ints b, Ints c, Ints d) {
#if defined(LESS_ISA_avx512)
  const auto halves = [](Ints x, Ints y) LESS_LAMBDA_INLINE {
    const __m512i p = (__m512i)x, q = (__m512i)y;
    return (__m512i)((Ints)_mm512_unpacklo_epi32(p, q) + (Ints)_mm512_unpackhi_epi32(p, q));
  };
  const __m512i x = halves(a, b), y = halves(c, d);
  return (Ints)_mm512_unpacklo_epi64(x, y) + (Ints)_mm512_unpackhi_epi64(x, y);
#elif defined(LESS_ISA_avx2)
  return (Ints)_mm256_hadd_epi32(_mm256_hadd_epi32((__m256i)a, (__m256i)b),
                                 _mm256_hadd_epi32((__m256i)c, (__m256i)d));
#elif defined(LESS_ISA_neon)
  return vpaddq_s32(vpaddq_s32(a, b), vpaddq_s32(c, d));
#else
  const auto all = [](Ints x) LESS_LAMBDA_INLINE { return (x[0] + x[2]) + (x[1] + x[3]); };
  return Ints{all(a), all(b), all(c), all(d)};
#endif
}

// A vector of 16 bytes each: sixteen(0), sixteen(1), ...
template <typename Sixteens>
LESS_INLINE Octets side_by_side(Sixteens sixteen) {
#if defined(LESS_ISA_avx512)
  __m512i x = _mm512_castsi128_si512((__m128i)sixteen(0));
  x = _mm512_inserti32x4(x, (__m128i)sixteen(1), 1);
  x = _mm512_inserti32x4(x, (__m128i)sixteen(2), 2);
  return (Octets)_mm512_inserti32x4(x, (__m128i)sixteen(3), 3);
#elif defined(LESS_ISA_avx2)
  const __m256i x = _mm256_castsi128_si256((__m128i)sixteen(0));
  return (Octets)_mm256_inserti128_si256(x, (__m128i)sixteen(1), 1);
#else
  return sixteen(0);
#endif
}

}  // namespace less::cpu::LESS_ISA
