// The part of CUDA's runtime that launchers and benches ask about the device. Hidden in the library
// that it is linked into: a process may also have the real one.
#include <cuda_runtime_api.h>

#include "emulator/runtime.h"

extern "C" {

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = less::emulator::shared_of_a_block();
      return cudaSuccess;
    case cudaDevAttrMultiProcessorCount:
      *value = less::emulator::multiprocessors();
      return cudaSuccess;
    case cudaDevAttrL2CacheSize:  // small: a bench soon has more
      *value = 1 << 16;
      return cudaSuccess;
    default:
      return cudaErrorInvalidValue;
  }
}

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  attributes->ptxVersion = less::emulator::code_architecture();
  attributes->binaryVersion = less::emulator::architecture();
  return cudaSuccess;
}

}  // extern "C"
