// Facts that only the CUDA compiler knows.
#pragma once

namespace less::cuda {

int compiler_version();  // 13000 for nvcc 13.0
int runtime_version();   // of the CUDA runtime linked in, as cudaRuntimeGetVersion; 0 on failure

}  // namespace less::cuda
