// The formats of rows, and what each of them takes.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define LESS_HD __host__ __device__ __forceinline__
#else
#define LESS_HD inline
#endif

namespace less {

// A row of i8 or fp8 has a float scale of its own: x = scale * row. fp8 is e4m3, of 4 bits of
// exponent and 3 of mantissa, without infinity; no CPU kernel has it.
enum class DType : int32_t { f32 = 0, bf16 = 1, fp16 = 2, i8 = 3, fp8 = 4 };

// Whether each row has a scale.
LESS_HD constexpr bool has_scale(DType dtype) { return dtype == DType::i8 || dtype == DType::fp8; }

LESS_HD constexpr int64_t bytes_of(DType dtype) {
  return dtype == DType::f32 ? 4 : has_scale(dtype) ? 1 : 2;
}

// Bytes of a row of D elements, its scale left out.
LESS_HD constexpr int64_t row_bytes(DType dtype, int64_t D) { return bytes_of(dtype) * D; }

}  // namespace less
