// Runs smoke.cu in the emulator: exits 0 where the sums are right and nothing was found.
#include <cuda_runtime.h>

#include <cstdio>

#include "emulator/control.h"

namespace less::cuda {
cudaError_t smoke(const float* x, float* sum, int blocks, cudaStream_t stream);
}

int main() {
  constexpr int kBlocks = 5;
  auto* x = static_cast<float*>(less_emulator_alloc(kBlocks * 256 * sizeof(float), "x", 1));
  auto* sum = static_cast<float*>(less_emulator_alloc(kBlocks * sizeof(float), "sum", 0));
  for (int i = 0; i < kBlocks * 256; ++i) x[i] = float(i / 256 + 1);
  if (less::cuda::smoke(x, sum, kBlocks, nullptr) != cudaSuccess) return 1;
  int wrong = 0;
  for (int b = 0; b < kBlocks; ++b) wrong += sum[b] != 256.0f * float((b + 1) * (b + 1));
  std::printf("%s: %d wrong, errors %s\n", less_emulator_tier(), wrong,
              less_emulator_errors_json());
  return wrong != 0 || less_emulator_error_count() != 0;
}
