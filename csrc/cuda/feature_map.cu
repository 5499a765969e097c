// hidden = gelu(x W1), y = hidden W2, then the end of the map (features.h), head by head.
//
// Grid:   (blocks of rows, heads, batch rows of a list); a block takes 64 rows (32 where R > 16,
//         weights are float, or 64 are more than its shared memory holds) through all of the head's
//         map. The rows of a head are those of all batch rows, one after another, so that weights
//         are read once for all of them.
// Memory: rows once, weights once per block (from L2 but for the first), y once; the hidden
//         activations live in registers alone. Weights arrive 64 hidden columns at a time while the
//         columns before them are multiplied.
// Order:  a row's sums run over d ascending, within chunks of 64 hidden columns over four fixed
//         parts, and over the chunks ascending: a row has the same bits in any block of any batch.
#include "cuda/feature_map/float.h"
#include "cuda/feature_map/mma.h"
#include "cuda/kernels.h"

namespace less::cuda {
namespace {

struct MapGrid {
  int64_t blocks;
  dim3 grid;
};

MapGrid map_grid(const FeatureRows& rows, int size) {
  const bool listed = rows.list != nullptr;
  const int64_t n = listed ? rows.T : rows.B * rows.T;
  const int64_t blocks = (n + size - 1) / size;
  return {blocks, dim3(unsigned(blocks), unsigned(rows.heads), unsigned(listed ? rows.B : 1))};
}

// Where a block's shared memory is too small (99 kB, of D = 256 and rows of several terms), fewer
// rows of w1 are there at once, then fewer rows of x: no sum is taken in another order by that.
template <typename Half, typename W, int kR>
cudaError_t launch_mma(const FeatureMaps& m, const FeatureRows& rows, int terms,
                       cudaStream_t stream) {
  DeviceLimits limits{};
  const cudaError_t error = device_limits(limits);
  if (error != cudaSuccess) return error;
  for (const int slab : {kSlab, kSlab / 2}) {
    const MmaShared<W, kR> shared(nullptr, m, terms, slab);
    if (int64_t(shared.bytes) > limits.shared) continue;
    const Launch how{map_grid(rows, kMapRows<kR>).grid, dim3(kMapThreads), shared.bytes, stream};
    return launch(feature_mma_kernel<Half, W, kR>, how, m, rows, terms, slab);
  }
  if constexpr (kR == 16) return launch_mma<Half, W, 64>(m, rows, terms, stream);
  return cudaErrorInvalidValue;
}

template <int kR>
cudaError_t launch_float(const FeatureMaps& m, const FeatureRows& rows, cudaStream_t stream) {
  const FloatShared shared(nullptr, m, kR + kFloatPad);
  const Launch how{map_grid(rows, kFloatRows).grid, dim3(kMapThreads), shared.bytes, stream};
  return launch(feature_float_kernel<kR>, how, m, rows);
}

template <int kR>
cudaError_t launch_map(const FeatureMaps& m, const FeatureRows& rows, cudaStream_t stream) {
  // 16-bit numbers that a row is cut into, for products in fp16 and in bf16.
  const bool wide = rows.x.dtype == DType::f32;
  const int halves = wide ? 2 : 1;
  const int bfloats = wide ? 3 : rows.x.dtype == DType::fp16 ? 2 : 1;
  switch (m.w_dtype) {
    case DType::f32:
      return launch_float<kR>(m, rows, stream);
    case DType::bf16:
      return launch_mma<__nv_bfloat16, __nv_bfloat16, kR>(m, rows, bfloats, stream);
    case DType::fp16:
      return launch_mma<__half, __half, kR>(m, rows, halves, stream);
    case DType::i8:
      return rows.x.dtype == DType::bf16
                 ? launch_mma<__nv_bfloat16, int8_t, kR>(m, rows, bfloats, stream)
                 : launch_mma<__half, int8_t, kR>(m, rows, halves, stream);
    default:
      break;
  }
  return cudaErrorInvalidValue;
}

}  // namespace

cudaError_t features(const FeatureMaps& map, const FeatureRows& rows, cudaStream_t stream) {
  if (rows.B * rows.heads * rows.T == 0 || map.R == 0) return cudaSuccess;
  const bool supported = map.D % 16 == 0 && map.D <= 256 && map.D > 0 && map.E > 0 && map.R <= 64;
  if (!supported) return cudaErrorInvalidValue;
  if (!aligned16({rows.x.data, rows.pool.data, map.w1, map.w2})) return cudaErrorMisalignedAddress;
  return map.R <= 16 ? launch_map<16>(map, rows, stream) : launch_map<64>(map, rows, stream);
}

cudaError_t feature_map(const FeatureMapParams& p, cudaStream_t stream) {
  FeatureRows rows{};
  rows.x = p.x;
  rows.y = p.y;
  rows.B = p.B;
  rows.heads = p.heads;
  rows.T = p.T;
  return features(p.maps, rows, stream);
}

}  // namespace less::cuda
