// Launching a kernel from an op: its device, its stream, its scratch, its errors.
#pragma once

#include <cuda_runtime_api.h>
#include <torch/csrc/stable/accelerator.h>

#include <string>
#include <utility>

#include "cuda/kernels.h"
#include "ops/check.h"

#ifdef LESS_CUDA_HALF
// Declared in torch's headers only where torch was built with CUDA, and weak because the libraries
// must also load, for their facts, where it was not.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device,
                                                                                   void** stream);
#endif

namespace less::ops {

using Named = std::pair<const char*, const Tensor&>;

#ifdef LESS_CUDA_HALF
inline cudaStream_t current_stream(const char* op, int32_t device) {
  if (aoti_torch_get_current_cuda_stream == nullptr) {
    fail(op, ": this torch was built without CUDA");
  }
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return static_cast<cudaStream_t>(stream);
}

inline std::string reason(cudaError_t error) {
  if (error != cudaErrorNoKernelImageForDevice) return cudaGetErrorString(error);
  return std::string("no kernels for this GPU's architecture: less was built for ") +
         LESS_CUDA_ARCHS + " (LESS_CUDA_ARCHS)";
}
#else
inline std::string reason(cudaError_t error) { return "CUDA error " + std::to_string(error); }
#endif

// Calls launcher(params, stream) on the device and current stream of the first tensor; the tensors
// are those whose shapes an error is to name.
template <typename Params>
void launch(const char* op, cudaError_t (*launcher)(const Params&, cudaStream_t),
            const Params& params, std::initializer_list<Named> tensors) {
#ifdef LESS_CUDA_HALF
  const int32_t device = tensors.begin()->second.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  const cudaError_t error = launcher(params, current_stream(op, device));
#else
  const cudaError_t error = launcher(params, nullptr);
#endif
  if (error == cudaSuccess) return;
  std::ostringstream shapes;
  const char* comma = "";
  for (const auto& [name, tensor] : tensors) {
    shapes << comma << name << ' ' << shape_text(tensor.sizes());
    comma = ", ";
  }
  fail(op, ": the launch failed: ", reason(error), " (", shapes.str(), ")");
}

// Scratch of `bytes`, zero: the caller's, which must be large enough, or else a new one, which must
// live until the launch is enqueued. Null where no scratch is wanted.
inline OptionalTensor scratch(const char* op, const OptionalTensor& given, const Tensor& like,
                              int64_t bytes) {
  if (given) {
    const Arguments arguments{op, "the other arguments", like};
    arguments.check("workspace", *given, ScalarType::Byte, {given->numel()});
    if (given->numel() < bytes) {
      fail(op, ": workspace must have at least ", bytes, " bytes, got ", given->numel());
    }
    return given;
  }
  if (bytes == 0) return std::nullopt;
  return torch::stable::new_zeros(like, {bytes}, ScalarType::Byte);
}

inline void* pointer(const OptionalTensor& tensor) {
  return tensor ? tensor->mutable_data_ptr() : nullptr;
}

}  // namespace less::ops
