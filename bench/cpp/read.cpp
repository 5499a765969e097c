// Reads a buffer in 64-byte lines, from 1, 2, 4 or 8 places at once, with and without prefetch.
#include "read.h"

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstring>

namespace less::bench {
namespace {

typedef uint64_t Line __attribute__((vector_size(64), may_alias));

template <int kStreams, int kAhead>
void read_all(const char* data, size_t bytes) {
  Line sum[kStreams] = {};
  const size_t part = bytes / kStreams / sizeof(Line) * sizeof(Line);
  for (size_t i = 0; i < part; i += sizeof(Line)) {
    for (int s = 0; s < kStreams; ++s) {
      const char* at = data + s * part + i;
      if (kAhead > 0) __builtin_prefetch(at + kAhead);
      Line line;
      std::memcpy(&line, at, sizeof line);
      sum[s] |= line;
    }
  }
  // The compiler must believe that somebody looks at every line.
  for (int s = 0; s < kStreams; ++s) asm volatile("" : : "m"(sum[s]));
}

template <int kStreams, int kAhead>
double rate(const char* data, size_t bytes) {
  const auto start = std::chrono::steady_clock::now();
  read_all<kStreams, kAhead>(data, bytes);
  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
  return double(bytes) / seconds.count();
}

}  // namespace

ReadRate read_rate(const void* data, size_t bytes) {
  const char* at = static_cast<const char*>(data);
  const double stream = rate<1, 0>(at, bytes);
  const double rates[] = {stream,
                          rate<2, 0>(at, bytes),
                          rate<4, 0>(at, bytes),
                          rate<4, 2048>(at, bytes),
                          rate<8, 0>(at, bytes),
                          rate<8, 1024>(at, bytes)};
  return {*std::max_element(std::begin(rates), std::end(rates)), stream};
}

}  // namespace less::bench

extern "C" __attribute__((visibility("default"))) void less_bench_read_rate(const void* data,
                                                                            size_t bytes,
                                                                            double* result) {
  const less::bench::ReadRate rate = less::bench::read_rate(data, bytes);
  result[0] = rate.best;
  result[1] = rate.stream;
}
