// Facts that only the CUDA compiler knows.
#include <cuda_runtime.h>

#include "cuda/build_facts.h"

namespace less::cuda {

int compiler_version() { return __CUDACC_VER_MAJOR__ * 1000 + __CUDACC_VER_MINOR__ * 10; }

int runtime_version() {
  int version = 0;
  return cudaRuntimeGetVersion(&version) == cudaSuccess ? version : 0;
}

}  // namespace less::cuda
