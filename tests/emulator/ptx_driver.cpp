// Runs translated kernels that have no launcher of their own; see ptx_program.py.
#include "emulator/control.h"
#include "emulator/runtime.h"

using namespace less::emulator;

namespace {

struct Call {
  Translated kernel;
  void** params;
};

void run_one(void* argument) {
  const Call& call = *static_cast<Call*>(argument);
  call.kernel(call.params);
}

}  // namespace

// `name` is a function of the kernel's name, which does nothing itself.
extern "C" LESS_EMULATOR_API int ptx_launch(void* name, unsigned blocks, unsigned threads,
                                            int cluster, size_t shared, void** params) {
  Call call{translated(name), params};
  if (call.kernel == nullptr) return -1;
  return run({dim3(blocks), dim3(threads), shared, cluster, false}, run_one, &call);
}
