// A thread of a kernel: a stack and the place where it stopped. Fibers switch by hand, in one
// operating-system thread, so that the schedule is ours.
#pragma once

#include <cstddef>

#include "emulator/sanitizer.h"

namespace less::emulator {

constexpr size_t kStackBytes = 256 << 10;

struct Fiber {
  void* stopped_at = nullptr;
  unsigned char* stack = nullptr;  // kStackBytes
  void* fake_stack = nullptr;      // of AddressSanitizer
};

// Gives the fiber a stack, and lets it begin at entry() when first switched to.
void prepare(Fiber& fiber, void (*entry)());
// Takes the stack of a fiber that never runs again.
void take_stack(Fiber& fiber);
// From one fiber to another; over: the first never comes back.
void switch_fibers(Fiber& from, Fiber& to, bool over);
// From the launching thread to a fiber, and back.
void enter(Fiber& to);
void leave(Fiber& from, bool over);

// Whether the address is on this fiber's stack, on any fiber's, on the launching thread's.
inline bool on_stack(const Fiber& fiber, const void* p) {
  return static_cast<size_t>(static_cast<const unsigned char*>(p) - fiber.stack) < kStackBytes;
}
bool on_any_stack(const void* p);
bool on_main_stack(const void* p);

}  // namespace less::emulator
