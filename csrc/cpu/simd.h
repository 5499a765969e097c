// The vector layer of all CPU kernels: eight floats, whatever the machine.
//
//   Vec x = Vec::load(p);            8 elements of float, bf16 or fp16, exactly widened
//   Vec x = Vec::load(p, n, fill);   n < 8 elements, the rest `fill` (0); p[n..] is never touched
//   x.store(p); x.store(p, n);       narrowed to nearest, ties to even
//   fma(a, b, c)  max  min  exp  gelu  sum(x)  max_of(x)  select(mask, a, b)
//
// Everything lives in the namespace of the SIMD level that is being compiled, so that code of one
// level is never linked into another. Two backends implement the primitives, and the functions
// below them are written once: `avx2` (AVX2, FMA, F16C) and `portable` (GCC/Clang vectors of four,
// which every 64-bit machine has; fma rounds twice there). A level gives the same bits on every
// machine, compiler and thread count; two levels may differ in the last bit.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/half.h"

#ifdef LESS_ISA_avx2
#include <immintrin.h>
#endif

#ifndef LESS_ISA
#error "compile through CMakeLists.txt, which defines LESS_ISA"
#endif

#define LESS_INLINE inline __attribute__((always_inline))

namespace less::cpu::LESS_ISA {

constexpr float kInfinity = __builtin_inff();

#ifdef LESS_ISA_avx2

// -- avx2 -----------------------------------------------------------------------------------------

struct Int {  // 8 x int32; as a mask, all bits or none of each
  __m256i x;
  Int() = default;
  LESS_INLINE Int(__m256i raw) : x(raw) {}
  LESS_INLINE Int(int32_t all) : x(_mm256_set1_epi32(all)) {}
};

LESS_INLINE Int operator+(Int a, Int b) { return _mm256_add_epi32(a.x, b.x); }
LESS_INLINE Int operator-(Int a, Int b) { return _mm256_sub_epi32(a.x, b.x); }
LESS_INLINE Int operator&(Int a, Int b) { return _mm256_and_si256(a.x, b.x); }
LESS_INLINE Int operator|(Int a, Int b) { return _mm256_or_si256(a.x, b.x); }
LESS_INLINE Int operator>(Int a, Int b) { return _mm256_cmpgt_epi32(a.x, b.x); }
LESS_INLINE Int operator==(Int a, Int b) { return _mm256_cmpeq_epi32(a.x, b.x); }
template <int kBits>
LESS_INLINE Int shift_left(Int a) {
  return _mm256_slli_epi32(a.x, kBits);
}
template <int kBits>
LESS_INLINE Int shift_right(Int a) {  // zeros enter
  return _mm256_srli_epi32(a.x, kBits);
}
template <int kBits>
LESS_INLINE Int shift_right_signed(Int a) {  // the sign enters
  return _mm256_srai_epi32(a.x, kBits);
}
LESS_INLINE Int select(Int mask, Int a, Int b) { return _mm256_blendv_epi8(b.x, a.x, mask.x); }

struct Vec {
  static constexpr int kSize = 8;
  __m256 x;

  Vec() = default;
  LESS_INLINE Vec(__m256 raw) : x(raw) {}
  LESS_INLINE Vec(float all) : x(_mm256_set1_ps(all)) {}

  static LESS_INLINE Vec load(const float* p) { return _mm256_loadu_ps(p); }
  static LESS_INLINE Vec load(const bf16* p) {
    const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
  }
  static LESS_INLINE Vec load(const fp16* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  template <typename T>
  static LESS_INLINE Vec load(const T* p, int n, float fill = 0.0f);

  LESS_INLINE void store(float* p) const { _mm256_storeu_ps(p, x); }
  LESS_INLINE void store(bf16* p) const;
  LESS_INLINE void store(fp16* p) const {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                     _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
  template <typename T>
  LESS_INLINE void store(T* p, int n) const;
};

LESS_INLINE Vec operator+(Vec a, Vec b) { return _mm256_add_ps(a.x, b.x); }
LESS_INLINE Vec operator-(Vec a, Vec b) { return _mm256_sub_ps(a.x, b.x); }
LESS_INLINE Vec operator*(Vec a, Vec b) { return _mm256_mul_ps(a.x, b.x); }
LESS_INLINE Vec operator/(Vec a, Vec b) { return _mm256_div_ps(a.x, b.x); }
LESS_INLINE Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a.x, b.x, c.x); }
// b where a is NaN or both are zero: max(limit, x) lets a NaN x through.
LESS_INLINE Vec max(Vec a, Vec b) { return _mm256_max_ps(a.x, b.x); }
LESS_INLINE Vec min(Vec a, Vec b) { return _mm256_min_ps(a.x, b.x); }
LESS_INLINE Int operator<(Vec a, Vec b) {
  return _mm256_castps_si256(_mm256_cmp_ps(a.x, b.x, _CMP_LT_OQ));
}
LESS_INLINE Int as_int(Vec a) { return _mm256_castps_si256(a.x); }
LESS_INLINE Vec as_vec(Int a) { return _mm256_castsi256_ps(a.x); }
LESS_INLINE Vec to_vec(Int a) { return _mm256_cvtepi32_ps(a.x); }

// Lower 16 bits of each element, to p[0..8).
LESS_INLINE void store_low_halves(Int a, void* p) {
  const __m256i packed = _mm256_packus_epi32(a.x, a.x);
  const __m256i ordered = _mm256_permute4x64_epi64(packed, 0x08);
  _mm_storeu_si128(static_cast<__m128i*>(p), _mm256_castsi256_si128(ordered));
}

#else

// -- portable -------------------------------------------------------------------------------------

typedef float Float4 __attribute__((vector_size(16)));
typedef int32_t Int4 __attribute__((vector_size(16)));
typedef uint32_t Uint4 __attribute__((vector_size(16)));
typedef uint16_t Half4 __attribute__((vector_size(8)));

struct Int {  // 8 x int32; as a mask, all bits or none of each
  Int4 lo, hi;
  Int() = default;
  LESS_INLINE Int(Int4 low, Int4 high) : lo(low), hi(high) {}
  LESS_INLINE Int(int32_t all) : lo(Int4{} + all), hi(Int4{} + all) {}
};

LESS_INLINE Int operator+(Int a, Int b) { return {a.lo + b.lo, a.hi + b.hi}; }
LESS_INLINE Int operator-(Int a, Int b) { return {a.lo - b.lo, a.hi - b.hi}; }
LESS_INLINE Int operator&(Int a, Int b) { return {a.lo & b.lo, a.hi & b.hi}; }
LESS_INLINE Int operator|(Int a, Int b) { return {a.lo | b.lo, a.hi | b.hi}; }
LESS_INLINE Int operator>(Int a, Int b) { return {Int4(a.lo > b.lo), Int4(a.hi > b.hi)}; }
LESS_INLINE Int operator==(Int a, Int b) { return {Int4(a.lo == b.lo), Int4(a.hi == b.hi)}; }
template <int kBits>
LESS_INLINE Int shift_left(Int a) {
  return {Int4(Uint4(a.lo) << kBits), Int4(Uint4(a.hi) << kBits)};
}
template <int kBits>
LESS_INLINE Int shift_right(Int a) {  // zeros enter
  return {Int4(Uint4(a.lo) >> kBits), Int4(Uint4(a.hi) >> kBits)};
}
template <int kBits>
LESS_INLINE Int shift_right_signed(Int a) {  // the sign enters
  return {a.lo >> kBits, a.hi >> kBits};
}
LESS_INLINE Int select(Int mask, Int a, Int b) {
  return {(a.lo & mask.lo) | (b.lo & ~mask.lo), (a.hi & mask.hi) | (b.hi & ~mask.hi)};
}

struct Vec {
  static constexpr int kSize = 8;
  Float4 lo, hi;

  Vec() = default;
  LESS_INLINE Vec(Float4 low, Float4 high) : lo(low), hi(high) {}
  LESS_INLINE Vec(float all) : lo(Float4{all, all, all, all}), hi(Float4{all, all, all, all}) {}

  static LESS_INLINE Vec load(const float* p) {
    Vec v;
    std::memcpy(&v.lo, p, 16);
    std::memcpy(&v.hi, p + 4, 16);
    return v;
  }
  static LESS_INLINE Vec load(const bf16* p);
  static LESS_INLINE Vec load(const fp16* p);
  template <typename T>
  static LESS_INLINE Vec load(const T* p, int n, float fill = 0.0f);

  LESS_INLINE void store(float* p) const {
    std::memcpy(p, &lo, 16);
    std::memcpy(p + 4, &hi, 16);
  }
  LESS_INLINE void store(bf16* p) const;
  LESS_INLINE void store(fp16* p) const;
  template <typename T>
  LESS_INLINE void store(T* p, int n) const;
};

LESS_INLINE Vec operator+(Vec a, Vec b) { return {a.lo + b.lo, a.hi + b.hi}; }
LESS_INLINE Vec operator-(Vec a, Vec b) { return {a.lo - b.lo, a.hi - b.hi}; }
LESS_INLINE Vec operator*(Vec a, Vec b) { return {a.lo * b.lo, a.hi * b.hi}; }
LESS_INLINE Vec operator/(Vec a, Vec b) { return {a.lo / b.lo, a.hi / b.hi}; }
LESS_INLINE Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }
LESS_INLINE Int operator<(Vec a, Vec b) { return {Int4(a.lo < b.lo), Int4(a.hi < b.hi)}; }
LESS_INLINE Int as_int(Vec a) { return {Int4(a.lo), Int4(a.hi)}; }
LESS_INLINE Vec as_vec(Int a) { return {Float4(a.lo), Float4(a.hi)}; }
LESS_INLINE Vec to_vec(Int a) {
  return {__builtin_convertvector(a.lo, Float4), __builtin_convertvector(a.hi, Float4)};
}
// b where a is NaN or both are zero: max(limit, x) lets a NaN x through.
LESS_INLINE Vec max(Vec a, Vec b) { return as_vec(select(b < a, as_int(a), as_int(b))); }
LESS_INLINE Vec min(Vec a, Vec b) { return as_vec(select(a < b, as_int(a), as_int(b))); }

LESS_INLINE Int load_halves(const void* p) {
  Half4 lo, hi;
  std::memcpy(&lo, p, 8);
  std::memcpy(&hi, static_cast<const char*>(p) + 8, 8);
  return {__builtin_convertvector(lo, Int4), __builtin_convertvector(hi, Int4)};
}

// Lower 16 bits of each element, to p[0..8).
LESS_INLINE void store_low_halves(Int a, void* p) {
  const Half4 lo = __builtin_convertvector(a.lo, Half4);
  const Half4 hi = __builtin_convertvector(a.hi, Half4);
  std::memcpy(p, &lo, 8);
  std::memcpy(static_cast<char*>(p) + 8, &hi, 8);
}

LESS_INLINE Vec Vec::load(const bf16* p) { return as_vec(shift_left<16>(load_halves(p))); }

LESS_INLINE Vec Vec::load(const fp16* p) {  // as to_float(fp16) in half.h
  const Int half = load_halves(p);
  const Int sign = shift_left<16>(half & Int(0x8000));
  const Int magnitude = half & Int(0x7fff);
  const Int small = as_int(to_vec(magnitude) * Vec(0x1p-24f));
  const Int normal = shift_left<13>(magnitude) + Int(112 << 23);
  const Int special = shift_left<13>(magnitude) | Int(255 << 23);
  const Int bits =
      select(Int(0x400) > magnitude, small, select(magnitude > Int(0x7bff), special, normal));
  return as_vec(bits | sign);
}

LESS_INLINE void Vec::store(fp16* p) const {  // as from_float<fp16>() in half.h
  const Int u = as_int(*this);
  const Int sign = shift_right<16>(u) & Int(0x8000);
  const Int a = u & Int(0x7fffffff);
  const Int small = as_int(as_vec(a) + Vec(0.5f)) - Int(0x3f000000);
  const Int odd = shift_right<13>(a) & Int(1);
  const Int normal = shift_right<13>(a - Int(0x38000000) + Int(0xfff) + odd);
  const Int nan = (shift_right<13>(a) & Int(0x3ff)) | Int(0x7e00);
  const Int large = select(a > Int(0x7f800000), nan, Int(0x7c00));
  const Int half = select(a > Int(0x477fffff), large, select(Int(0x38800000) > a, small, normal));
  store_low_halves(half | sign, p);
}

#endif

// -- written once ---------------------------------------------------------------------------------

LESS_INLINE Vec select(Int mask, Vec a, Vec b) {
  return as_vec(select(mask, as_int(a), as_int(b)));
}
LESS_INLINE Vec abs(Vec a) { return as_vec(as_int(a) & Int(0x7fffffff)); }
LESS_INLINE Vec operator-(Vec a) { return as_vec(as_int(a) + Int(INT32_MIN)); }

LESS_INLINE void Vec::store(bf16* p) const {  // as from_float<bf16>() in half.h
  const Int u = as_int(*this);
  const Int top = shift_right<16>(u);
  const Int rounded = shift_right<16>(u + Int(0x7fff) + (top & Int(1)));
  const Int nan = (u & Int(0x7fffffff)) > Int(0x7f800000);
  store_low_halves(select(nan, top | Int(0x40), rounded), p);
}

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

// Sum of the eight, always in this order: ((0+4)+(2+6)) + ((1+5)+(3+7)).
LESS_INLINE float sum(Vec a) {
  float x[Vec::kSize];
  a.store(x);
  return ((x[0] + x[4]) + (x[2] + x[6])) + ((x[1] + x[5]) + (x[3] + x[7]));
}

// Largest of the eight. Not for NaN.
LESS_INLINE float max_of(Vec a) {
  float x[Vec::kSize];
  a.store(x);
  float largest = x[0];
  for (int i = 1; i < Vec::kSize; ++i) largest = x[i] > largest ? x[i] : largest;
  return largest;
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
