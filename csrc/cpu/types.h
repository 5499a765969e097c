// The element types of the CPU's kernels.
#pragma once

#include "common/dtype.h"
#include "common/half.h"

namespace less::cpu {

// Of queries, keys and values as callers have them.
struct FloatTypes {
  using f32 = float;
  using bf16 = less::bf16;
  using fp16 = less::fp16;
  using i8 = void;
  using fp8 = void;
};

// Of slots and of the maps' matrices. No op lets fp8 in.
struct RowTypes : FloatTypes {
  using i8 = int8_t;
};

// Calls f with the type of a dtype's elements; does nothing for a dtype that no op lets in.
template <typename Types, typename F>
LESS_HD void with_type(DType dtype, F f) {
  with_dtype<Types>(dtype, 0, [&](auto type) {
    f(type);
    return 0;
  });
}

}  // namespace less::cpu
