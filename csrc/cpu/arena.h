// Scratch of one kernel call: one allocation, handed out in pieces aligned to cache lines.
#pragma once

#include <cstdint>
#include <memory>

#include "cpu/simd.h"

namespace less::cpu::LESS_ISA {

class Arena {
 public:
  // Floats that `n` floats take up.
  static constexpr int64_t size(int64_t n) { return (n + kLine - 1) / kLine * kLine; }

  // Not initialised. `floats` is the sum of size() over all that will be taken.
  explicit Arena(int64_t floats)
      : memory_(std::make_unique_for_overwrite<float[]>(floats + kLine)),
        next_(reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(memory_.get()) + kBytes - 1) &
                                       ~uintptr_t(kBytes - 1))) {}

  float* take(int64_t n) {
    float* const piece = next_;
    next_ += size(n);
    return piece;
  }

 private:
  static constexpr int64_t kBytes = 64;
  static constexpr int64_t kLine = kBytes / int64_t(sizeof(float));

  std::unique_ptr<float[]> memory_;
  float* next_;
};

}  // namespace less::cpu::LESS_ISA
