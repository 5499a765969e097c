// Scratch of a kernel's thread: kept from call to call, so that a step allocates nothing.
#pragma once

#include <cstdint>
#include <vector>

namespace less::cpu::LESS_ISA {

// Hands out pieces of one thread-local block, each aligned to 64 bytes, contents undefined.
//
//   Scratch scratch(total);             total: sum of padded_floats() of what will be taken
//   float* q = scratch.floats(G * D);
//
// One at a time in a thread: the next one hands out the same memory.
class Scratch {
 public:
  static constexpr int64_t kLine = 16;  // floats in 64 bytes

  static constexpr int64_t padded_floats(int64_t n) { return (n + kLine - 1) / kLine * kLine; }

  explicit Scratch(int64_t floats) {
    static thread_local std::vector<float> block;
    if (int64_t(block.size()) < floats + kLine) block.resize(floats + kLine);
    const auto at = reinterpret_cast<uintptr_t>(block.data());
    next_ = block.data() + (64 - at % 64) % 64 / sizeof(float);
  }

  float* floats(int64_t n) {
    float* piece = next_;
    next_ += padded_floats(n);
    return piece;
  }

 private:
  float* next_;
};

}  // namespace less::cpu::LESS_ISA
