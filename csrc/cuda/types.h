// The element types of the GPU's kernels, for with_dtype.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include "common/dtype.h"

namespace less::cuda {

// Of queries, keys and values as callers have them.
struct FloatTypes {
  using f32 = float;
  using bf16 = __nv_bfloat16;
  using fp16 = __half;
  using i8 = void;
  using fp8 = void;
};

// Of slots.
struct RowTypes : FloatTypes {
  using i8 = int8_t;
  using fp8 = __nv_fp8_e4m3;
};

}  // namespace less::cuda
