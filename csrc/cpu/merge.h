// Merging (common/merge.h): means, and the targets of many. Of a leaver i and the target j that
// takes it in, k_j and v_j move by w_i / (w_i + w_j) of the way to k_i and v_i.
//
// Order: means are one float rounding an operation, never fma().
#pragma once

#include <algorithm>
#include <cmath>

#include "common/merge.h"
#include "cpu/codec.h"
#include "cpu/panel.h"
#include "cpu/softmax.h"

namespace less::cpu::LESS_ISA {

// x [D] moves by `part` of the way to y.
LESS_INLINE void move_towards(const float* y, float part, int64_t D, float* x) {
  for_each(x, D,
           [=](Vec a, int64_t d, int n) { return a + Vec(part) * (load_some(y + d, n) - a); });
}

// Row j of `to` moves by `part` of the way to row i of `from`. x, y: [D] of scratch.
inline void merge_row(const Stored& from, int64_t i, float part, int64_t D, float* x, float* y,
                      const Stored& to, int64_t j) {
  decode_row(to, j, D, x);
  decode_row(from, i, D, y);
  move_towards(y, part, D, x);
  encode_row(to, j, x, D);
}

// nearest[lane]: which of N targets takes the leaver of a lane in, -1: none does. Targets come in
// ascending position: keys [N, D], weights [N]. Leavers are a panel of keys, weights [kLanes].
inline void nearest_targets(const float* keys, const float* weight, int64_t N, int64_t D,
                            const float* leaver, const float* leaver_weight, int32_t* nearest) {
  constexpr int kVecs = kPanelVecs;
  Vec lowest[kVecs], w[kVecs];
  Int index[kVecs];
  for (int j = 0; j < kVecs; ++j) {
    lowest[j] = Vec(kInfinity);
    index[j] = Int(-1);
    w[j] = Vec::load(leaver_weight + j * Vec::kSize);
  }
  for_groups<kGroup<kVecs>>(N, [&](auto group, int64_t n) {
    Vec far[group][kVecs];
    zero(far);
    for (int64_t d = 0; d < D; ++d) {
      Vec lane[kVecs];
      for (int j = 0; j < kVecs; ++j) lane[j] = Vec::load(leaver + d * kLanes + j * Vec::kSize);
      for (int i = 0; i < group; ++i) {
        const Vec x(keys[(n + i) * D + d]);
        for (int j = 0; j < kVecs; ++j) {
          const Vec apart = x - lane[j];
          far[i][j] = fma(apart, apart, far[i][j]);
        }
      }
    }
    for (int i = 0; i < group; ++i) {
      for (int j = 0; j < kVecs; ++j) {
        const Vec cost = merge_cost(w[j], Vec(weight[n + i]), far[i][j]);
        const Int better = cost < lowest[j];
        lowest[j] = select(better, cost, lowest[j]);
        index[j] = select(better, Int(int32_t(n + i)), index[j]);
      }
    }
  });
  for (int j = 0; j < kVecs; ++j) index[j].store(nearest + j * Vec::kSize);
}

}  // namespace less::cpu::LESS_ISA
