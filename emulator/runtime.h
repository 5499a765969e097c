// The emulator's runtime as generated and emulated kernels see it: what runs, barriers, warps,
// copies, fragments, accesses. Kernels reach it through emulator/device.h; the PTX tier calls
// everything here that is marked so.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>

// Code that works on the emulator's own memory, inside files whose accesses are instrumented.
#define LESS_EMULATOR_UNTRACKED __attribute__((no_sanitize("thread")))
// The last parameter of what a kernel calls: the line of the call.
#define LESS_EMULATOR_AT ::less::emulator::Where at = {__builtin_FILE(), __builtin_LINE()}

namespace less::emulator {

struct Where {
  const char* file;
  int line;
};

// A path for messages: below csrc/cuda, and of other files without folders.
inline const char* short_name(const char* path) {
  if (const char* const own = std::strstr(path, "csrc/cuda/")) return own + 10;
  const char* name = path;
  for (const char* p = path; *p; ++p) {
    if (*p == '/') name = p + 1;
  }
  return name;
}

// -- who runs ------------------------------------------------------------------------------------
// PTX: %tid, %ctaid, %ntid, %nctaid, %laneid, %cluster_ctarank, %cluster_nctarank.

struct Context {
  uint3 thread;
  uint3 block;
  int lane;
  unsigned char* window;  // the block's shared memory: the dynamic part comes first
  uint32_t cluster_rank;
};
extern Context* current;
extern dim3 block_dim;
extern dim3 grid_dim;
extern uint32_t cluster_size;

LESS_EMULATOR_UNTRACKED inline uint3 thread_index() { return current->thread; }
LESS_EMULATOR_UNTRACKED inline uint3 block_index() { return current->block; }
LESS_EMULATOR_UNTRACKED inline int lane() { return current->lane; }
LESS_EMULATOR_UNTRACKED inline dim3 block_size() { return block_dim; }
LESS_EMULATOR_UNTRACKED inline dim3 grid_size() { return grid_dim; }

// -- the device ----------------------------------------------------------------------------------
// The environment's LESS_EMULATOR_ARCHITECTURE says whose limits: 80, 90 (the default), 100, 120.

inline int architecture() {
  const char* const name = std::getenv("LESS_EMULATOR_ARCHITECTURE");
  return name == nullptr ? 90 : std::atoi(name);
}

// What its kernels were compiled for, as LESS_EMULATOR_CODE says: the same, unless PTX of an older
// architecture serves it.
inline int code_architecture() {
  const char* const name = std::getenv("LESS_EMULATOR_CODE");
  return name == nullptr ? architecture() : std::atoi(name);
}

// Multiprocessors: LESS_EMULATOR_SMS, as many as an H100 has by default.
inline int multiprocessors() {
  const char* const count = std::getenv("LESS_EMULATOR_SMS");
  return count == nullptr ? 132 : std::atoi(count);
}

// Bytes of shared memory, at most.
inline int shared_of_a_block() {
  const int of = architecture();
  return (of < 90 ? 163 : of < 120 ? 227 : 99) << 10;
}

// -- errors (PTX) ---------------------------------------------------------------------------------

// Notes an error of this kind, with the thread that made it; the kernel goes on.
void error(const char* kind, const char* format, ...) __attribute__((format(printf, 2, 3)));
// Notes it and ends the launch.
[[noreturn]] void fatal(const char* kind, const char* format, ...)
    __attribute__((format(printf, 2, 3)));

// -- launch ---------------------------------------------------------------------------------------

// A kernel of the PTX tier: takes the addresses of its parameters.
using Translated = void (*)(void** params);
// PTX: makes a translated kernel known by its mangled name.
struct Registered {
  Registered(const char* name, Translated kernel);
};
// The translated kernel of the same name; null where none are linked in or the option ptx is off.
Translated translated(const void* kernel);

struct LaunchConfig {
  dim3 grid;
  dim3 block;
  size_t shared;
  int cluster;
  bool dependent;
};
// Runs body(argument) once per thread of the grid. cudaErrorLaunchFailure: it did not end.
cudaError_t run(const LaunchConfig& config, void (*body)(void*), void* argument);

// -- shared memory --------------------------------------------------------------------------------

// PTX: the block's dynamic shared memory, and a static array of it by the place that declares it.
unsigned char* dynamic_shared();
void* static_shared(const char* file, int line, size_t bytes, size_t align);
// Nobody may touch what lies between the array's end and `end`, nor kSharedGuard bytes from there.
void shared_guard(void* array, size_t bytes, void* end);

// PTX: shared addresses as PTX sees them, 32 bits. Those of one's own block are offsets into its
// window; mapa makes those of another block of the cluster.
uint32_t shared_address(const void* own);
unsigned char* shared_pointer(uint32_t address, LESS_EMULATOR_AT);
uint32_t map_shared(uint32_t own, uint32_t rank, LESS_EMULATOR_AT);
// The same for C++ pointers.
void* cluster_pointer(const void* own, uint32_t rank, Where at);

// -- barriers (PTX) -------------------------------------------------------------------------------

enum class Vote { none, count, all, any };
// bar.sync, and bar.red by vote; threads <= 0: all of the block.
int block_barrier(int id, int threads, int predicate, Vote vote, Where at);
// bar.arrive
void named_arrive(int id, int threads, Where at);
// barrier.cluster.arrive (release unless relaxed), barrier.cluster.wait (acquire)
void cluster_arrive(bool relaxed, Where at);
void cluster_wait(Where at);
// fence / membar; gpu: of scope gpu or sys, else cta or cluster
void fence(bool gpu);
// griddepcontrol
void grid_dependency_wait(Where at);
void grid_launch_dependents(Where at);

// -- warps (PTX) ----------------------------------------------------------------------------------

// Bytes between the lanes' entries in the table that warp_exchange returns.
constexpr unsigned kExchangeStride = 64;
// Every lane of mask brings n bytes; returns the table of them all, and in *live who brought any.
// Give the table back with warp_release. orders: memory is ordered, as by __syncwarp.
const unsigned char* warp_exchange(uint32_t mask, const char* kind, const void* in, unsigned n,
                                   uint32_t* live, bool orders, Where at);
void warp_release(const unsigned char* table);

// -- asynchronous copies (PTX) --------------------------------------------------------------------

// cp.async of n bytes, of which the first source_n are read and the others are 0.
void copy_async(void* shared, const void* global, unsigned n, unsigned source_n, Where at);
void copy_async_commit();
void copy_async_wait(int groups, Where at);
void mbarrier_init(uint64_t* bar, uint32_t arrivals, Where at);
// fence.mbarrier_init
void mbarrier_fence_init();
// The mbarrier expects so many bytes more, then counts the arrival.
void mbarrier_arrive(uint64_t* bar, uint32_t bytes, Where at);
// mbarrier.try_wait.parity, until it succeeds.
void mbarrier_wait(uint64_t* bar, uint32_t parity, Where at);
void bulk_copy(void* shared, const void* global, uint32_t bytes, uint64_t* bar, Where at);

// -- tensor cores (PTX) ---------------------------------------------------------------------------

// num of 1, 2, 4 matrices of 8x8 halves; lane i brings the address of row i.
void ldmatrix(uint32_t* d, int num, const void* row, bool transposed, Where at);
// d = a b + c, in the fragments of m16n8k16, bf16 or fp16.
void mma_m16n8k16(float* d, const uint32_t* a, const uint32_t* b, const float* c, bool bf16,
                  Where at);
// The same in the fragments of m16n8k32, int8 and int32.
void mma_m16n8k32(int32_t* d, const uint32_t* a, const uint32_t* b, const int32_t* c, Where at);

// -- accesses (PTX) -------------------------------------------------------------------------------

// relaxed: volatile, ld.relaxed, st.relaxed.
enum class Access { read, write, atomic, relaxed_read, relaxed_write };
// Whether accesses are checked and counted: in builds that have the hooks.
extern bool tracking;
void access_at(const void* p, unsigned n, Access kind, Where at);
// Of an instrumented instruction at pc.
void access(const void* p, unsigned n, Access kind, const void* pc);
// Before an atomic or volatile access: another thread may run first.
void maybe_preempt();
// An atomic has changed something: threads that poll may go on. Without, many polls are a livelock.
void note_progress();

}  // namespace less::emulator
