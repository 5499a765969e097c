// A block's tiles of chunk_attention.cu: keys and values on their way through shared memory, and
// what a tile adds to the softmax of the queries.
#pragma once

#include "cuda/row_tiles.h"

namespace less::cuda {

constexpr int kStateRows = 16;  // rows of H in shared memory at once

template <typename Scheme, int kD>
struct AttendShape {
  // Warps that share 16 rows, each with a part of the columns of out: 64 accumulators are enough.
  static constexpr int kSharers = kD > 128 ? 2 : 1;
  static constexpr int kColumns = kD / kSharers;  // of a warp
  static constexpr int kRows = kIsWide<Scheme> && kD > 128 ? 32 : 64;
  static constexpr int kKeys =
      (kIsWide<Scheme> ? 32 : 64) / (kD > 128 || (!kIsPlain<Scheme> && kD > 96) ? 2 : 1);
  static constexpr int kThreads = kRows * 2 * kSharers;
  static constexpr int kStages = kIsPlain<Scheme> ? 2 : 1;  // of keys and values
  // On a multiprocessor at least, which leaves a thread 255 registers; 0: fewer, as the compiler
  // guesses, where its guess spills nothing.
  static constexpr int kBlocks = kIsPlain<Scheme> && kD != 96 ? 0 : 256 / kThreads;
  // Keys' weights, of even and of odd tiles; then who was last; and, at the end, two numbers of
  // each row, with gaps.
  static constexpr int kNumbers = 2 * (kRows + 16);
  static_assert(kKeys <= kRows);
  static constexpr int kKeyTile = Scheme::kParts * kKeys * kD;
  static constexpr int kValueTile = Scheme::kValueParts * kKeys * kD;

  // The first of the warp's 16 rows, of the block's, and of its columns.
  static LESS_DEVICE int row() { return int(threadIdx.x) / (32 * kSharers) * 16; }
  static LESS_DEVICE int column() { return int(threadIdx.x) / 32 % kSharers * kColumns; }
};

// A key's log-weight, in units of log 2, and the scales of its rows.
struct Factors {
  float weight, k, v;
};

template <typename Scheme, int kD>
struct AttendShared {
  using Shape = AttendShape<Scheme, kD>;
  uint16_t* q;    // a tile; at the end, the block's rows of out
  uint16_t* k;    // [kStages] tiles; at the end, rows of H
  uint16_t* v;    // [kStages] tiles; at the end, [kRows, kStateRows] of phi
  float* weight;  // [2, kKeys], as the scales, of the keys of even and of odd tiles; [kNumbers]
  float* k_scale;
  float* v_scale;

  __host__ __device__ AttendShared(SharedCarver& c)
      : q(c.take<uint16_t>(Scheme::kParts * Shape::kRows * kD)),
        k(c.take<uint16_t>(Shape::kStages * Shape::kKeyTile)),
        v(c.take<uint16_t>(Shape::kStages * Shape::kValueTile)),
        weight(c.take<float>(Shape::kNumbers)),
        k_scale(Scheme::kScaled ? c.take<float>(2 * Shape::kKeys) : nullptr),
        v_scale(Scheme::kScaled ? c.take<float>(2 * Shape::kKeys) : nullptr) {}
};

// Tiles on their way to shared memory: of the source that was entered last.
template <typename Scheme, int kD>
class Stream {
  using Shape = AttendShape<Scheme, kD>;

 public:
  // The next tile is the source's `tile`th.
  LESS_DEVICE void enter(const Source& from, int tile) {
    from_ = from;
    first_ = (tile - 1) * Shape::kKeys;
  }

  // Begins to load the next tile, by way of shared memory or of registers.
  LESS_DEVICE void fetch(int64_t D, uint16_t* k, uint16_t* v) {
    first_ += Shape::kKeys;
    if constexpr (kIsPlain<Scheme>) {
      copy_rows<kD, Shape::kKeys, Shape::kThreads>(from_.k, D, k_rows(), k);
      if (from_.v != nullptr) copy_rows<kD, Shape::kKeys, Shape::kThreads>(from_.v, D, v_rows(), v);
    } else if constexpr (!kIsWide<Scheme>) {
      k_.fetch(from_.k, D, k_rows());
      if (from_.v != nullptr) v_.fetch(from_.v, D, v_rows());
    }
    if (int(threadIdx.x) >= Shape::kKeys) return;
    factors_ = {-kInfinity, 1.0f, 1.0f};
    const int64_t at = row(int(threadIdx.x));
    if (at < 0) return;
    factors_.weight = log_weight_of<kIsWide<Scheme>>(from_, at);
    if constexpr (kIsWide<Scheme>) {
      const int64_t n = at - from_.base;
      if (from_.k_scale != nullptr) factors_.k = scale_at(from_.k_scale, from_.k_dtype, n);
      if (from_.v_scale != nullptr) factors_.v = scale_at(from_.v_scale, from_.v_dtype, n);
    } else if constexpr (Scheme::kScaled) {
      if (from_.k_scale != nullptr) factors_.k = scale_at(from_.k_scale, DType::i8, at);
      if (from_.v_scale != nullptr) factors_.v = scale_at(from_.v_scale, DType::i8, at);
    }
  }

  // What came through registers, to shared memory.
  LESS_DEVICE void place(DType dtype, int64_t D, uint16_t* k, uint16_t* v) const {
    using KeyTag = typename Scheme::KeyTag;
    using ValueTag = typename Scheme::ValueTag;
    if constexpr (kIsWide<Scheme>) {
      split_rows<KeyTag, Scheme::kParts, kD, Shape::kKeys, Shape::kThreads>(from_.k, from_.k_dtype,
                                                                            D, k_rows(), k);
      if (from_.v == nullptr) return;
      split_rows<ValueTag, Scheme::kValueParts, kD, Shape::kKeys, Shape::kThreads>(
          from_.v, from_.v_dtype, D, v_rows(), v);
    } else if constexpr (!kIsPlain<Scheme>) {
      k_.template place<KeyTag>(dtype, k);
      if (from_.v != nullptr) v_.template place<ValueTag>(dtype, v);
    }
  }

  LESS_DEVICE void place_factors(const AttendShared<Scheme, kD>& shared, int tile) const {
    const int half = tile % 2;
    const int key = int(threadIdx.x), at = half * Shape::kKeys + key;
    if (key >= Shape::kKeys) return;
    shared.weight[at] = factors_.weight;
    if constexpr (Scheme::kScaled) {
      shared.k_scale[at] = factors_.k;
      shared.v_scale[at] = factors_.v;
    }
  }

 private:
  LESS_DEVICE int64_t row(int r) const {
    const int n = first_ + r;
    // narrow: a number of a row, whose lanes read it
    return n >= from_.count ? -1 : from_.index == nullptr ? n : from_.index[n];
  }
  // Elements from the first row to row r of the tile; < 0: there is none.
  LESS_DEVICE auto k_rows() const {
    return [this](int r) {
      const int64_t n = row(r);
      return n < 0 ? -1 : (kIsWide<Scheme> ? n - from_.base : n) * from_.k_step;
    };
  }
  LESS_DEVICE auto v_rows() const {
    return [this](int r) {
      const int64_t n = row(r);
      return n < 0 ? -1 : (kIsWide<Scheme> ? n - from_.base : n) * from_.v_step;
    };
  }

  struct Nothing {};
  using Through = std::conditional_t<kIsPlain<Scheme> || kIsWide<Scheme>, Nothing,
                                     Bytes<kD, Shape::kKeys, Shape::kThreads>>;

  Source from_;
  int first_;  // of the tile fetched last
  Through k_, v_;
  Factors factors_;
};

// The softmax of a thread's two rows, lane / 4 and lane / 4 + 8 of its warp's 16, as far as it has
// come; logarithms to base 2.
template <int kColumns>
struct Running {
  float top[2];                // largest logit
  float total[2];              // sum of e^(l - top), of this lane's keys
  float out[kColumns / 8][4];  // sum of e^(l - top) v, as a fragment

  LESS_DEVICE Running() {
    top[0] = top[1] = -kInfinity;
    total[0] = total[1] = 0.0f;
#pragma unroll
    for (int n = 0; n < kColumns / 8; ++n) out[n][0] = out[n][1] = out[n][2] = out[n][3] = 0.0f;
  }
};

// s becomes e^(l - top) of a tile, of keys that the rows see: where key G is at most seen[0],
// seen[1]. Returns what the sums so far shrink by.
template <typename Scheme, int kKeys, int kColumns>
LESS_DEVICE float2 weigh_keys(const Logit& logit, const float* weight, const float* k_scale,
                              bool masked, int G, const int (&seen)[2], float (&s)[kKeys / 8][4],
                              Running<kColumns>& so_far) {
  const int lane = int(threadIdx.x) % 32;
  const auto factor = [&](int n, int j) {
    if constexpr (!Scheme::kScaled) return logit.scale;
    return logit.scale * k_scale[8 * n + lane % 4 * 2 + j % 2];
  };
  const bool capped = logit.cap(s, factor);
  float top[2] = {so_far.top[0], so_far.top[1]};
#pragma unroll
  for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int key = 8 * n + lane % 4 * 2 + j % 2;
      s[n][j] = fmaf(s[n][j], capped ? 1.0f : factor(n, j), weight[key]);
      if (masked && key * G > seen[j / 2]) s[n][j] = -kInfinity;
      top[j / 2] = fmaxf(top[j / 2], s[n][j]);
    }
  }
  float shrink[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    top[i] = max_of_quad(top[i]);
    const float from = top[i] == -kInfinity ? 0.0f : top[i];
    shrink[i] = exp2_approx(so_far.top[i] - from);
    so_far.top[i] = top[i];
    float total = 0.0f;
#pragma unroll
    for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
      for (int j = 2 * i; j < 2 * i + 2; ++j) {
        s[n][j] = exp2_approx(s[n][j] - from);
        total += s[n][j];
      }
    }
    so_far.total[i] = fmaf(so_far.total[i], shrink[i], total);
  }
  return make_float2(shrink[0], shrink[1]);
}

// out = out shrink + s v, s being a tile's e^(l - top), v's columns those from `column` on.
template <typename Scheme, int kKeys, int kD, int kColumns>
LESS_DEVICE void add_values(const float (&s)[kKeys / 8][4], const float* v_scale, const uint16_t* v,
                            int column, float2 shrink, float (&out)[kColumns / 8][4]) {
  using Tag = typename Scheme::ValueTag;
  constexpr int kParts = Scheme::kWeightParts;
  const int lane = int(threadIdx.x) % 32;
  static_assert(kColumns == kD || kColumns % 64 == 0, "permuted pieces are one warp's");
  const Pieces<kD> of_v(v + column, lane % 16, lane / 16);
  uint32_t left[kKeys / 16][kParts][4];
#pragma unroll
  for (int n = 0; n < kKeys / 8; ++n) {
    float a = 1.0f, b = 1.0f;
    if constexpr (Scheme::kScaled) {
      a = v_scale[8 * n + lane % 4 * 2];
      b = v_scale[8 * n + lane % 4 * 2 + 1];
    }
    uint32_t upper[kParts], lower[kParts];
    split<Tag>(s[n][0] * a, s[n][1] * b, upper);
    split<Tag>(s[n][2] * a, s[n][3] * b, lower);
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      left[n / 2][part][n % 2 * 2] = upper[part];
      left[n / 2][part][n % 2 * 2 + 1] = lower[part];
    }
  }
#pragma unroll
  for (int d = 0; d < kColumns / 16; ++d) {
    float sum[2][4] = {};
#pragma unroll
    for (int n = 0; n < kKeys / 16; ++n) {
#pragma unroll
      for (int part = 0; part < Scheme::kValueParts; ++part) {
        uint32_t right[4];
        ldmatrix_x4_trans(right, of_v.at(part * (kKeys / 16) + n, d));
        const uint32_t first[2] = {right[0], right[1]}, second[2] = {right[2], right[3]};
#pragma unroll
        for (int other = 0; other < kParts - part; ++other) {
          mma_m16n8k16(sum[0], left[n][other], first, Tag{});
          mma_m16n8k16(sum[1], left[n][other], second, Tag{});
        }
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        float& o = out[2 * d + half][j];
        o = fmaf(o, j < 2 ? shrink.x : shrink.y, sum[half][j]);
      }
    }
  }
}

}  // namespace less::cuda
