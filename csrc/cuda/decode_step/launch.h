// The launch of decode_step's kernel for one dtype of slots; decode_step_<dtype>.cu instantiates
// it, so that the dtypes compile side by side.
#pragma once

#include "cuda/decode_step/kernel.h"

namespace less::cuda {

template <typename T, int kD, bool kMma, typename Then>
cudaError_t launch_decode_kernel(const DecodeStepParams& p, const DecodePlan& plan,
                                 cudaStream_t stream) {
  Launch how{};
  how.grid = dim3(unsigned(plan.blocks), unsigned(plan.heads), unsigned(p.B));
  how.block = dim3(kDecodeThreads);
  how.shared = size_t(plan.shared);
  how.stream = stream;
  how.cluster = plan.cluster ? plan.blocks : 1;
  how.dependent = plan.dependent;
  return launch(decode_step_kernel<T, kD, kMma, Then>, how, p, plan);
}

template <typename T>
cudaError_t launch_decode(const DecodeStepParams& p, const DecodePlan& plan, cudaStream_t stream) {
  cudaError_t error = cudaErrorInvalidValue;
  decode_dispatch<T>(p.spec.D, plan.mma, [&](auto head_dim, auto mma) {
    constexpr int kD = decltype(head_dim)::value;
    constexpr bool kMma = decltype(mma)::value;
    if constexpr (!kFewBits<T>) {
      if (p.maps.phi.R > 0) {
        error = launch_decode_kernel<T, kD, kMma, DecodeFold>(p, plan, stream);
        return;
      }
    }
    if (weighs(p.spec.victim) || (kFewBits<T> && p.layout.weights)) {
      error = launch_decode_kernel<T, kD, kMma, DecodeMerge>(p, plan, stream);
    } else {
      error = launch_decode_kernel<T, kD, kMma, DecodeForget>(p, plan, stream);
    }
  });
  return error;
}

}  // namespace less::cuda
