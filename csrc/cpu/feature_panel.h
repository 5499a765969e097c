// A feature map of many rows at once: features.h, a row in every lane of a panel.
//
// Order: d, e and r ascending in one chain of fma each; a row's bits depend on nothing but the row.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/arena.h"
#include "cpu/features.h"
#include "cpu/panel.h"
#include "cpu/types.h"

namespace less::cpu::LESS_ISA {

class FeaturePanel {
 public:
  // Floats that the constructor takes from the arena.
  static int64_t size(const FeatureMaps& m) {
    return Arena::size(m.D * m.E) + Arena::size(m.E * m.R) + Arena::size(kRows * m.E) +
           Arena::size(std::max<int64_t>(m.E, 2) * kLanes) + Arena::size(m.R * kLanes);
  }

  FeaturePanel(const FeatureMaps& m, Arena& arena)
      : m_(m),
        w1_(arena.take(m.D * m.E)),
        w2_(arena.take(m.E * m.R)),
        rows_(arena.take(kRows * m.E)),
        hidden_(arena.take(std::max<int64_t>(m.E, 2) * kLanes)),
        before_mix_(arena.take(m.R * kLanes)) {}

  // Makes `head` the head that run() evaluates.
  void load(int64_t head) {
    if (head == head_) return;
    head_ = head;
    with_type<RowTypes>(m_.w_dtype,
                        [&](auto type) { load_weights<typename decltype(type)::type>(); });
  }

  // y[r * stride + lane] = map of the row in each lane of x [D][kLanes].
  void run(const float* x, float* y, int64_t stride) const {
    if (m_.kind == MapKind::centroid) return run_centroids(x, y, stride);
    const int64_t E = m_.E, R = m_.R;
    const float* w1_scale = m_.w1_scale == nullptr ? nullptr : m_.w1_scale + head_ * E;
    const float* w2_scale = m_.w2_scale == nullptr ? nullptr : m_.w2_scale + head_ * R;
    panel_product(w1_, m_.D, 1, E, m_.D, x, hidden_, kLanes);
    for_rows(hidden_, kLanes, E, [=](int64_t e, int64_t, Vec a) {
      return gelu(w1_scale == nullptr ? a : a * Vec(w1_scale[e]));
    });
    panel_product(w2_, 1, R, R, E, hidden_, y, stride);
    if (w2_scale != nullptr) {
      for_rows(y, stride, R, [=](int64_t r, int64_t, Vec a) { return a * Vec(w2_scale[r]); });
    }
    if (m_.kind == MapKind::exp) {
      const float* bias = m_.bias == nullptr ? nullptr : m_.bias + head_ * R;
      return for_rows(y, stride, R, [=](int64_t r, int64_t, Vec a) {
        if (bias != nullptr) a = a + Vec(bias[r]);
        return exp_clamped(a);
      });
    }
    if (m_.mix == nullptr) {
      return for_rows(y, stride, R, [](int64_t, int64_t, Vec a) { return abs(gelu(a)); });
    }
    const float* s1 = m_.scale + head_ * R;
    const float* s2 = m_.mix_scale + head_ * R;
    float* h = before_mix_;
    for_rows(y, stride, R, [=](int64_t r, int64_t lane, Vec a) {
      const Vec scaled = abs(Vec(s1[r])) * gelu(a);
      scaled.store(h + r * kLanes + lane);
      return scaled;
    });
    panel_product(m_.mix + head_ * R * R, 1, R, R, R, h, y, stride);
    for_rows(y, stride, R, [=](int64_t r, int64_t lane, Vec mixed) {
      return abs(fma(mixed, Vec(s2[r]), Vec::load(h + r * kLanes + lane)));
    });
  }

 private:
  void run_centroids(const float* x, float* y, int64_t stride) const {
    const int64_t R = m_.R, shared = head_ / m_.group;
    const float* scale = m_.w1_scale == nullptr ? nullptr : m_.w1_scale + shared * R;
    const float* bias = m_.bias + head_ * R;
    const Vec factor(m_.factor[head_]);
    const bool phi = m_.weight == nullptr;
    panel_product(w1_, m_.D, 1, R, m_.D, x, y, stride);
    for_rows(y, stride, R, [=](int64_t r, int64_t, Vec a) {
      if (scale != nullptr) a = a * Vec(scale[r]);
      a = fma(a, factor, Vec(bias[r]));
      return phi ? exp_clamped(a) : a;
    });
    if (phi) return;
    float* const mass = hidden_;          // [kLanes]: what a row's features add up to
    float* const top = hidden_ + kLanes;  // [kLanes]
    panel_product(m_.weight + head_ * m_.D, m_.D, 1, 1, m_.D, x, mass, kLanes);
    std::copy(y, y + kLanes, top);
    for_rows(y, stride, R, [=](int64_t, int64_t lane, Vec a) {
      max(Vec::load(top + lane), a).store(top + lane);
      return a;
    });
    Vec total[kPanelVecs];
    for (int j = 0; j < kPanelVecs; ++j) total[j] = Vec(0.0f);
    for_rows(y, stride, R, [&](int64_t, int64_t lane, Vec a) {
      const Vec e = exp(a - Vec::load(top + lane));
      total[lane / Vec::kSize] = total[lane / Vec::kSize] + e;
      return e;
    });
    const Vec offset(m_.offset[head_]);
    for_rows(mass, kLanes, 1, [&](int64_t, int64_t lane, Vec a) {
      return exp_clamped(a + offset) / total[lane / Vec::kSize];
    });
    for_rows(y, stride, R,
             [=](int64_t, int64_t lane, Vec a) { return a * Vec::load(mass + lane); });
  }

  // x[r][lane] = f(r, lane, x[r][lane]), vector by vector.
  template <typename F>
  static void for_rows(float* x, int64_t stride, int64_t rows, F f) {
    for (int64_t r = 0; r < rows; ++r) {
      for (int j = 0; j < kPanelVecs; ++j) {
        float* at = x + r * stride + j * Vec::kSize;
        f(r, j * Vec::kSize, Vec::load(at)).store(at);
      }
    }
  }

  // Widens the head's weights. W1 is transposed as well: a wide one's columns, read a few at a
  // time, would fall into the same few sets of the first-level cache.
  template <typename W>
  void load_weights() {
    const int64_t D = m_.D, E = m_.E;
    const W* w1 = static_cast<const W*>(m_.w1) + head_ / m_.group * D * E;
    for (int64_t d0 = 0; d0 < D; d0 += kRows) {
      const int64_t count = D - d0 < kRows ? D - d0 : kRows;
      widen(w1 + d0 * E, count * E, rows_);
      for (int64_t e = 0; e < E; ++e) {
        for (int64_t d = 0; d < count; ++d) w1_[e * D + d0 + d] = rows_[d * E + e];
      }
    }
    if (m_.w2 != nullptr) widen(static_cast<const W*>(m_.w2) + head_ * E * m_.R, E * m_.R, w2_);
  }

  static constexpr int64_t kRows = 16;  // of W1 that are transposed at once

  const FeatureMaps& m_;
  float* const w1_;          // [E, D]
  float* const w2_;          // [E, R]
  float* const rows_;        // [kRows, E]
  float* const hidden_;      // [E][kLanes], two rows or more
  float* const before_mix_;  // [R][kLanes]
  int64_t head_ = -1;
};

}  // namespace less::cpu::LESS_ISA
