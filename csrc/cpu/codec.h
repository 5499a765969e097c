// Rows of every format: floats into the bytes of a row, and back. No other file of the CPU's
// kernels knows how a row is packed; common/codec.h defines packed rows, whose bits are the same on
// every level: sums in the codec's order, never fma().
#pragma once

#include <algorithm>
#include <cstring>
#include <memory>
#include <type_traits>

#include "common/codec.h"
#include "common/layout.h"
#include "cpu/features.h"
#include "cpu/quantize.h"
#include "cpu/simd.h"
#include "params.h"

namespace less::cpu::LESS_ISA {

// -- packed rows ----------------------------------------------------------------------------------

// The first n of 16 bytes, n > 0, and zeros; or to memory.
LESS_INLINE Sixteen load_sixteen(const void* p, int n) {
  typedef int64_t Two __attribute__((vector_size(16)));
  Sixteen x{};
  if (n == 16) {
    std::memcpy(&x, p, 16);
  } else if (n == 8) {  // in a register: what memory is written in parts is slow to read whole
    int64_t eight;
    std::memcpy(&eight, p, 8);
    x = (Sixteen)Two{eight, 0};
  } else {
    std::memcpy(&x, p, n);
  }
  return x;
}
LESS_INLINE void store_sixteen(Sixteen x, void* p, int n) {
  if (n == 16) {
    std::memcpy(p, &x, 16);
  } else if (n == 8) {
    std::memcpy(p, &x, 8);
  } else {
    std::memcpy(p, &x, n);
  }
}

// Each byte's `bits` bits from bit `from` on; and the other way round, of bytes that fit there. The
// machine shifts pairs of bytes: what the one beside it brings in is masked away.
template <typename Bytes>
LESS_INLINE Bytes field(Bytes x, int from, int bits) {
  typedef uint16_t Pairs __attribute__((vector_size(sizeof(Bytes))));
  return (Bytes)((Pairs)x >> uint16_t(from)) & uint8_t((1 << bits) - 1);
}
template <typename Bytes>
LESS_INLINE Bytes at_field(Bytes x, int from) {
  typedef uint16_t Pairs __attribute__((vector_size(sizeof(Bytes))));
  return (Bytes)((Pairs)x << uint16_t(from));
}

// f(codes, d, n) for all codes of packed rows, of which load(i, n) gives n <= 16 bytes from byte i
// on: those of dims d .. d + n.
template <typename Load, typename F>
LESS_INLINE void for_codes(DType dtype, int64_t D, Load load, F f) {
  const int64_t quarter = D / 4, eighth = D / 8;
  const auto sixteens = [](int64_t count, auto each) LESS_LAMBDA_INLINE {
    int64_t i = 0;
    for (; i + 16 <= count; i += 16) each(i, 16);
    if (i < count) each(i, int(count - i));
  };
  if (dtype == DType::b4) {
    return sixteens(D / 2, [&](int64_t i, int n) LESS_LAMBDA_INLINE {
      const auto x = load(i, n);
      f(field(x, 0, 4), i, n);
      f(field(x, 4, 4), D / 2 + i, n);
    });
  }
  if (dtype == DType::b2) {
    return sixteens(quarter, [&](int64_t i, int n) LESS_LAMBDA_INLINE {
      const auto x = load(i, n);
      for (int j = 0; j < 4; ++j) f(field(x, 2 * j, 2), j * quarter + i, n);
    });
  }
  for (int half = 0; half < 2; ++half) {  // of each quarter: the dims of one third bit
    sixteens(eighth, [&](int64_t i, int n) LESS_LAMBDA_INLINE {
      const auto low = load(half * eighth + i, n), high = load(quarter + i, n);
      for (int j = 0; j < 4; ++j) {
        const auto third = at_field(field(high, 2 * j + half, 1), 2);
        f(field(low, 2 * j, 2) | third, j * quarter + half * eighth + i, n);
      }
    });
  }
}

// out [D]: the numbers of a packed row whose scale is `half`.
inline void decode_packed(DType dtype, const uint8_t* row, uint16_t half, int64_t D, float* out) {
  Sixteen level;
  std::memcpy(&level, levels_of(dtype).n, sizeof level);
  const Vec step(to_float(fp16{half}) * 0x1p-6f);  // exact, as the products are
  const auto load = [row](int64_t i, int n) { return load_sixteen(row + i, n); };
  for_codes(dtype, D, load, [&](Sixteen code, int64_t d, int n) {
    const Sixteen found = look_up(level, code);
    int8_t number[16];
    std::memcpy(number, &found, sizeof number);
    int i = 0;
    for (; i + Vec::kSize <= n; i += Vec::kSize) {
      (Vec::load(number + i) * step).store(out + d + i);
    }
    if (i < n) (Vec::load(number + i) * step).store(out + d + i, n - i);
  });
}

// Byte i of `count`: the `kFields` fields from bit kFrom on of code[i], code[i + count], ...,
// little bits first. The codes end 16 bytes before what may be read.
template <int kFields, int kFrom>
LESS_INLINE void pack_fields(const uint8_t* code, int64_t count, uint8_t* row) {
  constexpr int kBits = 8 / kFields;
  for (int64_t i = 0; i < count; i += 16) {
    Sixteen byte{};
    for (int j = 0; j < kFields; ++j) {
      byte |= at_field(field(load_sixteen(code + j * count + i, 16), kFrom, kBits), kBits * j);
    }
    store_sixteen(byte, row + i, int(std::min<int64_t>(16, count - i)));
  }
}

// Sums over a row in the codec's order: f(d, n, x) makes x[0 .. kSums) from dim d on, of n <= kSize
// dims, 0 beyond them.
template <int kSums, typename F>
LESS_INLINE void ordered_sums(int64_t D, float (&out)[kSums], F f) {
  constexpr int kV = Vec::kSize, kVecs = kCodecLanes / kV;
  static_assert(kCodecLanes % kV == 0);
  Vec lanes[kVecs][kSums];
  for (int p = 0; p < kVecs; ++p) {
    for (int s = 0; s < kSums; ++s) lanes[p][s] = Vec(-0.0f);  // to which every number adds itself
  }
  for (int64_t first = 0; first < D; first += kCodecLanes) {
    for (int p = 0; p < kVecs; ++p) {
      const int64_t d = first + p * kV;
      Vec x[kSums];
      for (int s = 0; s < kSums; ++s) x[s] = Vec(0.0f);
      if (d < D) f(d, int(std::min<int64_t>(kV, D - d)), x);
      for (int s = 0; s < kSums; ++s) lanes[p][s] = lanes[p][s] + x[s];
    }
  }
  for (int s = 0; s < kSums; ++s) {
    Vec total = lanes[0][s];
    if constexpr (kVecs == 2) total = total + lanes[1][s];
    out[s] = sum(total);  // by halves
  }
}

LESS_INLINE Vec only_first(Vec x, int n) {
  return n == Vec::kSize ? x : select(Int(n) > iota(), x, Vec(0.0f));
}

template <int kThresholds>
uint16_t encode_codes(const Levels& levels, float clip, const float* x, int64_t D, uint8_t* code) {
  constexpr int kV = Vec::kSize;
  const float largest = bits_to_float(largest_bits(x, D)) * clip;
  float threshold[kThresholds];
  for (int i = 0; i < kThresholds; ++i) threshold[i] = largest * levels.threshold[i];
  const float step = levels.value[1] - levels.value[0];
  float sums[2];  // x level, level^2
  ordered_sums(D, sums, [&](int64_t d, int n, Vec(&sum)[2]) {
    const Vec a = load_some(x + d, n);
    Int index(0);
    for (int i = 0; i < kThresholds; ++i) index = index - (Vec(threshold[i]) < a);
    const Vec level = Vec(index) * Vec(step) + Vec(levels.value[0]);  // exact
    sum[0] = only_first(a * level, n);
    sum[1] = only_first(level * level, n);
    uint8_t part[kV];
    LESS_EACH_PART(store_bytes(low_bytes(index.part[i]), part + i * kNative));
    std::memcpy(code + d, part, kV);
  });
  const float scale = sums[0] / sums[1];
  if (scale != scale) return 0x7e00;
  return from_float<fp16>(scale > kLargestHalf ? kLargestHalf : scale).bits;
}

// Writes the codes of x [D], D a multiple of 8, and returns their scale, fp16. NaN in x makes the
// scale so.
inline uint16_t encode_packed(DType dtype, const float* x, int64_t D, uint8_t* row) {
  constexpr int64_t kMost = 1024;
  uint8_t near[kMost + 16];
  std::unique_ptr<uint8_t[]> far;
  uint8_t* code = near;
  if (D > kMost) {
    far = std::make_unique_for_overwrite<uint8_t[]>(D + 16);
    code = far.get();
  }
  const Levels& levels = levels_of(dtype);
  const float clip = clip_of(dtype, D);
  if (dtype == DType::b4) {
    const uint16_t half = encode_codes<15>(levels, clip, x, D, code);
    pack_fields<2, 0>(code, D / 2, row);
    return half;
  }
  if (dtype == DType::b2) {
    const uint16_t half = encode_codes<3>(levels, clip, x, D, code);
    pack_fields<4, 0>(code, D / 4, row);
    return half;
  }
  const uint16_t half = encode_codes<7>(levels, clip, x, D, code);
  pack_fields<4, 0>(code, D / 4, row);
  pack_fields<8, 2>(code, D / 8, row + D / 4);
  return half;
}

// -- rows of any format ---------------------------------------------------------------------------

// Rows [N, D] of one format where they lie, a stride apart, and their scales.
struct Stored {
  DType dtype;
  unsigned char* rows;
  int64_t stride;  // bytes
  float* scale;    // [N]  of rows of 8 bits; else null
  uint16_t* half;  // [N]  of packed rows; else null
};

inline Stored stored(DType dtype, void* rows, float* scale, uint16_t* half, int64_t D) {
  return {dtype, static_cast<unsigned char*>(rows), row_bytes(dtype, D), scale, half};
}
inline Stored hot_keys(const Layout& layout, const Slots& slots) {
  return stored(layout.call_dtype, slots.hot_k, slots.hot_k_scale, nullptr, layout.D);
}
inline Stored hot_values(const Layout& layout, const Slots& slots) {
  return stored(layout.call_dtype, slots.hot_v, slots.hot_v_scale, nullptr, layout.D);
}
// Of the slots that are not hot, from slot W on.
inline Stored cold_keys(const Layout& layout, const Slots& slots) {
  return stored(layout.k_dtype, slots.k, slots.k_scale, slots.k_half, layout.D);
}
inline Stored cold_values(const Layout& layout, const Slots& slots) {
  return stored(layout.v_dtype, slots.v, slots.v_scale, slots.v_half, layout.D);
}

// The keys or values of a head's slots: of W hot ones, then of the others.
struct SlotRows {
  Stored hot, cold;
  int64_t W;
};

inline SlotRows key_rows(const Layout& layout, const Slots& slots) {
  return {hot_keys(layout, slots), cold_keys(layout, slots), slots.W};
}
inline SlotRows value_rows(const Layout& layout, const Slots& slots) {
  return {hot_values(layout, slots), cold_values(layout, slots), slots.W};
}

// The T tokens of a kv head of a call; scales [B, heads, T], or null.
inline Stored call_rows(const HeadRows& rows, const float* scale, int64_t b, int64_t h,
                        int64_t heads, int64_t T) {
  const int64_t bytes = bytes_of(rows.dtype);
  return {.dtype = rows.dtype,
          .rows = static_cast<unsigned char*>(rows.data) + offset(rows, b, h, 0) * bytes,
          .stride = rows.t * bytes,
          .scale = scale == nullptr ? nullptr : const_cast<float*>(scale) + (b * heads + h) * T,
          .half = nullptr};
}

// out[i] [D], D apart: the numbers of the rows row(i), i < count.
template <typename Row>
LESS_INLINE void decode_rows(const Stored& of, int64_t count, Row row, int64_t D, float* out) {
  if (packed(of.dtype)) {
    for (int64_t i = 0; i < count; ++i) {
      const int64_t n = row(i);
      decode_packed(of.dtype, of.rows + n * of.stride, of.half[n], D, out + i * D);
    }
    return;
  }
  with_type<RowTypes>(of.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    // Copies: what is stored could change what they are copies of, as far as a compiler knows.
    const Stored rows = of;
    const Row at = row;
    const int64_t N = count, width = D;
    float* to = out;
    for (int64_t i = 0; i < N; ++i, to += width) {
      const int64_t n = at(i);
      const float scale = std::is_same_v<T, int8_t> ? rows.scale[n] : 1.0f;
      widen_row(reinterpret_cast<const T*>(rows.rows + n * rows.stride), scale, width, to);
    }
  });
}

// out [D]: the numbers of row n.
inline void decode_row(const Stored& of, int64_t n, int64_t D, float* out) {
  decode_rows(of, 1, [n](int64_t) { return n; }, D, out);
}

// Row n becomes x [D], rounded to the rows' format.
inline void encode_row(const Stored& of, int64_t n, const float* x, int64_t D) {
  unsigned char* const row = of.rows + n * of.stride;
  if (packed(of.dtype)) {
    of.half[n] = encode_packed(of.dtype, x, D, row);
  } else if (of.dtype == DType::i8) {
    of.scale[n] = quantize_row(x, D, reinterpret_cast<int8_t*>(row));
  } else {
    narrow(x, D, of.dtype, 0, row);
  }
}

// Row j of `to`, which lie without gaps, becomes row i of `from`, of the same format.
LESS_INLINE void copy_row(const Stored& from, int64_t i, const Stored& to, int64_t j) {
  std::memcpy(to.rows + j * to.stride, from.rows + i * from.stride, to.stride);
  if (to.scale != nullptr) to.scale[j] = from.scale[i];
  if (to.half != nullptr) to.half[j] = from.half[i];
}

}  // namespace less::cpu::LESS_ISA
