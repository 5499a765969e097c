// What every op's checks and registration share. Messages: op, argument, wanted, got.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <initializer_list>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>

#include "params.h"

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

// Refuses a tensor that is not contiguous, of this dtype and this shape.
inline void check(const char* op, const char* name, const Tensor& tensor, ScalarType dtype,
                  std::initializer_list<int64_t> shape) {
  const auto sizes = tensor.sizes();
  bool same = sizes.size() == shape.size();
  for (size_t i = 0; same && i < sizes.size(); ++i) same = sizes[i] == shape.begin()[i];
  if (!same) {
    fail(op, ": ", name, " must have shape ", shape_text(shape), ", got ", shape_text(sizes));
  }
  if (tensor.scalar_type() != dtype) {
    fail(op, ": ", name, " must be ", dtype_name(dtype), ", got ",
         dtype_name(tensor.scalar_type()));
  }
  if (!tensor.is_contiguous()) {
    fail(op, ": ", name, " must be contiguous, got strides ", shape_text(tensor.strides()));
  }
}

inline const float* optional_floats(const OptionalTensor& tensor) {
  return tensor ? tensor->const_data_ptr<float>() : nullptr;
}

// Refuses a tensor on another device than the op's first one.
inline void check_device(const char* op, const char* name, const Tensor& tensor,
                         const char* first_name, const Tensor& first) {
  if (tensor.device() != first.device()) {
    fail(op, ": ", name, " must be on the device of ", first_name, ", got another (device types ",
         int(tensor.device().type()), " and ", int(first.device().type()), ")");
  }
}

inline void check_dim(const char* op, const char* name, const Tensor& tensor, int64_t dim,
                      const char* meaning) {
  if (tensor.dim() != dim) {
    fail(op, ": ", name, " must be ", meaning, ", got shape ", shape_text(tensor.sizes()));
  }
}

// The dtype of slots: float32, bfloat16 or float16.
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

// Work items per thread at least, so that a fork-join (tens of microseconds) pays: `work` is the
// multiply-adds of one item.
inline int64_t grain(int64_t work) {
  constexpr int64_t kWorthAFork = 1 << 19;
  return work >= kWorthAFork ? 1 : kWorthAFork / (work < 1 ? 1 : work);
}

}  // namespace less::ops
