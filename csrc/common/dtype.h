// The formats of rows, and what each of them takes.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define LESS_HD __host__ __device__ __forceinline__
#else
// Never a copy of its own: the CPU's kernels are compiled once per SIMD level, and a linker would
// take any level's copy for all.
#define LESS_HD inline __attribute__((always_inline))
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

// A C++ type as a value.
template <typename T>
struct Type {
  using type = T;
};

// Calls f with the type of a dtype's elements, Type<Types::fp16>{} for fp16 and so on. Types has
// one for each dtype; void where the caller has none, and then `otherwise` is returned.
template <typename Types, typename Result, typename F>
inline Result with_dtype(DType dtype, Result otherwise, F f) {
  const auto call = [&](auto type) -> Result {
    if constexpr (__is_same(typename decltype(type)::type, void)) {
      return otherwise;
    } else {
      return f(type);
    }
  };
  switch (dtype) {
    case DType::f32:
      return call(Type<typename Types::f32>{});
    case DType::bf16:
      return call(Type<typename Types::bf16>{});
    case DType::fp16:
      return call(Type<typename Types::fp16>{});
    case DType::i8:
      return call(Type<typename Types::i8>{});
    case DType::fp8:
      return call(Type<typename Types::fp8>{});
  }
  return otherwise;
}

// Bytes of a row of D elements, its scale left out.
LESS_HD constexpr int64_t row_bytes(DType dtype, int64_t D) { return bytes_of(dtype) * D; }

}  // namespace less
