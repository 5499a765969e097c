// Errors within a block: barriers, warps, bounds, what was never written.
#include "planted.h"

namespace less::cuda {

constexpr int kThreads = 64;

// out[t] = t + 1 from the neighbour, through shared memory.
__global__ void shared_barrier_kernel(int* out, bool wrong) {
  SMEM_ARRAY(int, x, kThreads);
  const int t = threadIdx.x;
  x[t] = t;
  if (!wrong) __syncthreads();
  store(out + t, x[(t + 33) % kThreads]);
}

bool shared_barrier(bool wrong) {
  Array<int> out(kThreads);
  launch(shared_barrier_kernel, {dim3(1), dim3(kThreads), 0, nullptr}, out.data(), wrong);
  bool right = out.all_written();
  for (int t = 0; t < kThreads; ++t) right &= out[t] == (t + 33) % kThreads;
  return right;
}

// Two rounds through one array: the second may not overwrite what the first still reads.
__global__ void reuse_barrier_kernel(int* out, bool wrong) {
  SMEM_ARRAY(int, x, kThreads);
  const int t = threadIdx.x;
  int sum = 0;
  for (int round = 0; round < 2; ++round) {
    x[t] = round * 100 + t;
    __syncthreads();
    sum += x[(t + 33) % kThreads];
    if (!wrong) __syncthreads();
  }
  store(out + t, sum);
}

bool reuse_barrier(bool wrong) {
  Array<int> out(kThreads);
  launch(reuse_barrier_kernel, {dim3(1), dim3(kThreads), 0, nullptr}, out.data(), wrong);
  bool right = out.all_written();
  for (int t = 0; t < kThreads; ++t) right &= out[t] == 100 + 2 * ((t + 33) % kThreads);
  return right;
}

// A warp talks through shared memory: __syncwarp orders it, a shuffle does not.
__global__ void warp_order_kernel(int* out, bool wrong) {
  SMEM_ARRAY(int, x, 32);
  const int t = threadIdx.x;
  x[t] = t;
  int unused = t;
  if (wrong) {
    unused = __shfl_sync(0xffffffffu, t, 0);
  } else {
    __syncwarp();
  }
  store(out + t, x[31 - t] + 0 * unused);
}

bool warp_order(bool wrong) {
  Array<int> out(32);
  launch(warp_order_kernel, {dim3(1), dim3(32), 0, nullptr}, out.data(), wrong);
  bool right = out.all_written();
  for (int t = 0; t < 32; ++t) right &= out[t] == 31 - t;
  return right;
}

__global__ void divergent_shuffle_kernel(int* out, bool wrong) {
  const int t = threadIdx.x;
  int v = t;
  if (!wrong || t < 16) {
    v += __shfl_xor_sync(0xffffffffu, v, 1);
  } else {
    v += __shfl_down_sync(0xffffffffu, v, 1);
  }
  store(out + t, v);
}

bool divergent_shuffle(bool wrong) {
  Array<int> out(32);
  launch(divergent_shuffle_kernel, {dim3(1), dim3(32), 0, nullptr}, out.data(), wrong);
  bool right = true;
  for (int t = 0; t < 32; ++t) right &= out[t] == t + (t ^ 1);
  return right;
}

// Masks of half a warp each; or lanes that name a mask without themselves.
__global__ void own_mask_kernel(int* out, bool wrong) {
  const int t = threadIdx.x;
  const unsigned mask = (t < 16) != wrong ? 0xffffu : 0xffff0000u;
  int v = t;
  for (int by = 8; by > 0; by /= 2) v += __shfl_xor_sync(mask, v, by);
  store(out + t, v);
}

bool own_mask(bool wrong) {
  Array<int> out(32);
  launch(own_mask_kernel, {dim3(1), dim3(32), 0, nullptr}, out.data(), wrong);
  bool right = true;
  for (int t = 0; t < 32; ++t) right &= out[t] == (t < 16 ? 120 : 376);
  return right;
}

__global__ void exited_lane_kernel(int* out, bool wrong) {
  const int t = threadIdx.x;
  if (t >= 16) return;
  const unsigned mask = wrong ? 0xffffffffu : 0xffffu;
  store(out + t, __shfl_down_sync(mask, t, wrong ? 8 : 0));
}

bool exited_lane(bool wrong) {
  Array<int> out(16);
  launch(exited_lane_kernel, {dim3(1), dim3(32), 0, nullptr}, out.data(), wrong);
  bool right = true;
  for (int t = 0; t < 16; ++t) right &= out[t] == t;
  return right;
}

__global__ void two_barriers_kernel(int* out, bool wrong) {
  if (wrong && threadIdx.x < 32) {
    __syncthreads();
  } else {
    store(out + threadIdx.x, 1);
    __syncthreads();
  }
  store(out + threadIdx.x, 2);
}

bool two_barriers(bool wrong) {
  Array<int> out(kThreads);
  launch(two_barriers_kernel, {dim3(1), dim3(kThreads), 0, nullptr}, out.data(), wrong);
  return out[0] == 2;
}

// One warp meets at a barrier, the other at another one.
__global__ void missed_barrier_kernel(int* out, bool wrong) {
  if (wrong && threadIdx.x < 32) {
    barrier_sync(1, kThreads);
  } else {
    __syncthreads();
  }
  store(out + threadIdx.x, 1);
}

bool missed_barrier(bool wrong) {
  Array<int> out(kThreads);
  return launch(missed_barrier_kernel, {dim3(1), dim3(kThreads), 0, nullptr}, out.data(), wrong) ==
         cudaSuccess;
}

// The first warp arrives, the second syncs: a producer and its consumer.
__global__ void named_barrier_kernel(int* out, bool wrong) {
  SMEM_ARRAY(int, x, 32);
  const int t = threadIdx.x;
  if (t < 32) {
    x[t] = t;
    barrier_arrive(1, 64);
  } else if (t < 64) {
    barrier_sync(1, wrong ? 96 : 64);
    store(out + t - 32, x[63 - t]);
  }
}

bool named_barrier(bool wrong) {
  Array<int> out(32);
  launch(named_barrier_kernel, {dim3(1), dim3(96), 0, nullptr}, out.data(), wrong);
  bool right = true;
  for (int t = 0; t < 32; ++t) right &= out[t] == 31 - t;
  return right;
}

// Half of each warp at a barrier that counts 64 threads.
__global__ void half_warps_kernel(int* out, bool wrong) {
  const int t = threadIdx.x;
  const bool joins = wrong ? t % 32 < 16 : t < 64;
  if (joins) barrier_sync(2, 64);
  store(out + t, t);
}

bool half_warps(bool wrong) {
  Array<int> out(128);
  launch(half_warps_kernel, {dim3(1), dim3(128), 0, nullptr}, out.data(), wrong);
  return out.all_written();
}

__global__ void shared_bounds_kernel(int* out, bool wrong) {
  DYN_SMEM(raw);
  SharedCarver carve{raw};
  int* const x = carve.take<int>(kThreads);
  int* const y = carve.take<int>(kThreads);
  const int t = threadIdx.x;
  y[t] = t;
  x[wrong ? t + 1 : t] = t;
  __syncthreads();
  store(out + t, y[t]);
}

bool shared_bounds(bool wrong) {
  Array<int> out(kThreads);
  SharedCarver measure{nullptr};
  measure.take<int>(kThreads);
  measure.take<int>(kThreads);
  launch(shared_bounds_kernel, {dim3(1), dim3(kThreads), measure.used, nullptr}, out.data(), wrong);
  return out[5] == 5;
}

__global__ void global_bounds_kernel(const int* in, int* out, bool wrong) {
  const int t = threadIdx.x;
  store(out + t, in[wrong ? t + 1 : t]);
}

bool global_bounds(bool wrong) {
  Array<int> in(kThreads, "in", true), out(kThreads);
  in.count();
  launch(global_bounds_kernel, {dim3(1), dim3(kThreads), 0, nullptr}, in.data(), out.data(), wrong);
  return out[5] == (wrong ? 6 : 5);
}

__global__ void shared_unwritten_kernel(float* out, bool wrong) {
  SMEM_ARRAY(float, x, kThreads);
  const int t = threadIdx.x;
  if (!wrong || t != 7) x[t] = float(t);
  __syncthreads();
  store(out + t, x[kThreads - 1 - t]);
}

bool shared_unwritten(bool wrong) {
  Array<float> out(kThreads);
  launch(shared_unwritten_kernel, {dim3(1), dim3(kThreads), 0, nullptr}, out.data(), wrong);
  bool right = true;
  for (int t = 0; t < kThreads; ++t) right &= out[t] == float(kThreads - 1 - t);
  return right;
}

__global__ void global_unwritten_kernel(float* scratch, float* out, bool wrong) {
  const int t = threadIdx.x;
  if (!wrong || t != 7) store(scratch + t, float(t));
  store(out + t, scratch[t]);
}

bool global_unwritten(bool wrong) {
  Array<float> scratch(kThreads, "scratch"), out(kThreads);
  launch(global_unwritten_kernel, {dim3(1), dim3(kThreads), 0, nullptr}, scratch.data(), out.data(),
         wrong);
  bool right = true;
  for (int t = 0; t < kThreads; ++t) right &= out[t] == float(t);
  return right;
}

__global__ void missed_output_kernel(int* out, bool wrong) {
  const int t = threadIdx.x;
  if (!wrong || t != 7) store(out + t, t);
}

bool missed_output(bool wrong) {
  Array<int> out(kThreads);
  launch(missed_output_kernel, {dim3(1), dim3(kThreads), 0, nullptr}, out.data(), wrong);
  return out.all_written() && out[7] == 7;
}

__global__ void misaligned_kernel(const char* in, uint4* out, bool wrong) {
  store16(out, load16(in + (wrong ? 8 : 0)));
}

bool misaligned(bool wrong) {
  Array<char> in(32, "in", true);
  Array<uint4> out(1);
  in.fill(1);
  launch(misaligned_kernel, {dim3(1), dim3(1), 0, nullptr}, in.data(), out.data(), wrong);
  return out[0].x == 0x01010101u;
}

// A thread reads what lies on another's stack.
__global__ void other_stack_kernel(int* out, bool wrong) {
  SMEM_ARRAY(int*, pointer, 1);
  int own[2] = {5, 6};
  int* volatile mine = own;
  if (threadIdx.x == 0) pointer[0] = mine;
  __syncthreads();
  const int* const from = wrong ? pointer[0] : mine;
  store(out + threadIdx.x, from[1]);
  __syncthreads();
}

bool other_stack(bool wrong) {
  Array<int> out(32);
  launch(other_stack_kernel, {dim3(1), dim3(32), 0, nullptr}, out.data(), wrong);
  return out[3] == 6;
}

const std::vector<Case>& block_cases() {
  static const std::vector<Case> cases{
      {"shared_barrier", shared_barrier},
      {"reuse_barrier", reuse_barrier},
      {"warp_order", warp_order},
      {"divergent_shuffle", divergent_shuffle},
      {"own_mask", own_mask},
      {"exited_lane", exited_lane},
      {"two_barriers", two_barriers},
      {"missed_barrier", missed_barrier},
      {"named_barrier", named_barrier},
      {"half_warps", half_warps},
      {"shared_bounds", shared_bounds},
      {"global_bounds", global_bounds},
      {"shared_unwritten", shared_unwritten},
      {"global_unwritten", global_unwritten},
      {"missed_output", missed_output},
      {"misaligned", misaligned},
      {"other_stack", other_stack},
  };
  return cases;
}

}  // namespace less::cuda
