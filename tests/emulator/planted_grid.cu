// Errors between blocks: races, fences, clusters, kernels that follow one another.
#include "planted.h"

namespace less::cuda {

__global__ void global_race_kernel(int* out, bool wrong) {
  const int t = threadIdx.x;
  const int64_t block = wrong ? 0 : blockIdx.x;
  store(out + block * blockDim.x + t, t);
}

bool global_race(bool wrong) {
  Array<int> out(4 * 32);
  launch(global_race_kernel, {dim3(4), dim3(32), 0, nullptr}, out.data(), wrong);
  return out.all_written();
}

// Races are seen in memory that nobody has told the emulator of, while nobody tells of any.
bool unregistered(bool wrong) {
  std::vector<int> out(4 * 32);
  launch(global_race_kernel, {dim3(4), dim3(32), 0, nullptr}, out.data(), wrong);
  return out[5] == 5;
}

__global__ void copy_kernel(const int* in, int* out) { store(out + threadIdx.x, in[threadIdx.x]); }

// Once some memory is told of, a kernel may touch no other.
bool foreign_memory(bool wrong) {
  Array<int> in(32, "in", true), out(32);
  in.fill(7);
  const std::vector<int> other(32, 7);
  const int* const from = wrong ? other.data() : in.data();
  launch(copy_kernel, {dim3(1), dim3(32), 0, nullptr}, from, out.data());
  return out[5] == 7;
}

enum LastError { kLastNone, kNoRelease, kNoAcquire, kNoBarrier };

// Each block leaves its part; the one that comes last adds them, and leaves the counter at zero.
__global__ void last_block_kernel(int* parts, int* counter, int* sum, int error) {
  SMEM_ARRAY(int, last, 1);
  const int t = threadIdx.x, blocks = gridDim.x;
  store(parts + int64_t(blockIdx.x) * 64 + t, int(blockIdx.x) + t);
  if (error != kNoBarrier) __syncthreads();
  if (t == 0) {
    if (error != kNoRelease) fence_gpu();
    last[0] = atomic_add(counter, 1) == blocks - 1;
    if (error != kNoAcquire) fence_gpu();
  }
  __syncthreads();
  if (!last[0]) return;
  int mine = 0;
  for (int i = 0; i < blocks; ++i) mine += parts[int64_t(i) * 64 + t];
  store(sum + t, mine);
  if (t == 0) store(counter, 0);
}

template <int error>
bool last_block(bool wrong) {
  constexpr int kBlocks = 6;
  Array<int> parts(kBlocks * 64, "parts"), counter(1, "counter", true), sum(64, "sum");
  counter.fill(0);
  bool right = true;
  for (int launches = 0; launches < 2; ++launches) {
    launch(last_block_kernel, {dim3(kBlocks), dim3(64), 0, nullptr}, parts.data(), counter.data(),
           sum.data(), wrong ? error : kLastNone);
    right &= counter[0] == 0;
    for (int t = 0; t < 64; ++t) right &= sum[t] == 15 + kBlocks * t;
  }
  return right && sum.all_written();
}

// A plain read of what others change by atomics.
__global__ void plain_counter_kernel(int* counter, int* out, bool wrong) {
  const int seen = wrong ? counter[0] : atomic_add(counter, 0);
  atomic_add(counter, 1);
  store(out + blockIdx.x * blockDim.x + threadIdx.x, seen);
}

bool plain_counter(bool wrong) {
  Array<int> counter(1, "counter", true), out(3 * 32);
  counter.fill(0);
  launch(plain_counter_kernel, {dim3(3), dim3(32), 0, nullptr}, counter.data(), out.data(), wrong);
  return counter[0] == 96;
}

__global__ void spin_kernel(int* flag, int* out, bool wrong) {
  if (threadIdx.x == 0) {
    while (atomic_add(flag, 0) == 0) {
    }
    store(out, 1);
  } else if (threadIdx.x == 32 && !wrong) {
    atomic_add(flag, 1);
  }
}

bool spin(bool wrong) {
  Array<int> flag(1, "flag", true), out(1);
  flag.fill(0);
  launch(spin_kernel, {dim3(1), dim3(64), 0, nullptr}, flag.data(), out.data(), wrong);
  return out[0] == 1;
}

// -- clusters -------------------------------------------------------------------------------------

enum ClusterError { kClusterNone, kNoStart, kNoSync, kNoExit, kBadRank, kTwoArrivals };

// Each block leaves a number with its right neighbour, and reads its left one's.
__global__ void cluster_kernel(int* out, int error) {
  SMEM_ARRAY(int, mine, 32);
  SMEM_ARRAY(int, given, 32);
  const int t = threadIdx.x;
  const uint32_t rank = cluster_rank(), size = cluster_size();
  if (error == kNoSync) cluster_sync();
  mine[t] = int(rank) * 100 + t;
  if (error != kNoStart && error != kNoSync) cluster_sync();
  if (error == kTwoArrivals) {
    cluster_arrive();
    cluster_arrive();
  }
  const uint32_t right = (rank + 1) % size, left = (rank + size - 1) % size;
  store_cluster(given + t, error == kBadRank ? size : right, int(rank));
  const int theirs = load_cluster(mine + (t + 5) % 32, left);
  if (error != kNoExit) cluster_sync();
  const int from = error == kNoExit ? int(left) : given[31 - t];
  store(out + int64_t(blockIdx.x) * 32 + t, theirs * 10 + from);
}

template <int error>
bool cluster(bool wrong) {
  constexpr int kBlocks = 12, kSize = 4;
  Array<int> out(kBlocks * 32);
  launch(cluster_kernel, {dim3(kBlocks), dim3(32), 0, nullptr, kSize}, out.data(),
         wrong ? error : kClusterNone);
  bool right = out.all_written();
  for (int block = 0; block < kBlocks; ++block) {
    const int left = (block + kSize - 1) % kSize;
    for (int t = 0; t < 32; ++t) {
      right &= out[block * 32 + t] == (left * 100 + (t + 5) % 32) * 10 + left;
    }
  }
  return right;
}

// -- launches -------------------------------------------------------------------------------------

__global__ void first_kernel(int* x) {
  grid_launch_dependents();
  store(x + threadIdx.x, int(threadIdx.x));
}

__global__ void second_kernel(const int* x, int* out, bool wrong) {
  const int t = threadIdx.x;
  const int early = wrong ? x[t] : 0;
  grid_dependency_wait();
  store(out + t, wrong ? early : x[t]);
}

bool dependent(bool wrong) {
  Array<int> x(32, "x"), out(32);
  launch(first_kernel, {dim3(1), dim3(32), 0, nullptr}, x.data());
  Launch how{dim3(1), dim3(32), 0, nullptr};
  how.dependent = true;
  launch(second_kernel, how, x.data(), out.data(), wrong);
  return out[7] == 7;
}

__global__ void no_wait_kernel(int* out, bool wrong) {
  if (!wrong) grid_dependency_wait();
  store(out + threadIdx.x, 1);
}

bool dependent_no_wait(bool wrong) {
  Array<int> x(32, "x"), out(32);
  launch(first_kernel, {dim3(1), dim3(32), 0, nullptr}, x.data());
  Launch how{dim3(1), dim3(32), 0, nullptr};
  how.dependent = true;
  launch(no_wait_kernel, how, out.data(), wrong);
  return out[7] == 1;
}

bool bad_launch(bool wrong) {
  Array<int> out(128);
  const Launch how{dim3(4), dim3(32), 0, nullptr, wrong ? 3 : 1};
  const cudaError_t error = launch(global_race_kernel, how, out.data(), false);
  return error == cudaSuccess;
}

__global__ void static_beside_dynamic_kernel(int* out) {
  DYN_SMEM(raw);
  SharedCarver carve{raw};
  int* const mine = carve.take<int>(32);
  mine[threadIdx.x] = int(threadIdx.x);
  SMEM_ARRAY(int, given, 32);
  given[threadIdx.x] = mine[threadIdx.x];
  store(out + threadIdx.x, given[threadIdx.x]);
}

__global__ void static_alone_kernel(int* out) {
  SMEM_ARRAY(int, given, 32);
  given[threadIdx.x] = int(threadIdx.x);
  store(out + threadIdx.x, given[threadIdx.x]);
}

bool static_beside_dynamic(bool wrong) {
  Array<int> out(32);
  if (!wrong) {
    launch(static_alone_kernel, {dim3(1), dim3(32), 0, nullptr}, out.data());
    return out[7] == 7;
  }
  SharedCarver measure{nullptr};
  measure.take<int>(32);
  launch(static_beside_dynamic_kernel, {dim3(1), dim3(32), measure.used, nullptr}, out.data());
  return out[7] == 7;
}

const std::vector<Case>& grid_cases() {
  static const std::vector<Case> cases{
      {"global_race", global_race},
      {"unregistered", unregistered},
      {"foreign_memory", foreign_memory},
      {"last_block_no_release", last_block<kNoRelease>},
      {"last_block_no_acquire", last_block<kNoAcquire>},
      {"last_block_no_barrier", last_block<kNoBarrier>},
      {"plain_counter", plain_counter},
      {"spin", spin},
      {"cluster_no_start", cluster<kNoStart>},
      {"cluster_no_sync", cluster<kNoSync>},
      {"cluster_no_exit", cluster<kNoExit>},
      {"cluster_bad_rank", cluster<kBadRank>},
      {"cluster_two_arrivals", cluster<kTwoArrivals>},
      {"dependent", dependent},
      {"dependent_no_wait", dependent_no_wait},
      {"bad_launch", bad_launch},
      {"static_beside_dynamic", static_beside_dynamic},
  };
  return cases;
}

}  // namespace less::cuda
