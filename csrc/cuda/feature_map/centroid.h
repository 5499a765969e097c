// Feature maps by centroids: a warp takes a row at a time; feature_map.cu says what is computed.
//
// Shared memory: a row [D] and its numbers [R + 1] of each warp. Centroids are few, and come from
// the caches.
// Order:  d in turns of a few lanes, ascending; their sums by shuffles: the same for every row.
#pragma once

#include "cuda/centroids.h"
#include "cuda/feature_map/rows.h"

namespace less::cuda {

constexpr int kCentroidThreads = 128;
constexpr int kCentroidWarps = kCentroidThreads / 32;
constexpr int kCentroidRows = 32;  // of a block
constexpr int kCentroidDims = 256;
constexpr int kCentroidRank = 64;

// Element d of a row of x.
LESS_DEVICE float row_element(const FeatureRows& in, const Row& row, int d) {
  const auto* const data = reinterpret_cast<const void*>(row.address);
  if (in.x.dtype == DType::fp8) {
    // narrow: a lane an element of a row, side by side
    return widened(static_cast<const __nv_fp8_e4m3*>(data)[d]) * row.scale;
  }
  return map_element(in.x.dtype, data, d) * row.scale;
}

__global__ void __launch_bounds__(kCentroidThreads)
    feature_centroid_kernel(const __grid_constant__ FeatureMaps m,
                            const __grid_constant__ FeatureRows in) {
  SMEM_ARRAY(float, rows, kCentroidWarps* kCentroidDims);
  SMEM_ARRAY(float, all_numbers, kCentroidWarps*(kCentroidRank + 1));
  const RowBlock block = row_block(in, kCentroidRows);
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
  const int D = int(m.D), R = int(m.R), count = centroid_numbers(m);
  const int parts = count <= 4 ? 8 : count <= 8 ? 4 : count <= 16 ? 2 : 1;
  float* const x = rows + warp * kCentroidDims;
  float* const numbers = all_numbers + warp * (kCentroidRank + 1);
#pragma unroll 1
  for (int i = warp; i < block.count; i += kCentroidWarps) {
    const Row row = locate(in, block, i);
    for (int d = lane; d < D; d += 32) x[d] = row_element(in, row, d);
    __syncwarp();
    if (in.space.key_scale != nullptr) {
      key_out_of_space(in.space, block.head, D, lane, 32, [] { __syncwarp(); }, x);
    }
#pragma unroll 1
    for (int r0 = 0; r0 < count; r0 += 32 / parts) {
      const int r = r0 + lane / parts;
      float sum = r < count ? centroid_product(m, block.head, r, x, lane % parts, parts) : 0.0f;
      for (int step = 1; step < parts; step *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
      if (r < count && lane % parts == 0) {
        numbers[r] = centroid_number(m, block.head, r, sum);
      }
    }
    __syncwarp();
    for (int r = lane; r < R; r += 32) {
      const float y = m.weight == nullptr ? numbers[r] : centroid_psi(numbers, R, r);
      // narrow: R features of a token, R any number, side by side
      store(in.y + row.output * R + r, y);
    }
    __syncwarp();  // the next row takes this one's place
  }
}

}  // namespace less::cuda
