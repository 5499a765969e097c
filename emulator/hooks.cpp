// What g++ -fsanitize=thread makes code call at every load and store, in place of the thread
// sanitizer's own library: accesses go to the emulator, which judges them by CUDA's rules.
#include "emulator/runtime.h"

using less::emulator::Access;

namespace {
struct Tracking {
  Tracking() { less::emulator::tracking = true; }
} const tracking;
}  // namespace

#define LESS_EMULATOR_HERE __builtin_return_address(0)

#define LESS_EMULATOR_HOOK(name, bytes, kind)                           \
  extern "C" void __tsan_##name##bytes(void* p) {                       \
    less::emulator::access(p, bytes, Access::kind, LESS_EMULATOR_HERE); \
  }
#define LESS_EMULATOR_VOLATILE(name, bytes, kind)                                 \
  extern "C" void __tsan_volatile_##name##bytes(void* p) {                        \
    less::emulator::maybe_preempt();                                              \
    if (Access::kind == Access::write) less::emulator::note_progress();           \
    less::emulator::access(p, bytes, Access::relaxed_##kind, LESS_EMULATOR_HERE); \
  }
#define LESS_EMULATOR_HOOKS(bytes)                  \
  LESS_EMULATOR_HOOK(read, bytes, read)             \
  LESS_EMULATOR_HOOK(write, bytes, write)           \
  LESS_EMULATOR_HOOK(unaligned_read, bytes, read)   \
  LESS_EMULATOR_HOOK(unaligned_write, bytes, write) \
  LESS_EMULATOR_VOLATILE(read, bytes, read)         \
  LESS_EMULATOR_VOLATILE(write, bytes, write)

LESS_EMULATOR_HOOKS(1)
LESS_EMULATOR_HOOKS(2)
LESS_EMULATOR_HOOKS(4)
LESS_EMULATOR_HOOKS(8)
LESS_EMULATOR_HOOKS(16)

extern "C" {

void __tsan_read_range(void* p, long bytes) {
  less::emulator::access(p, unsigned(bytes), Access::read, LESS_EMULATOR_HERE);
}
void __tsan_write_range(void* p, long bytes) {
  less::emulator::access(p, unsigned(bytes), Access::write, LESS_EMULATOR_HERE);
}
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}

// C++ atomics are the host's: kernels have CUDA's.
#define LESS_EMULATOR_ATOMIC(bits, T)                          \
  T __tsan_atomic##bits##_load(const volatile T* p, int) {     \
    return __atomic_load_n(p, __ATOMIC_SEQ_CST);               \
  }                                                            \
  void __tsan_atomic##bits##_store(volatile T* p, T v, int) {  \
    __atomic_store_n(p, v, __ATOMIC_SEQ_CST);                  \
  }                                                            \
  T __tsan_atomic##bits##_fetch_add(volatile T* p, T v, int) { \
    return __atomic_fetch_add(p, v, __ATOMIC_SEQ_CST);         \
  }
LESS_EMULATOR_ATOMIC(8, uint8_t)
LESS_EMULATOR_ATOMIC(32, uint32_t)
LESS_EMULATOR_ATOMIC(64, uint64_t)

}  // extern "C"
