// The head dims that kernels are compiled for: a kernel is a template over D, and each D costs a
// build its time and a library its size.
#pragma once

#include <cstdint>
#include <type_traits>
#include <utility>

// All of them, multiples of 16. The only list: the build and the tools read this line.
#define LESS_HEAD_DIMS 64, 80, 96, 128, 256

// Bit D / 16 of each that this build has: all, unless CMake's LESS_CUDA_HEAD_DIMS names fewer.
#ifndef LESS_HEAD_DIM_MASK
#define LESS_HEAD_DIM_MASK -1
#endif

namespace less::cuda {

constexpr int kHeadDims[] = {LESS_HEAD_DIMS};

constexpr bool head_dim_built(int D) { return (LESS_HEAD_DIM_MASK >> (D / 16) & 1) != 0; }

template <typename F, int... kDims>
bool with_head_dim(int64_t D, const F& f, std::integer_sequence<int, kDims...>) {
  const auto with = [&](auto head_dim) {
    if constexpr (head_dim_built(decltype(head_dim)::value)) {
      if (D == head_dim) return f(head_dim), true;
    }
    return false;
  };
  return (with(std::integral_constant<int, kDims>{}) || ...);
}

// f(integral_constant<int, D>); false where D is not in the list, or not in this build.
template <typename F>
bool with_head_dim(int64_t D, const F& f) {
  return with_head_dim(D, f, std::integer_sequence<int, LESS_HEAD_DIMS>{});
}

}  // namespace less::cuda
