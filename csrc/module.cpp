// less._C: loading it registers the ops of csrc/ops; its own functions tell how it was built.
#include <torch/headeronly/version.h>

#include <sstream>
#include <string>
#include <vector>

#include "cpu/dispatch.h"
#include "cpu/kernels.h"
#include "python.h"

namespace {

std::vector<std::string> split(const std::string& text) {
  std::vector<std::string> parts;
  std::istringstream stream(text);
  for (std::string part; std::getline(stream, part, ',');) parts.push_back(part);
  return parts;
}

const char* compiler() {
#if defined(__clang__)
  return "clang " __clang_version__;
#else
  return "gcc " __VERSION__;
#endif
}

PyObject* list_of(const std::vector<std::string>& names) {
  PyObject* list = PyList_New(0);
  for (const std::string& name : names) {
    PyObject* text = list ? PyUnicode_FromString(name.c_str()) : nullptr;
    if (text == nullptr || PyList_Append(list, text) != 0) Py_CLEAR(list);
    Py_XDECREF(text);
  }
  return list;
}

PyObject* build_facts(PyObject*, PyObject*) {
  return less::guarded([] {
    return Py_BuildValue(
        "{s:s, s:s, s:s, s:s, s:N, s:N, s:s, s:O, s:N}", "version", LESS_VERSION, "compiler",
        compiler(), "torch", TORCH_VERSION, "torch_at_least", "2.10", "simd_levels",
        list_of(split(LESS_SIMD_LEVELS)), "simd_supported", list_of(less::cpu::supported_levels()),
        "simd", less::cpu::name(less::cpu::level()), "cuda", LESS_CUDA_BUILT ? Py_True : Py_False,
        "cuda_archs", list_of(split(LESS_CUDA_ARCHS)));
  });
}

// The memory of an array, and how it is divided.
struct Array {
  unsigned long long address;
  Py_ssize_t size, itemsize;

  void* data() const { return reinterpret_cast<void*>(static_cast<uintptr_t>(address)); }
};

// Runs one function of csrc/cpu/simd.h over an array, in the level in use.
void run_simd(const std::string& what, const Array& src, const Array& dst) {
  using less::SimdTest;
  struct Entry {
    const char* name;
    SimdTest test;
    Py_ssize_t in, out;  // bytes an element
    Py_ssize_t results;  // 0: as many as elements
  };
  static constexpr Entry kTable[] = {
      {"exp", SimdTest::exp, 4, 4, 0},
      {"gelu", SimdTest::gelu, 4, 4, 0},
      {"tanh", SimdTest::tanh, 4, 4, 0},
      {"from_bf16", SimdTest::from_bf16, 2, 4, 0},
      {"from_fp16", SimdTest::from_fp16, 2, 4, 0},
      {"from_i8", SimdTest::from_i8, 1, 4, 0},
      {"to_bf16", SimdTest::to_bf16, 4, 2, 0},
      {"to_fp16", SimdTest::to_fp16, 4, 2, 0},
      {"to_i8", SimdTest::to_i8, 4, 1, 0},
      {"sum", SimdTest::sum, 4, 4, 1},
      {"max", SimdTest::max, 4, 4, 1},
      {"sums", SimdTest::sums, 4, 4, 4},
      {"width", SimdTest::width, 4, 4, 1},
  };
  float width = 0.0f;
  less::cpu::simd_test({SimdTest::width, nullptr, &width}, 0, 0);
  for (const Entry& entry : kTable) {
    if (what != entry.name) continue;
    const Py_ssize_t wanted = entry.results == 0 ? src.size : entry.results;
    const Py_ssize_t most = entry.results == 1 ? Py_ssize_t(width) : src.size;
    if (src.itemsize != entry.in || dst.itemsize != entry.out || dst.size != wanted ||
        src.size > most || (entry.results == 4 && src.size != 4 * Py_ssize_t(width))) {
      throw std::invalid_argument("simd: the arrays do not fit " + what);
    }
    less::cpu::simd_test({entry.test, src.data(), dst.data()}, 0, src.size);
    return;
  }
  throw std::invalid_argument("simd: no function " + what);
}

PyObject* none() {
  Py_INCREF(Py_None);
  return Py_None;
}

PyObject* simd(PyObject*, PyObject* args) {
  const char* what = nullptr;
  Array src{}, dst{};
  if (!PyArg_ParseTuple(args, "s(Knn)(Knn):simd", &what, &src.address, &src.size, &src.itemsize,
                        &dst.address, &dst.size, &dst.itemsize)) {
    return nullptr;
  }
  return less::guarded([&] {
    run_simd(what, src, dst);
    return none();
  });
}

PyObject* set_simd(PyObject*, PyObject* args) {
  const char* level = nullptr;
  if (!PyArg_ParseTuple(args, "s:set_simd", &level)) return nullptr;
  return less::guarded([&] {
    less::cpu::set_level(level);
    return none();
  });
}

PyMethodDef kFunctions[] = {
    {"build_facts", build_facts, METH_NOARGS,
     "How this library was built: version, compiler, torch's headers, SIMD levels, CUDA."},
    {nullptr, nullptr, 0, nullptr},
};

PyMethodDef kHooks[] = {
    {"simd", simd, METH_VARARGS,
     "simd(what, src, dst): a function of csrc/cpu/simd.h over two arrays, each given as "
     "(address, elements, bytes an element)."},
    {"set_simd", set_simd, METH_VARARGS, "set_simd(level): compute in this SIMD level."},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef kModule = less::module_of(
    "_C", "Native half of less: ops under torch.ops.less, and facts about this build.", kFunctions);

PyModuleDef kTest =
    less::module_of("less._C._test", "Hooks for the tests; no part of the interface.", kHooks);

}  // namespace

PyMODINIT_FUNC PyInit__C() {
  return less::guarded(
      [] {
        less::cpu::level();  // a bad LESS_SIMD fails the import, not some later call
        PyObject* module = PyModule_Create(&kModule);
        PyObject* test = module ? PyModule_Create(&kTest) : nullptr;
        if (test == nullptr || PyModule_AddObjectRef(module, "_test", test) != 0) Py_CLEAR(module);
        Py_XDECREF(test);
        return module;
      },
      PyExc_ImportError);
}
