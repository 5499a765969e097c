// y = x in a layer's space, or back out of it (common/space.h)
//
// Grid:   (rows / kRotateWarps, jobs); a warp owns a row, lane l the dims l, l + 32, ...: pairs up
//         to 16 apart meet by shuffles, those further apart in a lane's registers.
// Memory: x read and y written once.
// Order:  the butterflies' own, every operation rounded by itself: a row's bits are the
//         reference's.
#include "cuda/convert.h"
#include "cuda/kernels.h"
#include "cuda/rotate.h"

namespace less::cuda {

constexpr int kRotateThreads = 256;
constexpr int kRotateWarps = kRotateThreads / 32;
constexpr int kRotateEach = kRotateMost / 32;  // numbers of a lane, at most

LESS_HD int64_t rows_of(const RotateParams& p) { return p.B * p.heads * p.T; }

LESS_DEVICE float element(const HeadRows& x, int64_t at) {
  // narrow: a lane an element of the row, side by side
  if (x.dtype == DType::f32) return static_cast<const float*>(x.data)[at];
  const uint16_t bits = static_cast<const uint16_t*>(x.data)[at];
  return x.dtype == DType::bf16 ? widened(bits_of<__nv_bfloat16>(bits))
                                : widened(bits_of<__half>(bits));
}

LESS_DEVICE void put_element(const HeadRows& y, int64_t at, float x) {
  if (y.dtype == DType::f32) {
    store(static_cast<float*>(y.data) + at, x);
  } else {
    const uint16_t bits = y.dtype == DType::bf16 ? bits_of<uint16_t>(narrowed<__nv_bfloat16>(x))
                                                 : bits_of<uint16_t>(narrowed<__half>(x));
    store(static_cast<uint16_t*>(y.data) + at, bits);
  }
}

// f(i, d) for the lane's dims.
template <typename F>
LESS_DEVICE void for_dims(int D, const F& f) {
  const int lane = int(threadIdx.x) % 32;
#pragma unroll
  for (int i = 0; i < kRotateEach; ++i) {
    if (i * 32 + lane < D) f(i, i * 32 + lane);
  }
}

LESS_DEVICE void butterflies(float (&x)[kRotateEach], int block) {
  const int lane = int(threadIdx.x) % 32;
#pragma unroll
  for (int length = 1; length < 32; length *= 2) {
    if (length >= block) return;
    const bool upper = (lane & length) != 0;
#pragma unroll
    for (int i = 0; i < kRotateEach; ++i) {
      const float other = __shfl_xor_sync(0xffffffffu, x[i], length);
      x[i] = upper ? __fsub_rn(other, x[i]) : __fadd_rn(x[i], other);
    }
  }
#pragma unroll
  for (int step = 1; step < kRotateEach; step *= 2) {
    if (step * 32 >= block) return;
#pragma unroll
    for (int i = 0; i < kRotateEach; ++i) {
      if (i & step) continue;
      const float a = x[i], b = x[i + step];
      x[i] = __fadd_rn(a, b);
      x[i + step] = __fsub_rn(a, b);
    }
  }
}

// To 8 bits with a scale, as rows of i8 are.
LESS_DEVICE void round_row(float (&x)[kRotateEach], int D) {
  uint32_t largest = 0;  // of |x| as integers: in order, and NaN is above infinity
  for_dims(D, [&](int i, int) { largest = max(largest, bits_of<uint32_t>(x[i]) & 0x7fffffffu); });
  const float scale = __fdiv_rn(bits_of<float>(__reduce_max_sync(0xffffffffu, largest)), 127.0f);
  const bool sound = scale > 0.0f && scale <= 3.402823466e38f;
  for_dims(D, [&](int i, int) {
    const int8_t eight = sound ? narrowed<int8_t>(__fdiv_rn(x[i], scale)) : int8_t(0);
    x[i] = __fmul_rn(float(eight), scale);
  });
}

__global__ void __launch_bounds__(kRotateThreads)
    rotate_kernel(const __grid_constant__ RotateJobs jobs) {
  const RotateJob& job = jobs.job[blockIdx.y];
  const RotateParams& p = job.params;
  const int64_t row = int64_t{blockIdx.x} * kRotateWarps + threadIdx.x / 32;
  if (row >= rows_of(p)) return;
  const int D = int(p.D);
  const int64_t t = row % p.T, head = row / p.T, h = head % p.heads, b = head / p.heads;
  const int64_t from = offset(p.x, b, h, t), to = offset(job.y, b, h, t);
  // narrow: a number of a row, whose lanes read it
  const bool there = (p.valid == nullptr || p.valid[b * p.T + t]) &&
                     (job.pool.data == nullptr || page(job.pool, b) != nullptr);
  if (!there) {
    for_dims(D, [&](int, int d) { put_element(job.y, to + d, 0.0f); });
    return;
  }
  const int64_t own = h / (p.heads / p.K) * D;  // of the kv head's numbers
  const bool query = p.rotation == Rotation::query || p.rotation == Rotation::rounded_query;
  const bool out = p.rotation == Rotation::output;
  const bool key = query || p.rotation == Rotation::key;
  const uint16_t* const scale = (key ? p.space.key_scale : p.space.value_scale) + own;
  const uint16_t* const mean = (key ? p.space.key_mean : p.space.value_mean) + own;
  const float f = hadamard_factor(p.D);
  // What a dim is multiplied by. narrow: a lane a dim, side by side
  const auto factor = [&](int d) {
    const float c = widened(bits_of<__half>(scale[d]));
    return query || out ? __fdiv_rn(f, c) : __fmul_rn(c, f);
  };
  // narrow: a lane a dim, side by side
  const auto centre = [&](int d) { return widened(bits_of<__half>(mean[d])); };
  float x[kRotateEach] = {};
  for_dims(D, [&](int i, int d) {
    x[i] = element(p.x, from + d);
    if (out) return;
    if (!query) x[i] = __fsub_rn(x[i], centre(d));
    x[i] = __fmul_rn(x[i], factor(d));
  });
  butterflies(x, int(hadamard_block(p.D)));
  if (p.rotation == Rotation::rounded_query) round_row(x, D);
  for_dims(D, [&](int i, int d) {
    if (out) x[i] = __fadd_rn(__fmul_rn(x[i], factor(d)), centre(d));
    put_element(job.y, to + d, x[i]);
  });
}

cudaError_t rotate_rows(const RotateJobs& jobs, cudaStream_t stream) {
  int64_t most = 0;
  for (int i = 0; i < jobs.count; ++i) {
    const RotateParams& p = jobs.job[i].params;
    if (p.D > kRotateMost) return cudaErrorInvalidValue;
    most = rows_of(p) > most ? rows_of(p) : most;
  }
  if (most == 0) return cudaSuccess;
  const dim3 grid(unsigned((most + kRotateWarps - 1) / kRotateWarps), unsigned(jobs.count));
  return launch(rotate_kernel, Launch{grid, dim3(kRotateThreads), 0, stream}, jobs);
}

cudaError_t rotate(const RotateParams& p, cudaStream_t stream) {
  RotateJobs jobs{};
  jobs.job[0] = {p, contiguous_rows(p.y, DType::f32, p.heads, p.T, p.D), {}};
  jobs.count = 1;
  return rotate_rows(jobs, stream);
}

}  // namespace less::cuda
