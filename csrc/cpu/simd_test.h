// What less._C._test shows of csrc/cpu/simd.h, so that Python tests can try every input.
#pragma once

#include <cstdint>

namespace less {

enum class SimdTest : int32_t {
  exp,        // float -> float
  gelu,       // float -> float
  tanh,       // float -> float
  from_bf16,  // bf16 -> float
  from_fp16,  // fp16 -> float
  to_bf16,    // float -> bf16
  to_fp16,    // float -> fp16
  from_i8,    // int8 -> float
  to_i8,      // float -> int8
  sum,        // float[n] -> float[1], n <= Vec::kSize
  max,        // float[n] -> float[1], n <= Vec::kSize
  sums,       // float[n] -> float[4]: of four consecutive Vecs; n = 4 Vec::kSize
  width,      // nothing  -> float[1]: Vec::kSize
};

struct SimdTestParams {
  SimdTest what;
  const void* src;  // [n]
  void* dst;        // [n], or as said above
};

}  // namespace less
