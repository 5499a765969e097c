// less._cuda: loading it registers the CUDA implementations of csrc/ops. Loaded only where
// torch.cuda is available.
#include "cuda/build_facts.h"
#include "python.h"

namespace {

PyObject* build_facts(PyObject*, PyObject*) {
  return Py_BuildValue("{s:s, s:i, s:i}", "cuda_archs", LESS_CUDA_ARCHS, "nvcc",
                       less::cuda::compiler_version(), "runtime", less::cuda::runtime_version());
}

PyMethodDef kFunctions[] = {
    {"build_facts", build_facts, METH_NOARGS,
     "How this library was built: architectures, nvcc, the CUDA runtime linked in."},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef kModule = less::module_of(
    "_cuda", "CUDA half of less: kernels for the ops under torch.ops.less.", kFunctions);

}  // namespace

PyMODINIT_FUNC PyInit__cuda() { return PyModule_Create(&kModule); }
