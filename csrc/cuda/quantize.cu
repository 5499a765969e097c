// eight[n,:] = round(x[n,:] / scale[n]), scale[n] = max|x[n,:]| / 127, of fp8 / 448
//
// Grid:   blocks of kThreads threads over the rows; 8, 16 or 32 lanes of a warp own a row, each its
//         pieces of 16 bytes, so that a row of 128 halves keeps 16 lanes busy and no lane idle.
// Memory: x read once (rows longer than a warp's pieces twice), out and scale written once.
// Order:  the largest magnitude is the same in any order: a row's bits depend on nothing but the
// row.
#include "cuda/convert.h"
#include "cuda/kernels.h"
#include "cuda/types.h"

namespace less::cuda {

constexpr int kQuantizeThreads = 256;

LESS_HD int64_t rows_of(const QuantizeParams& p) { return p.B * p.heads * p.T; }

template <typename T, int kN>
LESS_DEVICE void load_piece(const T* x, float (&piece)[kN]) {
  if constexpr (kN == 1) {
    piece[0] = widened(*x);  // narrow: rows of no whole number of 16 bytes, element by element
  } else {
    widen16<T>(load16(x), piece);
  }
}

template <typename Eight, int kN>
LESS_DEVICE void store_piece(Eight* out, const float (&piece)[kN], float scale, bool finite) {
  uint32_t word[(kN + 3) / 4] = {};
#pragma unroll
  for (int i = 0; i < kN; ++i) {
    const Eight eight = narrowed<Eight>(finite ? piece[i] / scale : 0.0f);
    word[i / 4] |= uint32_t(bits_of<uint8_t>(eight)) << (8 * (i % 4));
  }
  if constexpr (kN == 1) {
    // narrow: rows of no whole number of 16 bytes, element by element
    store(reinterpret_cast<uint8_t*>(out), uint8_t(word[0]));
  } else if constexpr (kN == 4) {
    store(reinterpret_cast<uint32_t*>(out), word[0]);  // narrow: 16 bytes that were read become 4
  } else {
    store8(out, make_uint2(word[0], word[1]));  // narrow: 16 bytes that were read become 8
  }
}

// kN values a lane at a time: a piece of 16 bytes, or one.
template <typename T, typename Eight, int kN>
__global__ void __launch_bounds__(kQuantizeThreads) quantize_kernel(QuantizeParams p, int lanes) {
  const int64_t row = (int64_t(blockIdx.x) * kQuantizeThreads + threadIdx.x) / lanes;
  const int64_t lane = threadIdx.x % lanes, pieces = row < rows_of(p) ? p.D / kN : 0;
  const int64_t head = row / p.T;
  const T* const x =
      static_cast<const T*>(p.x.data) + offset(p.x, head / p.heads, head % p.heads, row % p.T);
  Eight* const out = static_cast<Eight*>(p.eight) + row * p.D;
  // As integers, the bits of |x| are in order, with NaN above infinity: nothing is lost.
  float piece[kN] = {};
  uint32_t top = 0;
  for (int64_t i = lane; i < pieces; i += lanes) {
    load_piece<T, kN>(x + i * kN, piece);
#pragma unroll
    for (int j = 0; j < kN; ++j) {
      const uint32_t bits = bits_of<uint32_t>(piece[j]) & 0x7fffffffu;
      top = bits > top ? bits : top;
    }
  }
  for (int step = lanes / 2; step > 0; step /= 2) {
    const uint32_t other = __shfl_xor_sync(0xffffffffu, top, step);
    top = other > top ? other : top;
  }
  constexpr float kLargest = std::is_same_v<Eight, int8_t> ? 127.0f : 448.0f;
  const float scale = bits_of<float>(top) / kLargest;
  // What is not finite becomes 0 under a scale that says so; so does what underflows.
  const bool finite = scale > 0.0f && scale <= 3.402823466e38f;
  for (int64_t i = lane; i < pieces; i += lanes) {
    if (pieces > lanes) load_piece<T, kN>(x + i * kN, piece);
    store_piece<Eight, kN>(out + i * kN, piece, scale, finite);
  }
  if (lane == 0 && row < rows_of(p)) store(p.scale + row, scale);
}

template <typename T, typename Eight, int kN>
cudaError_t quantize_pieces(const QuantizeParams& p, cudaStream_t stream) {
  const int64_t pieces = p.D / kN;
  const int lanes = pieces <= 8 ? 8 : pieces <= 16 ? 16 : 32;
  const int64_t blocks = (rows_of(p) * lanes + kQuantizeThreads - 1) / kQuantizeThreads;
  return launch(quantize_kernel<T, Eight, kN>,
                {dim3(unsigned(blocks)), dim3(kQuantizeThreads), 0, stream}, p, lanes);
}

template <typename T, typename Eight>
cudaError_t quantize_values(const QuantizeParams& p, cudaStream_t stream) {
  constexpr int kPiece = 16 / int(sizeof(T));
  const bool pieces =
      (p.D | p.x.b | p.x.h | p.x.t) % kPiece == 0 && aligned16(p.x.data) && aligned16(p.eight);
  return pieces ? quantize_pieces<T, Eight, kPiece>(p, stream)
                : quantize_pieces<T, Eight, 1>(p, stream);
}

template <typename Eight>
cudaError_t quantize_to(const QuantizeParams& p, cudaStream_t stream) {
  return with_dtype<FloatTypes>(p.x.dtype, cudaErrorInvalidValue, [&](auto type) {
    return quantize_values<typename decltype(type)::type, Eight>(p, stream);
  });
}

cudaError_t quantize(const QuantizeParams& params, cudaStream_t stream) {
  if (rows_of(params) == 0) return cudaSuccess;
  switch (params.dtype) {
    case DType::i8:
      return quantize_to<int8_t>(params, stream);
    case DType::fp8:
      return quantize_to<__nv_fp8_e4m3>(params, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace less::cuda
