// What every op's checks and registration share. Messages: op, argument, wanted, got.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "params.h"

// A kernel is launched, not called: see ops/library.h.
#if defined(LESS_CUDA_HALF) || defined(LESS_EMULATED_HALF)
#define LESS_LAUNCHES 1
#endif

namespace less::ops {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

template <typename... Parts>
[[noreturn]] inline void fail(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  throw std::runtime_error(text.str());
}

inline const char* dtype_name(ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Half:
      return "float16";
    case ScalarType::Double:
      return "float64";
    case ScalarType::Char:
      return "int8";
    case ScalarType::Byte:
      return "uint8";
    case ScalarType::Float8_e4m3fn:
      return "float8_e4m3fn";
    case ScalarType::Bool:
      return "bool";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Long:
      return "int64";
    default:
      return "another dtype";
  }
}

inline std::string device_text(const torch::stable::Device& device) {
  if (device.is_cpu()) return "cpu";
  return (device.is_cuda() ? "cuda:" : "another kind of device, ") + std::to_string(device.index());
}

template <typename Sizes>
std::string shape_text(const Sizes& sizes) {
  std::ostringstream text;
  text << '[';
  const char* comma = "";
  for (int64_t size : sizes) {
    text << comma << size;
    comma = ", ";
  }
  text << ']';
  return text.str();
}

#ifdef LESS_EMULATED_HALF
// Memory that the emulator lets a kernel touch. `fresh`: every byte of it must be written.
struct Memory {
  const char* name;
  void* data;
  size_t bytes;
  bool fresh;
};
#endif

// The arguments of one call of an op. Every tensor must lie on the device of the first.
struct Arguments {
  const char* op;
  const char* first_name;
  const Tensor& first;
#ifdef LESS_EMULATED_HALF
  mutable std::vector<Memory> memory = {};
#endif

  void check_shape(const char* name, const Tensor& tensor,
                   std::initializer_list<int64_t> shape) const {
    const auto sizes = tensor.sizes();
    bool same = sizes.size() == shape.size();
    for (size_t i = 0; same && i < sizes.size(); ++i) same = sizes[i] == shape.begin()[i];
    if (!same) {
      fail(op, ": ", name, " must have shape ", shape_text(shape), ", got ", shape_text(sizes));
    }
  }

  void check_device(const char* name, const Tensor& tensor) const {
    if (tensor.device() != first.device()) {
      fail(op, ": ", name, " must be on the device of ", first_name, ", ",
           device_text(first.device()), ", got ", device_text(tensor.device()));
    }
  }

  // Refuses a tensor that is not contiguous, of this dtype and this shape.
  void check(const char* name, const Tensor& tensor, ScalarType dtype,
             std::initializer_list<int64_t> shape) const {
    check_shape(name, tensor, shape);
    if (tensor.scalar_type() != dtype) {
      fail(op, ": ", name, " must be ", dtype_name(dtype), ", got ",
           dtype_name(tensor.scalar_type()));
    }
    if (!tensor.is_contiguous()) {
      fail(op, ": ", name, " must be contiguous, got strides ", shape_text(tensor.strides()));
    }
    check_device(name, tensor);
    note(name, tensor, false);
  }

  // The same, where it is given.
  void check(const char* name, const OptionalTensor& tensor, ScalarType dtype,
             std::initializer_list<int64_t> shape) const {
    if (tensor) check(name, *tensor, dtype, shape);
  }

  // A new tensor, on the same device, that the op writes.
  Tensor output(const char* name, ScalarType dtype, std::initializer_list<int64_t> shape) const {
    Tensor tensor = torch::stable::new_empty(first, shape, dtype);
    note(name, tensor, true);
    return tensor;
  }

  // Lets the emulator's kernels touch this memory.
  void note_memory([[maybe_unused]] const char* name, [[maybe_unused]] void* data,
                   [[maybe_unused]] size_t bytes, [[maybe_unused]] bool fresh) const {
#ifdef LESS_EMULATED_HALF
    if (bytes > 0) memory.push_back({name, data, bytes, fresh});
#endif
  }

 private:
  void note(const char* name, const Tensor& tensor, bool fresh) const {
    const size_t bytes = size_t(tensor.numel()) * tensor.element_size();
    note_memory(name, tensor.mutable_data_ptr(), bytes, fresh);
  }
};

// From where to where a tensor's numbers lie, whatever its strides.
inline std::pair<uintptr_t, uintptr_t> extent(const Tensor& tensor) {
  const uintptr_t begin = reinterpret_cast<uintptr_t>(tensor.mutable_data_ptr());
  if (tensor.numel() == 0) return {begin, begin};
  int64_t last = 0;
  for (int64_t i = 0; i < tensor.dim(); ++i) last += (tensor.size(i) - 1) * tensor.stride(i);
  return {begin, begin + uintptr_t(last + 1) * tensor.element_size()};
}

// Refuses a tensor that an op writes where another lies in its memory, and would be read after it.
inline void check_apart(const char* op, const char* name, const Tensor& written,
                        std::initializer_list<std::pair<const char*, OptionalTensor>> others) {
  const auto [begin, end] = extent(written);
  for (const auto& [other_name, other] : others) {
    if (!other) continue;
    const auto [first, last] = extent(*other);
    if (first < end && begin < last) fail(op, ": ", name, " must not overlap ", other_name);
  }
}

inline const float* optional_floats(const OptionalTensor& tensor) {
  return tensor ? tensor->const_data_ptr<float>() : nullptr;
}

inline void check_dim(const char* op, const char* name, const Tensor& tensor, int64_t dim,
                      const char* meaning) {
  if (tensor.dim() != dim) {
    fail(op, ": ", name, " must be ", meaning, ", got shape ", shape_text(tensor.sizes()));
  }
}

// The dtype of slots without scales: float32, bfloat16 or float16.
inline DType slot_dtype(const char* op, const char* name, const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return DType::f32;
    case ScalarType::BFloat16:
      return DType::bf16;
    case ScalarType::Half:
      return DType::fp16;
    default:
      fail(op, ": ", name, " must be float32, bfloat16 or float16, got ",
           dtype_name(tensor.scalar_type()));
  }
}

// The dtype of slots, those with scales among them.
inline DType row_dtype(const char* op, const char* name, const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Char:
      return DType::i8;
    case ScalarType::Float8_e4m3fn:
#ifndef LESS_LAUNCHES
      fail(op, ": ", name, " must be float32, bfloat16, float16 or int8 on a CPU, got ",
           "float8_e4m3fn");
#endif
      return DType::fp8;
    default:
      return slot_dtype(op, name, tensor);
  }
}

// Refuses a softcap below 0, or not finite.
inline void check_softcap(const char* op, double softcap) {
  if (!(softcap >= 0.0 && softcap <= 1e30)) {
    fail(op, ": softcap must be 0 (none) or a positive number, got ", softcap);
  }
}

}  // namespace less::ops
