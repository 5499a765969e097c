// The head dims that kernels are compiled for: a kernel is a template over D, and each D costs a
// build its time and a library its size. CMake's LESS_CUDA_HEAD_DIMS names fewer.
#pragma once

// Bit D / 16 of each. By default 64, 80, 96, 128 and 256.
#ifndef LESS_HEAD_DIM_MASK
#define LESS_HEAD_DIM_MASK 0x10170
#endif

namespace less::cuda {

constexpr bool head_dim_built(int D) { return (LESS_HEAD_DIM_MASK >> (D / 16) & 1) != 0; }

}  // namespace less::cuda
