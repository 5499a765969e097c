// Squared distances from one key to others of its format, where they lie.
//
//   floats   sum (k - k_n)^2
//   codes    of levels m, m_n and scales s, s_n; in whole numbers, but for the last line:
//              e = |m - m_n|^2 = |m|^2 + |m_n|^2 - 2 m . m_n
//              |s m - s_n m_n|^2 = s s_n e + (s - s_n) (s |m|^2 - s_n |m_n|^2)
//            int8 rows are their levels; those of a code c of b bits are 2 c - (2^b - 1), in units
//            of 2 / 2^b scales
//
// So keys that are equal lie at exactly 0.
#pragma once

#include <algorithm>

#include "cpu/byte_products.h"
#include "cpu/codec.h"
#include "cpu/softmax.h"

namespace less::cpu::LESS_ISA {

// Sums of squared differences from a key to four rows.
struct FourSums {
  Vec a{0.0f}, b{0.0f}, c{0.0f}, d{0.0f};

  // The numbers of the rows at x, a stride of bytes apart.
  template <typename T>
  LESS_INLINE void add(Vec key, const uint8_t* x, int64_t stride) {
    const auto one = [key](Vec& sum, const uint8_t* row) LESS_LAMBDA_INLINE {
      const Vec apart = Vec::load(reinterpret_cast<const T*>(row)) - key;
      sum = fma(apart, apart, sum);
    };
    one(a, x);
    one(b, x + stride);
    one(c, x + 2 * stride);
    one(d, x + 3 * stride);
  }
  LESS_INLINE void store(float* out) const { quick_sums({a, b, c, d}, out); }
};

// A key of numbers of a type, as floats.
template <typename T>
class FloatKey {
 public:
  static int64_t scratch(int64_t D) { return 2 * padded(D); }

  FloatKey(const Stored& of, int64_t i, int64_t D, float* memory) : D_(D), key_(memory) {
    std::fill(key_, key_ + 2 * padded(D), 0.0f);
    decode_row(of, i, D, key_);
  }

  // out[n] = |k - k_n|^2, n < N
  void distances(const Stored& rows, int64_t N, float* out) const {
    if (N < kRows || D_ % Vec::kSize != 0) {
      for (int64_t n = 0; n < N; ++n) out[n] = distance(rows, n);
      return;
    }
    for (int64_t n = 0; n < N; n += kRows) {
      const int64_t first = std::min(n, N - kRows);  // the last ones overlap
      const uint8_t* x = rows.rows + first * rows.stride;
      FourSums low, high;
      const auto add = [&](int64_t d) LESS_LAMBDA_INLINE {
        const Vec key = Vec::load(key_ + d);
        low.add<T>(key, x, rows.stride);
        high.add<T>(key, x + 4 * rows.stride, rows.stride);
        x += Vec::kSize * sizeof(T);
      };
      int64_t d = 0;
      for (; d + 2 * Vec::kSize <= D_; d += 2 * Vec::kSize) {
        add(d);
        add(d + Vec::kSize);
      }
      if (d < D_) add(d);
      low.store(out + first);
      high.store(out + first + 4);
    }
  }

 private:
  static constexpr int kRows = 8;

  float distance(const Stored& rows, int64_t n) const {
    float* const other = key_ + padded(D_);
    decode_row(rows, n, D_, other);
    Vec sum_of(0.0f);
    for (int64_t d = 0; d < D_; d += Vec::kSize) {
      const Vec apart = Vec::load(other + d) - Vec::load(key_ + d);
      sum_of = fma(apart, apart, sum_of);
    }
    return sum(sum_of);
  }

  int64_t D_;
  float* key_;  // [D], and a row to compare it with
};

// Bytes of kNative rows, 16 of each.
struct RowBytes {
  Octets a, b, c, d;
};

LESS_INLINE RowBytes field(const RowBytes& x, int from, int bits) {
  return {field(x.a, from, bits), field(x.b, from, bits), field(x.c, from, bits),
          field(x.d, from, bits)};
}
LESS_INLINE RowBytes at_field(const RowBytes& x, int from) {
  return {at_field(x.a, from), at_field(x.b, from), at_field(x.c, from), at_field(x.d, from)};
}
LESS_INLINE RowBytes operator|(const RowBytes& x, const RowBytes& y) {
  return {x.a | y.a, x.b | y.b, x.c | y.c, x.d | y.d};
}

// A sum of products for each of them.
template <bool kVnni, bool kSmall>
struct RowSums {
  ByteSum<kVnni, kSmall> a, b, c, d;

  LESS_INLINE Ints totals() const {
    return sums_of_quarters(a.total(), b.total(), c.total(), d.total());
  }
};

// A key of codes.
template <DType kType>
class CodeKey {
 public:
  static int64_t scratch(int64_t D) { return (D / 16 + 8) * kNative; }

  // `memory`: at a multiple of 64 bytes.
  CodeKey(const Stored& of, int64_t i, int64_t D, float* memory)
      : D_(D), level_(reinterpret_cast<Octets*>(memory)), scale_(scale_of(of, i)) {
    Octets* next = level_;
    for_bytes(one_row(of, i), [&next](Sixteen x) LESS_LAMBDA_INLINE {
      if (packed(kType)) x = x + x - kTop;
      *next++ = side_by_side([x](int) LESS_LAMBDA_INLINE { return x; });
    });
    const Sums own = sums_of_one(of, i);
    square_ = squares(own);
    zero_ = apart(own);
  }

  // out[n] = |k - k_n|^2, n < N
  void distances(const Stored& rows, int64_t N, float* out) const {
    if (N < Vec::kSize) {
      for (int64_t n = 0; n < N; ++n) {
        distance(sums_of_one(rows, n), Vec(scale_of(rows, n))).store(out + n, 1);
      }
      return;
    }
    with_vnni([&](auto vnni) LESS_LAMBDA_INLINE {
      constexpr bool kVnni = decltype(vnni)::value;
      // 28800 of the largest products.
      if (packed(kType) && !kVnni && D_ <= 1024) return distances<kVnni, true>(rows, N, out);
      distances<kVnni, false>(rows, N, out);
    });
  }

 private:
  static constexpr uint8_t kTop = packed(kType) ? (1 << bits_of(kType)) - 1 : 0;
  static constexpr float kUnit = packed(kType) ? 2.0f / (1 << bits_of(kType)) : 1.0f;

  // Of kSize rows. Of codes c: sum c m, and sum c (c - kTop); of int8: sum m_n m, and |m_n|^2.
  struct Sums {
    Int cross, square;
  };

  // |m_n|^2
  Int squares(const Sums& of) const {
    if constexpr (!packed(kType)) return of.square;
    return shift_left<2>(of.square) + Int(int32_t(kTop * kTop * D_));
  }
  // e, but for what is the same for all rows.
  static Int apart(const Sums& of) {
    if constexpr (!packed(kType)) return of.square - of.cross - of.cross;
    return shift_left<2>(of.square - of.cross);
  }

  Vec distance(const Sums& of, Vec scale) const {
    const Vec own(scale_), e(apart(of) - zero_), both = own * scale;
    const Vec more = (own - scale) * (own * Vec(square_) - scale * Vec(squares(of)));
    return (both * e + more) * Vec(kUnit * kUnit);
  }

  static float scale_of(const Stored& of, int64_t i) {
    return packed(kType) ? to_float(fp16{of.half[i]}) : of.scale[i];
  }
  static Vec scales(const Stored& of, int64_t n) {
    return packed(kType) ? Vec::load(reinterpret_cast<const fp16*>(of.half) + n)
                         : Vec::load(of.scale + n);
  }

  // f(x) for all codes, or int8, of what load(from, n) gives n bytes of, 16 at a time.
  template <typename Load, typename F>
  LESS_INLINE void for_bytes(Load load, F f) const {
    if constexpr (packed(kType)) {
      const auto codes = [&f](const auto& x, int64_t, int) LESS_LAMBDA_INLINE { f(x); };
      for_codes(kType, D_, load, codes);
    } else {
      int64_t d = 0;
      for (; d + 16 <= D_; d += 16) f(load(d, 16));
      if (d < D_) f(load(d, int(D_ - d)));
    }
  }

  static auto one_row(const Stored& of, int64_t i) {
    return [row = of.rows + i * of.stride](int64_t from, int n)
               LESS_LAMBDA_INLINE { return load_sixteen(row + from, n); };
  }

  // Those of row n, in every element.
  Sums sums_of_one(const Stored& of, int64_t n) const {
    ByteSum<false, false> cross, square;
    const Octets* next = level_;
    for_bytes(one_row(of, n), [&](Sixteen x) LESS_LAMBDA_INLINE {
      add(side_by_side([x](int) LESS_LAMBDA_INLINE { return x; }), *next++, cross, square);
    });
    const Ints c = cross.total(), s = square.total();
    Sums all;
    LESS_EACH_PART(all.cross.part[i] = sums_of_quarters(c, c, c, c);
                   all.square.part[i] = sums_of_quarters(s, s, s, s));
    return all;
  }

  template <bool kVnni, bool kSmall>
  void distances(const Stored& rows, int64_t N, float* out) const {
    const int64_t stride = rows.stride;
    for (int64_t n = 0; n < N; n += Vec::kSize) {
      const int64_t at = std::min(n, N - Vec::kSize);  // the last ones overlap
      Sums sums;
      LESS_EACH_PART({
        const uint8_t* const first = rows.rows + (at + i * kNative) * stride;
        RowSums<kVnni, kSmall> cross, square;
        const Octets* next = level_;
        const auto load = [=](int64_t from, int some) LESS_LAMBDA_INLINE {
          const auto rows_from = [=](int j) LESS_LAMBDA_INLINE {
            return side_by_side([=](int quarter) LESS_LAMBDA_INLINE {
              return load_sixteen(first + (4 * quarter + j) * stride + from, some);
            });
          };
          return RowBytes{rows_from(0), rows_from(1), rows_from(2), rows_from(3)};
        };
        for_bytes(load, [&](const RowBytes& x) LESS_LAMBDA_INLINE {
          const Octets level = *next++;
          add(x.a, level, cross.a, square.a);
          add(x.b, level, cross.b, square.b);
          add(x.c, level, cross.c, square.c);
          add(x.d, level, cross.d, square.d);
        });
        sums.cross.part[i] = cross.totals();
        sums.square.part[i] = square.totals();
      });
      distance(sums, scales(rows, at)).store(out + at);
    }
  }

  template <typename Sum>
  static LESS_INLINE void add(Octets x, Octets level, Sum& cross, Sum& square) {
    if constexpr (packed(kType)) {
      cross.add(x, level);
      square.add(x, x - kTop);
    } else {  // signs are the level's, as products are of what is not negative
      typedef int8_t Signed __attribute__((vector_size(sizeof(Octets))));
      const Octets sign = (Octets)((Signed)x < 0);
      const Octets magnitude = (x ^ sign) - sign;
      cross.add(magnitude, (level ^ sign) - sign);
      square.add(magnitude, magnitude);
    }
  }

  int64_t D_;
  Octets* level_;  // of 16 bytes each, for every row at its side
  float scale_;
  Int square_, zero_;  // |m|^2, and what apart() is of the key itself, in every element
};

// Floats that a key of any format takes up.
inline int64_t key_scratch(int64_t D) {
  return std::max(FloatKey<float>::scratch(D), CodeKey<DType::i8>::scratch(D));
}

// Calls f with the key of row i, which is told by key.distances(). `memory`: key_scratch() floats,
// at a multiple of 64 bytes.
template <typename F>
LESS_INLINE void with_key(const Stored& of, int64_t i, int64_t D, float* memory, F f) {
  switch (of.dtype) {
    case DType::b4:
      return f(CodeKey<DType::b4>(of, i, D, memory));
    case DType::b3:
      return f(CodeKey<DType::b3>(of, i, D, memory));
    case DType::b2:
      return f(CodeKey<DType::b2>(of, i, D, memory));
    case DType::i8:
      return f(CodeKey<DType::i8>(of, i, D, memory));
    default:
      return with_type<FloatTypes>(of.dtype, [&](auto type) {
        f(FloatKey<typename decltype(type)::type>(of, i, D, memory));
      });
  }
}

}  // namespace less::cpu::LESS_ISA
