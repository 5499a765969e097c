// One op's file, three libraries: which of them this compilation is for, and its registration.
//
//   less._C       CPU tensors, namespace less; csrc/cpu runs
//   less._cuda    LESS_CUDA_HALF: CUDA tensors, namespace less; csrc/cuda runs
//   for tests     LESS_EMULATED_HALF: CPU tensors, namespace less_emulated; csrc/cuda runs, on the
//                 emulator
//
// An op's file checks and fills its params in one function for all three, hands them to `run`, and
// ends with LESS_OP(name, schema).
#pragma once

#if defined(LESS_CUDA_HALF)
#define LESS_OP_NAMESPACE less
#define LESS_OP_KEY CUDA
#define LESS_OP_SCHEMA(schema)  // less._C has declared it
#elif defined(LESS_EMULATED_HALF)
#define LESS_OP_NAMESPACE less_emulated
#define LESS_OP_KEY CPU
#define LESS_OP_SCHEMA(schema) \
  STABLE_TORCH_LIBRARY_FRAGMENT(LESS_OP_NAMESPACE, m) { m.def(schema); }
#else
#define LESS_OP_NAMESPACE less
#define LESS_OP_KEY CPU
#define LESS_OP_SCHEMA(schema) \
  STABLE_TORCH_LIBRARY_FRAGMENT(LESS_OP_NAMESPACE, m) { m.def(schema); }
#endif

#include "ops/check.h"  // after LESS_LAUNCHES: what a row may be of depends on it

#define LESS_OP(name, schema)                                    \
  LESS_OP_SCHEMA(schema)                                         \
  STABLE_TORCH_LIBRARY_IMPL(LESS_OP_NAMESPACE, LESS_OP_KEY, m) { \
    m.impl(#name, TORCH_BOX(&less::ops::name));                  \
  }

#ifdef LESS_LAUNCHES
#include "ops/launch.h"
#else
#include "cpu/kernels.h"

namespace less::ops {

// Work items per thread at least, so that a fork-join (tens of microseconds) pays: `work` is the
// multiply-adds of one item.
inline int64_t grain(int64_t work) {
  constexpr int64_t kWorthAFork = 1 << 19;
  return work >= kWorthAFork ? 1 : kWorthAFork / (work < 1 ? 1 : work);
}

// Runs what writes pages. Once it has begun, they are whole again only at its end, and what stops
// it, such as want of memory for a kernel's scratch, is told by a message that callers know.
template <typename Write>
void writing(const char* op, const Write& write) {
  try {
    write();
  } catch (const std::exception& error) {
    fail(op, ": stopped while it wrote, and the pages are no longer whole: ", error.what());
  }
}

}  // namespace less::ops
#endif
