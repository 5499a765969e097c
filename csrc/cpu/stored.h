// Rows as slots hold them, of any format: where a row lies, and its scale.
#pragma once

#include <cstring>

#include "cpu/codec.h"
#include "cpu/features.h"
#include "cpu/quantize.h"
#include "cpu/types.h"

namespace less::cpu::LESS_ISA {

// One row and its scale: a float of 8 bits, fp16 of packed rows; null for others.
struct StoredRow {
  DType dtype;
  int64_t D;
  void* data;
  void* scale;
};

// Rows that follow each other.
struct StoredRows {
  DType dtype;
  int64_t D;
  uint8_t* data;
  uint8_t* scale;

  LESS_INLINE uint8_t* row(int64_t i) const { return data + i * row_bytes(dtype, D); }
  LESS_INLINE StoredRow at(int64_t i) const {
    return {dtype, D, row(i), scale == nullptr ? nullptr : scale + i * scale_bytes(dtype)};
  }
};

LESS_INLINE StoredRows stored_rows(DType dtype, int64_t D, void* data, float* scale,
                                   uint16_t* half) {
  void* const scales = packed(dtype) ? static_cast<void*>(half) : scale;
  return {dtype, D, static_cast<uint8_t*>(data), static_cast<uint8_t*>(scales)};
}

// x [D], rounded to what the row holds.
inline void encode_row(const float* x, const StoredRow& row) {
  if (packed(row.dtype)) {
    const uint16_t half = encode_packed(row.dtype, x, row.D, static_cast<uint8_t*>(row.data));
    std::memcpy(row.scale, &half, sizeof half);
  } else if (row.dtype == DType::i8) {
    const float scale = quantize_row(x, row.D, static_cast<int8_t*>(row.data));
    std::memcpy(row.scale, &scale, sizeof scale);
  } else {
    narrow(x, row.D, row.dtype, 0, row.data);
  }
}

// The numbers x [D] that a row stands for.
inline void decode_row(const StoredRow& row, float* x) {
  if (packed(row.dtype)) {
    uint16_t half;
    std::memcpy(&half, row.scale, sizeof half);
    decode_packed(row.dtype, static_cast<const uint8_t*>(row.data), half, row.D, x);
  } else if (row.dtype == DType::i8) {
    float scale;
    std::memcpy(&scale, row.scale, sizeof scale);
    widen_row(static_cast<const int8_t*>(row.data), scale, row.D, x);
  } else {
    widen(row.data, row.dtype, 0, row.D, x);
  }
}

// Copies a row to another of its format.
LESS_INLINE void put(const StoredRow& to, const StoredRow& from) {
  std::memcpy(to.data, from.data, row_bytes(to.dtype, to.D));
  if (to.scale != nullptr) std::memcpy(to.scale, from.scale, scale_bytes(to.dtype));
}

// The scales of rows, by which their numbers are multiplied.
struct NoScales {
  LESS_INLINE Vec times(Vec a, int64_t, int) const { return a; }
};
template <typename T>
struct ScalesOf {
  const T* scale;

  LESS_INLINE Vec times(Vec a, int64_t s, int n) const { return a * load_some(scale + s, n); }
};

// Calls f with the scales of rows.
template <typename F>
LESS_INLINE void with_scales(const StoredRows& rows, F f) {
  if (rows.scale == nullptr) return f(NoScales{});
  if (packed(rows.dtype)) {
    return f(ScalesOf<fp16>{reinterpret_cast<const fp16*>(rows.scale)});
  }
  f(ScalesOf<float>{reinterpret_cast<const float*>(rows.scale)});
}

}  // namespace less::cpu::LESS_ISA
