// Our own runtime for g++ -fsanitize=thread: link this INSTEAD of libtsan. Every plain load and
// store of the kernel then reports to the emulator. Never compile this file itself with
// -fsanitize=thread.
#include "emulator/runtime.h"
using less::emulator::Access;
namespace {
struct On {
  On() { less::emulator::tracking = true; }
} on;
}  // namespace
#define PC __builtin_return_address(0)
#define RW(n)                                                                                   \
  extern "C" void __tsan_read##n(void* p) { less::emulator::access(p, n, Access::read, PC); }   \
  extern "C" void __tsan_write##n(void* p) { less::emulator::access(p, n, Access::write, PC); } \
  extern "C" void __tsan_volatile_read##n(void* p) {                                            \
    less::emulator::maybe_preempt();                                                            \
    less::emulator::access(p, n, Access::relaxed_read, PC);                                     \
  }                                                                                             \
  extern "C" void __tsan_volatile_write##n(void* p) {                                           \
    less::emulator::access(p, n, Access::relaxed_write, PC);                                    \
  }                                                                                             \
  extern "C" void __tsan_unaligned_read##n(void* p) {                                           \
    less::emulator::access(p, n, Access::read, PC);                                             \
  }                                                                                             \
  extern "C" void __tsan_unaligned_write##n(void* p) {                                          \
    less::emulator::access(p, n, Access::write, PC);                                            \
  }
RW(1) RW(2) RW(4) RW(8) RW(16) extern "C" void __tsan_read_range(void* p, long n) {
  less::emulator::access(p, (unsigned)n, Access::read, PC);
}
extern "C" void __tsan_write_range(void* p, long n) {
  less::emulator::access(p, (unsigned)n, Access::write, PC);
}
extern "C" void __tsan_init() {}
extern "C" void __tsan_func_entry(void*) {}
extern "C" void __tsan_func_exit() {}
extern "C" void __tsan_vptr_update(void**, void*) {}
extern "C" void __tsan_vptr_read(void**) {}
// std:: code in the same translation unit may use C++ atomics
#define AT(bits, T)                                                                           \
  extern "C" T __tsan_atomic##bits##_load(const volatile T* p, int) {                         \
    return __atomic_load_n(p, 5);                                                             \
  }                                                                                           \
  extern "C" void __tsan_atomic##bits##_store(volatile T* p, T v, int) {                      \
    __atomic_store_n(p, v, 5);                                                                \
  }                                                                                           \
  extern "C" T __tsan_atomic##bits##_fetch_add(volatile T* p, T v, int) {                     \
    return __atomic_fetch_add(p, v, 5);                                                       \
  }                                                                                           \
  extern "C" T __tsan_atomic##bits##_fetch_sub(volatile T* p, T v, int) {                     \
    return __atomic_fetch_sub(p, v, 5);                                                       \
  }                                                                                           \
  extern "C" T __tsan_atomic##bits##_exchange(volatile T* p, T v, int) {                      \
    return __atomic_exchange_n(p, v, 5);                                                      \
  }                                                                                           \
  extern "C" int __tsan_atomic##bits##_compare_exchange_strong(volatile T* p, T* e, T v, int, \
                                                               int) {                         \
    return __atomic_compare_exchange_n(p, e, v, 0, 5, 5);                                     \
  }
AT(8, unsigned char) AT(16, unsigned short) AT(32, unsigned) AT(64, unsigned long)
