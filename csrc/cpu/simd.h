// The vector layer of all CPU kernels: Vec::kSize floats, 16 on AVX-512 and 8 elsewhere.
//
//   Vec x = Vec::load(p);            kSize elements of float, bf16, fp16 or int8_t, exactly widened
//   Vec x = Vec::load(p, n, fill);   n < kSize elements, the rest `fill` (0); p[n..] is not touched
//   x.store(p); x.store(p, n);       narrowed to nearest, ties to even; int8_t saturates at +-127
//   fma(a, b, c)  max  min  exp  gelu  sum(x)  sum(x[4], out)  max_of(x)  select(mask, a, b)
//
// A Vec is one or two of the machine's vectors, and nearly all of it is written once, in the
// vector types of GCC and Clang. What a compiler cannot say in them is the short list of functions
// of "hooks" below, one set for each level:
//
//   portable   two vectors of 4; fma rounds twice; every 64-bit machine
//   avx2       one vector of 8; AVX2, FMA, F16C
//   avx512     one vector of 16; AVX-512 F, BW, DQ, VL
//   neon       two vectors of 4; aarch64
//
// Everything lives in the namespace of the level that is being compiled, so that code of one level
// is never linked into another. A level gives the same bits on every machine, compiler and thread
// count; two levels may differ in the last bit.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/half.h"

#if defined(LESS_ISA_avx2) || defined(LESS_ISA_avx512)
#include <immintrin.h>
#elif defined(LESS_ISA_neon)
#include <arm_neon.h>
#endif

#ifndef LESS_ISA
#error "compile through CMakeLists.txt, which defines LESS_ISA"
#endif

#define LESS_INLINE inline __attribute__((always_inline))
#define LESS_LAMBDA_INLINE __attribute__((always_inline))

namespace less::cpu::LESS_ISA {

constexpr float kInfinity = __builtin_inff();

// -- the machine's vectors ------------------------------------------------------------------------

#if defined(LESS_ISA_avx512)
constexpr int kNative = 16;  // floats in a vector
constexpr int kParts = 1;    // vectors in a Vec
#elif defined(LESS_ISA_avx2)
constexpr int kNative = 8;
constexpr int kParts = 1;
#else
constexpr int kNative = 4;
constexpr int kParts = 2;
#endif

// A statement for each part i. Written out, because the inliner weighs a loop before it unrolls it
// and then leaves the small functions of kernels uninlined.
#if defined(LESS_ISA_avx512) || defined(LESS_ISA_avx2)
#define LESS_EACH_PART(...) \
  {                         \
    constexpr int i = 0;    \
    __VA_ARGS__;            \
  }
#else
#define LESS_EACH_PART(...) \
  {                         \
    constexpr int i = 0;    \
    __VA_ARGS__;            \
  }                         \
  {                         \
    constexpr int i = 1;    \
    __VA_ARGS__;            \
  }
#endif

typedef float Floats __attribute__((vector_size(4 * kNative)));
typedef int32_t Ints __attribute__((vector_size(4 * kNative)));
typedef uint32_t Words __attribute__((vector_size(4 * kNative)));
typedef uint16_t Halves __attribute__((vector_size(2 * kNative)));
typedef int8_t Bytes __attribute__((vector_size(kNative)));
typedef float Four __attribute__((vector_size(16)));
typedef uint8_t Sixteen __attribute__((vector_size(16)));

// The same where they lie in memory: aligned as their elements only, of whatever type.
typedef Floats FloatsInMemory __attribute__((aligned(4), may_alias));
typedef Ints IntsInMemory __attribute__((aligned(4), may_alias));
typedef Halves HalvesInMemory __attribute__((aligned(2), may_alias));
typedef Bytes BytesInMemory __attribute__((aligned(1), may_alias));

LESS_INLINE Halves load_halves(const void* p) { return *static_cast<const HalvesInMemory*>(p); }
LESS_INLINE Bytes load_bytes(const void* p) { return *static_cast<const BytesInMemory*>(p); }
LESS_INLINE void store_halves(Halves x, void* p) { *static_cast<HalvesInMemory*>(p) = x; }
LESS_INLINE void store_bytes(Bytes x, void* p) { *static_cast<BytesInMemory*>(p) = x; }

// -- hooks ----------------------------------------------------------------------------------------
//
//   fused(a, b, c)      a * b + c
//   larger, smaller     b where a is NaN or both are zero
//   from_fp16, to_fp16  as to_float() and from_float() of half.h
//   unsigned_ints(x)    from 16 bits, zeros above
//   signed_ints(x)      from 8 bits, the sign above
//   low_halves(a)       the lower 16 bits of each element, where the upper 16 are zero
//   low_bytes(a)        the lower 8 bits of each element, which is within +-127
//   looked_up(t, i)     t[i & 15] of a table of 16 numbers
//   look_up(table, i)   table[i] of each i, which is below 16

#if defined(LESS_ISA_avx512)

LESS_INLINE Floats fused(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
LESS_INLINE Floats larger(Floats a, Floats b) { return _mm512_max_ps(a, b); }
LESS_INLINE Floats smaller(Floats a, Floats b) { return _mm512_min_ps(a, b); }
LESS_INLINE Floats from_fp16(Halves x) { return _mm512_cvtph_ps((__m256i)x); }
LESS_INLINE Halves to_fp16(Floats x) {
  return (Halves)_mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
LESS_INLINE Ints unsigned_ints(Halves x) { return (Ints)_mm512_cvtepu16_epi32((__m256i)x); }
LESS_INLINE Ints signed_ints(Bytes x) { return (Ints)_mm512_cvtepi8_epi32((__m128i)x); }
LESS_INLINE Halves low_halves(Ints a) { return (Halves)_mm512_cvtepi32_epi16((__m512i)a); }
LESS_INLINE Bytes low_bytes(Ints a) { return (Bytes)_mm512_cvtepi32_epi8((__m512i)a); }
LESS_INLINE Floats looked_up(const Floats (&table)[1], Ints i) {
  return _mm512_permutexvar_ps((__m512i)i, table[0]);
}
LESS_INLINE Sixteen look_up(Sixteen table, Sixteen i) {
  return (Sixteen)_mm_shuffle_epi8((__m128i)table, (__m128i)i);
}

#elif defined(LESS_ISA_avx2)

LESS_INLINE Floats fused(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
LESS_INLINE Floats larger(Floats a, Floats b) { return _mm256_max_ps(a, b); }
LESS_INLINE Floats smaller(Floats a, Floats b) { return _mm256_min_ps(a, b); }
LESS_INLINE Floats from_fp16(Halves x) { return _mm256_cvtph_ps((__m128i)x); }
LESS_INLINE Halves to_fp16(Floats x) {
  return (Halves)_mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
LESS_INLINE Ints unsigned_ints(Halves x) { return (Ints)_mm256_cvtepu16_epi32((__m128i)x); }
LESS_INLINE Ints signed_ints(Bytes x) {
  return (Ints)_mm256_cvtepi8_epi32(_mm_cvtsi64_si128((long long)x));
}
LESS_INLINE Halves low_halves(Ints a) {
  const __m256i packed = _mm256_packus_epi32((__m256i)a, (__m256i)a);  // within 128 bits
  return (Halves)_mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08));
}
LESS_INLINE Bytes low_bytes(Ints a) {
  const __m128i lower = _mm256_castsi256_si128((__m256i)a);
  const __m128i halves = _mm_packs_epi32(lower, _mm256_extracti128_si256((__m256i)a, 1));
  return (Bytes)_mm_cvtsi128_si64(_mm_packs_epi16(halves, halves));
}
LESS_INLINE Floats looked_up(const Floats (&table)[2], Ints i) {
  const Floats low = _mm256_permutevar8x32_ps(table[0], (__m256i)i);
  const Floats high = _mm256_permutevar8x32_ps(table[1], (__m256i)i);
  return _mm256_blendv_ps(low, high, (Floats)(i << 28));
}
LESS_INLINE Sixteen look_up(Sixteen table, Sixteen i) {
  return (Sixteen)_mm_shuffle_epi8((__m128i)table, (__m128i)i);
}

#elif defined(LESS_ISA_neon)

LESS_INLINE Floats fused(Floats a, Floats b, Floats c) { return vfmaq_f32(c, a, b); }
LESS_INLINE Floats larger(Floats a, Floats b) { return b < a ? a : b; }
LESS_INLINE Floats smaller(Floats a, Floats b) { return a < b ? a : b; }
LESS_INLINE Floats from_fp16(Halves x) { return vcvt_f32_f16((float16x4_t)x); }
LESS_INLINE Halves to_fp16(Floats x) { return (Halves)vcvt_f16_f32(x); }
LESS_INLINE Ints unsigned_ints(Halves x) { return (Ints)vmovl_u16(x); }
LESS_INLINE Ints signed_ints(Bytes x) {
  uint32_t four;
  std::memcpy(&four, &x, sizeof four);
  return vmovl_s16(vget_low_s16(vmovl_s8((int8x8_t)vcreate_u8(four))));
}
LESS_INLINE Halves low_halves(Ints a) { return (Halves)vmovn_s32(a); }
LESS_INLINE Bytes low_bytes(Ints a) {
  const int16x4_t halves = vmovn_s32(a);
  const uint32_t four = vget_lane_u32((uint32x2_t)vmovn_s16(vcombine_s16(halves, halves)), 0);
  Bytes x;
  std::memcpy(&x, &four, sizeof x);
  return x;
}
LESS_INLINE Floats looked_up(const Floats (&table)[4], Ints i) {
  const uint8x16x4_t bytes = {
      {(uint8x16_t)table[0], (uint8x16_t)table[1], (uint8x16_t)table[2], (uint8x16_t)table[3]}};
  const Ints at = (i & 15) * 0x04040404 + 0x03020100;
  return (Floats)vqtbl4q_u8(bytes, (uint8x16_t)at);
}
LESS_INLINE Sixteen look_up(Sixteen table, Sixteen i) {
  return (Sixteen)vqtbl1q_u8((uint8x16_t)table, (uint8x16_t)i);
}

#else

LESS_INLINE Floats fused(Floats a, Floats b, Floats c) { return a * b + c; }
LESS_INLINE Floats larger(Floats a, Floats b) { return b < a ? a : b; }
LESS_INLINE Floats smaller(Floats a, Floats b) { return a < b ? a : b; }
LESS_INLINE Ints unsigned_ints(Halves x) { return __builtin_convertvector(x, Ints); }
LESS_INLINE Ints signed_ints(Bytes x) { return __builtin_convertvector(x, Ints); }
LESS_INLINE Halves low_halves(Ints a) { return __builtin_convertvector(a, Halves); }
LESS_INLINE Bytes low_bytes(Ints a) { return __builtin_convertvector(a, Bytes); }
LESS_INLINE Floats looked_up(const Floats (&table)[4], Ints i) {
  i &= 15;
  Floats x;
  for (int lane = 0; lane < kNative; ++lane) x[lane] = table[i[lane] / kNative][i[lane] % kNative];
  return x;
}
LESS_INLINE Sixteen look_up(Sixteen table, Sixteen i) {
  uint8_t from[16], at[16], to[16];
  std::memcpy(from, &table, sizeof from);
  std::memcpy(at, &i, sizeof at);
  for (int n = 0; n < 16; ++n) to[n] = from[at[n]];
  Sixteen x;
  std::memcpy(&x, to, sizeof x);
  return x;
}

LESS_INLINE Floats from_fp16(Halves x) {
  const Ints half = __builtin_convertvector(x, Ints);
  const Ints sign = (half & 0x8000) << 16;
  const Ints magnitude = half & 0x7fff;
  const Ints small = (Ints)(__builtin_convertvector(magnitude, Floats) * 0x1p-24f);
  const Ints normal = (magnitude << 13) + (112 << 23);
  const Ints special = (magnitude << 13) | (255 << 23);
  const Ints bits = magnitude < 0x400 ? small : magnitude > 0x7bff ? special : normal;
  return (Floats)(bits | sign);
}

LESS_INLINE Halves to_fp16(Floats x) {
  const Ints u = (Ints)x;
  const Ints sign = (Ints)((Words)u >> 16) & 0x8000;
  const Ints a = u & 0x7fffffff;
  const Ints small = (Ints)((Floats)a + 0.5f) - 0x3f000000;
  const Ints odd = (a >> 13) & 1;
  const Ints normal = (Ints)((Words)a - 0x38000000u + 0xfffu + (Words)odd) >> 13;
  const Ints nan = ((a >> 13) & 0x3ff) | 0x7e00;
  const Ints large = a > 0x7f800000 ? nan : 0x7c00 - Ints{};
  const Ints half = a > 0x477fffff ? large : a < 0x38800000 ? small : normal;
  return low_halves(half | sign);
}

#endif

// -- written once ---------------------------------------------------------------------------------

struct Int {  // kSize x int32; as a mask, all bits or none of each
  Ints part[kParts];

  Int() = default;
  LESS_INLINE Int(int32_t all) { LESS_EACH_PART(part[i] = all - Ints{}); }

  static LESS_INLINE Int load(const int32_t* p) {
    Int a;
    LESS_EACH_PART(a.part[i] = *reinterpret_cast<const IntsInMemory*>(p + i * kNative));
    return a;
  }
  LESS_INLINE void store(int32_t* p) const { std::memcpy(p, part, sizeof part); }
};

// Sums wrap around, as those of unsigned numbers do.
LESS_INLINE Int operator+(Int a, Int b) {
  LESS_EACH_PART(a.part[i] = (Ints)((Words)a.part[i] + (Words)b.part[i]));
  return a;
}
LESS_INLINE Int operator-(Int a, Int b) {
  LESS_EACH_PART(a.part[i] = (Ints)((Words)a.part[i] - (Words)b.part[i]));
  return a;
}
LESS_INLINE Int operator&(Int a, Int b) {
  LESS_EACH_PART(a.part[i] &= b.part[i]);
  return a;
}
LESS_INLINE Int operator|(Int a, Int b) {
  LESS_EACH_PART(a.part[i] |= b.part[i]);
  return a;
}
LESS_INLINE Int operator>(Int a, Int b) {
  LESS_EACH_PART(a.part[i] = a.part[i] > b.part[i]);
  return a;
}
LESS_INLINE Int operator==(Int a, Int b) {
  LESS_EACH_PART(a.part[i] = a.part[i] == b.part[i]);
  return a;
}
template <int kBits>
LESS_INLINE Int shift_left(Int a) {
  LESS_EACH_PART(a.part[i] = (Ints)((Words)a.part[i] << kBits));
  return a;
}
template <int kBits>
LESS_INLINE Int shift_right(Int a) {  // zeros enter
  LESS_EACH_PART(a.part[i] = (Ints)((Words)a.part[i] >> kBits));
  return a;
}
template <int kBits>
LESS_INLINE Int shift_right_signed(Int a) {  // the sign enters
  LESS_EACH_PART(a.part[i] = a.part[i] >> kBits);
  return a;
}
LESS_INLINE Int select(Int mask, Int a, Int b) {
  LESS_EACH_PART(a.part[i] = mask.part[i] ? a.part[i] : b.part[i]);
  return a;
}

struct Vec {
  static constexpr int kSize = kParts * kNative;
  Floats part[kParts];

  Vec() = default;
  LESS_INLINE Vec(float all) {
    LESS_EACH_PART(part[i] = all - Floats{});  // keeps the sign of -0
  }
  LESS_INLINE explicit Vec(Int a) {
    LESS_EACH_PART(part[i] = __builtin_convertvector(a.part[i], Floats));
  }

  static LESS_INLINE Vec load(const float* p);
  static LESS_INLINE Vec load(const bf16* p);
  static LESS_INLINE Vec load(const fp16* p);
  static LESS_INLINE Vec load(const whole16* p);
  static LESS_INLINE Vec load(const int8_t* p);
  template <typename T>
  static LESS_INLINE Vec load(const T* p, int n, float fill = 0.0f);

  LESS_INLINE void store(float* p) const;
  LESS_INLINE void store(bf16* p) const;
  LESS_INLINE void store(fp16* p) const;
  LESS_INLINE void store(int8_t* p) const;  // not for NaN
  template <typename T>
  LESS_INLINE void store(T* p, int n) const;
};

LESS_INLINE Vec operator+(Vec a, Vec b) {
  LESS_EACH_PART(a.part[i] += b.part[i]);
  return a;
}
LESS_INLINE Vec operator-(Vec a, Vec b) {
  LESS_EACH_PART(a.part[i] -= b.part[i]);
  return a;
}
LESS_INLINE Vec operator*(Vec a, Vec b) {
  LESS_EACH_PART(a.part[i] *= b.part[i]);
  return a;
}
LESS_INLINE Vec operator/(Vec a, Vec b) {
  LESS_EACH_PART(a.part[i] /= b.part[i]);
  return a;
}
LESS_INLINE Vec fma(Vec a, Vec b, Vec c) {
  LESS_EACH_PART(a.part[i] = fused(a.part[i], b.part[i], c.part[i]));
  return a;
}
// b where a is NaN or both are zero: max(limit, x) lets a NaN x through.
LESS_INLINE Vec max(Vec a, Vec b) {
  LESS_EACH_PART(a.part[i] = larger(a.part[i], b.part[i]));
  return a;
}
LESS_INLINE Vec min(Vec a, Vec b) {
  LESS_EACH_PART(a.part[i] = smaller(a.part[i], b.part[i]));
  return a;
}
LESS_INLINE Int operator<(Vec a, Vec b) {
  Int mask;
  LESS_EACH_PART(mask.part[i] = a.part[i] < b.part[i]);
  return mask;
}
LESS_INLINE Int as_int(Vec a) {
  Int bits;
  LESS_EACH_PART(bits.part[i] = (Ints)a.part[i]);
  return bits;
}
LESS_INLINE Vec as_vec(Int a) {
  Vec x;
  LESS_EACH_PART(x.part[i] = (Floats)a.part[i]);
  return x;
}
LESS_INLINE Vec select(Int mask, Vec a, Vec b) {
  LESS_EACH_PART(a.part[i] = mask.part[i] ? a.part[i] : b.part[i]);
  return a;
}
// A table of 16 numbers, by the lowest four bits of each element.
struct Table {
  Floats part[16 / kNative];

  LESS_INLINE explicit Table(const float* p) { std::memcpy(part, p, sizeof part); }
};
LESS_INLINE Vec look_up(const Table& table, Int at) {
  Vec x;
  LESS_EACH_PART(x.part[i] = looked_up(table.part, at.part[i]));
  return x;
}
LESS_INLINE Vec abs(Vec a) { return as_vec(as_int(a) & Int(0x7fffffff)); }
LESS_INLINE Vec operator-(Vec a) { return as_vec(as_int(a) + Int(INT32_MIN)); }

LESS_INLINE Vec Vec::load(const float* p) {
  Vec x;
  LESS_EACH_PART(x.part[i] = *reinterpret_cast<const FloatsInMemory*>(p + i * kNative));
  return x;
}
LESS_INLINE Vec Vec::load(const bf16* p) {
  Vec x;
  LESS_EACH_PART(x.part[i] = (Floats)(unsigned_ints(load_halves(p + i * kNative)) << 16));
  return x;
}
LESS_INLINE Vec Vec::load(const fp16* p) {
  Vec x;
  LESS_EACH_PART(x.part[i] = from_fp16(load_halves(p + i * kNative)));
  return x;
}
LESS_INLINE Vec Vec::load(const whole16* p) {
  Int x;
  LESS_EACH_PART(x.part[i] = unsigned_ints(load_halves(p + i * kNative)));
  return Vec(x);
}
LESS_INLINE Vec Vec::load(const int8_t* p) {
  Int x;
  LESS_EACH_PART(x.part[i] = signed_ints(load_bytes(p + i * kNative)));
  return Vec(x);
}

LESS_INLINE void Vec::store(float* p) const {
  LESS_EACH_PART(*reinterpret_cast<FloatsInMemory*>(p + i * kNative) = part[i]);
}
LESS_INLINE void Vec::store(bf16* p) const {  // as from_float<bf16>() in half.h
  const Int u = as_int(*this);
  const Int top = shift_right<16>(u);
  const Int rounded = shift_right<16>(u + Int(0x7fff) + (top & Int(1)));
  const Int nan = (u & Int(0x7fffffff)) > Int(0x7f800000);
  const Int half = select(nan, top | Int(0x40), rounded);
  LESS_EACH_PART(store_halves(low_halves(half.part[i]), p + i * kNative));
}
LESS_INLINE void Vec::store(fp16* p) const {
  LESS_EACH_PART(store_halves(to_fp16(part[i]), p + i * kNative));
}
LESS_INLINE void Vec::store(int8_t* p) const {
  const Vec shifter(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer, in the low bits
  const Vec x = min(Vec(127.0f), max(Vec(-127.0f), *this));
  const Int whole = as_int(x + shifter) - as_int(shifter);
  LESS_EACH_PART(store_bytes(low_bytes(whole.part[i]), p + i * kNative));
}

#ifdef LESS_ISA_avx512

// The first n < 16 elements of memory, and `fill` behind them; or to memory.
LESS_INLINE uint16_t first(int n) { return uint16_t((1u << n) - 1); }
LESS_INLINE Floats load_first(const float* p, int n, float fill) {
  return _mm512_mask_loadu_ps(_mm512_set1_ps(fill), first(n), p);
}
template <typename T>
LESS_INLINE Halves load_first(const T* p, int n, T fill) {
  return (Halves)_mm256_mask_loadu_epi16(_mm256_set1_epi16(short(fill.bits)), first(n), p);
}
LESS_INLINE Bytes load_first(const int8_t* p, int n, int8_t fill) {
  return (Bytes)_mm_mask_loadu_epi8(_mm_set1_epi8(fill), first(n), p);
}
LESS_INLINE void store_first(Floats x, float* p, int n) { _mm512_mask_storeu_ps(p, first(n), x); }
template <typename T>
LESS_INLINE void store_first(Halves x, T* p, int n) {
  _mm256_mask_storeu_epi16(p, first(n), (__m256i)x);
}
LESS_INLINE void store_first(Bytes x, int8_t* p, int n) {
  _mm_mask_storeu_epi8(p, first(n), (__m128i)x);
}

// The array between vanishes: what is stored whole is what is loaded whole.
template <typename T>
LESS_INLINE Vec Vec::load(const T* p, int n, float fill) {
  const auto x = load_first(p, n, from_float<T>(fill));
  T whole[kSize];
  std::memcpy(whole, &x, sizeof x);
  return load(whole);
}

template <typename T>
LESS_INLINE void Vec::store(T* p, int n) const {
  T whole[kSize];
  store(whole);
  decltype(load_first(whole, n, whole[0])) x;
  std::memcpy(&x, whole, sizeof x);
  store_first(x, p, n);
}

#else

template <typename T>
LESS_INLINE Vec Vec::load(const T* p, int n, float fill) {
  T whole[kSize];
  const T filler = from_float<T>(fill);
  for (int i = 0; i < kSize; ++i) whole[i] = i < n ? p[i] : filler;
  return load(whole);
}

template <typename T>
LESS_INLINE void Vec::store(T* p, int n) const {
  T whole[kSize];
  store(whole);
  for (int i = 0; i < n; ++i) p[i] = whole[i];
}

#endif

// kSize bytes, the first n of which are memory's; each one's sign above it.
LESS_INLINE Int load_signed(const uint8_t* p, int n = Vec::kSize) {
  Int x;
#ifdef LESS_ISA_avx512
  const auto* const at = reinterpret_cast<const int8_t*>(p);
  x.part[0] = signed_ints(n == Vec::kSize ? load_bytes(p) : load_first(at, n, 0));
#else
  uint8_t whole[Vec::kSize] = {};
  if (n == Vec::kSize) {
    std::memcpy(whole, p, sizeof whole);
  } else {
    std::memcpy(whole, p, n);
  }
  LESS_EACH_PART(x.part[i] = signed_ints(load_bytes(whole + i * kNative)));
#endif
  return x;
}

// Up to a vector of elements; the rest is 0.
template <typename T>
LESS_INLINE Vec load_some(const T* p, int n) {
  return n == Vec::kSize ? Vec::load(p) : Vec::load(p, n);
}

// Elements 4 i to 4 i + 3.
LESS_INLINE Four quarter(Vec a, int i) {
  const Floats x = a.part[4 * i / kNative];
  const int first = 4 * i % kNative;
  return Four{x[first], x[first + 1], x[first + 2], x[first + 3]};
}

// The upper half added to the lower, until four are left.
LESS_INLINE Four sum_to_four(Vec a) {
#ifdef LESS_ISA_avx512
  const __m256 x = _mm512_castps512_ps256(a.part[0]) + _mm512_extractf32x8_ps(a.part[0], 1);
  return _mm256_castps256_ps128(x) + _mm256_extractf128_ps(x, 1);
#else
  return quarter(a, 0) + quarter(a, 1);
#endif
}

// 0, 1, 2, ...
LESS_INLINE Int iota() {
  int32_t index[Vec::kSize];
  for (int i = 0; i < Vec::kSize; ++i) index[i] = i;
  return Int::load(index);
}

// Sum of all, always by halves: of eight ((0+4)+(2+6)) + ((1+5)+(3+7)).
LESS_INLINE float sum(Vec a) {
  const Four x = sum_to_four(a);
  return (x[0] + x[2]) + (x[1] + x[3]);
}

// The sums of four, to out[0..4), in fewer instructions than one by one; the same bits.
LESS_INLINE void sum(const Vec (&a)[4], float* out) {
  const Four w = sum_to_four(a[0]), x = sum_to_four(a[1]);
  const Four y = sum_to_four(a[2]), z = sum_to_four(a[3]);
  const Four wx = Four{w[0], w[1], x[0], x[1]} + Four{w[2], w[3], x[2], x[3]};
  const Four yz = Four{y[0], y[1], z[0], z[1]} + Four{y[2], y[3], z[2], z[3]};
  const Four all = Four{wx[0], wx[2], yz[0], yz[2]} + Four{wx[1], wx[3], yz[1], yz[3]};
  std::memcpy(out, &all, sizeof all);
}

// The sums of four, to out[0..4), in whatever order takes least.
LESS_INLINE void quick_sums(const Vec (&a)[4], float* out) {
#if defined(LESS_ISA_avx512)
  const auto halves = [](Vec x, Vec y) LESS_LAMBDA_INLINE {
    const __m512i p = (__m512i)x.part[0], q = (__m512i)y.part[0];
    return (__m512i)((Floats)_mm512_unpacklo_epi32(p, q) + (Floats)_mm512_unpackhi_epi32(p, q));
  };
  const __m512i x = halves(a[0], a[1]), y = halves(a[2], a[3]);
  Vec quarters;
  quarters.part[0] = (Floats)_mm512_unpacklo_epi64(x, y) + (Floats)_mm512_unpackhi_epi64(x, y);
  const Four all = sum_to_four(quarters);
  std::memcpy(out, &all, sizeof all);
#elif defined(LESS_ISA_avx2)
  const __m256 sums = _mm256_hadd_ps(_mm256_hadd_ps(a[0].part[0], a[1].part[0]),
                                     _mm256_hadd_ps(a[2].part[0], a[3].part[0]));
  const Four all = _mm256_castps256_ps128(sums) + _mm256_extractf128_ps(sums, 1);
  std::memcpy(out, &all, sizeof all);
#else
  sum(a, out);
#endif
}

// Largest of all. Not for NaN.
LESS_INLINE float max_of(Vec a) {
  Four x = quarter(a, 0);
  for (int i = 1; i < Vec::kSize / 4; ++i) {
    const Four y = quarter(a, i);
    x = x > y ? x : y;
  }
  const float even = x[0] > x[2] ? x[0] : x[2];
  const float odd = x[1] > x[3] ? x[1] : x[3];
  return even > odd ? even : odd;
}

// e^x, within 2 ulp over the whole float range, subnormal results included; 0 at -inf, inf from
// 88.73 on, NaN at NaN.
//
// x = n ln2 + r with |r| <= ln2 / 2; e^r by a polynomial (the classic one of Cephes' expf); 2^n in
// two factors, so that neither overflows nor becomes subnormal before the last product.
LESS_INLINE Vec exp(Vec x) {
  x = min(Vec(89.0f), max(Vec(-104.0f), x));
  const Vec shifter(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer, in the low bits
  const Vec shifted = fma(x, Vec(1.44269504088896341f), shifter);
  const Vec whole = shifted - shifter;
  const Int n = as_int(shifted) - as_int(shifter);
  Vec r = fma(whole, Vec(-0.693359375f), x);  // ln2 in two parts; the first product is exact
  r = fma(whole, Vec(2.12194440e-4f), r);
  Vec y(1.9875691500e-4f);
  y = fma(y, r, Vec(1.3981999507e-3f));
  y = fma(y, r, Vec(8.3334519073e-3f));
  y = fma(y, r, Vec(4.1665795894e-2f));
  y = fma(y, r, Vec(1.6666665459e-1f));
  y = fma(y, r, Vec(5.0000001201e-1f));
  y = fma(y, r * r, r) + Vec(1.0f);
  const Int half = shift_right_signed<1>(n);
  const Vec low = as_vec(shift_left<23>(half + Int(127)));
  const Vec high = as_vec(shift_left<23>(n - half + Int(127)));
  return y * low * high;
}

// tanh x, within 2 ulp; NaN at NaN.
//
// 1 - 2 / (e^2x + 1); below 5/8, where that cancels, an odd minimax polynomial.
LESS_INLINE Vec tanh(Vec x) {
  const Vec a = abs(x), z = a * a;
  Vec y(-0x1.901808p-8f);
  y = fma(y, z, Vec(0x1.581fa8p-6f));
  y = fma(y, z, Vec(-0x1.b928e0p-5f));
  y = fma(y, z, Vec(0x1.110e2ep-3f));
  y = fma(y, z, Vec(-0x1.555552p-2f));
  const Vec small = fma(y * z, a, a);
  const Vec large = Vec(1.0f) - Vec(2.0f) / (exp(a + a) + Vec(1.0f));
  const Int sign = as_int(x) & Int(INT32_MIN);
  return as_vec(as_int(select(a < Vec(0.625f), small, large)) | sign);
}

// x (1 + erf(x / sqrt 2)) / 2, the exact gelu; error at most 3e-7 + half an ulp of x.
//
// Written as relu(x) - |x| Q(|x|), Q the upper tail of the normal distribution, so that nothing
// cancels at either end. Q(a) = e^(-a^2/2) t P(t), t = 1 / (1 + 0.35 a); P is a minimax polynomial
// for 0 <= a <= 15, relative error 4e-8.
LESS_INLINE Vec gelu(Vec x) {
  const Vec a = min(Vec(15.0f), abs(x));
  const Vec t = Vec(1.0f) / fma(a, Vec(0.35f), Vec(1.0f));
  Vec y(-0x1.ddd3dap-6f);
  y = fma(y, t, Vec(0x1.270a3ep-3f));
  y = fma(y, t, Vec(-0x1.060c0cp-2f));
  y = fma(y, t, Vec(0x1.4671d6p-3f));
  y = fma(y, t, Vec(-0x1.7d32a8p-6f));
  y = fma(y, t, Vec(0x1.b07058p-4f));
  y = fma(y, t, Vec(0x1.eac36p-4f));
  y = fma(y, t, Vec(0x1.1e7136p-3f));
  y = fma(y, t, Vec(0x1.1df1c0p-3f));
  const Vec tail = y * t * exp(a * a * Vec(-0.5f));
  return max(Vec(0.0f), x) - a * tail;
}

}  // namespace less::cpu::LESS_ISA
