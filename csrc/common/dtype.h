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
// exponent and 3 of mantissa, without infinity; no CPU kernel has it. A row of b4, b3 or b2 is
// packed: codes of so many bits, and an fp16 scale (common/codec.h).
enum class DType : int32_t { f32 = 0, bf16 = 1, fp16 = 2, i8 = 3, fp8 = 4, b4 = 5, b3 = 6, b2 = 7 };

LESS_HD constexpr bool packed(DType dtype) { return dtype >= DType::b4; }

// Bytes of the scale that each row has; 0: it has none.
LESS_HD constexpr int64_t scale_bytes(DType dtype) {
  return packed(dtype) ? 2 : dtype == DType::i8 || dtype == DType::fp8 ? 4 : 0;
}

LESS_HD constexpr bool has_scale(DType dtype) { return scale_bytes(dtype) > 0; }

// Bits of one number.
LESS_HD constexpr int bits_of(DType dtype) {
  switch (dtype) {
    case DType::f32:
      return 32;
    case DType::bf16:
    case DType::fp16:
      return 16;
    case DType::i8:
    case DType::fp8:
      return 8;
    case DType::b4:
      return 4;
    case DType::b3:
      return 3;
    case DType::b2:
      return 2;
  }
  return 0;
}

// Bytes of one number that is not packed.
LESS_HD constexpr int64_t bytes_of(DType dtype) { return bits_of(dtype) / 8; }

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
    case DType::b4:
    case DType::b3:
    case DType::b2:
      break;  // no type has numbers of them
  }
  return otherwise;
}

// Bytes of a row of D numbers, its scale left out.
LESS_HD constexpr int64_t row_bytes(DType dtype, int64_t D) { return bits_of(dtype) * D / 8; }

}  // namespace less
