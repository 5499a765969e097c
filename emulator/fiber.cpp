#include "emulator/fiber.h"

#include <pthread.h>
#include <sys/mman.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

#if LESS_EMULATOR_ASAN
// Threads that a fatal error ends leave behind what they held.
extern "C" __attribute__((visibility("default"))) const char* __asan_default_options() {
  return "detect_leaks=0";
}
#endif

// Saves the callee's registers on the stack, the stack in *from, and resumes what `to` saved.
extern "C" void less_emulator_switch(void** from, void* to);
extern "C" void less_emulator_begin();
asm(R"(
.text
.globl less_emulator_switch
.hidden less_emulator_switch
.type less_emulator_switch,@function
less_emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size less_emulator_switch,.-less_emulator_switch

.globl less_emulator_begin
.hidden less_emulator_begin
.type less_emulator_begin,@function
less_emulator_begin:
  xorl %ebp, %ebp
  call *%rbx
  ud2
.size less_emulator_begin,.-less_emulator_begin
)");

namespace less::emulator {
namespace {

constexpr size_t kStacks = 16384;
constexpr size_t kPage = 4096;
unsigned char* stacks;
size_t stacks_used;
std::vector<unsigned char*> free_stacks;

void* main_stopped_at;
[[maybe_unused]] void* main_fake_stack;
const unsigned char* main_stack;
size_t main_stack_bytes;
void (*entry_point)();

unsigned char* new_stack() {
  if (!free_stacks.empty()) {
    unsigned char* const stack = free_stacks.back();
    free_stacks.pop_back();
    return stack;
  }
  if (stacks == nullptr) {
    void* const all = mmap(nullptr, kStacks * kStackBytes, PROT_READ | PROT_WRITE,
                           MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (all == MAP_FAILED) std::perror("less emulator: stacks"), std::abort();
    stacks = static_cast<unsigned char*>(all);
  }
  if (stacks_used == kStacks) std::fputs("less emulator: too many threads\n", stderr), std::abort();
  unsigned char* const stack = stacks + kStackBytes * stacks_used++;
  mprotect(stack, kPage, PROT_NONE);  // an overflow faults
  return stack;
}

void find_main_stack() {
  if (main_stack != nullptr) {
    const unsigned char here = 0;
    if (on_main_stack(&here)) return;
  }
  pthread_attr_t attributes;
  void* low = nullptr;
  pthread_getattr_np(pthread_self(), &attributes);
  pthread_attr_getstack(&attributes, &low, &main_stack_bytes);
  pthread_attr_destroy(&attributes);
  main_stack = static_cast<const unsigned char*>(low);
}

void begin() {
#if LESS_EMULATOR_ASAN
  __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr);
#endif
  entry_point();
}

}  // namespace

void prepare(Fiber& fiber, void (*entry)()) {
  fiber.stack = new_stack();
  ASAN_UNPOISON_MEMORY_REGION(fiber.stack + kPage, kStackBytes - kPage);
  entry_point = entry;
  // As less_emulator_switch leaves a stack: six registers, of which rbx holds whom to call, and the
  // place to return to. The call wants the stack on a multiple of 16.
  void** top = reinterpret_cast<void**>(fiber.stack + kStackBytes) - 2;
  *--top = reinterpret_cast<void*>(&less_emulator_begin);
  *--top = nullptr;                          // rbp
  *--top = reinterpret_cast<void*>(&begin);  // rbx
  for (int i = 0; i < 4; ++i) *--top = nullptr;
  fiber.stopped_at = top;
  fiber.fake_stack = nullptr;
}

void take_stack(Fiber& fiber) {
  if (fiber.stack != nullptr) free_stacks.push_back(fiber.stack);
  fiber.stack = nullptr;
}

void switch_fibers(Fiber& from, Fiber& to, [[maybe_unused]] bool over) {
#if LESS_EMULATOR_ASAN
  __sanitizer_start_switch_fiber(over ? nullptr : &from.fake_stack, to.stack, kStackBytes);
#endif
  less_emulator_switch(&from.stopped_at, to.stopped_at);
#if LESS_EMULATOR_ASAN
  __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
#endif
}

void enter(Fiber& to) {
  find_main_stack();
#if LESS_EMULATOR_ASAN
  __sanitizer_start_switch_fiber(&main_fake_stack, to.stack, kStackBytes);
#endif
  less_emulator_switch(&main_stopped_at, to.stopped_at);
#if LESS_EMULATOR_ASAN
  __sanitizer_finish_switch_fiber(main_fake_stack, nullptr, nullptr);
#endif
}

void leave(Fiber& from, [[maybe_unused]] bool over) {
#if LESS_EMULATOR_ASAN
  __sanitizer_start_switch_fiber(over ? nullptr : &from.fake_stack, main_stack, main_stack_bytes);
#endif
  less_emulator_switch(&from.stopped_at, main_stopped_at);
#if LESS_EMULATOR_ASAN
  __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
#endif
}

bool on_any_stack(const void* p) {
  return static_cast<size_t>(static_cast<const unsigned char*>(p) - stacks) <
         stacks_used * kStackBytes;
}

bool on_main_stack(const void* p) {
  return static_cast<size_t>(static_cast<const unsigned char*>(p) - main_stack) < main_stack_bytes;
}

}  // namespace less::emulator
