// A feature map of a few rows by several blocks: every block takes a slice of the columns of W1,
// and what it makes of them is a share of y = gelu(x W1) W2. The sum of the shares, in the order of
// the blocks, is y; features.h has the end of the map.
//
// The unit of a slice is 32 bytes of a row of W1, a sector of memory. A block takes up to four
// units at once: 128 threads load 16 bytes of as many rows as there are, eight loads each under
// way. A unit has the same bits whichever others are taken with it.
#pragma once

#include "cuda/convert.h"
#include "cuda/decode_step/plan.h"
#include "cuda/features.h"

namespace less::cuda {

constexpr int kDecodeMapColumns = 32 * kDecodeMapUnits;  // of units at once, at most: int8

struct DecodeMapScratch {
  float* sums;        // [warps, kDecodeMapColumns]  x W1, by warps
  float* hidden;      // [kDecodeMapColumns]
  float* turn;        // [units, threads]  what units give y, by threads
  float* unit;        // [units, R]  and by units
  unsigned char* w2;  // [32 kDecodeMapUnits R]  the units' rows of W2
};

// acc[e] += x[d] w, w column e of row d, for rows d0, d0 + step, ...; those from D on are not
// there.
template <typename T, int kN>
LESS_DEVICE void add_map_rows(const uint4 (&rows)[kN], const float* x, int d0, int step, int D,
                              float (&acc)[16]) {
#pragma unroll
  for (int i = 0; i < kN; ++i) {
    const int d = d0 + i * step;
    if (d >= D) break;
    const float at = x[d];
    float w[16 / sizeof(T)];
    widen16<T>(rows[i], w);
#pragma unroll
    for (int e = 0; e < 16 / int(sizeof(T)); ++e) acc[e] = fmaf(at, w[e], acc[e]);
  }
}

template <int kN>
LESS_DEVICE void add_map_rows(DType dtype, const uint4 (&rows)[kN], const float* x, int d0,
                              int step, int D, float (&acc)[16]) {
  if (dtype == DType::fp16) {
    add_map_rows<__half>(rows, x, d0, step, D, acc);
  } else if (dtype == DType::bf16) {
    add_map_rows<__nv_bfloat16>(rows, x, d0, step, D, acc);
  } else if (dtype == DType::i8) {
    add_map_rows<int8_t>(rows, x, d0, step, D, acc);
  } else {
    add_map_rows<float>(rows, x, d0, step, D, acc);
  }
}

// sum[u] += hidden[e] w, w feature r of row e of W2 in unit u, for columns e0, e0 + step, ... of
// the `columns` that a unit has.
template <typename T>
LESS_DEVICE void add_unit_rows(const unsigned char* w2, const float* hidden, int count, int columns,
                               int R, int r, int e0, int step, float (&sum)[kDecodeMapUnits]) {
#pragma unroll 1
  for (int e = e0; e < columns; e += step) {
#pragma unroll
    for (int u = 0; u < kDecodeMapUnits; ++u) {
      const int i = min(u, count - 1) * columns + e;
      const float w = widened(reinterpret_cast<const T*>(w2)[i * R + r]);
      sum[u] = fmaf(hidden[i], w, sum[u]);
    }
  }
}

template <typename... Args>
LESS_DEVICE void add_unit_rows(DType dtype, const unsigned char* w2, Args&&... args) {
  if (dtype == DType::fp16) {
    add_unit_rows<__half>(w2, args...);
  } else if (dtype == DType::bf16) {
    add_unit_rows<__nv_bfloat16>(w2, args...);
  } else if (dtype == DType::i8) {
    add_unit_rows<int8_t>(w2, args...);
  } else {
    add_unit_rows<float>(w2, args...);
  }
}

// `count` bytes from global memory to shared, zeros after the first `valid`; neither need be
// aligned.
LESS_DEVICE void copy_bytes(unsigned char* shared, const unsigned char* global, int count,
                            int valid) {
#pragma unroll 1
  // narrow: weights of no whole number of 16 bytes, byte by byte
  for (int i = threadIdx.x; i < count; i += kDecodeThreads) shared[i] = i < valid ? global[i] : 0;
}

// Up to 16 bytes, as many as are valid, the others 0.
LESS_DEVICE uint4 load_bytes(const unsigned char* global, int valid) {
  uint4 w = make_uint4(0, 0, 0, 0);
#pragma unroll 1
  for (int i = min(valid, 16) - 1; i >= 0; --i) {
    // narrow: weights of no whole number of 16 bytes, byte by byte
    const uint32_t byte = global[i];
    const uint32_t bits = byte << (i % 4 * 8);
    if (i < 4) {
      w.x |= bits;
    } else if (i < 8) {
      w.y |= bits;
    } else if (i < 12) {
      w.z |= bits;
    } else {
      w.w |= bits;
    }
  }
  return w;
}

// Shares of a layer's map that a block makes: `count` from `first` on, of `of` in all. A share is a
// run of the units of all heads.
struct DecodeMapShares {
  int first;
  int count;
  int of;

  // The first unit of a share, of so many.
  LESS_DEVICE int begin(int share, int units) const { return units * share / of; }
  // The share that has a unit.
  LESS_DEVICE int with(int unit, int units) const { return ((unit + 1) * of - 1) / units; }
};

// y [shares.count, heads, R], a share every `stride` floats: this block's shares of the maps of
// `heads` heads from `first` on, of x [heads, D]; x and y are shared. All threads call it; ends
// with y visible to all. A unit's sums are in the same order whichever units are taken with it.
LESS_DEVICE void shares_of_maps(const FeatureMaps& m, int64_t first, int heads, const float* x,
                                const DecodeMapShares& shares, const DecodeMapScratch& s, float* y,
                                int stride) {
  constexpr int kWidth = 2 * kDecodeMapUnits;     // chunks of 16 bytes of a row, a lane each
  constexpr int kRows = kDecodeThreads / kWidth;  // at once
  constexpr int kLoads = 8;                       // under way
  const int t = threadIdx.x, lane = t % 32, warp = t / 32;
  const int R = int(m.R), D = int(m.D), E = int(m.E);
  const int bytes = int(bytes_of(m.w_dtype));
  const int columns = 32 / bytes;  // of a unit
  const int units = (E + columns - 1) / columns;
  const bool aligned =
      E % columns == 0 &&
      ((reinterpret_cast<uintptr_t>(m.w1) | reinterpret_cast<uintptr_t>(m.w2)) & 15) == 0;
  const auto* const w1 = static_cast<const unsigned char*>(m.w1) + first * m.D * m.E * bytes;
  const auto* const w2 = static_cast<const unsigned char*>(m.w2) + first * m.E * m.R * bytes;
  const int all = units * heads;
  const int begin = shares.begin(shares.first, all);
  const int end = shares.begin(shares.first + shares.count, all);
  const int turns = min(16, kDecodeThreads / R);  // of a unit's columns, that threads take at once
#pragma unroll 1
  for (int i = t; i < heads * R; i += kDecodeThreads) {
#pragma unroll 1
    for (int share = 0; share < shares.count; ++share) y[share * stride + i] = 0.0f;
  }
#pragma unroll 1
  for (int u0 = begin, count; u0 < end; u0 += count) {
    const int g = u0 / units, e0 = (u0 - g * units) * columns;  // of one head at once
    count = min(min(kDecodeMapUnits, end - u0), (g + 1) * units - u0);
    int share[kDecodeMapUnits];
#pragma unroll
    for (int u = 0; u < kDecodeMapUnits; ++u) {
      share[u] = shares.with(u0 + min(u, count - 1), all);
    }
    // -- rows of W2, on their way while W1 is read
    const unsigned char* const w2_rows = w2 + (int64_t(g) * E + e0) * R * bytes;
    if (aligned) {
#pragma unroll 1
      for (int i = t * 16; i < count * columns * R * bytes; i += kDecodeThreads * 16) {
        copy_async16(s.w2 + i, w2_rows + i);
      }
    } else {
      copy_bytes(s.w2, w2_rows, count * columns * R * bytes, (E - e0) * R * bytes);
    }
    copy_async_commit();
    // -- x W1 of the units: thread (rows, chunk)
    const int chunk = t % kWidth, row0 = t / kWidth;
    const bool active = chunk < 2 * count;
    const int first_column = e0 + chunk * (columns / 2);
    const unsigned char* const column =
        w1 + (int64_t(g) * D * E + (active ? first_column : e0)) * bytes;
    const float* const at_g = x + g * D;
    float acc[16];
#pragma unroll
    for (int e = 0; e < 16; ++e) acc[e] = 0.0f;
    if (aligned) {
#pragma unroll 1
      for (int d0 = row0; d0 < D; d0 += kLoads * kRows) {
        uint4 w[kLoads];
#pragma unroll
        for (int i = 0; i < kLoads; ++i) {
          const int d = d0 + i * kRows;
          w[i] =
              active && d < D ? load16_nc(column + int64_t(d) * E * bytes) : make_uint4(0, 0, 0, 0);
        }
        add_map_rows(m.w_dtype, w, at_g, d0, kRows, D, acc);
      }
    } else if (active) {
#pragma unroll 1
      for (int d = row0; d < D; d += kRows) {
        const uint4 w[1] = {
            load_bytes(column + int64_t(d) * E * bytes, (E - first_column) * bytes)};
        add_map_rows(m.w_dtype, w, at_g, d, kRows, D, acc);
      }
    }
    // -- the sum over rows, within warps and then over them
#pragma unroll
    for (int e = 0; e < 16; e += 4) {
      if (e >= columns / 2) break;
#pragma unroll
      for (int i = e; i < e + 4; ++i) {
#pragma unroll
        for (int step = kWidth; step < 32; step *= 2) {
          acc[i] += __shfl_xor_sync(0xffffffffu, acc[i], step);
        }
      }
    }
    if (lane < kWidth) {
      float* const sums = s.sums + warp * kDecodeMapColumns + chunk * (columns / 2);
#pragma unroll
      for (int e = 0; e < 16; e += 4) {
        if (e >= columns / 2) break;
        store16_shared(sums + e,
                       bits_of<uint4>(make_float4(acc[e], acc[e + 1], acc[e + 2], acc[e + 3])));
      }
    }
    copy_async_wait<0>();
    __syncthreads();
    if (t < count * columns) {
      const int e = e0 + t;
      float sum = s.sums[t];
#pragma unroll
      for (int w = 1; w < kDecodeWarps; ++w) sum += s.sums[w * kDecodeMapColumns + t];
      // narrow: a lane a hidden column, side by side
      if (e < E && m.w1_scale != nullptr) sum *= m.w1_scale[(first + g) * E + e];
      s.hidden[t] = e < E ? gelu(sum) : 0.0f;
    }
    __syncthreads();
    // -- times W2, unit by unit: thread (every so many columns, r), then warp u has unit u
    static_assert(kDecodeMapUnits == kDecodeWarps, "a warp a unit");
    if (t < turns * R) {
      float sum[kDecodeMapUnits] = {};
      add_unit_rows(m.w_dtype, s.w2, s.hidden, count, columns, R, t % R, t / R, turns, sum);
#pragma unroll
      for (int u = 0; u < kDecodeMapUnits; ++u) s.turn[u * kDecodeThreads + t] = sum[u];
    }
    __syncthreads();
#pragma unroll 1
    for (int r = lane; r < R; r += 32) {
      const float* const turn = s.turn + warp * kDecodeThreads + r;
      float sum = 0.0f;
#pragma unroll 16
      for (int i = 0; i < turns; ++i) sum += turn[i * R];
      s.unit[warp * R + r] = warp < count ? sum : 0.0f;
    }
    __syncthreads();
    if (t < R) {  // of a share several units; shares in order
      float* at[kDecodeMapUnits];
      float sum[kDecodeMapUnits];
#pragma unroll
      for (int u = 0; u < kDecodeMapUnits; ++u) {
        at[u] = y + (share[u] - shares.first) * stride + g * R + t;
        sum[u] = *at[u];
      }
#pragma unroll
      for (int u = 0; u < kDecodeMapUnits; ++u) {
        if (u > 0 && share[u] == share[u - 1]) sum[u] = sum[u - 1];
        sum[u] += s.unit[u * R + t];
      }
#pragma unroll
      for (int u = 0; u < kDecodeMapUnits; ++u) {
        if (u + 1 == kDecodeMapUnits || share[u] != share[u + 1]) *at[u] = sum[u];
      }
    }
  }
  __syncthreads();
}

}  // namespace less::cuda
