// What leaves goes into the state: H += psi^T v, z += psi, in strips of the list.
//
// Grid:   fold (B*K, strips, cells / 128), add (B*K, R*D / 512).
// Memory: values and features of the list once, into shared memory while the tile before is
//         multiplied; a strip's sums written and read once; H and z read and written once.
// Order:  a strip's length follows from the number of those who leave; within it, groups of threads
//         take tokens in turn, ascending; groups, then strips, are added in ascending order.
#pragma once

#include "cuda/compact/workspace.h"
#include "cuda/convert.h"

namespace less::cuda {

constexpr int kFoldThreads = 128;
constexpr int kFoldTile = 32;  // tokens at once
constexpr int kCellR = 8;      // a cell: 8 rows of H by 4 dims, in a thread's registers
constexpr int kCellD = 4;
constexpr int kCell = kCellR * kCellD;
constexpr int kSumsRow = kFoldThreads + 4;

// The same cut for launcher and kernel.
struct FoldShared {
  unsigned char* v;  // [2, kFoldTile, D]  as in memory
  float* psi;        // [2, kFoldTile, rows]
  float* scale;      // [2, kFoldTile]  of the values
  float* sums;       // [kCell, kSumsRow]  in place of v, at the end
  int rows;          // R, and up to a multiple of kCellR
  size_t bytes;

  __host__ __device__ FoldShared(unsigned char* base, const CompactParams& p, int element) {
    SharedCarver carver{base};
    const int v_bytes = 2 * kFoldTile * int(p.spec.D) * element;
    const int sums_bytes = kCell * kSumsRow * int(sizeof(float));
    rows = (p.layout.R + kCellR - 1) / kCellR * kCellR;
    v = carver.take<unsigned char>(v_bytes > sums_bytes ? v_bytes : sums_bytes);
    sums = reinterpret_cast<float*>(v);
    psi = carver.take<float>(2 * kFoldTile * rows);
    scale = carver.take<float>(2 * kFoldTile);
    bytes = carver.used;
  }
};

// Starts the copies of tokens [first, first + kFoldTile) of the list into a buffer; what lies past
// `end`, and rows past R, are zeros.
template <typename V>
LESS_DEVICE void stage_tile(const CompactParams& p, const CompactWorkspace& w, const HeadRow& at,
                            int first, int end, const FoldShared& s, int buffer) {
  const Slots kept = less::head(p.layout, at.page, at.h, dtype_of<V>(), p.spec.D).slots;
  const int D = int(p.spec.D), R = p.layout.R, S = int(kept.S);
  const int32_t* list = w.list + at.row * p.T;
  const int row_bytes = D * int(sizeof(V)), pieces = row_bytes / 16;
  for (int i = threadIdx.x; i < kFoldTile * pieces; i += kFoldThreads) {
    const int token = i / pieces, c = i - token * pieces;
    const bool there = first + token < end;
    // narrow: a number of a token, whose lanes read its row
    const int source = there ? list[first + token] : 0;
    const V* values = source < S ? static_cast<const V*>(kept.v) + int64_t{source} * D
                                 : static_cast<const V*>(p.call.v.data) +
                                       offset(p.call.v, at.b, at.h, source - S);
    copy_async16(s.v + (buffer * kFoldTile + token) * row_bytes + c * 16,
                 reinterpret_cast<const unsigned char*>(values) + c * 16, there);
  }
  if constexpr (sizeof(V) == 1) {
    if (threadIdx.x < kFoldTile) {
      const bool there = first + int(threadIdx.x) < end;
      // narrow: a lane a token, side by side
      const int source = there ? list[first + int(threadIdx.x)] : 0;
      const float* scale =
          source < S ? kept.v_scale + source : p.call.v_scale + at.row * p.T + (source - S);
      // narrow: a lane a token, side by side
      s.scale[buffer * kFoldTile + threadIdx.x] = there ? *scale : 0.0f;
    }
  }
  const float* psi = w.psi + (at.row * p.T + first) * R;
  float* to = s.psi + buffer * kFoldTile * s.rows;
  if (R % 4 == 0) {
    for (int i = threadIdx.x; i < kFoldTile * s.rows / 4; i += kFoldThreads) {
      const int token = i / (s.rows / 4), r = i % (s.rows / 4) * 4;
      const bool there = first + token < end && r < R;
      copy_async16(to + token * s.rows + r, there ? psi + token * R + r : psi, there);
    }
  } else {
    for (int i = threadIdx.x; i < kFoldTile * s.rows; i += kFoldThreads) {
      const int token = i / s.rows, r = i % s.rows;
      // narrow: R features of a token, R any number, side by side
      to[i] = first + token < end && r < R ? psi[token * R + r] : 0.0f;
    }
  }
}

// Four values of shared memory.
template <typename V>
LESS_DEVICE void load_values(const V* v, float scale, float (&out)[4]) {
  if constexpr (sizeof(V) == 4) {
    widen16<V>(load16_shared(v), out);
  } else if constexpr (sizeof(V) == 2) {
    const uint2 bits = load8_shared(v);
    float low[2], high[2];
    widen4(bits.x, low, V());
    widen4(bits.y, high, V());
    out[0] = low[0], out[1] = low[1], out[2] = high[0], out[3] = high[1];
  } else {
    widen4(*reinterpret_cast<const uint32_t*>(v), out, V());
#pragma unroll
    for (int i = 0; i < 4; ++i) out[i] *= scale;
  }
}

template <typename V>
__global__ void __launch_bounds__(kFoldThreads, 5)
    compact_fold_kernel(const __grid_constant__ CompactParams p,
                        const __grid_constant__ CompactWorkspace w) {
  const int n = w.leaving[blockIdx.x];
  const int begin = int(blockIdx.y * strip_tokens(n));
  if (begin >= n) return;
  const int end = min(n, begin + int(strip_tokens(n)));
  DYN_SMEM(base);
  const FoldShared s(base, p, sizeof(V));
  const HeadRow head(p, blockIdx.x);
  const int thread = threadIdx.x, D = int(p.spec.D), R = p.layout.R, across = D / kCellD;
  // This block's cells, and the groups of threads that each have all of them.
  const int first_cell = int(blockIdx.z) * kFoldThreads;
  const int cells = min(kFoldThreads, s.rows / kCellR * across - first_cell);
  const int groups = kFoldThreads / cells;
  const int group = thread / cells, cell = first_cell + thread % cells;
  const int r = cell / across * kCellR, d = cell % across * kCellD;

  float acc[kCellR][kCellD] = {};
  float z = 0.0f;
  stage_tile<V>(p, w, head, begin, end, s, 0);
  copy_async_commit();
  int buffer = 0;
  for (int first = begin; first < end; first += kFoldTile, buffer ^= 1) {
    copy_async_wait<0>();
    __syncthreads();
    if (first + kFoldTile < end) {
      stage_tile<V>(p, w, head, first + kFoldTile, end, s, buffer ^ 1);
    }
    copy_async_commit();
    const V* v = reinterpret_cast<const V*>(s.v) + buffer * kFoldTile * D + d;
    const float* psi = s.psi + buffer * kFoldTile * s.rows;
    for (int token = group; token < kFoldTile && group < groups; token += groups) {
      float value[4], left[2][4];
      load_values(v + token * D, sizeof(V) == 1 ? s.scale[buffer * kFoldTile + token] : 1.0f,
                  value);
      widen16<float>(load16_shared(psi + token * s.rows + r), left[0]);
      widen16<float>(load16_shared(psi + token * s.rows + r + 4), left[1]);
#pragma unroll
      for (int i = 0; i < kCellR; ++i) {
#pragma unroll
        for (int j = 0; j < kCellD; ++j) acc[i][j] = fmaf(left[i / 4][i % 4], value[j], acc[i][j]);
      }
    }
    if (blockIdx.z == 0 && thread < R) {
      for (int token = 0; token < kFoldTile; ++token) z += psi[token * s.rows + thread];
    }
  }

  __syncthreads();  // sums take the place of the values
#pragma unroll
  for (int i = 0; i < kCell; ++i) s.sums[i * kSumsRow + thread] = acc[i / kCellD][i % kCellD];
  __syncthreads();
  float* part = w.part + (head.row * w.strips + blockIdx.y) * w.part_size;
  for (int i = thread; i < cells * kCellR; i += kFoldThreads) {
    const int row = i / cells, at = i - row * cells, of = first_cell + at;
    if (of / across * kCellR + row >= R) continue;
    uint32_t bits[4];
#pragma unroll
    for (int j = 0; j < kCellD; ++j) {
      const float* from = s.sums + (row * kCellD + j) * kSumsRow + at;
      float sum = from[0];
      for (int g = 1; g < groups; ++g) sum += from[g * cells];
      bits[j] = __float_as_uint(sum);
    }
    store16(part + (of / across * kCellR + row) * D + of % across * kCellD,
            make_uint4(bits[0], bits[1], bits[2], bits[3]));
  }
  if (blockIdx.z == 0 && thread < R) store(part + R * D + thread, z);
}

__global__ void __launch_bounds__(kFoldThreads)
    compact_add_kernel(const __grid_constant__ CompactParams p,
                       const __grid_constant__ CompactWorkspace w) {
  const int64_t strips = strip_count(w.leaving[blockIdx.x]);
  if (strips == 0) return;
  const HeadRow head(p, blockIdx.x);
  const State state = less::head(p.layout, head.page, head.h).state;
  const int D = int(p.spec.D), R = p.layout.R;
  const int i = (int(blockIdx.y) * kFoldThreads + int(threadIdx.x)) * 4;
  const float* part = w.part + head.row * w.strips * w.part_size;
  if (i < R * D) {
    float sum[4] = {};
    for (int64_t strip = 0; strip < strips; ++strip) {
      float x[4];
      widen16<float>(load16(part + strip * w.part_size + i), x);
#pragma unroll
      for (int j = 0; j < 4; ++j) sum[j] += x[j];
    }
    float h[4];
    float* H = state.H + i;
    widen16<float>(load16(H), h);
    store16(H, make_uint4(__float_as_uint(h[0] + sum[0]), __float_as_uint(h[1] + sum[1]),
                          __float_as_uint(h[2] + sum[2]), __float_as_uint(h[3] + sum[3])));
  }
  if (blockIdx.y == 0 && int(threadIdx.x) < R) {
    float sum = 0.0f;
    for (int64_t strip = 0; strip < strips; ++strip) {
      // narrow: a lane a feature, side by side
      sum += part[strip * w.part_size + R * D + threadIdx.x];
    }
    float* z = state.z + threadIdx.x;
    store(z, *z + sum);
  }
}

}  // namespace less::cuda
