// Rows of 4 bits by sums of whole numbers, where the machine multiplies four bytes in the time of
// one float: the avx512 level. As rows.h, without the rows' scales; levels are (2 code - 15) / 8.
//
//   keys     q . k = scale / 8 (2 sum q8 code - 15 sum q8), of queries that are 8 bits and a scale
//   values   sum w v = unit / 8 (2 sum n code - 15 sum n), n = round(w / unit), unit the largest
//            weight of at most kTile rows / 32639: each w within unit / 2 = 2^-16 of the largest
//
// n has 15 bits and is multiplied as 256 high + low, both within -128 .. 127. Products of four are
// of codes, 0 .. 15, and such bytes. With AVX512-VNNI they are one instruction; without, two of
// them, at most 2 15 128 = 3840, are first added in 16 bits. Neither ever saturates, so both give
// the same whole numbers, hence the same bits on every machine.
#pragma once

#include "cpu/byte_products.h"
#include "cpu/rows.h"

namespace less::cpu::LESS_ISA {

#ifdef LESS_ISA_avx512

namespace integer {

constexpr int64_t kTile = 256;      // rows whose sums stay whole numbers: below 2^28 even here
constexpr float kWhole = 32639.0f;  // 256 127 + 127
constexpr int64_t kMostChunks = 4;  // of 64 bytes, in a row
constexpr int kHeadsAtOnce = kMostHeads<2>;
static_assert(kLevels4.value[0] == -15.0f / 8.0f && kLevels4.value[15] == 15.0f / 8.0f);

typedef int32_t FourInMemory __attribute__((aligned(1), may_alias));

// sum + the products of each four codes and the four bytes at `four`.
template <bool kVnni>
LESS_INLINE __m512i add_products(__m512i sum, __m512i codes, const int8_t* four) {
  const auto& bytes = *reinterpret_cast<const FourInMemory*>(four);
  if constexpr (kVnni) {
    // Not the intrinsic: this level is compiled for machines without it.
    asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(codes), "m"(bytes));
    return sum;
  } else {
    const __m512i pairs = _mm512_maddubs_epi16(codes, _mm512_set1_epi32(bytes));
    return _mm512_add_epi32(sum, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)));
  }
}

LESS_INLINE Vec floats(__m512i x) {
  Int whole;
  whole.part[0] = (Ints)x;
  return Vec(whole);
}

LESS_INLINE __m512i low_codes(__m512i x) { return _mm512_and_si512(x, _mm512_set1_epi8(15)); }
LESS_INLINE __m512i high_codes(__m512i x) { return low_codes(_mm512_srli_epi16(x, 4)); }

// 4 x 4 quarters of vectors, transposed.
LESS_INLINE void transpose_quarters(__m512i (&x)[4]) {
  const __m512i a = _mm512_shuffle_i64x2(x[0], x[1], 0x44);
  const __m512i b = _mm512_shuffle_i64x2(x[2], x[3], 0x44);
  const __m512i c = _mm512_shuffle_i64x2(x[0], x[1], 0xee);
  const __m512i d = _mm512_shuffle_i64x2(x[2], x[3], 0xee);
  x[0] = _mm512_shuffle_i64x2(a, b, 0x88);
  x[1] = _mm512_shuffle_i64x2(a, b, 0xdd);
  x[2] = _mm512_shuffle_i64x2(c, d, 0x88);
  x[3] = _mm512_shuffle_i64x2(c, d, 0xdd);
}

// Up to 64 bytes, from byte `from` on, of `count` rows.
struct Chunk {
  const uint8_t* rows;
  int64_t bytes, count;  // of a row; rows
  int64_t from;

  // f(row), which returns the chunk of row n + .. for rows n .. n + kRows: zeros beyond the bytes
  // of a row and beyond the rows.
  template <int kRows, typename F>
  LESS_INLINE void load(int64_t n, F f) const {
    const uint8_t* const at = rows + n * bytes + from;
    const int64_t left = bytes - from;
    if (left >= 64 && n + kRows <= count) {
      return f([=, this](int i) LESS_LAMBDA_INLINE { return _mm512_loadu_si512(at + i * bytes); });
    }
    const uint64_t mask = left >= 64 ? ~uint64_t(0) : (uint64_t(1) << left) - 1;
    f([=, this](int i) LESS_LAMBDA_INLINE {
      return _mm512_maskz_loadu_epi8(n + i < count ? mask : 0, at + i * bytes);
    });
  }
};

// word[j]: bytes 4 j .. 4 j + 3 of each of 16 rows.
LESS_INLINE void words_of_sixteen(const Chunk& chunk, int64_t n, __m512i* word) {
  chunk.load<16>(n, [=](auto row) LESS_LAMBDA_INLINE {
    __m512i x[4][4];  // [byte / 4 % 4][row / 4]
    for (int i = 0; i < 4; ++i) {
      const __m512i r0 = row(4 * i), r1 = row(4 * i + 1);
      const __m512i r2 = row(4 * i + 2), r3 = row(4 * i + 3);
      const __m512i a = _mm512_unpacklo_epi32(r0, r1), b = _mm512_unpackhi_epi32(r0, r1);
      const __m512i c = _mm512_unpacklo_epi32(r2, r3), d = _mm512_unpackhi_epi32(r2, r3);
      x[0][i] = _mm512_unpacklo_epi64(a, c);
      x[1][i] = _mm512_unpackhi_epi64(a, c);
      x[2][i] = _mm512_unpacklo_epi64(b, d);
      x[3][i] = _mm512_unpackhi_epi64(b, d);
    }
    for (int j = 0; j < 4; ++j) {
      transpose_quarters(x[j]);
      for (int i = 0; i < 4; ++i) word[4 * i + j] = x[j][i];
    }
  });
}

// sum[h]: sum q8 code of 16 rows.
template <bool kVnni, int kHeads>
LESS_INLINE void dot_sixteen(const __m512i* word, const int8_t* q, int64_t width, int64_t D,
                             __m512i* sum) {
  __m512i low[kHeads], high[kHeads];
  for (int h = 0; h < kHeads; ++h) low[h] = high[h] = _mm512_setzero_si512();
  for (int64_t d = 0; d < D / 2; d += 4) {
    const __m512i x = word[d / 4], first = low_codes(x), second = high_codes(x);
    for (int h = 0; h < kHeads; ++h) {
      low[h] = add_products<kVnni>(low[h], first, q + h * width + d);
      high[h] = add_products<kVnni>(high[h], second, q + h * width + D / 2 + d);
    }
  }
  for (int h = 0; h < kHeads; ++h) sum[h] = _mm512_add_epi32(low[h], high[h]);
}

template <bool kVnni>
void dots(const int8_t* q, const float* q_scale, const int32_t* q_sum, int64_t heads, int64_t width,
          const uint8_t* k, int64_t N, int64_t D, float* logit, int64_t stride, Stream* stream) {
  const int64_t bytes = D / 2;
  for (int64_t n = 0; n < N; n += 16) {
    if (stream != nullptr) stream->read(k + n * bytes);
    __m512i word[16 * kMostChunks];
    for (int64_t from = 0; from < bytes; from += 64) {
      words_of_sixteen({k, bytes, N, from}, n, word + from / 4);
    }
    const int count = N - n < 16 ? int(N - n) : 16;
    for (int64_t h = 0; h < heads;) {
      const int now = heads_at_once<2>(heads - h);
      __m512i sum[kHeadsAtOnce];
      with_heads<2>(now, [&](auto each) LESS_LAMBDA_INLINE {
        dot_sixteen<kVnni, each>(word, q + h * width, width, D, sum);
      });
      for (int i = 0; i < now; ++i, ++h) {
        const __m512i eights =
            _mm512_sub_epi32(_mm512_add_epi32(sum[i], sum[i]), _mm512_set1_epi32(15 * q_sum[h]));
        const Vec x = floats(eights) * Vec(q_scale[h] * 0.125f);
        if (count == 16) {
          x.store(logit + h * stride + n);
        } else {
          x.store(logit + h * stride + n, count);
        }
      }
    }
  }
}

// A head's weights of up to kTile rows as whole numbers.
struct Weights {
  alignas(64) int8_t high[kTile], low[kTile];  // zeros up to a multiple of 16
  float unit;
  int32_t total;
};

LESS_INLINE void round_weights(const float* p, int64_t N, Weights& to) {
  Vec top(0.0f), all(0.0f);
  for (int64_t n = 0; n < N; n += 16) {
    const Vec x = load_some(p + n, int(std::min<int64_t>(16, N - n)));
    top = max(top, x);
    all = all + x;
  }
  // What is smaller counts as nothing; and the unit is NaN as soon as a weight is.
  const float largest = std::max(max_of(top), 1e-30f);
  to.unit = largest / kWhole + 0.0f * sum(all);
  const Vec inverse(kWhole / largest), shifter(12582912.0f);  // as in Vec::store
  Int total(0);
  for (int64_t n = 0; n < N; n += 16) {
    const Vec x = load_some(p + n, int(std::min<int64_t>(16, N - n)));
    const Int whole = as_int(fma(x, inverse, shifter)) - as_int(shifter);
    const Int high = shift_right_signed<8>(whole + Int(128));
    store_bytes(low_bytes(high.part[0]), to.high + n);
    store_bytes(low_bytes((whole - shift_left<8>(high)).part[0]), to.low + n);
    total = total + whole;
  }
  int32_t part[16];
  total.store(part);
  uint32_t of_all = 0;  // unsigned: where a weight is NaN, and with it the unit, these are anything
  for (int32_t x : part) of_all += uint32_t(x);
  to.total = int32_t(of_all);
}

// word[n / 4][j]: of four rows, byte after byte, bytes 16 i + 4 j .. 16 i + 4 j + 3 in
// quarter i.
using Words = __m512i[kTile / 4][4];

LESS_INLINE void words_of_fours(const Chunk& chunk, Words& word, Stream* stream) {
  for (int64_t n = 0; n < chunk.count; n += 4) {
    if (stream != nullptr && n % 16 == 0) stream->read(chunk.rows + n * chunk.bytes);
    chunk.load<4>(n, [&](auto row) LESS_LAMBDA_INLINE {
      const __m512i r0 = row(0), r1 = row(1), r2 = row(2), r3 = row(3);
      const __m512i a = _mm512_unpacklo_epi8(r0, r1), b = _mm512_unpackhi_epi8(r0, r1);
      const __m512i c = _mm512_unpacklo_epi8(r2, r3), d = _mm512_unpackhi_epi8(r2, r3);
      word[n / 4][0] = _mm512_unpacklo_epi16(a, c);
      word[n / 4][1] = _mm512_unpackhi_epi16(a, c);
      word[n / 4][2] = _mm512_unpacklo_epi16(b, d);
      word[n / 4][3] = _mm512_unpackhi_epi16(b, d);
    });
  }
}

// Adds to out[h * width + d] for the dims d of up to 64 bytes of the rows, and half a row on.
template <bool kVnni, int kHeads>
LESS_INLINE void add_words(const Words& word, int64_t N, const Weights* weights, int64_t D,
                           int64_t from, float* out, int64_t width) {
  __m512i x[2][kHeads][4];
  for (int j = 0; j < 4; ++j) {
    __m512i high[2][kHeads], low[2][kHeads];
    for (int half = 0; half < 2; ++half) {
      for (int h = 0; h < kHeads; ++h) high[half][h] = low[half][h] = _mm512_setzero_si512();
    }
    for (int64_t n = 0; n < N; n += 4) {
      const __m512i both = word[n / 4][j];
      const __m512i code[2] = {low_codes(both), high_codes(both)};
      for (int half = 0; half < 2; ++half) {
        for (int h = 0; h < kHeads; ++h) {
          high[half][h] = add_products<kVnni>(high[half][h], code[half], weights[h].high + n);
          low[half][h] = add_products<kVnni>(low[half][h], code[half], weights[h].low + n);
        }
      }
    }
    for (int half = 0; half < 2; ++half) {
      for (int h = 0; h < kHeads; ++h) {
        const __m512i sum = _mm512_add_epi32(_mm512_slli_epi32(high[half][h], 8), low[half][h]);
        x[half][h][j] =
            _mm512_sub_epi32(_mm512_add_epi32(sum, sum),
                             _mm512_set1_epi32(int32_t(15u * uint32_t(weights[h].total))));
      }
    }
  }
  for (int h = 0; h < kHeads; ++h) {
    const Vec eighth(weights[h].unit * 0.125f);
    for (int half = 0; half < 2; ++half) {
      transpose_quarters(x[half][h]);
      for (int i = 0; i < 4; ++i) {
        const int64_t d = from + 16 * i, left = D / 2 - d;
        if (left <= 0) break;
        float* const at = out + h * width + half * (D / 2) + d;
        const Vec eights = floats(x[half][h][i]);
        if (left >= 16) {
          fma(eights, eighth, Vec::load(at)).store(at);
        } else {
          fma(eights, eighth, Vec::load(at, int(left))).store(at, int(left));
        }
      }
    }
  }
}

template <bool kVnni>
void add_weighted(const float* p, int64_t heads, int64_t stride, const uint8_t* v, int64_t N,
                  int64_t D, float* out, int64_t width, Stream* stream) {
  const int64_t bytes = D / 2;
  for (int64_t n = 0; n < N; n += kTile) {
    const int64_t count = std::min(kTile, N - n);
    for (int64_t h = 0; h < heads;) {
      const int now = heads_at_once<2>(heads - h);
      Weights weights[kHeadsAtOnce];
      for (int i = 0; i < now; ++i) round_weights(p + (h + i) * stride + n, count, weights[i]);
      for (int64_t from = 0; from < bytes; from += 64) {
        Words word;
        words_of_fours({v + n * bytes, bytes, count, from}, word,
                       h == 0 && from == 0 ? stream : nullptr);
        with_heads<2>(now, [&](auto each) LESS_LAMBDA_INLINE {
          add_words<kVnni, each>(word, count, weights, D, from, out + h * width, width);
        });
      }
      h += now;
    }
  }
}

}  // namespace integer

// One head alone waits for its rows, not for its products: floats do as well.
LESS_INLINE bool integer_rows(DType dtype, int64_t heads, int64_t D) {
  return dtype == DType::b4 && heads > 1 && D <= 128 * integer::kMostChunks;
}

// Where whole numbers serve: as dots_of_rows(), of queries q [heads, width] of 8 bits, each with a
// scale and its sum; else returns false.
inline bool dots_in_integers(DType dtype, const int8_t* q, const float* q_scale,
                             const int32_t* q_sum, int64_t heads, int64_t width, const void* k,
                             int64_t N, int64_t D, float* logit, int64_t stride, Stream* stream) {
  if (!integer_rows(dtype, heads, D)) return false;
  with_vnni([=](auto vnni) {
    integer::dots<decltype(vnni)::value>(q, q_scale, q_sum, heads, width,
                                         static_cast<const uint8_t*>(k), N, D, logit, stride,
                                         stream);
  });
  return true;
}

// Where whole numbers serve: as add_weighted_rows(); else returns false.
inline bool add_in_integers(DType dtype, const float* p, int64_t heads, int64_t stride,
                            const void* v, int64_t N, int64_t D, float* out, int64_t width,
                            Stream* stream) {
  if (!integer_rows(dtype, heads, D)) return false;
  with_vnni([=](auto vnni) {
    integer::add_weighted<decltype(vnni)::value>(p, heads, stride, static_cast<const uint8_t*>(v),
                                                 N, D, out, width, stream);
  });
  return true;
}

#else

inline bool dots_in_integers(DType, const int8_t*, const float*, const int32_t*, int64_t, int64_t,
                             const void*, int64_t, int64_t, float*, int64_t, Stream*) {
  return false;
}
inline bool add_in_integers(DType, const float*, int64_t, int64_t, const void*, int64_t, int64_t,
                            float*, int64_t, Stream*) {
  return false;
}

#endif

}  // namespace less::cpu::LESS_ISA
