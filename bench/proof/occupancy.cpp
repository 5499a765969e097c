// Blocks that a multiprocessor holds, by NVIDIA's own cuda_occupancy.h. Reads lines
//   arch registers static-shared dynamic-shared threads
// and prints, for each: blocks, warps of the most it can hold.
#include <cuda_occupancy.h>

#include <cstdio>

namespace {

// Of the architecture's data-centre or, for 120, desktop part: the CUDA programming guide's table.
bool device_of(int arch, cudaOccDeviceProp& device) {
  struct Row {
    int arch, threads, shared, of_a_block, sms;
  };
  constexpr Row rows[] = {{80, 2048, 164, 163, 108},   // A100
                          {89, 1536, 100, 99, 142},    // L40S, RTX 4090
                          {90, 2048, 228, 227, 132},   // H100, H200
                          {100, 2048, 228, 227, 148},  // B200
                          {120, 1536, 100, 99, 188}};  // RTX PRO 6000
  for (const Row& row : rows) {
    if (row.arch != arch) continue;
    device.computeMajor = arch / 10;
    device.computeMinor = arch % 10;
    device.maxThreadsPerBlock = 1024;
    device.maxThreadsPerMultiprocessor = row.threads;
    device.regsPerBlock = device.regsPerMultiprocessor = 65536;
    device.warpSize = 32;
    device.sharedMemPerBlock = 48 * 1024;
    device.sharedMemPerMultiprocessor = size_t(row.shared) * 1024;
    device.sharedMemPerBlockOptin = size_t(row.of_a_block) * 1024;
    device.reservedSharedMemPerBlock = 1024;
    device.numSms = row.sms;
    return true;
  }
  return false;
}

}  // namespace

int main() {
  int arch, registers, fixed, dynamic, threads;
  while (std::scanf("%d %d %d %d %d", &arch, &registers, &fixed, &dynamic, &threads) == 5) {
    cudaOccDeviceProp device;
    if (!device_of(arch, device)) {
      std::fprintf(stderr, "occupancy: no figures of sm_%d\n", arch);
      return 1;
    }
    cudaOccFuncAttributes kernel;
    kernel.maxThreadsPerBlock = 1024;
    kernel.numRegs = registers;
    kernel.sharedSizeBytes = size_t(fixed);
    kernel.partitionedGCConfig = PARTITIONED_GC_OFF;
    kernel.shmemLimitConfig = FUNC_SHMEM_LIMIT_OPTIN;
    kernel.maxDynamicSharedSizeBytes = device.sharedMemPerBlockOptin;
    const cudaOccDeviceState state;
    cudaOccResult result;
    if (cudaOccMaxActiveBlocksPerMultiprocessor(&result, &device, &kernel, &state, threads,
                                                size_t(dynamic)) != CUDA_OCC_SUCCESS) {
      std::fprintf(stderr, "occupancy: refused: sm_%d, %d registers, %d + %d bytes, %d threads\n",
                   arch, registers, fixed, dynamic, threads);
      return 1;
    }
    const int blocks = result.activeBlocksPerMultiprocessor;
    std::printf("%d %d %d\n", blocks, blocks * ((threads + 31) / 32),
                device.maxThreadsPerMultiprocessor / 32);
  }
  return 0;
}
