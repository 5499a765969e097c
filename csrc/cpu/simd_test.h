// What less._C._test shows of csrc/cpu/simd.h, so that Python tests can try every input.
#pragma once

#include <cstdint>

namespace less {

enum class SimdTest : int32_t {
  exp,        // float -> float
  gelu,       // float -> float
  from_bf16,  // bf16 -> float
  from_fp16,  // fp16 -> float
  to_bf16,    // float -> bf16
  to_fp16,    // float -> fp16
  sum,        // float[n] -> float[1]
  max,        // float[n] -> float[1]
};

struct SimdTestParams {
  SimdTest what;
  const void* src;  // [n]
  void* dst;        // [n], or [1] for sum and max
};

}  // namespace less
