// Loaded before everything else, so that allocations of tensors, and those that the kernels of
// less._C make, come by here: the n-th from now on fails, once.
//
//   watch(first, last)     addresses of less._C, by which its allocations are known
//   fail_allocation(n)     n = 0: none
//   allocations_left()     0 or less: it has failed; else how many are still to come
#include <dlfcn.h>
#include <errno.h>
#include <stdint.h>
#include <stdlib.h>

#include <atomic>
#include <new>

namespace {

std::atomic<long> left{0};
std::atomic<bool> armed{false};
uintptr_t first_address = 0, last_address = 0;

bool due() { return armed && left.fetch_sub(1) == 1; }

// Whether less._C called: others, torch's own bookkeeping among them, are none of its business.
bool of_less(const void* caller) {
  const auto at = reinterpret_cast<uintptr_t>(caller);
  return at >= first_address && at < last_address;
}

void* allocate(size_t size, const void* caller) {
  if (of_less(caller) && due()) throw std::bad_alloc();
  void* const memory = malloc(size == 0 ? 1 : size);
  if (memory == nullptr) throw std::bad_alloc();
  return memory;
}

}  // namespace

extern "C" {

void watch(uintptr_t first, uintptr_t last) {
  first_address = first;
  last_address = last;
}

void fail_allocation(long n) {
  left = n;
  armed = n > 0;
}

long allocations_left() { return left; }

// As torch's CPU allocator asks for the numbers of a tensor.
int posix_memalign(void** memory, size_t alignment, size_t size) {
  using Function = int (*)(void**, size_t, size_t);
  static const Function next = reinterpret_cast<Function>(dlsym(RTLD_NEXT, "posix_memalign"));
  return due() ? ENOMEM : next(memory, alignment, size);
}

}  // extern "C"

void* operator new(size_t size) { return allocate(size, __builtin_return_address(0)); }
void* operator new[](size_t size) { return allocate(size, __builtin_return_address(0)); }
void operator delete(void* memory) noexcept { free(memory); }
void operator delete[](void* memory) noexcept { free(memory); }
void operator delete(void* memory, size_t) noexcept { free(memory); }
void operator delete[](void* memory, size_t) noexcept { free(memory); }
