// less._cuda: loading it registers the CUDA implementations of csrc/ops. Loaded only where
// torch.cuda is available.
#include <pybind11/pybind11.h>

#include "cuda/build_facts.h"

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "CUDA half of less: kernels for the ops under torch.ops.less.";
  m.def(
      "build_facts",
      [] {
        pybind11::dict facts;
        facts["cuda_archs"] = LESS_CUDA_ARCHS;
        facts["nvcc"] = less::cuda::compiler_version();
        facts["runtime"] = less::cuda::runtime_version();
        return facts;
      },
      "How this library was built: architectures, nvcc, the CUDA runtime linked in.");
}
