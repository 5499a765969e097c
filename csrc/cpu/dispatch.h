// Chooses, once per process, which SIMD level of every CPU kernel runs.
//
// Each csrc/cpu/<op>.cpp is compiled once per level, with LESS_ISA naming it, and defines
//
//     namespace less::cpu::LESS_ISA {
//     void fold(const FoldParams& p, int64_t begin, int64_t end) { ... }
//     }
//
// csrc/cpu/kernels.h lists the kernel once,
//
//     LESS_CPU_KERNEL(fold, FoldParams)
//
// and csrc/ops/fold.cpp calls less::cpu::fold(params, begin, end), which is the best level that
// this machine has, or the one that the environment variable LESS_SIMD names.
// [begin, end) is the range of independent work items (rows, heads) that this call owns.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace less::cpu {

// From the least to the best of a machine.
enum class Level : int { portable, avx2, avx512, neon };

// The level in use. The first call decides; it throws std::runtime_error where LESS_SIMD names an
// unknown level, one that was not compiled in, or one that this machine cannot run.
Level level();

const char* name(Level level);

// Levels compiled in that this machine can run, lowest first.
std::vector<std::string> supported_levels();

// For tests: use this level from now on. Throws as level() does. Not while a kernel runs.
void set_level(const std::string& name);

}  // namespace less::cpu

#ifdef LESS_HAVE_avx2
#define LESS_IF_AVX2(...) __VA_ARGS__
#else
#define LESS_IF_AVX2(...)
#endif
#ifdef LESS_HAVE_avx512
#define LESS_IF_AVX512(...) __VA_ARGS__
#else
#define LESS_IF_AVX512(...)
#endif
#ifdef LESS_HAVE_neon
#define LESS_IF_NEON(...) __VA_ARGS__
#else
#define LESS_IF_NEON(...)
#endif

#define LESS_CPU_KERNEL(op, Params)                                               \
  namespace less::cpu {                                                           \
  namespace portable {                                                            \
  void op(const Params&, int64_t begin, int64_t end);                             \
  }                                                                               \
  LESS_IF_AVX2(namespace avx2 { void op(const Params&, int64_t, int64_t); })      \
  LESS_IF_AVX512(namespace avx512 { void op(const Params&, int64_t, int64_t); })  \
  LESS_IF_NEON(namespace neon { void op(const Params&, int64_t, int64_t); })      \
  inline void op(const Params& params, int64_t begin, int64_t end) {              \
    switch (level()) {                                                            \
      LESS_IF_AVX2(case Level::avx2 : return avx2::op(params, begin, end);)       \
      LESS_IF_AVX512(case Level::avx512 : return avx512::op(params, begin, end);) \
      LESS_IF_NEON(case Level::neon : return neon::op(params, begin, end);)       \
      default:                                                                    \
        return portable::op(params, begin, end);                                  \
    }                                                                             \
  }                                                                               \
  }
