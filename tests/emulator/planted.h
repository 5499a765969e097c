// Small kernels, each right or with one error planted in it, for the emulator's test of itself.
#pragma once

#include <cstdint>
#include <vector>

#include "cuda/device.h"
#include "emulator/control.h"

namespace less::cuda {

// Global memory of the emulator, for as long as the case runs.
template <typename T>
class Array {
 public:
  explicit Array(size_t n, const char* name = "out", bool initialised = false)
      : n_(n), p_(static_cast<T*>(less_emulator_alloc(n * sizeof(T), name, initialised))) {}
  Array(const Array&) = delete;
  Array& operator=(const Array&) = delete;
  ~Array() { less_emulator_free(p_); }
  operator T*() const { return p_; }
  T* data() const { return p_; }
  size_t size() const { return n_; }
  void fill(T value) {
    for (size_t i = 0; i < n_; ++i) p_[i] = value;
  }
  // 0, 1, 2, ...
  void count() {
    for (size_t i = 0; i < n_; ++i) p_[i] = T(i);
  }
  // Whether kernels wrote every byte; true where nobody counts.
  bool all_written() const {
    const char tier = less_emulator_tier()[0];
    if (tier != 't' && tier != 'p') return true;
    return less_emulator_written(p_, n_ * sizeof(T)) == int64_t(n_ * sizeof(T));
  }

 private:
  size_t n_;
  T* p_;
};

// Runs its kernels; returns whether the values are right.
struct Case {
  const char* name;
  bool (*run)(bool wrong);
};

// What a case has seen that is neither right nor wrong; printed with the rest.
extern std::vector<unsigned> seen;

const std::vector<Case>& block_cases();
const std::vector<Case>& async_cases();
const std::vector<Case>& grid_cases();
const std::vector<Case>& profile_cases();

}  // namespace less::cuda
