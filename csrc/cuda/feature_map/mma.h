// Feature maps on tensor cores, for weights of 16 or 8 bits; feature_map.cu says what is computed.
//
// Exactness: products of 16-bit numbers are exact, sums are float. What one 16-bit number cannot
// hold is cut into several that add up to it: a float row into two fp16 (after a power of two has
// brought the row into range) or three bf16, the hidden activations into three bf16, fp16 weights
// of the second product into two bf16.
//
// Shared memory, which ldmatrix reads without bank conflicts: rows [terms, kRows, D + 8] and w1
// [.., 64 + 8], of 16 bits, have an odd number of 16 bytes; those of w2 change places (w2_at).
#pragma once

#include "cuda/convert.h"
#include "cuda/feature_map/rows.h"
#include "cuda/features.h"

namespace less::cuda {

constexpr int kMapThreads = 128;
constexpr int kMapWarps = kMapThreads / 32;
constexpr int kChunk = 16 * kMapWarps;  // hidden columns at once; each warp owns 16 of them
constexpr int kSlab = 128;              // rows of w1 at once, at most
constexpr int kPad = 8;                 // 16-bit elements

// Instances of a map's kernel: R up to 16 with many rows at once, or up to 64 with fewer.
template <int kR>
constexpr int kMapRows = kR == 16 ? 64 : 32;

template <typename Half>
using MmaTag = std::conditional_t<std::is_same_v<Half, __half>, HalfTag, BFloatTag>;

// The same cut for launcher and kernel.
template <typename W, int kR>
struct MmaShared {
  static constexpr int kRows = kMapRows<kR>;
  static constexpr bool kEight = std::is_same_v<W, int8_t>;
  static constexpr int kW1Row = kEight ? kChunk : 2 * (kChunk + kPad);  // bytes, as copied
  static constexpr int kW2Terms = std::is_same_v<W, __half> ? 2 : 1;
  static constexpr int kYRow = kR + 8;  // floats

  uint16_t* x;         // [terms, kRows, D + kPad]
  uint64_t* address;   // [kRows]
  int64_t* output;     // [kRows]
  float* row_scale;    // [kRows]  what the products of a row are to be multiplied by
  float* factor;       // [kRows]  what a row was multiplied by
  unsigned char* raw;  // [stages, stage]  w1 [slab, kW1Row], then w2 [kChunk, R], as in memory
  float* y;            // [kMapWarps, kRows, kYRow]  in place of raw, at the end
  uint16_t* w1;        // [slab, kChunk + kPad]  widened; null unless i8
  uint16_t* w2;        // [kW2Terms, kChunk, kR]  bf16, by w2_at
  int slab;
  int stage;  // bytes
  size_t bytes;

  __host__ __device__ MmaShared(unsigned char* base, const FeatureMaps& m, int terms, int most) {
    SharedCarver carver{base};
    x = carver.take<uint16_t>(int64_t{terms} * kRows * (m.D + kPad));
    address = carver.take<uint64_t>(kRows);
    output = carver.take<int64_t>(kRows);
    row_scale = carver.take<float>(kRows);
    factor = carver.take<float>(kRows);
    slab = m.D < most ? int(m.D) : most;
    stage = slab * kW1Row + kChunk * int(m.R) * int(sizeof(W));
    const int stages = m.E > kChunk || m.D > slab ? 2 : 1;
    const int y_bytes = kMapWarps * kRows * kYRow * int(sizeof(float));
    raw = carver.take<unsigned char>(stages * stage > y_bytes ? stages * stage : y_bytes);
    y = reinterpret_cast<float*>(raw);
    w1 = kEight ? carver.take<uint16_t>(slab * (kChunk + kPad)) : nullptr;
    w2 = carver.take<uint16_t>(kW2Terms * kChunk * kR);
    bytes = carver.used;
  }
};

// Two numbers as Half, the first in the lower half; what that leaves of them stays in a and b.
template <typename Half>
LESS_DEVICE uint32_t cut(float& a, float& b) {
  const uint32_t bits = two_narrowed<Half>(a, b);
  float held[2];
  widen4(bits, held, Half());
  a -= held[0];
  b -= held[1];
  return bits;
}

// Writes what rows [0, count) of the block are; rows up to the next multiple of 16 are zeros.
template <typename X, typename Half, typename Shared>
LESS_DEVICE void stage_rows(const Shared& s, int64_t D, int count, int terms) {
  constexpr int kThreadsPerRow = kMapThreads / Shared::kRows;
  constexpr bool kScaled = std::is_same_v<Half, __half> &&
                           (std::is_same_v<X, float> || std::is_same_v<X, __nv_bfloat16>);
  constexpr int kN = 16 / sizeof(X);  // of a piece
  const int thread = threadIdx.x, pieces = int(D) / kN;
  if constexpr (kScaled) {
    // The power of two that brings the largest of a row to 2^14 .. 2^15, and its inverse.
    const int row = thread / kThreadsPerRow;
    float top = 0.0f;
    if (row < count) {
      const X* x = reinterpret_cast<const X*>(s.address[row]);
      for (int c = thread % kThreadsPerRow; c < pieces; c += kThreadsPerRow) {
        float v[kN];
        widen16<X>(load16(x + c * kN), v);
        for (int i = 0; i < kN; ++i) top = fmaxf(top, fabsf(v[i]));
      }
    }
    for (int lanes = kThreadsPerRow / 2; lanes > 0; lanes /= 2) {
      top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, lanes));
    }
    if (row < count && thread % kThreadsPerRow == 0) {
      const int exponent = min(max(int(__float_as_uint(top) >> 23), 15), 253);
      s.factor[row] = __uint_as_float(uint32_t(268 - exponent) << 23);
      s.row_scale[row] *= __uint_as_float(uint32_t(exponent - 14) << 23);
    }
    __syncthreads();
  }
  for (int i = thread; i < (count + 15) / 16 * 16 * pieces; i += kMapThreads) {
    const int row = i / pieces, c = i - row * pieces;
    float v[kN] = {};
    if (row < count) widen16<X>(load16(reinterpret_cast<const X*>(s.address[row]) + c * kN), v);
    if constexpr (kScaled) {
      if (row < count) {
        for (int j = 0; j < kN; ++j) v[j] *= s.factor[row];
      }
    }
    for (int term = 0; term < terms; ++term) {
      uint16_t* to = s.x + (term * Shared::kRows + row) * (D + kPad) + c * kN;
      uint32_t two[kN / 2];
#pragma unroll
      for (int j = 0; j < kN / 2; ++j) two[j] = cut<Half>(v[2 * j], v[2 * j + 1]);
      if constexpr (kN == 4) {
        store8_shared(to, make_uint2(two[0], two[1]));
      } else {
#pragma unroll
        for (int j = 0; j < kN / 2; j += 4) {
          store16_shared(to + 2 * j, make_uint4(two[j], two[j + 1], two[j + 2], two[j + 3]));
        }
      }
    }
  }
}

// Where the weights of one step lie: hidden columns [e, e + kChunk), rows [d, d + rows) of w1.
struct MapStep {
  int e;
  int d;
  int rows;
  bool last;  // of the columns: brings their rows of w2 along
};

LESS_DEVICE MapStep map_step(const FeatureMaps& m, int step, int slab) {
  const int slabs = (int(m.D) + slab - 1) / slab;
  const int chunk = step / slabs, part = step - chunk * slabs;
  const int left = int(m.D) - part * slab;
  return {chunk * kChunk, part * slab, left < slab ? left : slab, part == slabs - 1};
}

// Copies rows of `width` elements, of which those from `valid` on become zeros: 16 bytes at a time
// where rows allow it, else one by one.
template <typename W, int kWidth>
LESS_DEVICE void stage_matrix(const W* from, int64_t from_row, int rows, int valid, bool aligned,
                              unsigned char* to, int to_row) {
  constexpr int kElements = 16 / sizeof(W), kPieces = kWidth / kElements;
  if (aligned) {
    for (int i = threadIdx.x; i < rows * kPieces; i += kMapThreads) {
      const int row = i / kPieces, c = i % kPieces;
      const bool there = c * kElements < valid;
      const W* piece = there ? from + row * from_row + c * kElements : from;
      copy_async16(to + row * to_row + c * 16, piece, there);
    }
    return;
  }
#pragma unroll 1
  for (int i = threadIdx.x; i < rows * kWidth; i += kMapThreads) {
    const int row = i / kWidth, c = i % kWidth;
    reinterpret_cast<W*>(to + row * to_row)[c] =
        // narrow: weights of no whole number of 16 bytes, element by element
        c < valid ? from[row * from_row + c] : narrowed<W>(0.0f);
  }
}

// Copies `count` elements that lie together.
template <typename W>
LESS_DEVICE void stage_run(const W* from, int count, bool aligned, unsigned char* to) {
  constexpr int kElements = 16 / sizeof(W);
  if (aligned) {
    for (int i = threadIdx.x; i < count / kElements; i += kMapThreads) {
      copy_async16(to + i * 16, from + i * kElements);
    }
    return;
  }
#pragma unroll 1
  // narrow: weights of no whole number of 16 bytes, element by element
  for (int i = threadIdx.x; i < count; i += kMapThreads) reinterpret_cast<W*>(to)[i] = from[i];
}

// Starts the copies of a step's weights.
template <typename W, int kW1Row>
LESS_DEVICE void stage_weights(const FeatureMaps& m, int64_t head, const MapStep& at, int slab,
                               unsigned char* stage) {
  const int columns = min(kChunk, int(m.E) - at.e);
  const W* w1 = static_cast<const W*>(m.w1) + (head * m.D + at.d) * m.E + at.e;
  const W* w2 = static_cast<const W*>(m.w2) + (head * m.E + at.e) * m.R;
  stage_matrix<W, kChunk>(w1, m.E, at.rows, columns, m.E * sizeof(W) % 16 == 0, stage, kW1Row);
  if (at.last) {
    stage_run(w2, columns * int(m.R), m.E * m.R * sizeof(W) % 16 == 0, stage + slab * kW1Row);
  }
}

// Where feature r of hidden column e is in w2: eight rows' 16 bytes lie in different banks.
template <int kR>
LESS_DEVICE int w2_at(int e, int r) {
  const int piece = r / 8 ^ e / (64 / kR) % (kR / 8);
  return e * kR + piece * 8 + r % 8;
}

// w2 of a chunk as bf16 terms, zeros where there is no hidden column or feature.
template <typename W, int kR, int kTerms>
LESS_DEVICE void widen_w2(const W* raw, int columns, int R, uint16_t* w2) {
  for (int i = threadIdx.x; i < kChunk * kR / 2; i += kMapThreads) {
    const int e = i / (kR / 2), r = i % (kR / 2) * 2;
    float a = e < columns && r < R ? widened(raw[e * R + r]) : 0.0f;
    float b = e < columns && r + 1 < R ? widened(raw[e * R + r + 1]) : 0.0f;
    for (int term = 0; term < kTerms; ++term) {
      *reinterpret_cast<uint32_t*>(w2 + term * kChunk * kR + w2_at<kR>(e, r)) =
          cut<__nv_bfloat16>(a, b);
    }
  }
}

template <typename Half>
LESS_DEVICE void widen_w1(const unsigned char* raw, int rows, uint16_t* w1) {
  constexpr int kPieces = kChunk / 16;
  for (int i = threadIdx.x; i < rows * kPieces; i += kMapThreads) {
    const int row = i / kPieces, c = i % kPieces;
    const uint4 v = load16_shared(raw + row * kChunk + c * 16);
    float in[16];
    widen16<int8_t>(v, in);
    uint32_t out[8];
#pragma unroll
    for (int j = 0; j < 8; ++j) out[j] = two_narrowed<Half>(in[2 * j], in[2 * j + 1]);
    uint16_t* to = w1 + row * (kChunk + kPad) + c * 16;
    store16_shared(to, make_uint4(out[0], out[1], out[2], out[3]));
    store16_shared(to + 8, make_uint4(out[4], out[5], out[6], out[7]));
  }
}

// The first product: acc += x[.., d .. d + rows) w1 of this warp's 16 columns.
template <typename Half, typename Shared, int kTiles>
LESS_DEVICE void multiply(const Shared& s, const uint16_t* w1, int64_t D, const MapStep& at,
                          int count, int terms, float (&acc)[kTiles][2][4]) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int row = lane % 16, column = lane / 16 * 8;
  const int x_row = int(D) + kPad;
  const uint16_t* b_at = w1 + row * (kChunk + kPad) + warp * 16 + column;
  const uint16_t* a_at = s.x + row * x_row + at.d + column;
  for (int d = 0; d < at.rows; d += 16) {
    uint32_t b[4];
    ldmatrix_x4_trans(b, b_at + d * (kChunk + kPad));
    const uint32_t left[2] = {b[0], b[1]}, right[2] = {b[2], b[3]};
    for (int term = 0; term < terms; ++term) {
#pragma unroll
      for (int i = 0; i < kTiles; ++i) {
        if (i * 16 >= count) break;
        uint32_t a[4];
        ldmatrix_x4(a, a_at + (term * Shared::kRows + i * 16) * x_row + d);
        mma_m16n8k16(acc[i][0], a, left, MmaTag<Half>{});
        mma_m16n8k16(acc[i][1], a, right, MmaTag<Half>{});
      }
    }
  }
}

// acc's gelu, cut into three bf16 terms in the places of the next product's left factor: a fragment
// of results is one of inputs.
LESS_DEVICE void activate(const float (&acc)[2][4], const float (&row_scale)[2],
                          const float (&column_scale)[2][2], uint32_t (&terms)[3][4]) {
#pragma unroll
  for (int tile = 0; tile < 2; ++tile) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float a = gelu(acc[tile][2 * half] * (row_scale[half] * column_scale[tile][0]));
      float b = gelu(acc[tile][2 * half + 1] * (row_scale[half] * column_scale[tile][1]));
#pragma unroll
      for (int term = 0; term < 3; ++term) terms[term][tile * 2 + half] = cut<__nv_bfloat16>(a, b);
    }
  }
}

// The second product: y += gelu(acc) w2 of this warp's 16 hidden columns; acc becomes 0.
template <typename Shared, int kTiles, int kYTiles>
LESS_DEVICE void project(const Shared& s, const FeatureMaps& m, int64_t head, int e, int count,
                         float (&acc)[kTiles][2][4], float (&y)[kTiles][kYTiles][4]) {
  constexpr int kR = kYTiles * 8;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  float column_scale[2][2] = {{1.0f, 1.0f}, {1.0f, 1.0f}};
  if constexpr (Shared::kEight) {
    for (int tile = 0; tile < 2; ++tile) {
      for (int i = 0; i < 2; ++i) {
        const int column = e + warp * 16 + tile * 8 + lane % 4 * 2 + i;
        // narrow: a lane a hidden column, side by side
        column_scale[tile][i] = column < m.E ? m.w1_scale[head * m.E + column] : 0.0f;
      }
    }
  }
#pragma unroll
  for (int i = 0; i < kTiles; ++i) {
    if (i * 16 >= count) break;
    const float row_scale[2] = {s.row_scale[i * 16 + lane / 4], s.row_scale[i * 16 + lane / 4 + 8]};
    uint32_t hidden[3][4];
    activate(acc[i], row_scale, column_scale, hidden);
#pragma unroll
    for (int n = 0; n < kYTiles; n += 2) {
      if (n * 8 >= m.R) break;
#pragma unroll
      for (int term = 0; term < Shared::kW2Terms; ++term) {
        uint32_t b[4];
        ldmatrix_x4_trans(
            b, s.w2 + term * kChunk * kR + w2_at<kR>(warp * 16 + lane % 16, n * 8 + lane / 16 * 8));
        const uint32_t left[2] = {b[0], b[1]}, right[2] = {b[2], b[3]};
#pragma unroll
        for (int part = 0; part < 3 - term; ++part) {  // what is left out is below 2^-24
          mma_m16n8k16(y[i][n], hidden[part], left, BFloatTag{});
          mma_m16n8k16(y[i][n + 1], hidden[part], right, BFloatTag{});
        }
      }
    }
    for (int tile = 0; tile < 2; ++tile) {
      for (int j = 0; j < 4; ++j) acc[i][tile][j] = 0.0f;
    }
  }
}

// Sums the parts of y, one after another, and writes the features of rows [0, count).
template <int kParts, int kRows, int kYRow>
LESS_DEVICE void finish_rows(const FeatureMaps& m, int64_t head, float* y, const int64_t* output,
                             int count, float* out) {
  const int R = int(m.R);
  for (int i = threadIdx.x; i < count * R; i += kMapThreads) {
    const int row = i / R, r = i - row * R;
    float* at = y + row * kYRow + r;
    float sum = at[0];
    for (int part = 1; part < kParts; ++part) sum += at[part * kRows * kYRow];
    sum = feature(m, head, r, sum);
    if (m.mix == nullptr) {
      // narrow: R features of a token, R any number, side by side
      store(out + output[row] * R + r, sum);
    } else {
      at[0] = sum;
    }
  }
  if (m.mix == nullptr) return;
  __syncthreads();
  for (int i = threadIdx.x; i < count * R; i += kMapThreads) {
    const int row = i / R, r = i - row * R;
    // narrow: R features of a token, R any number, side by side
    store(out + output[row] * R + r, mixed_feature(m, head, r, y + row * kYRow));
  }
}

template <typename Half, typename W, int kR>
__global__ void __launch_bounds__(kMapThreads, 3)
    feature_mma_kernel(const __grid_constant__ FeatureMaps m,
                       const __grid_constant__ FeatureRows in, int terms, int slab) {
  using Shared = MmaShared<W, kR>;
  constexpr int kRows = Shared::kRows, kTiles = kRows / 16, kYTiles = kR / 8;
  const RowBlock block = row_block(in, kRows);
  if (block.count <= 0) return;
  DYN_SMEM(base);
  const Shared s(base, m, terms, slab);
  const int thread = threadIdx.x;
  const int steps = (int(m.E) + kChunk - 1) / kChunk * ((int(m.D) + s.slab - 1) / s.slab);

  stage_weights<W, Shared::kW1Row>(m, block.head, map_step(m, 0, s.slab), s.slab, s.raw);
  copy_async_commit();
  if (thread < kRows) {
    Row row{0, 1.0f, 0};
    if (thread < block.count) row = locate(in, block, thread);
    s.address[thread] = row.address;
    s.output[thread] = row.output;
    s.row_scale[thread] = row.scale;
  }
  __syncthreads();
  switch (in.x.dtype) {
    case DType::f32:
      stage_rows<float, Half>(s, m.D, block.count, terms);
      break;
    case DType::bf16:
      stage_rows<__nv_bfloat16, Half>(s, m.D, block.count, terms);
      break;
    case DType::fp16:
      stage_rows<__half, Half>(s, m.D, block.count, terms);
      break;
    case DType::i8:
      stage_rows<int8_t, Half>(s, m.D, block.count, terms);
      break;
    case DType::fp8:
      stage_rows<__nv_fp8_e4m3, Half>(s, m.D, block.count, terms);
      break;
    default:  // no op has packed rows here
      break;
  }

  float acc[kTiles][2][4] = {}, y[kTiles][kYTiles][4] = {};
  for (int step = 0; step < steps; ++step) {
    const MapStep at = map_step(m, step, s.slab);
    unsigned char* stage = s.raw + step % 2 * s.stage;
    copy_async_wait<0>();
    __syncthreads();
    if (step + 1 < steps) {
      stage_weights<W, Shared::kW1Row>(m, block.head, map_step(m, step + 1, s.slab), s.slab,
                                       s.raw + (step + 1) % 2 * s.stage);
    }
    copy_async_commit();
    const uint16_t* w1 = reinterpret_cast<const uint16_t*>(stage);
    if constexpr (Shared::kEight) {
      widen_w1<Half>(stage, at.rows, s.w1);
      w1 = s.w1;
    }
    if (at.last) {
      const W* raw = reinterpret_cast<const W*>(stage + s.slab * Shared::kW1Row);
      widen_w2<W, kR, Shared::kW2Terms>(raw, min(kChunk, int(m.E) - at.e), int(m.R), s.w2);
    }
    __syncthreads();
    multiply<Half>(s, w1, m.D, at, block.count, terms, acc);
    if (at.last) project(s, m, block.head, at.e, block.count, acc, y);
  }

  __syncthreads();  // y takes the place of the last weights
  const int lane = thread % 32, warp = thread / 32;
#pragma unroll
  for (int i = 0; i < kTiles; ++i) {
#pragma unroll
    for (int n = 0; n < kYTiles; ++n) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float* to = s.y + (warp * kRows + i * 16 + half * 8 + lane / 4) * Shared::kYRow + n * 8 +
                    lane % 4 * 2;
        store8_shared(to, make_uint2(__float_as_uint(y[i][n][2 * half]),
                                     __float_as_uint(y[i][n][2 * half + 1])));
      }
    }
  }
  __syncthreads();
  finish_rows<kMapWarps, kRows, Shared::kYRow>(m, block.head, s.y, s.output, block.count, in.y);
}

}  // namespace less::cuda
