// The emulator's half of csrc/cuda/device.h: CUDA's own names, then the project's, for plain g++.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <tuple>
#include <type_traits>

#include "emulator/intrinsics.h"
#include "emulator/runtime.h"

#undef __global__
#undef __device__
#undef __host__
#undef __shared__
#undef __constant__
#undef __forceinline__
#undef __noinline__
#undef __launch_bounds__
#undef __grid_constant__
#undef __cluster_dims__
#define __global__
#define __device__
#define __host__
#define __constant__ static
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __cluster_dims__(...)
#define __shared__ static_assert(false, "use SMEM_ARRAY or DYN_SMEM, not __shared__");
#define LESS_DEVICE inline

#define threadIdx (::less::emulator::thread_index())
#define blockIdx (::less::emulator::block_index())
#define blockDim (::less::emulator::block_size())
#define gridDim (::less::emulator::grid_size())
constexpr int warpSize = 32;

#define SMEM_ARRAY(T, name, n)     \
  T* const name = static_cast<T*>( \
      ::less::emulator::static_shared(__FILE__ " " #name, __LINE__, sizeof(T) * (n), 128))
#define DYN_SMEM(name) unsigned char* const name = ::less::emulator::dynamic_shared()

// -- CUDA's barriers and fences -------------------------------------------------------------------

inline void __syncthreads(LESS_EMULATOR_AT) {
  less::emulator::block_barrier(0, 0, 0, less::emulator::Vote::none, at);
}
inline int __syncthreads_count(int predicate, LESS_EMULATOR_AT) {
  return less::emulator::block_barrier(0, 0, predicate, less::emulator::Vote::count, at);
}
inline int __syncthreads_and(int predicate, LESS_EMULATOR_AT) {
  return less::emulator::block_barrier(0, 0, predicate, less::emulator::Vote::all, at);
}
inline int __syncthreads_or(int predicate, LESS_EMULATOR_AT) {
  return less::emulator::block_barrier(0, 0, predicate, less::emulator::Vote::any, at);
}
inline void __syncwarp(unsigned mask = 0xffffffffu, LESS_EMULATOR_AT) {
  uint32_t live;
  less::emulator::warp_release(
      less::emulator::warp_exchange(mask, "__syncwarp", nullptr, 0, &live, true, at));
}
inline void __threadfence() { less::emulator::fence(true); }
inline void __threadfence_system() { less::emulator::fence(true); }
inline void __threadfence_block() { less::emulator::fence(false); }

// -- CUDA's warp collectives ----------------------------------------------------------------------

namespace less::emulator {

// The value of lane `source`, or one's own where there is no such lane in the segment.
template <typename T>
LESS_EMULATOR_UNTRACKED T shuffle(uint32_t mask, T value, int source, bool in_segment,
                                  const char* kind, Where at) {
  static_assert(sizeof(T) <= kExchangeStride && std::is_trivially_copyable_v<T>);
  uint32_t live;
  const unsigned char* table = warp_exchange(mask, kind, &value, sizeof(T), &live, false, at);
  T result = value;
  if (in_segment) {
    if (!(live >> source & 1)) {
      error("shuffle-source",
            "%s at %s:%d: lane %d reads lane %d, which is not in the mask 0x%08x or has exited",
            kind, short_name(at.file), at.line, lane(), source, mask);
    } else {
      std::memcpy(static_cast<void*>(&result), table + source * kExchangeStride, sizeof(T));
    }
  }
  warp_release(table);
  return result;
}

// f over the values of the mask's lanes, in the order of the lanes.
template <typename T, typename F>
LESS_EMULATOR_UNTRACKED T warp_reduce(uint32_t mask, T value, F f, const char* kind, Where at) {
  uint32_t live;
  const unsigned char* table = warp_exchange(mask, kind, &value, sizeof(T), &live, false, at);
  T result{};
  bool first = true;
  for (int i = 0; i < 32; ++i) {
    if (!(live >> i & 1)) continue;
    T x;
    std::memcpy(&x, table + i * kExchangeStride, sizeof(T));
    result = first ? x : f(result, x);
    first = false;
  }
  warp_release(table);
  return result;
}

}  // namespace less::emulator

template <typename T>
inline T __shfl_sync(unsigned mask, T value, int source, int width = 32, LESS_EMULATOR_AT) {
  const int lane = less::emulator::lane();
  return less::emulator::shuffle(mask, value, (lane & ~(width - 1)) | (source & (width - 1)), true,
                                 "__shfl_sync", at);
}
template <typename T>
inline T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32, LESS_EMULATOR_AT) {
  const int lane = less::emulator::lane(), source = lane ^ bits;
  return less::emulator::shuffle(mask, value, source & 31, source <= (lane | (width - 1)),
                                 "__shfl_xor_sync", at);
}
template <typename T>
inline T __shfl_down_sync(unsigned mask, T value, unsigned by, int width = 32, LESS_EMULATOR_AT) {
  const int lane = less::emulator::lane(), source = lane + int(by);
  return less::emulator::shuffle(mask, value, source & 31, source <= (lane | (width - 1)),
                                 "__shfl_down_sync", at);
}
template <typename T>
inline T __shfl_up_sync(unsigned mask, T value, unsigned by, int width = 32, LESS_EMULATOR_AT) {
  const int lane = less::emulator::lane(), source = lane - int(by);
  return less::emulator::shuffle(mask, value, source & 31, source >= (lane & ~(width - 1)),
                                 "__shfl_up_sync", at);
}
inline unsigned __ballot_sync(unsigned mask, int predicate, LESS_EMULATOR_AT) {
  const unsigned bit = predicate ? 1u << less::emulator::lane() : 0;
  return less::emulator::warp_reduce(
      mask, bit, [](unsigned a, unsigned b) { return a | b; }, "__ballot_sync", at);
}
inline int __any_sync(unsigned mask, int predicate, LESS_EMULATOR_AT) {
  return __ballot_sync(mask, predicate, at) != 0;
}
inline int __all_sync(unsigned mask, int predicate, LESS_EMULATOR_AT) {
  return __ballot_sync(mask, !predicate, at) == 0;
}

#define LESS_EMULATOR_REDUCE(name, T, expression)                          \
  inline T name(unsigned mask, T value, LESS_EMULATOR_AT) {                \
    return less::emulator::warp_reduce(                                    \
        mask, value, [](T a, T b) -> T { return expression; }, #name, at); \
  }
LESS_EMULATOR_REDUCE(__reduce_add_sync, unsigned, a + b)
LESS_EMULATOR_REDUCE(__reduce_add_sync, int, int(unsigned(a) + unsigned(b)))
LESS_EMULATOR_REDUCE(__reduce_max_sync, unsigned, a > b ? a : b)
LESS_EMULATOR_REDUCE(__reduce_max_sync, int, a > b ? a : b)
LESS_EMULATOR_REDUCE(__reduce_min_sync, unsigned, a < b ? a : b)
LESS_EMULATOR_REDUCE(__reduce_min_sync, int, a < b ? a : b)
LESS_EMULATOR_REDUCE(__reduce_or_sync, unsigned, a | b)
LESS_EMULATOR_REDUCE(__reduce_and_sync, unsigned, a& b)
LESS_EMULATOR_REDUCE(__reduce_xor_sync, unsigned, a ^ b)
#undef LESS_EMULATOR_REDUCE

template <typename T>
LESS_EMULATOR_UNTRACKED inline unsigned __match_any_sync(unsigned mask, T value, LESS_EMULATOR_AT) {
  uint32_t live;
  const unsigned char* table =
      less::emulator::warp_exchange(mask, "__match_any_sync", &value, sizeof(T), &live, false, at);
  unsigned equal = 0;
  for (int i = 0; i < 32; ++i) {
    const bool same =
        std::memcmp(table + i * less::emulator::kExchangeStride, &value, sizeof(T)) == 0;
    if ((live >> i & 1) && same) equal |= 1u << i;
  }
  less::emulator::warp_release(table);
  return equal;
}
[[noreturn]] inline unsigned __activemask() {
  less::emulator::fatal("activemask", "__activemask() depends on the schedule: pass a mask");
}

// -- CUDA's atomics -------------------------------------------------------------------------------

namespace less::emulator {

// One operating-system thread: a plain read, change, write.
template <typename T, typename F>
LESS_EMULATOR_UNTRACKED T change(T* p, F f, Where at) {
  maybe_preempt();
  access_at(p, sizeof(T), Access::atomic, at);
  T old;
  std::memcpy(&old, p, sizeof(T));
  const T changed = f(old);
  std::memcpy(p, &changed, sizeof(T));
  if (std::memcmp(&old, &changed, sizeof(T)) != 0) note_progress();
  return old;
}

}  // namespace less::emulator

template <typename T, typename U>
inline T atomicAdd(T* p, U v, LESS_EMULATOR_AT) {
  return less::emulator::change(p, [=](T old) { return T(old + T(v)); }, at);
}
template <typename T, typename U>
inline T atomicSub(T* p, U v, LESS_EMULATOR_AT) {
  return less::emulator::change(p, [=](T old) { return T(old - T(v)); }, at);
}
template <typename T, typename U>
inline T atomicMax(T* p, U v, LESS_EMULATOR_AT) {
  return less::emulator::change(p, [=](T old) { return old > T(v) ? old : T(v); }, at);
}
template <typename T, typename U>
inline T atomicMin(T* p, U v, LESS_EMULATOR_AT) {
  return less::emulator::change(p, [=](T old) { return old < T(v) ? old : T(v); }, at);
}
template <typename T, typename U>
inline T atomicOr(T* p, U v, LESS_EMULATOR_AT) {
  return less::emulator::change(p, [=](T old) { return T(old | T(v)); }, at);
}
template <typename T, typename U>
inline T atomicAnd(T* p, U v, LESS_EMULATOR_AT) {
  return less::emulator::change(p, [=](T old) { return T(old & T(v)); }, at);
}
template <typename T, typename U>
inline T atomicExch(T* p, U v, LESS_EMULATOR_AT) {
  return less::emulator::change(p, [=](T) { return T(v); }, at);
}
template <typename T>
inline T atomicCAS(T* p, T expected, T v, LESS_EMULATOR_AT) {
  return less::emulator::change(p, [=](T old) { return old == expected ? v : old; }, at);
}
inline unsigned atomicInc(unsigned* p, unsigned last, LESS_EMULATOR_AT) {
  return less::emulator::change(p, [=](unsigned old) { return old >= last ? 0u : old + 1; }, at);
}

// -- the project's names; what they mean is said in cuda/device.h ---------------------------------

namespace less::cuda {

// Bytes behind each array that SharedCarver cuts; none where nvcc's kernels cut theirs without.
constexpr int kSharedGuard =
#ifdef LESS_EMULATOR_SHARED_GUARD
    LESS_EMULATOR_SHARED_GUARD;
#else
    128;
#endif

// Whether a device runs the same code as long as the process lives: here a test may change it.
constexpr bool kCodeStays = false;

// What faults on the device.
inline void check_aligned(const void* p, size_t bytes, emulator::Where at) {
  if (reinterpret_cast<uintptr_t>(p) % bytes == 0) return;
  emulator::fatal("misaligned", "%s:%d: %zu bytes at %p", emulator::short_name(at.file), at.line,
                  bytes, p);
}

template <typename T>
LESS_EMULATOR_UNTRACKED T load_whole(const void* p, emulator::Where at) {
  check_aligned(p, sizeof(T), at);
  emulator::access_at(p, sizeof(T), emulator::Access::read, at);
  T v;
  std::memcpy(&v, p, sizeof(T));
  return v;
}
template <typename T>
LESS_EMULATOR_UNTRACKED void store_whole(void* p, const T& v, emulator::Where at) {
  check_aligned(p, sizeof(T), at);
  emulator::access_at(p, sizeof(T), emulator::Access::write, at);
  std::memcpy(p, &v, sizeof(T));
}

inline uint4 load16(const void* global, LESS_EMULATOR_AT) { return load_whole<uint4>(global, at); }
inline uint2 load8(const void* global, LESS_EMULATOR_AT) { return load_whole<uint2>(global, at); }
inline uint4 load16_nc(const void* global, LESS_EMULATOR_AT) {
  return load_whole<uint4>(global, at);
}
inline void store16(void* global, uint4 v, LESS_EMULATOR_AT) { store_whole(global, v, at); }
inline void store8(void* global, uint2 v, LESS_EMULATOR_AT) { store_whole(global, v, at); }
template <typename T>
inline void store(T* global, T value, LESS_EMULATOR_AT) {
  static_assert(sizeof(T) == 1 || sizeof(T) == 2 || sizeof(T) == 4, "store8 and store16 are wider");
  store_whole(global, value, at);
}
inline uint4 load16_shared(const void* shared, LESS_EMULATOR_AT) {
  return load_whole<uint4>(shared, at);
}
inline uint2 load8_shared(const void* shared, LESS_EMULATOR_AT) {
  return load_whole<uint2>(shared, at);
}
inline void store16_shared(void* shared, uint4 v, LESS_EMULATOR_AT) { store_whole(shared, v, at); }
inline void store8_shared(void* shared, uint2 v, LESS_EMULATOR_AT) { store_whole(shared, v, at); }

inline void copy_async16(void* shared, const void* global, bool pred = true, LESS_EMULATOR_AT) {
  emulator::copy_async(shared, global, 16, pred ? 16 : 0, at);
}
inline void copy_async_commit() { emulator::copy_async_commit(); }
template <int N>
inline void copy_async_wait(LESS_EMULATOR_AT) {
  emulator::copy_async_wait(N, at);
}
inline void mbarrier_init(uint64_t* bar, uint32_t arrivals, LESS_EMULATOR_AT) {
  emulator::mbarrier_init(bar, arrivals, at);
}
inline void mbarrier_fence_init() { emulator::mbarrier_fence_init(); }
inline void mbarrier_arrive(uint64_t* bar, LESS_EMULATOR_AT) {
  emulator::mbarrier_arrive(bar, 0, at);
}
inline void mbarrier_arrive_expect(uint64_t* bar, uint32_t bytes, LESS_EMULATOR_AT) {
  emulator::mbarrier_arrive(bar, bytes, at);
}
inline void mbarrier_wait(uint64_t* bar, uint32_t parity, LESS_EMULATOR_AT) {
  emulator::mbarrier_wait(bar, parity, at);
}
inline void bulk_copy(void* shared, const void* global, uint32_t bytes, uint64_t* bar,
                      LESS_EMULATOR_AT) {
  emulator::bulk_copy(shared, global, bytes, bar, at);
}

struct HalfTag {};
struct BFloatTag {};

inline void ldmatrix_x4(uint32_t (&d)[4], const void* shared, LESS_EMULATOR_AT) {
  emulator::ldmatrix(d, 4, shared, false, at);
}
inline void ldmatrix_x2(uint32_t (&d)[2], const void* shared, LESS_EMULATOR_AT) {
  emulator::ldmatrix(d, 2, shared, false, at);
}
inline void ldmatrix_x4_trans(uint32_t (&d)[4], const void* shared, LESS_EMULATOR_AT) {
  emulator::ldmatrix(d, 4, shared, true, at);
}
inline void ldmatrix_x2_trans(uint32_t (&d)[2], const void* shared, LESS_EMULATOR_AT) {
  emulator::ldmatrix(d, 2, shared, true, at);
}
inline void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], HalfTag,
                         LESS_EMULATOR_AT) {
  emulator::mma_m16n8k16(d, a, b, d, false, at);
}
inline void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], BFloatTag,
                         LESS_EMULATOR_AT) {
  emulator::mma_m16n8k16(d, a, b, d, true, at);
}
inline void mma_m16n8k32(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                         LESS_EMULATOR_AT) {
  emulator::mma_m16n8k32(d, a, b, d, at);
}

inline uint32_t and_xor(uint32_t x, uint32_t mask, uint32_t bits) { return (x & mask) ^ bits; }
inline float exp2_approx(float x) {
  const float y = std::exp2(x);
  return y < 0x1p-126f ? 0.0f : y;
}

inline void barrier_sync(uint32_t id, uint32_t threads, LESS_EMULATOR_AT) {
  emulator::block_barrier(int(id), int(threads), 0, emulator::Vote::none, at);
}
inline void barrier_arrive(uint32_t id, uint32_t threads, LESS_EMULATOR_AT) {
  emulator::named_arrive(int(id), int(threads), at);
}
inline void fence_gpu() { emulator::fence(true); }
inline int atomic_add(int* global, int value, LESS_EMULATOR_AT) {
  return atomicAdd(global, value, at);
}

inline void add_global(double* global, double value, LESS_EMULATOR_AT) {
  atomicAdd(global, value, at);
}

LESS_EMULATOR_UNTRACKED inline uint32_t cluster_rank() { return emulator::current->cluster_rank; }
LESS_EMULATOR_UNTRACKED inline uint32_t cluster_size() { return emulator::cluster_size; }
inline void cluster_arrive(LESS_EMULATOR_AT) { emulator::cluster_arrive(false, at); }
inline void cluster_wait(LESS_EMULATOR_AT) { emulator::cluster_wait(at); }
inline void cluster_sync(LESS_EMULATOR_AT) {
  emulator::cluster_arrive(false, at);
  emulator::cluster_wait(at);
}
template <typename T>
inline T load_cluster(const T* own, uint32_t rank, LESS_EMULATOR_AT) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16, "4, 8 or 16 bytes");
  return load_whole<T>(emulator::cluster_pointer(own, rank, at), at);
}
template <typename T>
inline void store_cluster(T* own, uint32_t rank, T value, LESS_EMULATOR_AT) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16, "4, 8 or 16 bytes");
  store_whole(emulator::cluster_pointer(own, rank, at), value, at);
}

inline void grid_dependency_wait(LESS_EMULATOR_AT) { emulator::grid_dependency_wait(at); }
inline void grid_launch_dependents(LESS_EMULATOR_AT) { emulator::grid_launch_dependents(at); }

}  // namespace less::cuda

namespace less::emulator {

// A kernel with its arguments, as the runtime calls it once per thread.
template <typename... Params>
struct Call {
  void (*kernel)(Params...);
  Translated translated;
  std::tuple<std::decay_t<Params>...> args;
  void* addresses[sizeof...(Params) + 1];

  static void run_one(void* self) {
    Call& call = *static_cast<Call*>(self);
    if (call.translated != nullptr) {
      call.translated(call.addresses);
    } else {
      std::apply(call.kernel, call.args);
    }
  }
};

template <typename... Params>
cudaError_t launch(void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared, int cluster,
                   bool dependent, std::decay_t<Params>... args) {
  const void* const address = reinterpret_cast<const void*>(kernel);
  Call<Params...> call{kernel, translated(address), {args...}, {}};
  int i = 0;
  std::apply([&](auto&... arg) { ((call.addresses[i++] = static_cast<void*>(&arg)), ...); },
             call.args);
  return run({grid, block, shared, cluster, dependent}, &Call<Params...>::run_one, &call);
}

}  // namespace less::emulator
