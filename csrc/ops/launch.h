// Launching a kernel from an op: its device, its stream, its scratch, its errors.
#pragma once

#include <cuda_runtime_api.h>
#include <torch/csrc/stable/accelerator.h>

#include <string>
#include <utility>

#include "cuda/head_dims.h"
#include "cuda/kernels.h"
#include "cuda/rotate.h"
#include "ops/check.h"

#ifdef LESS_EMULATED_HALF
#include <cstring>

#include "emulator/control.h"
#endif

#ifdef LESS_CUDA_HALF
// Declared in torch's headers only where torch was built with CUDA, and weak because the libraries
// must also load, for their facts, where it was not.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device,
                                                                                   void** stream);
#endif

namespace less::ops {

using Named = std::pair<const char*, const Tensor&>;

// Refuses a head dim that kernels which are templates over it were not compiled for.
inline void check_head_dim(const char* op, const char* name, int64_t D) {
  std::string built;
  for (const int dim : cuda::kHeadDims) {
    if (!cuda::head_dim_built(dim)) continue;
    if (D == dim) return;
    built += (built.empty() ? "" : ", ") + std::to_string(dim);
  }
  fail(op, ": ", name, " must have a head dim of ", built, " on a GPU (LESS_CUDA_HEAD_DIMS), got ",
       D);
}

// Refuses a head dim that no kernel takes, of those that are compiled for all.
inline void check_any_head_dim(const char* op, const char* name, int64_t D) {
  if (D >= 16 && D <= 256 && D % 16 == 0) return;
  fail(op, ": ", name, " must have a head dim of a multiple of 16, at most 256, on a GPU, got ", D);
}

// Refuses a row that no kernel takes, of those for which a row is lanes of one warp.
inline void check_row_dim(const char* op, const char* name, int64_t D) {
  if (D <= cuda::kRotateMost) return;
  fail(op, ": ", name, " must have a head dim of at most ", cuda::kRotateMost, " on a GPU, got ",
       D);
}

#ifdef LESS_CUDA_HALF
inline cudaStream_t current_stream(const char* op, int32_t device) {
  if (aoti_torch_get_current_cuda_stream == nullptr) {
    fail(op, ": this torch was built without CUDA");
  }
  void* stream = nullptr;
  if (aoti_torch_get_current_cuda_stream(device, &stream) != AOTI_TORCH_SUCCESS) {
    fail(op, ": torch has no current stream of device ", device);
  }
  return static_cast<cudaStream_t>(stream);
}

inline std::string reason(cudaError_t error) {
  // The latter is what asking for a kernel's attributes may say of the same.
  if (error != cudaErrorNoKernelImageForDevice && error != cudaErrorInvalidDeviceFunction) {
    return cudaGetErrorString(error);
  }
  return std::string("no kernels for this GPU's architecture: less was built for ") +
         LESS_CUDA_ARCHS + " (LESS_CUDA_ARCHS)";
}

template <typename Params>
cudaError_t enqueue(const Arguments& arguments,
                    cudaError_t (*launcher)(const Params&, cudaStream_t), const Params& params) {
  const int32_t device = arguments.first.get_device_index();
  // The guard speaks to torch's CUDA runtime, the next line to the one linked in here.
  const torch::stable::accelerator::DeviceGuard guard(device);
  cudaError_t error = cudaSetDevice(device);
  if (error == cudaSuccess) error = launcher(params, current_stream(arguments.op, device));
  // What is told as an exception must not be found again by the next who asks.
  if (error != cudaSuccess) cudaGetLastError();
  return error;
}
#else
inline std::string reason(cudaError_t error) { return "CUDA error " + std::to_string(error); }

// Runs the kernel, which may touch the arguments' memory alone and must write what is fresh of it:
// NaN until then. Whatever else the emulator found wrong is an error too.
template <typename Params>
cudaError_t enqueue(const Arguments& arguments,
                    cudaError_t (*launcher)(const Params&, cudaStream_t), const Params& params) {
  const char* const tier = less_emulator_tier();
  const bool track = std::strcmp(tier, "fast") != 0 && std::strcmp(tier, "asan") != 0;
  less_emulator_reset();
  for (const Memory& m : arguments.memory) {
    if (m.fresh) std::memset(m.data, 0xff, m.bytes);
    less_emulator_register(m.data, m.bytes, m.name, !m.fresh);
  }
  const cudaError_t error = launcher(params, nullptr);
  std::string unwritten;
  for (const Memory& m : arguments.memory) {
    if (track && m.fresh && error == cudaSuccess) {
      const int64_t left = int64_t(m.bytes) - less_emulator_written(m.data, m.bytes);
      if (left > 0) unwritten += ' ' + std::to_string(left) + " bytes of " + m.name;
    }
    less_emulator_unregister(m.data);
  }
  if (less_emulator_error_count() > 0) fail(arguments.op, ": ", less_emulator_errors_json());
  if (!unwritten.empty()) fail(arguments.op, ": never written:", unwritten);
  return error;
}
#endif

// Calls launcher(params, stream) on the device and current stream of the arguments; the tensors are
// those whose shapes an error is to name.
template <typename Params>
void launch(const Arguments& arguments, cudaError_t (*launcher)(const Params&, cudaStream_t),
            const Params& params, std::initializer_list<Named> tensors) {
  const cudaError_t error = enqueue(arguments, launcher, params);
  if (error == cudaSuccess) return;
  std::ostringstream shapes;
  const char* comma = "";
  for (const auto& [name, tensor] : tensors) {
    shapes << comma << name << ' ' << shape_text(tensor.sizes());
    comma = ", ";
  }
  fail(arguments.op, ": the launch failed: ", reason(error), " (", shapes.str(), ")");
}

// Scratch of `bytes`, zero: the caller's, which must be large enough, or else a new one, which must
// live until the launch is enqueued. Null where no scratch is wanted.
inline OptionalTensor scratch(const Arguments& arguments, const OptionalTensor& given,
                              int64_t bytes) {
  if (given && given->numel() < bytes) {
    fail(arguments.op, ": workspace must have at least ", bytes, " bytes, got ", given->numel());
  }
  OptionalTensor held = given;
  if (!given && bytes > 0) {
    held = torch::stable::new_zeros(arguments.first, {bytes}, ScalarType::Byte);
  }
  if (held) arguments.check("workspace", *held, ScalarType::Byte, {held->numel()});
  return held;
}

inline void* pointer(const OptionalTensor& tensor) {
  return tensor ? tensor->mutable_data_ptr() : nullptr;
}

}  // namespace less::ops
