// What leaves becomes part of who stays (common/merge.h): each goes to the nearest of those who
// take others, by scores and keys as they were chosen, and each of those becomes a mean.
//
// Grid:   leave (B*K, T / 32) before slots are written, nearest (B*K, T / 64) and mean (B*K, S /
// 32)
//         afterwards.
// Memory: rows that leave are read once and kept in the workspace as slots that are not hot hold
//         them; nearest reads keys of slots once for 64 of those, in tiles, mean a row once where
//         it changes, and each row of those who left.
// Order:  each who leaves has a nearest of its own; means are taken oldest first, by one warp.
#pragma once

#include "cuda/compact/select.h"
#include "cuda/compact/workspace.h"
#include "cuda/merge.h"

namespace less::cuda {

constexpr int kMergeThreads = 256;
constexpr int kMergeWarps = kMergeThreads / 32;
constexpr int kMergeEach = 4;  // rows of a warp
constexpr int kMergeRows = kMergeWarps * kMergeEach;

// -- who leaves --

// Copies a row as it is stored; one warp.
LESS_DEVICE void copy_row(void* to, const void* from, int bytes) {
  auto* const a = static_cast<unsigned char*>(to);
  const auto* const b = static_cast<const unsigned char*>(from);
  const int lane = int(threadIdx.x) % 32;
  if (bytes % 16 == 0) {
    for (int i = lane * 16; i < bytes; i += 32 * 16) store16(a + i, load16(b + i));
  } else {
    // narrow: rows of no whole number of 16 bytes
    for (int i = lane; i < bytes; i += 32) store(a + i, b[i]);
  }
}

// How many of the list are older than its ith, who lies in a slot; one warp. The call's tokens are
// younger, and in order.
LESS_DEVICE int older_than(const int32_t* list, const int32_t* when, int n, int i, int64_t S) {
  const int lane = int(threadIdx.x) % 32;
  const int32_t mine = when[i];
  int older = 0;
#pragma unroll 1
  for (int first = 0; first < n; first += 32) {
    const int at = first + lane;
    // narrow: a lane one who leaves, side by side
    const bool of_slot = at < n && list[at] < S;
    // narrow: a lane one who leaves, side by side
    older += __popc(__ballot_sync(0xffffffffu, of_slot && when[at] < mine));
    if (!__any_sync(0xffffffffu, of_slot)) break;
  }
  return older;
}

__global__ void __launch_bounds__(kMergeThreads, 1)
    compact_leave_kernel(const __grid_constant__ CompactParams p,
                         const __grid_constant__ CompactWorkspace w) {
  SMEM_ARRAY(uint8_t, codes, kMergeWarps * 256);
  const int n = w.leaving[blockIdx.x];
  const int begin = int(blockIdx.y) * kMergeRows;
  if (begin >= n) return;
  const HeadRow head(p, blockIdx.x);
  const Layout& layout = p.layout;
  const Slots slots = less::head(layout, head.page, head.h).slots;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, D = int(p.spec.D);
  const int64_t element = bytes_of(layout.call_dtype), first = head.row * p.T;
  const bool few = packed(layout.v_dtype);
  const float* const score = p.score + head.row * (layout.S + p.T);
  const int32_t *const list = w.list + first, *const when = w.when + first;
  const int mine = begin + warp * kMergeEach;
#pragma unroll 1
  for (int i = mine; i < min(mine + kMergeEach, n); ++i) {
    const int64_t from = list[i];  // narrow: a number of a row, whose lanes read it
    const bool of_slot = from < slots.S, hot = from < slots.W, cold = of_slot && !hot;
    const int64_t token = from - slots.S;
    const int place = of_slot ? older_than(list, when, n, i, slots.S) : i;
    if (lane == 0) {
      store(w.left_position + first + place, when[i]);
      const float own_score = score[of_slot ? from : layout.S + token];
      store(w.left_score + first + place, noted_score(few, own_score));
      store(w.left_weight + first + place,
            of_slot ? weight_at(few, slots, from) : weight_of_one(few));
    }
#pragma unroll 1
    for (int v = 0; v < 2; ++v) {
      const StoredRows to = w.left(p, head.row, v == 1), own = cold_rows(layout, slots, v == 1);
      const HeadRows& call = v == 1 ? p.call.v : p.call.k;
      const float* const call_scale = v == 1 ? p.call.v_scale : p.call.k_scale;
      const float* const hot_scale = v == 1 ? slots.hot_v_scale : slots.hot_k_scale;
      const void* row = static_cast<const unsigned char*>(call.data) +
                        offset(call, head.b, head.h, of_slot ? 0 : token) * element;
      if (hot) {
        row = static_cast<const unsigned char*>(v == 1 ? slots.hot_v : slots.hot_k) +
              from * D * element;
      }
      if (cold) row = own.at(from - slots.W, D);
      float scale = 1.0f;
      if (cold) {
        // narrow: a number of a row, whose lanes read it
        if (lane == 0 && packed(own.dtype)) store(to.halves + place, own.halves[from - slots.W]);
        if (!packed(own.dtype)) scale = own.scale(from - slots.W);
      } else if (has_scale(layout.call_dtype)) {
        // narrow: a number of a row, whose lanes read it
        scale = hot ? hot_scale[from] : call_scale[first + token];
      }
      if (cold || !packed(layout.v_dtype)) {
        copy_row(to.at(place, D), row, int(row_bytes(to.dtype, D)));
        if (lane == 0 && to.scales != nullptr) store(to.scales + place, scale);
      } else {
        encode_row(to, place, decoded_row(layout.call_dtype, row, scale, D), D, codes + warp * 256);
      }
    }
  }
}

// -- to whom --

constexpr int kNearestTile = 64;  // of those who leave, and of slots
constexpr int kNearestDims = 16;
constexpr int kNearestEach = 4;  // of both, of a thread
constexpr int kNearestStride = kNearestTile + 4;
static_assert(kMergeThreads * kNearestEach * kNearestEach == kNearestTile * kNearestTile);

// Whether others may become part of who is in a slot that is not hot once the call has joined.
LESS_DEVICE bool takes_others(const CompactParams& p, const CompactWorkspace& w, int64_t row,
                              int64_t S, int64_t slot) {
  const int32_t take = w.take[row * p.layout.S + slot];  // narrow: a lane a slot, side by side
  if (take == kEmpty) return false;
  const int64_t who = take == kStays ? slot : take >= 0 ? S + take : kFromHot - take;
  // narrow: a lane a slot, side by side
  return w.key[row * w.candidates + who] != key_of(INFINITY);
}

// Dims d .. d + 15 of rows first .. first + 63 as [16][kNearestStride]; zeros from row n on.
LESS_DEVICE void stage_keys(const StoredRows& of, int64_t first, int64_t n, int D, int d,
                            float* to) {
  const int row = int(threadIdx.x) / 4, four = int(threadIdx.x) % 4 * 4;
  float x[4] = {0.0f, 0.0f, 0.0f, 0.0f};
  if (first + row < n) {
    // narrow: four numbers a lane, 16 bytes where they are float32
    four_numbers(of.dtype, of.at(first + row, D), of.scale(first + row), D, d + four, x);
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) to[(four + i) * kNearestStride + row] = x[i];
}

struct Nearest {
  float cost;
  int32_t position;
  int32_t slot;

  LESS_DEVICE void meet(const Nearest& o) {
    if (leaves_before(o.cost, o.position, cost, position)) *this = o;
  }
};

__global__ void __launch_bounds__(kMergeThreads, 1)
    compact_nearest_kernel(const __grid_constant__ CompactParams p,
                           const __grid_constant__ CompactWorkspace w) {
  SMEM_ARRAY(float, left, kNearestDims* kNearestStride);
  SMEM_ARRAY(float, kept, kNearestDims* kNearestStride);
  SMEM_ARRAY(float, kept_mass, kNearestTile);
  SMEM_ARRAY(int32_t, kept_position, kNearestTile);
  const int n = w.leaving[blockIdx.x];
  const int begin = int(blockIdx.y) * kNearestTile;
  if (begin >= n) return;
  const HeadRow head(p, blockIdx.x);
  const Slots slots = less::head(p.layout, head.page, head.h).slots;
  const StoredRows keys = cold_rows(p.layout, slots, false), leaves = w.left(p, head.row, false);
  const bool few = packed(p.layout.v_dtype);
  const int D = int(p.spec.D), thread = threadIdx.x;
  const int own = thread / 16 * kNearestEach, other = thread % 16 * kNearestEach;
  const int64_t cold = slots.S - slots.W, first_left = head.row * p.T + begin;
  float mass[kNearestEach];
  Nearest best[kNearestEach];
#pragma unroll
  for (int i = 0; i < kNearestEach; ++i) {
    mass[i] = begin + own + i < n ? mass_of(w.left_score[first_left + own + i]) : 0.0f;
    best[i] = {INFINITY, INT32_MAX, -1};
  }
#pragma unroll 1
  for (int64_t first = 0; first < cold; first += kNearestTile) {
    if (thread < kNearestTile) {
      const int64_t slot = slots.W + first + thread;
      const bool target = first + thread < cold && takes_others(p, w, head.row, slots.S, slot);
      kept_mass[thread] = target ? mass_of(score_at(few, slots, slot)) : 0.0f;
      kept_position[thread] = target ? slots.position[slot] : -1;  // narrow: slots lie side by side
    }
    float far[kNearestEach][kNearestEach] = {};
#pragma unroll 1
    for (int d = 0; d < D; d += kNearestDims) {
      stage_keys(leaves, begin, n, D, d, left);
      stage_keys(keys, first, cold, D, d, kept);
      __syncthreads();
#pragma unroll
      for (int e = 0; e < kNearestDims; ++e) {
        float a[4], b[4];
        widen16<float>(load16_shared(left + e * kNearestStride + own), a);
        widen16<float>(load16_shared(kept + e * kNearestStride + other), b);
#pragma unroll
        for (int i = 0; i < kNearestEach; ++i) {
#pragma unroll
          for (int j = 0; j < kNearestEach; ++j) {
            const float by = a[i] - b[j];
            far[i][j] = fmaf(by, by, far[i][j]);
          }
        }
      }
      __syncthreads();
    }
#pragma unroll
    for (int j = 0; j < kNearestEach; ++j) {
      const int32_t position = kept_position[other + j];
      const float kept_by = kept_mass[other + j];
      const int32_t slot = int32_t(slots.W + first + other + j);
#pragma unroll
      for (int i = 0; i < kNearestEach; ++i) {
        const float cost = merge_cost(mass[i], kept_by, far[i][j]);
        if (position >= 0 && cost < INFINITY) best[i].meet({cost, position, slot});
      }
    }
    __syncthreads();  // positions are written anew
  }
#pragma unroll
  for (int i = 0; i < kNearestEach; ++i) {
#pragma unroll
    for (int step = 8; step > 0; step /= 2) {
      Nearest o;
      o.cost = __shfl_xor_sync(0xffffffffu, best[i].cost, step);
      o.position = __shfl_xor_sync(0xffffffffu, best[i].position, step);
      o.slot = __shfl_xor_sync(0xffffffffu, best[i].slot, step);
      best[i].meet(o);
    }
    if (other == 0 && begin + own + i < n) store(w.into + first_left + own + i, best[i].slot);
  }
}

// -- means --

// A mean of rows in a warp: a lane has dims 4 lane .. 4 lane + 3, and those 128 after them.
struct Mean {
  float x[2][4] = {};
  float mass = 0.0f;

  LESS_DEVICE void add(const StoredRows& of, int64_t index, int D, float more) {
    mass += more;
    const float part = more / mass, scale = of.scale(index);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int d = half * 128 + int(threadIdx.x) % 32 * 4;
      if (d >= D) break;
      float other[4];
      // narrow: four numbers a lane, 16 bytes where they are float32
      four_numbers(of.dtype, of.at(index, D), scale, D, d, other);
#pragma unroll
      for (int e = 0; e < 4; ++e) x[half][e] = moved(x[half][e], other[e], part);
    }
  }

  // to [D]: shared.
  LESS_DEVICE void keep(int D, float* to) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int d = half * 128 + int(threadIdx.x) % 32 * 4;
      if (d >= D) break;
      store16_shared(to + d,
                     bits_of<uint4>(make_float4(x[half][0], x[half][1], x[half][2], x[half][3])));
    }
    __syncwarp();
  }
};

// f(i) for those who leave and go into a slot, oldest first; one warp.
template <typename F>
LESS_DEVICE void for_each_in(const int32_t* into, int n, int64_t slot, const F& f) {
#pragma unroll 1
  for (int first = 0; first < n; first += 32) {
    const int at = first + int(threadIdx.x) % 32;
    // narrow: a lane one who leaves, side by side
    unsigned who = __ballot_sync(0xffffffffu, at < n && into[at] == slot);
#pragma unroll 1
    for (; who != 0; who &= who - 1) f(first + __ffs(int(who)) - 1);
  }
}

__global__ void __launch_bounds__(kMergeThreads, 1)
    compact_mean_kernel(const __grid_constant__ CompactParams p,
                        const __grid_constant__ CompactWorkspace w) {
  SMEM_ARRAY(uint8_t, codes, kMergeWarps * 256);
  SMEM_ARRAY(float, rows, kMergeWarps * 256);
  const int n = w.leaving[blockIdx.x];
  if (n == 0) return;
  const HeadRow head(p, blockIdx.x);
  const Slots slots = less::head(p.layout, head.page, head.h).slots;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, D = int(p.spec.D);
  const bool few = packed(p.layout.v_dtype);
  const int64_t left = head.row * p.T;
  const int32_t* const into = w.into + left;
  const int64_t first = slots.W + int64_t{blockIdx.y} * kMergeRows + warp * kMergeEach;
#pragma unroll 1
  for (int64_t slot = first; slot < min(first + kMergeEach, slots.S); ++slot) {
    float score = score_at(few, slots, slot), weight = weight_at(few, slots, slot);
    const float own = mass_of(score);
    int32_t position = slots.position[slot];  // narrow: a number of a row, whose lanes read it
    bool any = false;
    for_each_in(into, n, slot, [&](int i) {
      any = true;
      score += w.left_score[left + i];  // narrow: one number of each row
      // narrow: one number of each row
      weight = both_weights(few, weight, w.left_weight[left + i]);
      position = max(position, w.left_position[left + i]);  // narrow: one number of each row
    });
    if (!any) continue;
#pragma unroll 1
    for (int v = 0; v < 2; ++v) {
      const StoredRows to = cold_rows(p.layout, slots, v == 1), of = w.left(p, head.row, v == 1);
      Mean mean;
      mean.add(to, slot - slots.W, D, own);
      for_each_in(into, n, slot, [&](int i) {
        // narrow: a number of a row, whose lanes read it
        mean.add(of, i, D, mass_of(w.left_score[left + i]));
      });
      mean.keep(D, rows + warp * 256);
      store_row(to, slot - slots.W, lane_row(rows + warp * 256, D), D, codes + warp * 256);
      __syncwarp();
    }
    if (lane != 0) continue;
    store(slots.position + slot, position);
    put_score(few, slots, slot, score);
    put_weight(few, slots, slot, weight);
  }
}

}  // namespace less::cuda
