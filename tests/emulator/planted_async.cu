// Errors with copies that land later: cp.async, mbarriers, bulk copies.
#include "planted.h"

namespace less::cuda {

constexpr int kCopiers = 32;

__global__ void async_wait_kernel(const float* in, float* out, bool wrong) {
  SMEM_ARRAY(float, x, kCopiers * 4);
  const int t = threadIdx.x;
  copy_async16(x + t * 4, in + t * 4, t != 3);
  copy_async_commit();
  if (!wrong) copy_async_wait<0>();
  __syncthreads();
  const int other = kCopiers - 1 - t;
  store16(out + t * 4, load16_shared(x + other * 4));
  if (wrong) copy_async_wait<0>();
}

bool async_wait(bool wrong) {
  Array<float> in(kCopiers * 4, "in", true), out(kCopiers * 4);
  in.count();
  launch(async_wait_kernel, {dim3(1), dim3(kCopiers), 0, nullptr}, in.data(), out.data(), wrong);
  bool right = out.all_written();
  for (int t = 0; t < kCopiers; ++t) {
    const int other = kCopiers - 1 - t;
    right &= out[t * 4 + 1] == (other == 3 ? 0.0f : in[other * 4 + 1]);
  }
  return right;
}

// The group before the last one may be read, not the last.
__global__ void async_groups_kernel(const float* in, float* out, bool wrong) {
  SMEM_ARRAY(float, x, kCopiers * 8);
  const int t = threadIdx.x;
  copy_async16(x + t * 8, in + t * 8);
  copy_async_commit();
  copy_async16(x + t * 8 + 4, in + t * 8 + 4);
  copy_async_commit();
  copy_async_wait<1>();
  const float first = x[t * 8 + (wrong ? 4 : 0)];
  copy_async_wait<0>();
  store(out + t, first + x[t * 8 + 7]);
}

bool async_groups(bool wrong) {
  Array<float> in(kCopiers * 8, "in", true), out(kCopiers);
  in.count();
  launch(async_groups_kernel, {dim3(1), dim3(kCopiers), 0, nullptr}, in.data(), out.data(), wrong);
  bool right = true;
  for (int t = 0; t < kCopiers; ++t) right &= out[t] == float(16 * t + 7);
  return right;
}

__global__ void async_end_kernel(const float* in, float* out, bool wrong) {
  SMEM_ARRAY(float, x, kCopiers * 4);
  const int t = threadIdx.x;
  copy_async16(x + t * 4, in + t * 4);
  copy_async_commit();
  if (!wrong) copy_async_wait<0>();
  store(out + t, 1.0f);
}

bool async_end(bool wrong) {
  Array<float> in(kCopiers * 4, "in", true), out(kCopiers);
  in.count();
  launch(async_end_kernel, {dim3(1), dim3(kCopiers), 0, nullptr}, in.data(), out.data(), wrong);
  return out[0] == 1.0f;
}

__global__ void async_address_kernel(const float* in, float* out, bool wrong) {
  SMEM_ARRAY(float, x, 4);
  float* const to = wrong ? out : x;
  copy_async16(to, in);
  copy_async_commit();
  copy_async_wait<0>();
  store(out, to[1]);
}

bool async_address(bool wrong) {
  Array<float> in(4, "in", true), out(4);
  in.count();
  launch(async_address_kernel, {dim3(1), dim3(1), 0, nullptr}, in.data(), out.data(), wrong);
  return out[0] == 1.0f;
}

// What can be wrong with a ring of bulk copies.
enum BulkError { kNone, kTooMany, kTooFew, kNoWait, kNoFence, kNoEmpty, kArriveTwice };

// One thread copies rows through a ring of two stages; a warp reads them.
__global__ void bulk_ring_kernel(const float* in, float* out, int rows, int error) {
  constexpr int kRow = 32;
  SMEM_ARRAY(float, stage, 2 * kRow);
  SMEM_ARRAY(uint64_t, bar, 4);
  uint64_t *const full = bar, *const empty = bar + 2;
  const int t = threadIdx.x;
  if (t == 0) {
    for (int i = 0; i < 2; ++i) {
      mbarrier_init(full + i, 1);
      mbarrier_init(empty + i, 1);
    }
    if (error != kNoFence) mbarrier_fence_init();
  }
  __syncthreads();
  if (t == 32) {
    for (int i = 0; i < rows; ++i) {
      if (error != kNoEmpty) mbarrier_wait(empty + i % 2, (i / 2 & 1) ^ 1);
      const int surplus = error == kTooMany ? 16 : error == kTooFew ? -16 : 0;
      mbarrier_arrive_expect(full + i % 2, uint32_t(kRow * 4 + surplus));
      bulk_copy(stage + i % 2 * kRow, in + i * kRow, kRow * 4, full + i % 2);
    }
  } else if (t < 32) {
    for (int i = 0; i < rows; ++i) {
      if (error != kNoWait) mbarrier_wait(full + i % 2, i / 2 & 1);
      store(out + i * kRow + t, stage[i % 2 * kRow + t]);
      __syncwarp();
      if (t == 0) mbarrier_arrive(empty + i % 2);
      if (t == 0 && error == kArriveTwice) mbarrier_arrive(empty + i % 2);
    }
  }
  __syncthreads();
}

template <int error>
bool bulk_ring(bool wrong) {
  constexpr int kRows = 7;
  Array<float> in(kRows * 32, "in", true), out(kRows * 32);
  in.count();
  launch(bulk_ring_kernel, {dim3(1), dim3(64), 0, nullptr}, in.data(), out.data(), kRows,
         wrong ? error : kNone);
  bool right = out.all_written();
  for (int i = 0; i < kRows * 32; ++i) right &= out[i] == float(i);
  return right;
}

__global__ void mbarrier_unknown_kernel(int* out, bool wrong) {
  SMEM_ARRAY(uint64_t, bar, 2);
  if (threadIdx.x == 0) mbarrier_init(bar, 32);
  __syncthreads();
  mbarrier_arrive(bar + (wrong ? 1 : 0));
  mbarrier_wait(bar, 0);
  store(out + threadIdx.x, 1);
}

bool mbarrier_unknown(bool wrong) {
  Array<int> out(32);
  launch(mbarrier_unknown_kernel, {dim3(1), dim3(32), 0, nullptr}, out.data(), wrong);
  return out.all_written();
}

const std::vector<Case>& async_cases() {
  static const std::vector<Case> cases{
      {"async_wait", async_wait},
      {"async_groups", async_groups},
      {"async_end", async_end},
      {"async_address", async_address},
      {"bulk_too_many_expected", bulk_ring<kTooMany>},
      {"bulk_too_few_expected", bulk_ring<kTooFew>},
      {"bulk_no_wait", bulk_ring<kNoWait>},
      {"bulk_no_fence", bulk_ring<kNoFence>},
      {"bulk_no_empty", bulk_ring<kNoEmpty>},
      {"bulk_arrive_twice", bulk_ring<kArriveTwice>},
      {"mbarrier_unknown", mbarrier_unknown},
  };
  return cases;
}

}  // namespace less::cuda
