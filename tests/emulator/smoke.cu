// sum[b] = sum_i x[b,i]^2 over 256 numbers of each block, by copies, shuffles and shared memory.
#include "cuda/device.h"

namespace less::cuda {

__global__ void __launch_bounds__(64) smoke_kernel(const float* x, float* sum) {
  DYN_SMEM(raw);
  SharedCarver carve{raw};
  float* const rows = carve.take<float>(256);
  SMEM_ARRAY(float, parts, 2);
  const int thread = threadIdx.x;
  const int64_t block = blockIdx.x;
  copy_async16(rows + thread * 4, x + block * 256 + thread * 4);
  copy_async_commit();
  copy_async_wait<0>();
  __syncthreads();
  const uint4 bits = load16_shared(rows + thread * 4);
  const float four[4] = {__uint_as_float(bits.x), __uint_as_float(bits.y), __uint_as_float(bits.z),
                         __uint_as_float(bits.w)};
  float square = 0.0f;
  for (float value : four) square = fmaf(value, value, square);
  for (int by = 16; by > 0; by /= 2) square += __shfl_xor_sync(0xffffffffu, square, by);
  if (thread % 32 == 0) parts[thread / 32] = square;
  __syncthreads();
  if (thread == 0) store(sum + block, parts[0] + parts[1]);
}

cudaError_t smoke(const float* x, float* sum, int blocks, cudaStream_t stream) {
  SharedCarver measure{nullptr};
  measure.take<float>(256);
  return launch(smoke_kernel, {dim3(unsigned(blocks)), dim3(64), measure.used, stream}, x, sum);
}

}  // namespace less::cuda
