// What one core can read from memory: the roof under which the kernels are judged.
#pragma once

#include <cstddef>

namespace less::bench {

// Bytes a second of one pass over a buffer, which must be far larger than the last cache. Which
// pattern of access is fastest differs between machines, so several are tried.
struct ReadRate {
  double best;    // of all patterns
  double stream;  // one sequential stream
};

ReadRate read_rate(const void* data, size_t bytes);

}  // namespace less::bench

// For ctypes: result[0] is `best`, result[1] `stream`. Touches nothing but its arguments.
extern "C" void less_bench_read_rate(const void* data, size_t bytes, double* result);
