// Rows of several kinds through a layer's space by one launch.
#pragma once

#include <cuda_runtime_api.h>

#include "params.h"

namespace less::cuda {

constexpr int kRotateMost = 256;  // head dim, at most

// `y` instead of what the params say of it: rows of any dtype, wherever they lie. A row of a batch
// row without a page is 0, where there is a pool.
struct RotateJob {
  RotateParams params;
  HeadRows y;
  Pool pool;
};

struct RotateJobs {
  RotateJob job[3];
  int count;
};

cudaError_t rotate_rows(const RotateJobs& jobs, cudaStream_t stream);

}  // namespace less::cuda
