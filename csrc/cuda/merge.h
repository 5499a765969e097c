// Means of rows on the device (common/merge.h).
#pragma once

#include "common/merge.h"
#include "cuda/device.h"

namespace less::cuda {

// x, moved by `part` of the way; each step is one rounding.
LESS_DEVICE float moved(float x, float to, float part) {
  return __fadd_rn(x, __fmul_rn(part, __fsub_rn(to, x)));
}

}  // namespace less::cuda
