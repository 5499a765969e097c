// less._C: loading it registers the ops of csrc/ops; its own functions tell how it was built.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/headeronly/version.h>

#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/dispatch.h"
#include "cpu/kernels.h"

namespace py = pybind11;

namespace {

std::vector<std::string> split(const std::string& text) {
  std::vector<std::string> parts;
  std::istringstream stream(text);
  for (std::string part; std::getline(stream, part, ',');) parts.push_back(part);
  return parts;
}

std::string compiler() {
#if defined(__clang__)
  return "clang " __clang_version__;
#else
  return "gcc " __VERSION__;
#endif
}

py::dict build_facts() {
  py::dict facts;
  facts["version"] = LESS_VERSION;
  facts["compiler"] = compiler();
  facts["torch"] = TORCH_VERSION;
  facts["torch_at_least"] = "2.10";
  facts["simd_levels"] = split(LESS_SIMD_LEVELS);
  facts["simd_supported"] = less::cpu::supported_levels();
  facts["simd"] = less::cpu::name(less::cpu::level());
  facts["cuda"] = bool(LESS_CUDA_BUILT);
  facts["cuda_archs"] = split(LESS_CUDA_ARCHS);
  return facts;
}

// Runs one function of csrc/cpu/simd.h over a buffer, in the level in use.
void simd(const std::string& what, const py::buffer& src, const py::buffer& dst) {
  using less::SimdTest;
  struct Entry {
    const char* name;
    SimdTest test;
    py::ssize_t in, out;  // bytes an element
    py::ssize_t results;  // 0: as many as elements
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
  const py::buffer_info in = src.request();
  const py::buffer_info out = dst.request(/*writable=*/true);
  for (const Entry& entry : kTable) {
    if (what != entry.name) continue;
    const py::ssize_t wanted = entry.results == 0 ? in.size : entry.results;
    const py::ssize_t most = entry.results == 1 ? py::ssize_t(width) : in.size;
    if (in.itemsize != entry.in || out.itemsize != entry.out || out.size != wanted ||
        in.size > most || (entry.results == 4 && in.size != 4 * py::ssize_t(width))) {
      throw std::invalid_argument("simd: the buffers do not fit " + what);
    }
    less::cpu::simd_test({entry.test, in.ptr, out.ptr}, 0, in.size);
    return;
  }
  throw std::invalid_argument("simd: no function " + what);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native half of less: ops under torch.ops.less, and facts about this build.";
  less::cpu::level();  // a bad LESS_SIMD fails the import, not some later call
  m.def("build_facts", &build_facts,
        "How this library was built: version, compiler, torch's headers, SIMD levels, CUDA.");
  py::module_ test = m.def_submodule("_test", "Hooks for the tests; no part of the interface.");
  test.def("simd", &simd, py::arg("what"), py::arg("src"), py::arg("dst"));
  test.def("set_simd", &less::cpu::set_level, py::arg("level"));
}
