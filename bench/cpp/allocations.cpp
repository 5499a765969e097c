// The program's own malloc family, in front of glibc's, which keeps its implementation reachable
// under these names for the purpose.
#include "allocations.h"

#include <atomic>
#include <cerrno>
#include <cstddef>

#ifndef __GLIBC__
#error "allocations are counted in front of glibc's malloc"
#endif

namespace {
std::atomic<int64_t> count{0};
}  // namespace

namespace less::bench {
int64_t allocations() { return count.load(std::memory_order_relaxed); }
}  // namespace less::bench

extern "C" {

void* __libc_malloc(size_t);
void* __libc_calloc(size_t, size_t);
void* __libc_realloc(void*, size_t);
void* __libc_memalign(size_t, size_t);
void __libc_free(void*);

__attribute__((visibility("default"))) void* malloc(size_t bytes) {
  count.fetch_add(1, std::memory_order_relaxed);
  return __libc_malloc(bytes);
}

__attribute__((visibility("default"))) void* calloc(size_t items, size_t bytes) {
  count.fetch_add(1, std::memory_order_relaxed);
  return __libc_calloc(items, bytes);
}

__attribute__((visibility("default"))) void* realloc(void* old, size_t bytes) {
  count.fetch_add(1, std::memory_order_relaxed);
  return __libc_realloc(old, bytes);
}

__attribute__((visibility("default"))) void* aligned_alloc(size_t alignment, size_t bytes) {
  count.fetch_add(1, std::memory_order_relaxed);
  return __libc_memalign(alignment, bytes);
}

__attribute__((visibility("default"))) void* memalign(size_t alignment, size_t bytes) {
  count.fetch_add(1, std::memory_order_relaxed);
  return __libc_memalign(alignment, bytes);
}

__attribute__((visibility("default"))) int posix_memalign(void** out, size_t alignment,
                                                          size_t bytes) {
  count.fetch_add(1, std::memory_order_relaxed);
  void* made = __libc_memalign(alignment, bytes);
  if (made == nullptr) return ENOMEM;
  *out = made;
  return 0;
}

__attribute__((visibility("default"))) void free(void* old) { __libc_free(old); }
}
