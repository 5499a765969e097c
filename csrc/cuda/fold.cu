// H[b,k,r,:] += sum_n psi_k[b,k,n,r] v[b,k,n,:]     z[b,k,r] += sum_n psi_k[b,k,n,r]
//
// Grid:   (B * K, parts of R); a thread owns the columns of one 16-byte piece of v in kRows rows of
//         H, and so many such groups of rows make a block as fit kThreads.
// Memory: H and z read and written once, 8 * R * (D + 1) bytes a head; psi once, v once per block
//         of rows. Pieces of 16 bytes where D and the addresses allow it, else elements.
// Order:  n ascending from H as it was, fused multiply-adds, one writer per element: folding in two
//         calls gives the same bits.
#include "cuda/convert.h"
#include "cuda/kernels.h"
#include "cuda/types.h"

namespace less::cuda {

constexpr int kFoldRows = 4;
constexpr int kFoldThreads = 256;

// Columns d .. d + kN - 1 of a row of H.
template <int kN>
LESS_DEVICE void load_columns(const float* h, float (&x)[kN]) {
  if constexpr (kN == 1) {
    x[0] = *h;  // narrow: rows of no whole number of 16 bytes, element by element
  } else {
#pragma unroll
    for (int i = 0; i < kN; i += 4) {
      const uint4 w = load16(h + i);
      x[i] = bits_of<float>(w.x);
      x[i + 1] = bits_of<float>(w.y);
      x[i + 2] = bits_of<float>(w.z);
      x[i + 3] = bits_of<float>(w.w);
    }
  }
}

template <int kN>
LESS_DEVICE void store_columns(float* h, const float (&x)[kN]) {
  if constexpr (kN == 1) {
    store(h, x[0]);  // narrow: rows of no whole number of 16 bytes, element by element
  } else {
#pragma unroll
    for (int i = 0; i < kN; i += 4) {
      store16(h + i, make_uint4(bits_of<uint32_t>(x[i]), bits_of<uint32_t>(x[i + 1]),
                                bits_of<uint32_t>(x[i + 2]), bits_of<uint32_t>(x[i + 3])));
    }
  }
}

// kN values a thread: a piece of 16 bytes, or one.
template <typename T, int kN>
__global__ void __launch_bounds__(kFoldThreads, 2) fold_kernel(FoldParams p) {
  const int64_t head = blockIdx.x;
  const int64_t r0 = (int64_t(blockIdx.y) * blockDim.y + threadIdx.y) * kFoldRows;
  const int64_t d = int64_t(threadIdx.x) * kN;
  const int rows = int(p.R - r0 < kFoldRows ? p.R - r0 : kFoldRows);
  if (rows <= 0) return;
  const float* const psi = p.psi_k + head * p.N * p.R + r0;
  const T* const v = static_cast<const T*>(p.v) + head * p.N * p.D;
  const bool* const keep = p.keep == nullptr ? nullptr : p.keep + head * p.N;
  float* const H = p.H + (head * p.R + r0) * p.D;
  float* const z = p.z + head * p.R + r0;

  for (int64_t column = d; column < p.D; column += int64_t(blockDim.x) * kN) {
    float h[kFoldRows][kN], mass[kFoldRows];
#pragma unroll
    for (int r = 0; r < kFoldRows; ++r) {
      if (r >= rows) break;
      load_columns<kN>(H + r * p.D + column, h[r]);
      // narrow: a number of a feature, by one lane
      mass[r] = column == 0 ? z[r] : 0.0f;  // the writer alone reads
    }
    for (int64_t n = 0; n < p.N; ++n) {
      if (keep != nullptr && !keep[n]) continue;  // narrow: the same number for all lanes
      float x[kN];
      if constexpr (kN == 1) {
        // narrow: rows of no whole number of 16 bytes, element by element
        x[0] = widened(v[n * p.D + column]);
      } else {
        widen16<T>(load16_nc(v + n * p.D + column), x);
      }
#pragma unroll
      for (int r = 0; r < kFoldRows; ++r) {
        if (r >= rows) break;
        const float weight = psi[n * p.R + r];  // narrow: the same number for all lanes
        mass[r] += weight;
#pragma unroll
        for (int i = 0; i < kN; ++i) h[r][i] = fmaf(weight, x[i], h[r][i]);
      }
    }
#pragma unroll
    for (int r = 0; r < kFoldRows; ++r) {
      if (r >= rows) break;
      store_columns<kN>(H + r * p.D + column, h[r]);
      if (column == 0) store(z + r, mass[r]);  // narrow: a number of a feature, by one lane
    }
  }
}

template <typename T, int kN>
cudaError_t fold_pieces(const FoldParams& p, cudaStream_t stream) {
  const int64_t pieces = p.D / kN, groups = (p.R + kFoldRows - 1) / kFoldRows;
  const int64_t across = pieces < kFoldThreads ? pieces : kFoldThreads;
  const int64_t down = kFoldThreads / across < groups ? kFoldThreads / across : groups;
  const dim3 grid(unsigned(p.heads), unsigned((groups + down - 1) / down));
  return launch(fold_kernel<T, kN>, {grid, dim3(unsigned(across), unsigned(down)), 0, stream}, p);
}

template <typename T>
cudaError_t fold_values(const FoldParams& p, cudaStream_t stream) {
  constexpr int kPiece = 16 / int(sizeof(T));
  const bool pieces = p.D % kPiece == 0 && aligned16(p.v) && aligned16(p.H);
  return pieces ? fold_pieces<T, kPiece>(p, stream) : fold_pieces<T, 1>(p, stream);
}

cudaError_t fold(const FoldParams& params, cudaStream_t stream) {
  if (params.heads == 0 || params.N == 0 || params.R == 0 || params.D == 0) return cudaSuccess;
  return with_dtype<FloatTypes>(params.v_dtype, cudaErrorInvalidValue, [&](auto type) {
    return fold_values<typename decltype(type)::type>(params, stream);
  });
}

}  // namespace less::cuda
