// What kernels say to the device, by one name whoever compiles them: nvcc, or g++ for the emulator
// (LESS_EMULATOR, see emulator/). The only header that knows which of the two it is.
//
// Rules that make one source serve both:
//   - a kernel is launched through launch(), never <<<>>>;
//   - shared memory comes from SMEM_ARRAY, DYN_SMEM and SharedCarver, never from __shared__;
//   - a kernel has static arrays or dynamic shared memory, not both: a launch asks for the latter
//     alone, while 48 kB, and what a device has, are limits of their sum;
//   - accesses of 8 and 16 bytes, and stores of what a function returned, go through the helpers
//     here: they name the address space, and the emulator sees them as the one access they are;
//   - kernels are not in anonymous namespaces: their names find their PTX.
#pragma once

#include <atomic>
#include <cstdint>
#include <initializer_list>
#include <type_traits>
#include <utility>

#ifdef LESS_EMULATOR
#include "emulator/device.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#include <cuda_runtime.h>

#define SMEM_ARRAY(T, name, n) __shared__ __align__(128) T name[n]
#define DYN_SMEM(name) extern __shared__ __align__(128) unsigned char name[]

// Clusters, mbarriers, bulk copies and dependent launch exist from sm_90 on. Below, asking for
// what cannot be had traps.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#define LESS_CUDA_SM90 1
#else
#define LESS_CUDA_SM90 0
#endif

#define LESS_DEVICE __device__ __forceinline__

namespace less::cuda {

constexpr int kSharedGuard = 0;

// Whether a device runs the same code as long as the process lives.
constexpr bool kCodeStays = true;

// -- global memory --------------------------------------------------------------------------------

LESS_DEVICE uint64_t global_address(const void* p) { return __cvta_generic_to_global(p); }

LESS_DEVICE uint4 load16(const void* global) {
  uint4 v;
  asm volatile("ld.global.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(global_address(global))
               : "memory");
  return v;
}

LESS_DEVICE uint2 load8(const void* global) {
  uint2 v;
  asm volatile("ld.global.v2.b32 {%0, %1}, [%2];"
               : "=r"(v.x), "=r"(v.y)
               : "l"(global_address(global))
               : "memory");
  return v;
}

// Of data that no kernel writes while this one runs, and that is read once.
LESS_DEVICE uint4 load16_nc(const void* global) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(global_address(global)));
  return v;
}

LESS_DEVICE void store16(void* global, uint4 v) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(global_address(global)), "r"(v.x),
               "r"(v.y), "r"(v.z), "r"(v.w)
               : "memory");
}

LESS_DEVICE void store8(void* global, uint2 v) {
  asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(global_address(global)), "r"(v.x), "r"(v.y)
               : "memory");
}

// Of 1, 2 or 4 bytes: floats, the half types, integers, bool.
template <typename T>
LESS_DEVICE void store(T* global, T value) {
  static_assert(sizeof(T) == 1 || sizeof(T) == 2 || sizeof(T) == 4, "store8 and store16 are wider");
  const uint64_t address = global_address(global);
  if constexpr (sizeof(T) == 4) {
    const uint32_t bits = reinterpret_cast<const uint32_t&>(value);
    asm volatile("st.global.b32 [%0], %1;" ::"l"(address), "r"(bits) : "memory");
  } else if constexpr (sizeof(T) == 2) {
    const uint16_t bits = reinterpret_cast<const uint16_t&>(value);
    asm volatile("st.global.b16 [%0], %1;" ::"l"(address), "h"(bits) : "memory");
  } else {
    const uint32_t bits = reinterpret_cast<const uint8_t&>(value);
    asm volatile("st.global.b8 [%0], %1;" ::"l"(address), "r"(bits) : "memory");
  }
}

// -- shared memory --------------------------------------------------------------------------------

LESS_DEVICE uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

LESS_DEVICE uint4 load16_shared(const void* shared) {
  uint4 v;
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(shared_address(shared))
               : "memory");
  return v;
}

LESS_DEVICE uint2 load8_shared(const void* shared) {
  uint2 v;
  asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];"
               : "=r"(v.x), "=r"(v.y)
               : "r"(shared_address(shared))
               : "memory");
  return v;
}

LESS_DEVICE void store16_shared(void* shared, uint4 v) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(shared)), "r"(v.x),
               "r"(v.y), "r"(v.z), "r"(v.w)
               : "memory");
}

LESS_DEVICE void store8_shared(void* shared, uint2 v) {
  asm volatile("st.shared.v2.b32 [%0], {%1, %2};" ::"r"(shared_address(shared)), "r"(v.x), "r"(v.y)
               : "memory");
}

// -- asynchronous copies --------------------------------------------------------------------------

// 16 bytes from global to shared memory, past the registers; zeros where !pred, and then nothing is
// read. Visible to this thread after its group was committed and waited for.
LESS_DEVICE void copy_async16(void* shared, const void* global, bool pred = true) {
  const int bytes = pred ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)),
               "l"(global_address(global)), "r"(bytes)
               : "memory");
}

LESS_DEVICE void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Returns once at most N of the committed groups are still under way.
template <int N>
LESS_DEVICE void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

LESS_DEVICE void mbarrier_init(uint64_t* bar, uint32_t arrivals) {
#if LESS_CUDA_SM90
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(bar)), "r"(arrivals)
               : "memory");
#else
  __trap();
#endif
}

// Makes the mbarriers that this thread has initialised known to bulk copies and the cluster.
LESS_DEVICE void mbarrier_fence_init() {
#if LESS_CUDA_SM90
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#else
  __trap();
#endif
}

LESS_DEVICE void mbarrier_arrive(uint64_t* bar) {
#if LESS_CUDA_SM90
  asm volatile(
      "{.reg .b64 state; mbarrier.arrive.shared::cta.b64 state, [%0];}" ::"r"(shared_address(bar))
      : "memory");
#else
  __trap();
#endif
}

LESS_DEVICE void mbarrier_arrive_expect(uint64_t* bar, uint32_t bytes) {
#if LESS_CUDA_SM90
  asm volatile(
      "{.reg .b64 state; mbarrier.arrive.expect_tx.shared::cta.b64 state, [%0], %1;}" ::"r"(
          shared_address(bar)),
      "r"(bytes)
      : "memory");
#else
  __trap();
#endif
}

// Returns once the phase of this parity (0 for the first) is over.
LESS_DEVICE void mbarrier_wait(uint64_t* bar, uint32_t parity) {
#if LESS_CUDA_SM90
  uint32_t over;
  do {
    asm volatile(
        "{.reg .pred over; mbarrier.try_wait.parity.shared::cta.b64 over, [%1], %2; "
        "selp.u32 %0, 1, 0, over;}"
        : "=r"(over)
        : "r"(shared_address(bar)), "r"(parity)
        : "memory");
  } while (!over);
#else
  __trap();
#endif
}

// bytes % 16 == 0, both addresses multiples of 16; bar is told when they have arrived.
LESS_DEVICE void bulk_copy(void* shared, const void* global, uint32_t bytes, uint64_t* bar) {
#if LESS_CUDA_SM90
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(shared_address(shared)),
      "l"(global_address(global)), "r"(bytes), "r"(shared_address(bar))
      : "memory");
#else
  __trap();
#endif
}

// -- tensor cores ---------------------------------------------------------------------------------

struct HalfTag {};
struct BFloatTag {};

LESS_DEVICE void ldmatrix_x4(uint32_t (&d)[4], const void* shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
               : "r"(shared_address(shared))
               : "memory");
}

LESS_DEVICE void ldmatrix_x2(uint32_t (&d)[2], const void* shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(d[0]), "=r"(d[1])
               : "r"(shared_address(shared))
               : "memory");
}

LESS_DEVICE void ldmatrix_x4_trans(uint32_t (&d)[4], const void* shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
               : "r"(shared_address(shared))
               : "memory");
}

LESS_DEVICE void ldmatrix_x2_trans(uint32_t (&d)[2], const void* shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
               : "=r"(d[0]), "=r"(d[1])
               : "r"(shared_address(shared))
               : "memory");
}

// d += a b: a 16x16 row-major, b 16x8 column-major of half floats, d 16x8 of floats, as fragments.
LESS_DEVICE void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                              HalfTag) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

LESS_DEVICE void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                              BFloatTag) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// d += a b: a 16x32 row-major, b 32x8 column-major of int8, d 16x8 of int32, as fragments.
LESS_DEVICE void mma_m16n8k32(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// -- arithmetic -----------------------------------------------------------------------------------

// (x & mask) ^ bits, one instruction.
LESS_DEVICE uint32_t and_xor(uint32_t x, uint32_t mask, uint32_t bits) {
  uint32_t y;
  asm("lop3.b32 %0, %1, %2, %3, 0x6a;" : "=r"(y) : "r"(x), "r"(mask), "r"(bits));
  return y;
}

// 2^x, subnormal results are 0.
LESS_DEVICE float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// -- barriers, fences -----------------------------------------------------------------------------

// Named barriers 1..15 of a block, for whole warps; threads counts those that sync or arrive.
LESS_DEVICE void barrier_sync(uint32_t id, uint32_t threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

LESS_DEVICE void barrier_arrive(uint32_t id, uint32_t threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

LESS_DEVICE void fence_gpu() { __threadfence(); }

// Returns the old value. Relaxed: orders nothing by itself, fence_gpu() before or after does.
LESS_DEVICE int atomic_add(int* global, int value) {
  int old;
  asm volatile("atom.relaxed.gpu.global.add.s32 %0, [%1], %2;"
               : "=r"(old)
               : "l"(global_address(global)), "r"(value)
               : "memory");
  return old;
}

// Adds without waiting for the old value; relaxed.
LESS_DEVICE void add_global(double* global, double value) {
  asm volatile("red.relaxed.gpu.global.add.f64 [%0], %1;" ::"l"(global_address(global)), "d"(value)
               : "memory");
}

// -- clusters -------------------------------------------------------------------------------------
// A launch that asks for no cluster has clusters of one block, on every architecture.

LESS_DEVICE uint32_t cluster_rank() {
#if LESS_CUDA_SM90
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
#else
  return 0;
#endif
}

LESS_DEVICE uint32_t cluster_size() {
#if LESS_CUDA_SM90
  uint32_t size;
  asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  return size;
#else
  return 1;
#endif
}

// All threads of all blocks of the cluster; what was written before arriving is seen after waiting.
LESS_DEVICE void cluster_arrive() {
#if LESS_CUDA_SM90
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
#endif
}

LESS_DEVICE void cluster_wait() {
#if LESS_CUDA_SM90
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#else
  __syncthreads();
#endif
}

LESS_DEVICE void cluster_sync() {
  cluster_arrive();
  cluster_wait();
}

// Where the block of that rank has what this block has at own.
LESS_DEVICE uint32_t cluster_address(const void* own, uint32_t rank) {
#if LESS_CUDA_SM90
  uint32_t address;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;"
               : "=r"(address)
               : "r"(shared_address(own)), "r"(rank));
  return address;
#else
  return shared_address(own);
#endif
}

// The value at own in the shared memory of the block of that rank, of 4, 8 or 16 bytes.
template <typename T>
LESS_DEVICE T load_cluster(const T* own, uint32_t rank) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16, "4, 8 or 16 bytes");
  const uint32_t address = cluster_address(own, rank);
  uint32_t v[sizeof(T) / 4];
#if LESS_CUDA_SM90
#define LESS_LOAD "ld.shared::cluster"
#else
#define LESS_LOAD "ld.shared"
#endif
  if constexpr (sizeof(T) == 4) {
    asm volatile(LESS_LOAD ".b32 %0, [%1];" : "=r"(v[0]) : "r"(address) : "memory");
  } else if constexpr (sizeof(T) == 8) {
    asm volatile(LESS_LOAD ".v2.b32 {%0, %1}, [%2];"
                 : "=r"(v[0]), "=r"(v[1])
                 : "r"(address)
                 : "memory");
  } else {
    asm volatile(LESS_LOAD ".v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3])
                 : "r"(address)
                 : "memory");
  }
#undef LESS_LOAD
  return reinterpret_cast<const T&>(v);
}

template <typename T>
LESS_DEVICE void store_cluster(T* own, uint32_t rank, T value) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16, "4, 8 or 16 bytes");
  const uint32_t address = cluster_address(own, rank);
  uint32_t v[sizeof(T) / 4];
  reinterpret_cast<T&>(v) = value;
#if LESS_CUDA_SM90
#define LESS_STORE "st.shared::cluster"
#else
#define LESS_STORE "st.shared"
#endif
  if constexpr (sizeof(T) == 4) {
    asm volatile(LESS_STORE ".b32 [%0], %1;" ::"r"(address), "r"(v[0]) : "memory");
  } else if constexpr (sizeof(T) == 8) {
    asm volatile(LESS_STORE ".v2.b32 [%0], {%1, %2};" ::"r"(address), "r"(v[0]), "r"(v[1])
                 : "memory");
  } else {
    asm volatile(LESS_STORE ".v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(v[0]), "r"(v[1]),
                 "r"(v[2]), "r"(v[3])
                 : "memory");
  }
#undef LESS_STORE
}

// -- dependent launch -----------------------------------------------------------------------------

// Returns once the kernel before this one in the stream is over and its writes can be seen: at once
// unless Launch::dependent.
LESS_DEVICE void grid_dependency_wait() {
#if LESS_CUDA_SM90
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Lets a dependent kernel start once every block of this one has said so or ended.
LESS_DEVICE void grid_launch_dependents() {
#if LESS_CUDA_SM90
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

}  // namespace less::cuda
#endif  // LESS_EMULATOR

namespace less::cuda {

// Whether accesses of 16 bytes from p on are allowed.
inline bool aligned16(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

// Of each; null is. A launcher asks first: on a device a misaligned access ends the whole context.
inline bool aligned16(std::initializer_list<const void*> all) {
  for (const void* p : all) {
    if (!aligned16(p)) return false;
  }
  return true;
}

struct Launch {
  dim3 grid;
  dim3 block;
  size_t shared;  // bytes of dynamic shared memory
  cudaStream_t stream;
  int cluster = 1;         // blocks of a cluster, along x; more than 1 wants sm_90
  bool dependent = false;  // may start before the kernel before it is over; wants sm_90
};

// What a launcher may ask of the current device.
struct DeviceLimits {
  bool clusters;  // of more than one block
  int shared;     // bytes of shared memory that a block can have
  int sms;        // multiprocessors
};

// Does nothing. All kernels were compiled for the same architectures: what the driver runs of this
// one on a device tells what it runs of the others.
template <int = 0>
__global__ void architecture_kernel() {}

// For which architecture the code was compiled that the current device runs, 90 for sm_90: less
// than the device's own where that is served by PTX. The answer is kept, for each step asks.
inline cudaError_t code_architecture(int device, int& architecture) {
  constexpr int kDevices = 64;
  static std::atomic<int> known[kDevices];  // 0: nobody has asked
  const bool kept = kCodeStays && device < kDevices;
  architecture = kept ? known[device].load(std::memory_order_relaxed) : 0;
  if (architecture != 0) return cudaSuccess;
  cudaFuncAttributes attributes{};
  const cudaError_t error =
      cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(&architecture_kernel<>));
  if (error != cudaSuccess) return error;
  architecture = attributes.ptxVersion;
  if (kept) known[device].store(architecture, std::memory_order_relaxed);
  return cudaSuccess;
}

inline cudaError_t device_limits(DeviceLimits& limits) {
  int device = 0, architecture = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = code_architecture(device, architecture);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&limits.shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  }
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&limits.sms, cudaDevAttrMultiProcessorCount, device);
  }
  limits.clusters = architecture >= 90;
  return error;
}

#ifndef LESS_EMULATOR
template <typename... Params, typename... Args>
cudaError_t launch(void (*kernel)(Params...), const Launch& how, Args&&... args) {
  if (how.shared > 48 * 1024) {
    // All that the device has: threads that launch a kernel with other sizes would undo a tighter
    // limit between another's asking and its launch.
    DeviceLimits limits{};
    cudaError_t error = device_limits(limits);
    if (error == cudaSuccess) {
      error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                   cudaFuncAttributeMaxDynamicSharedMemorySize, limits.shared);
    }
    if (error != cudaSuccess) return error;
  }
  cudaLaunchAttribute attributes[2];
  cudaLaunchConfig_t config{};
  config.gridDim = how.grid;
  config.blockDim = how.block;
  config.dynamicSmemBytes = how.shared;
  config.stream = how.stream;
  config.attrs = attributes;
  if (how.cluster > 1) {
    cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = unsigned(how.cluster);
    attribute.val.clusterDim.y = 1;
    attribute.val.clusterDim.z = 1;
  }
  if (how.dependent) {
    cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
  }
  return cudaLaunchKernelEx(&config, kernel, static_cast<Params>(args)...);
}
#else
template <typename... Params, typename... Args>
cudaError_t launch(void (*kernel)(Params...), const Launch& how, Args&&... args) {
  return emulator::launch(kernel, how.grid, how.block, how.shared, how.cluster, how.dependent,
                          static_cast<Params>(args)...);
}
#endif

// Cuts dynamic shared memory into arrays, each on a multiple of 128 bytes. With a null base it only
// measures: the launcher and the kernel cut alike, and `used` is what the launcher asks for.
struct SharedCarver {
  unsigned char* base;
  size_t used = 0;

  template <typename T>
  __host__ __device__ T* take(int64_t n) {
#ifdef __CUDA_ARCH__
    T* const array = reinterpret_cast<T*>(base + used);  // an integer would lose the address space
#else
    T* const array = reinterpret_cast<T*>(reinterpret_cast<uintptr_t>(base) + used);
#endif
    used = (used + size_t(n) * sizeof(T) + 127) / 128 * 128;
    used += kSharedGuard;
#ifdef LESS_EMULATOR
    if (base != nullptr) emulator::shared_guard(array, size_t(n) * sizeof(T), base + used);
#endif
    return array;
  }
};

}  // namespace less::cuda
