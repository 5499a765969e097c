// Empties the L2 cache of what it holds.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>

namespace less::bench {

// Reads `bytes` of a buffer, of which no kernel is told, through the cache; a multiple of 16. What
// a memset would leave there is to be written back later, on the time of whoever comes next.
cudaError_t flush(const void* buffer, size_t bytes, float* sink, cudaStream_t stream);

}  // namespace less::bench
