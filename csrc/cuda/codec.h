// Rows as slots store them, on the device: codes of packed rows to levels four at a time, and the
// warp that encodes or decodes a row of any format. The levels, the packing and the order of every
// sum are common/codec.h's; so are the bits.
#pragma once

#include "common/codec.h"
#include "cuda/convert.h"
#include "cuda/device.h"

namespace less::cuda {

// The kernels' own type of such rows: a template argument beside the element types of others.
struct FewBits {
  int8_t level;
};

// -- codes to levels --

// Levels are uniform: as int8, code << kLevelShift with bits of kLevelBits turned around.
template <DType kType>
constexpr int kLevelShift = kType == DType::b4   ? 4
                            : kType == DType::b3 ? 5
                                                 : 6;
template <DType kType>
constexpr uint32_t kLevelBits = kType == DType::b4   ? 0x88888888u
                                : kType == DType::b3 ? 0x90909090u
                                                     : 0xa0a0a0a0u;

template <DType kType>
constexpr bool levels_are_uniform() {
  const Levels& levels = levels_of(kType);
  for (int i = 0; i < levels.count; ++i) {
    const auto level = uint8_t(uint32_t(i) << kLevelShift<kType> ^ (kLevelBits<kType> & 0xffu));
    if (uint8_t(levels.n[i]) != level) return false;
  }
  return true;
}
static_assert(levels_are_uniform<DType::b4>() && levels_are_uniform<DType::b3>() &&
              levels_are_uniform<DType::b2>());

// The levels, int8, of four codes, a code a byte.
template <DType kType>
LESS_DEVICE uint32_t levels_of_codes(uint32_t codes) {
  return codes << kLevelShift<kType> ^ kLevelBits<kType>;
}

LESS_DEVICE uint32_t levels_of_codes(DType dtype, uint32_t codes) {
  return dtype == DType::b4   ? levels_of_codes<DType::b4>(codes)
         : dtype == DType::b3 ? levels_of_codes<DType::b3>(codes)
                              : levels_of_codes<DType::b2>(codes);
}

// The codes of dims d .. d + 3 of a packed row, a code a byte; D is a multiple of 16, d of 4.
LESS_DEVICE uint32_t four_codes(DType dtype, int D, int d, const uint8_t* row) {
  if (dtype == DType::b3 && D % 32 != 0) {  // their bytes are no words
    uint32_t codes = 0;
#pragma unroll 1
    for (int i = 0; i < 4; ++i) {
      // narrow: bytes that are no words
      codes |= uint32_t(code_at(dtype, row, D, d + i)) << (8 * i);
    }
    return codes;
  }
  // narrow: four codes a lane, of the bytes that hold them and others
  const auto word = [row](int i) { return *reinterpret_cast<const uint32_t*>(row + i); };
  if (dtype == DType::b4) return word(d % (D / 2)) >> (d / (D / 2) * 4) & 0x0f0f0f0fu;
  const int quarter = D / 4, eighth = D / 8;
  const uint32_t low = word(d % quarter) >> (d / quarter * 2) & 0x03030303u;
  if (dtype == DType::b2) return low;
  return low | (word(quarter + d % eighth) >> (d / eighth) & 0x01010101u) << 2;
}

// What a row's stored scale is in units of its levels: exact.
LESS_DEVICE float level_scale(uint16_t half) {
  return __half2float(bits_of<__half>(half)) * (1.0f / 64.0f);
}

// -- stored rows --

// Rows of one format, and their scales where they have any.
struct StoredRows {
  DType dtype;
  void* rows;
  float* scales;     // of 8 bits
  uint16_t* halves;  // of packed ones

  LESS_DEVICE void* at(int64_t row, int D) const {
    return static_cast<unsigned char*>(rows) + row * row_bytes(dtype, D);
  }

  // In units of a packed row's levels.
  LESS_DEVICE float scale(int64_t row) const {
    if (packed(dtype)) return level_scale(halves[row]);  // narrow: one number of each row
    return has_scale(dtype) ? scales[row] : 1.0f;        // narrow: one number of each row
  }
};

// The keys or the values of slots that are not hot.
LESS_DEVICE StoredRows cold_rows(const Layout& layout, const Slots& slots, bool values) {
  return {values ? layout.v_dtype : layout.k_dtype, values ? slots.v : slots.k,
          values ? slots.v_scale : slots.k_scale, values ? slots.v_half : slots.k_half};
}

// Dims d .. d + 3 of a stored row; d is a multiple of 4. No product is contracted: rows of the same
// bytes are the same numbers, whatever is done to them.
LESS_DEVICE void four_numbers(DType dtype, const void* row, float scale, int D, int d,
                              float (&x)[4]) {
  if (!has_scale(dtype)) return load_four(row, dtype, d, x);
  if (packed(dtype)) {
    const auto* const codes = static_cast<const uint8_t*>(row);
    widen4(levels_of_codes(dtype, four_codes(dtype, D, d, codes)), x, int8_t());
  } else {
    // narrow: four numbers of 8 bits
    const uint32_t four = static_cast<const uint32_t*>(row)[d / 4];
    if (dtype == DType::i8) {
      widen4(four, x, int8_t());
    } else {
      widen4(four, x, __nv_fp8_e4m3());
    }
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) x[i] = __fmul_rn(x[i], scale);
}

// A row of shared memory as numbers: row `index` of `of`, at to [D]; one warp.
LESS_DEVICE void decode_row(const StoredRows& of, int64_t index, int D, float* to) {
  const float scale = of.scale(index);
#pragma unroll 1
  for (int d = int(threadIdx.x) % 32 * 4; d < D; d += 128) {
    float x[4];
    // narrow: four numbers a lane, 16 bytes where they are float32
    four_numbers(of.dtype, of.at(index, D), scale, D, d, x);
    store16_shared(to + d, bits_of<uint4>(make_float4(x[0], x[1], x[2], x[3])));
  }
}

// -- a warp has a row --

constexpr int kCodecEach = 256 / kCodecLanes;  // numbers of a lane, at most

// What a lane holds of a row [D]: dims lane % 16, and every 16th after it. Both halves of a warp
// hold the same.
struct LaneRow {
  float x[kCodecEach];
};

template <typename F>
LESS_DEVICE void for_lane_dims(int D, const F& f) {
  const int lane = int(threadIdx.x) % kCodecLanes;
#pragma unroll
  for (int i = 0; i < kCodecEach; ++i) {
    if (i * kCodecLanes < D) f(i, i * kCodecLanes + lane);
  }
}

// The row that a stored one stands for, of the dtype of a call's rows or of hot ones.
LESS_DEVICE LaneRow decoded_row(DType dtype, const void* row, float scale, int D) {
  LaneRow out;
  for_lane_dims(D, [&](int i, int d) {
    // narrow: a lane a number of the one row, side by side
    if (dtype == DType::i8) {
      out.x[i] = __fmul_rn(float(static_cast<const int8_t*>(row)[d]), scale);
    } else if (dtype == DType::fp16) {
      out.x[i] = widened(bits_of<__half>(static_cast<const uint16_t*>(row)[d]));
    } else {
      out.x[i] = static_cast<const float*>(row)[d];
    }
  });
  return out;
}

// A row of shared memory.
LESS_DEVICE LaneRow lane_row(const float* row, int D) {
  LaneRow out;
  for_lane_dims(D, [&](int i, int d) { out.x[i] = row[d]; });
  return out;
}

// The sum of term(i) over the row, in the codec's order; the same for all lanes.
template <typename Term>
LESS_DEVICE float ordered_sum(int D, const Term& term) {
  float sum = term(0);
#pragma unroll
  for (int i = 1; i < kCodecEach; ++i) {
    if (i * kCodecLanes < D) sum = __fadd_rn(sum, term(i));
  }
#pragma unroll
  for (int step = kCodecLanes / 2; step > 0; step /= 2) {
    sum = __fadd_rn(sum, __shfl_xor_sync(0xffffffffu, sum, step));
  }
  return sum;
}

// The largest |x| of the row, or NaN; the same for all lanes.
LESS_DEVICE float largest_of(const LaneRow& row, int D) {
  uint32_t largest = 0;  // of |x| as integers: in order, and NaN is above infinity
  for_lane_dims(
      D, [&](int i, int) { largest = max(largest, bits_of<uint32_t>(row.x[i]) & 0x7fffffffu); });
  return bits_of<float>(__reduce_max_sync(0xffffffffu, largest));
}

template <DType kType, int kI>
LESS_DEVICE float threshold() {
  constexpr float at = levels_of(kType).threshold[kI];
  return at;
}

template <DType kType, int... kI>
LESS_DEVICE int code_of(float x, float largest, std::integer_sequence<int, kI...>) {
  return (int(x > __fmul_rn(largest, threshold<kType, kI>())) + ...);
}

// The codes of a packed row, and its scale as it is stored.
template <DType kType>
LESS_DEVICE float encode_levels(const LaneRow& row, int D, uint8_t* codes) {
  constexpr int kCount = levels_of(kType).count;
  const bool writes = int(threadIdx.x) % 32 < kCodecLanes;
  const float largest = __fmul_rn(largest_of(row, D), clip_of(kType, D));
  LaneRow level;
  for_lane_dims(D, [&](int i, int d) {
    const int code =
        code_of<kType>(row.x[i], largest, std::make_integer_sequence<int, kCount - 1>());
    level.x[i] = float(int8_t(levels_of_codes<kType>(uint32_t(code)))) * (1.0f / 64.0f);
    if (writes) codes[d] = uint8_t(code);
  });
  const float by = ordered_sum(D, [&](int i) { return __fmul_rn(row.x[i], level.x[i]); });
  const float of = ordered_sum(D, [&](int i) { return __fmul_rn(level.x[i], level.x[i]); });
  const float scale = __fdiv_rn(by, of);
  return widened(__float2half_rn(scale > kLargestHalf ? kLargestHalf : scale));
}

// The step of a row of 8 bits, max|x| / most; and its numbers in units of that.
struct Eighth {
  float scale;
  bool sound;

  LESS_DEVICE float units(float x) const { return sound ? __fdiv_rn(x, scale) : 0.0f; }
};

LESS_DEVICE Eighth eighth_of(const LaneRow& row, int D, float most) {
  const float scale = __fdiv_rn(largest_of(row, D), most);
  return {scale, scale > 0.0f && scale <= 3.402823466e38f};
}

// The codes of a packed row, or the bytes of one of int8. codes [D]: the warp's own, shared.
// Returns the scale, as it is stored.
LESS_DEVICE float encode_codes(DType dtype, const LaneRow& row, int D, uint8_t* codes) {
  float scale;
  if (dtype == DType::i8) {
    const Eighth eighth = eighth_of(row, D, 127.0f);
    for_lane_dims(D, [&](int i, int d) {
      const int8_t x = narrowed<int8_t>(eighth.units(row.x[i]));
      if (int(threadIdx.x) % 32 < kCodecLanes) codes[d] = uint8_t(x);
    });
    scale = eighth.scale;
  } else {
    scale = dtype == DType::b4   ? encode_levels<DType::b4>(row, D, codes)
            : dtype == DType::b3 ? encode_levels<DType::b3>(row, D, codes)
                                 : encode_levels<DType::b2>(row, D, codes);
  }
  __syncwarp();
  return scale;
}

// The row that a packed row or one of int8 stands for once this one is stored as such.
LESS_DEVICE LaneRow rounded_row(DType dtype, const LaneRow& row, int D, uint8_t* codes) {
  const float scale = encode_codes(dtype, row, D, codes);
  LaneRow out;
  for_lane_dims(D, [&](int i, int d) {
    const uint32_t code = codes[d];
    const float level = float(int8_t(packed(dtype) ? levels_of_codes(dtype, code) : code));
    out.x[i] = __fmul_rn(level, packed(dtype) ? scale * (1.0f / 64.0f) : scale);
  });
  __syncwarp();
  return out;
}

// Stores a row as row `index` of packed ones, or of int8. codes [D]: the warp's own, shared.
LESS_DEVICE void encode_row(const StoredRows& to, int64_t index, const LaneRow& row, int D,
                            uint8_t* codes) {
  const int lane = int(threadIdx.x) % 32;
  const DType dtype = to.dtype;
  const float scale = encode_codes(dtype, row, D, codes);
  if (lane == 0) {
    if (dtype == DType::i8) {
      store(to.scales + index, scale);
    } else {
      store(to.halves + index, bits_of<uint16_t>(__float2half_rn(scale)));
    }
  }
  const int bytes = int(row_bytes(dtype, D)), each = bytes % 4 == 0 ? 4 : 1;
  auto* const bytes_of_row = static_cast<uint8_t*>(to.at(index, D));
  const auto code = [codes](int64_t d) { return int(codes[d]); };
#pragma unroll 1
  for (int first = lane * each; first < bytes; first += 32 * each) {
    uint32_t word = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int at = first + (i < each ? i : 0);
      const uint8_t byte = dtype == DType::i8 ? codes[at] : packed_byte(dtype, D, at, code);
      word |= uint32_t(byte) << (8 * i);
    }
    if (each == 4) {
      // narrow: a row may be of no whole number of 16 bytes
      store(reinterpret_cast<uint32_t*>(bytes_of_row + first), word);
    } else {
      // narrow: a row may be of no whole number of 4 bytes
      store(bytes_of_row + first, uint8_t(word));
    }
  }
  __syncwarp();
}

// The same of rows of any format.
LESS_DEVICE void store_row(const StoredRows& to, int64_t index, const LaneRow& row, int D,
                           uint8_t* codes) {
  const int lane = int(threadIdx.x) % 32;
  const DType dtype = to.dtype;
  if (packed(dtype) || dtype == DType::i8) return encode_row(to, index, row, D, codes);
  const Eighth eighth = eighth_of(row, D, 448.0f);
  if (dtype == DType::fp8 && lane == 0) store(to.scales + index, eighth.scale);
  for_lane_dims(D, [&](int i, int d) {
    if (lane >= kCodecLanes) return;
    void* const of = to.at(index, D);
    // narrow: a lane a number of the one row, side by side
    if (dtype == DType::f32) {
      store(static_cast<float*>(of) + d, row.x[i]);
    } else if (dtype == DType::bf16) {
      store(static_cast<__nv_bfloat16*>(of) + d, narrowed<__nv_bfloat16>(row.x[i]));
    } else if (dtype == DType::fp16) {
      store(static_cast<__half*>(of) + d, narrowed<__half>(row.x[i]));
    } else {
      const auto x = narrowed<__nv_fp8_e4m3>(eighth.units(row.x[i]));
      store(static_cast<uint8_t*>(of) + d, bits_of<uint8_t>(x));
    }
  });
}

}  // namespace less::cuda
