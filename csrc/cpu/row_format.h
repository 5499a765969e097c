// How the loops over rows (rows.h) read a row of any format: some vectors at a time.
//
// A row of D numbers has kFields parts of D / kFields dims each. Reader::load(row, d, n) reads what
// holds n dims, d on, of every part; field<j>(raw) are those of part j, as floats without the row's
// scale.
#pragma once

#include <type_traits>

#include "common/codec.h"
#include "cpu/simd.h"
#include "cpu/types.h"

namespace less::cpu::LESS_ISA {

// Rows whose numbers are of a C++ type.
template <typename T>
struct PlainReader {
  static constexpr int kFields = 1;
  using Raw = Vec;

  LESS_INLINE explicit PlainReader(int64_t D) : D_(D) {}
  LESS_INLINE int64_t bytes() const { return D_ * int64_t(sizeof(T)); }
  LESS_INLINE Raw load(const uint8_t* row, int64_t d, int n) const {
    const T* const at = reinterpret_cast<const T*>(row) + d;
    return n == Vec::kSize ? Vec::load(at) : Vec::load(at, n);
  }
  template <int>
  LESS_INLINE Vec field(const Raw& raw) const {
    return raw;
  }

 private:
  int64_t D_;
};

// Packed rows of 4 or 2 bits.
template <DType kType>
struct PackedReader {
  static constexpr int kFields = 8 / bits_of(kType);
  using Raw = Int;

  LESS_INLINE explicit PackedReader(int64_t D) : D_(D), level_(levels_of(kType).value) {}
  LESS_INLINE int64_t bytes() const { return D_ / kFields; }
  LESS_INLINE Raw load(const uint8_t* row, int64_t d, int n) const {
    return load_signed(row + d, n);
  }
  template <int j>
  LESS_INLINE Vec field(const Raw& raw) const {
    return look_up(level_, shift_right<j * bits_of(kType)>(raw));
  }

 private:
  int64_t D_;
  Table level_;
};

// Packed rows of 3 bits: two of them in four parts, and the third in eight.
template <>
struct PackedReader<DType::b3> {
  static constexpr int kFields = 8;
  struct Raw {
    Int low[2], high;
  };

  LESS_INLINE explicit PackedReader(int64_t D) : D_(D), level_(kLevels3.value) {}
  LESS_INLINE int64_t bytes() const { return D_ / 8 * 3; }
  LESS_INLINE Raw load(const uint8_t* row, int64_t d, int n) const {
    const int64_t part = D_ / 8;
    return {{load_signed(row + d, n), load_signed(row + part + d, n)},
            load_signed(row + 2 * part + d, n)};
  }
  template <int j>
  LESS_INLINE Vec field(const Raw& raw) const {
    const Int low = shift_right<2 * (j / 2)>(raw.low[j % 2]) & Int(3);
    const Int high = shift_left<2>(shift_right<j>(raw.high) & Int(1));
    return look_up(level_, low | high);
  }

 private:
  int64_t D_;
  Table level_;
};

// Calls f with the reader of a format; does nothing for one that no op lets in.
template <typename F>
LESS_INLINE void with_reader(DType dtype, int64_t D, F f) {
  switch (dtype) {
    case DType::b4:
      return f(PackedReader<DType::b4>(D));
    case DType::b3:
      return f(PackedReader<DType::b3>(D));
    case DType::b2:
      return f(PackedReader<DType::b2>(D));
    default:
      with_type<RowTypes>(dtype,
                          [&](auto type) { f(PlainReader<typename decltype(type)::type>(D)); });
  }
}

// f(std::integral_constant<int, 0>{}), ... below kCount.
template <int kCount, typename F>
LESS_INLINE void unrolled(F f) {
  [&]<int... j>(std::integer_sequence<int, j...>) {
    (f(std::integral_constant<int, j>{}), ...);
  }(std::make_integer_sequence<int, kCount>{});
}

}  // namespace less::cpu::LESS_ISA
