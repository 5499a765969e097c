// Feature maps of float weights, on CUDA cores; feature_map.cu says what is computed.
//
// Shared memory: rows [kRows, D + 4], hidden [kRows, kChunk + 4] and weights as in memory, floats.
// A thread makes 4 x 4 hidden activations at once; all its reads are of 16 bytes.
#pragma once

#include "cuda/feature_map/mma.h"

namespace less::cuda {

constexpr int kFloatRows = 32;
constexpr int kFloatSlab = 32;  // rows of w1 at once
constexpr int kFloatPad = 4;

struct FloatShared {
  float* x;            // [kFloatRows, D + kFloatPad]
  uint64_t* address;   // [kFloatRows]
  int64_t* output;     // [kFloatRows]
  float* row_scale;    // [kFloatRows]
  float* hidden;       // [kFloatRows, kChunk + kFloatPad]
  float* y;            // [kFloatRows, y_row]
  unsigned char* raw;  // [2, stage]  w1 [kFloatSlab, kChunk], then w2 [kChunk, R]
  int stage;           // bytes
  size_t bytes;

  __host__ __device__ FloatShared(unsigned char* base, const FeatureMaps& m, int y_row) {
    SharedCarver carver{base};
    x = carver.take<float>(kFloatRows * (m.D + kFloatPad));
    address = carver.take<uint64_t>(kFloatRows);
    output = carver.take<int64_t>(kFloatRows);
    row_scale = carver.take<float>(kFloatRows);
    hidden = carver.take<float>(kFloatRows * (kChunk + kFloatPad));
    y = carver.take<float>(kFloatRows * y_row);
    stage = int(sizeof(float)) * (kFloatSlab * kChunk + kChunk * int(m.R));
    raw = carver.take<unsigned char>(2 * stage);
    bytes = carver.used;
  }
};

template <typename X>
LESS_DEVICE void stage_float_rows(const FloatShared& s, int64_t D, int count) {
  constexpr int kN = 16 / sizeof(X);  // of a piece
  const int pieces = int(D) / kN;
  for (int i = threadIdx.x; i < kFloatRows * pieces; i += kMapThreads) {
    const int row = i / pieces, c = i - row * pieces;
    float v[kN] = {};
    if (row < count) widen16<X>(load16(reinterpret_cast<const X*>(s.address[row]) + c * kN), v);
#pragma unroll
    for (int j = 0; j < kN; j += 4) {
      store16_shared(s.x + row * (D + kFloatPad) + c * kN + j,
                     make_uint4(__float_as_uint(v[j]), __float_as_uint(v[j + 1]),
                                __float_as_uint(v[j + 2]), __float_as_uint(v[j + 3])));
    }
  }
}

LESS_DEVICE void load_four_shared(const float* from, float (&v)[4]) {
  const uint4 bits = load16_shared(from);
  v[0] = __uint_as_float(bits.x);
  v[1] = __uint_as_float(bits.y);
  v[2] = __uint_as_float(bits.z);
  v[3] = __uint_as_float(bits.w);
}

// acc[i][j] += sum_d x[4 row + i][d] w1[d][4 column + j], d ascending.
LESS_DEVICE void multiply_floats(const float* x, int x_row, const float* w1, int rows,
                                 float (&acc)[4][4]) {
  for (int d = 0; d < rows; d += 4) {
    float a[4][4], b[4][4];
#pragma unroll
    for (int i = 0; i < 4; ++i) load_four_shared(x + i * x_row + d, a[i]);
#pragma unroll
    for (int i = 0; i < 4; ++i) load_four_shared(w1 + (d + i) * kChunk, b[i]);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int k = 0; k < 4; ++k) {
#pragma unroll
        for (int j = 0; j < 4; ++j) acc[i][j] = fmaf(a[i][k], b[k][j], acc[i][j]);
      }
    }
  }
}

template <int kR>
__global__ void __launch_bounds__(kMapThreads, 3)
    feature_float_kernel(const __grid_constant__ FeatureMaps m,
                         const __grid_constant__ FeatureRows in) {
  constexpr int kYRow = kR + kFloatPad, kY = kR / 4;
  const RowBlock block = row_block(in, kFloatRows);
  if (block.count <= 0) return;
  DYN_SMEM(base);
  const FloatShared s(base, m, kYRow);
  const int thread = threadIdx.x, R = int(m.R);
  const int steps = (int(m.E) + kChunk - 1) / kChunk * ((int(m.D) + kFloatSlab - 1) / kFloatSlab);
  constexpr int kW1Row = kChunk * int(sizeof(float));

  stage_weights<float, kW1Row>(m, block.head, map_step(m, 0, kFloatSlab), kFloatSlab, s.raw);
  copy_async_commit();
  if (thread < kFloatRows) {
    Row row{0, 1.0f, 0};
    if (thread < block.count) row = locate(in, block, thread);
    s.address[thread] = row.address;
    s.output[thread] = row.output;
    s.row_scale[thread] = row.scale;
  }
  __syncthreads();
  switch (in.x.dtype) {
    case DType::f32:
      stage_float_rows<float>(s, m.D, block.count);
      break;
    case DType::bf16:
      stage_float_rows<__nv_bfloat16>(s, m.D, block.count);
      break;
    case DType::fp16:
      stage_float_rows<__half>(s, m.D, block.count);
      break;
    case DType::i8:
      stage_float_rows<int8_t>(s, m.D, block.count);
      break;
    case DType::fp8:
      stage_float_rows<__nv_fp8_e4m3>(s, m.D, block.count);
      break;
    default:  // no op has packed rows here
      break;
  }

  const int row4 = thread / 16 * 4, column4 = thread % 16 * 4;
  const int x_row = int(m.D) + kFloatPad, h_row = kChunk + kFloatPad;
  const float* h = s.hidden + thread / 4 * h_row;  // a thread's row in the second product
  float acc[4][4] = {}, y[kY] = {};
  for (int step = 0; step < steps; ++step) {
    const MapStep at = map_step(m, step, kFloatSlab);
    const unsigned char* stage = s.raw + step % 2 * s.stage;
    copy_async_wait<0>();
    __syncthreads();
    if (step + 1 < steps) {
      stage_weights<float, kW1Row>(m, block.head, map_step(m, step + 1, kFloatSlab), kFloatSlab,
                                   s.raw + (step + 1) % 2 * s.stage);
    }
    copy_async_commit();
    multiply_floats(s.x + row4 * x_row + at.d, x_row,
                    reinterpret_cast<const float*>(stage) + column4, at.rows, acc);
    if (!at.last) continue;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float scale = s.row_scale[row4 + i];
      uint32_t bits[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        bits[j] = __float_as_uint(gelu(acc[i][j] * scale));
        acc[i][j] = 0.0f;
      }
      store16_shared(s.hidden + (row4 + i) * h_row + column4,
                     make_uint4(bits[0], bits[1], bits[2], bits[3]));
    }
    __syncthreads();
    const float* w2 = reinterpret_cast<const float*>(stage) + kFloatSlab * kChunk;
    const int columns = min(kChunk, int(m.E) - at.e);
    for (int e = 0; e < columns; ++e) {
      const float a = h[e];
#pragma unroll
      for (int j = 0; j < kY; ++j) {
        const int r = thread % 4 + 4 * j;
        if (r < R) y[j] = fmaf(a, w2[e * R + r], y[j]);
      }
    }
  }
#pragma unroll
  for (int j = 0; j < kY; ++j) s.y[thread / 4 * kYRow + thread % 4 + 4 * j] = y[j];
  __syncthreads();
  finish_rows<1, kFloatRows, kYRow>(m, block.head, s.y, s.output, block.count, in.y);
}

}  // namespace less::cuda
