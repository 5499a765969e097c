// score[j] = sum over the queries of j's group from token j on of e^(l - lse) decay^(tokens after),
// l = scale q.k, or softcap tanh(scale q.k / softcap)
//
// prompt_masses: range (b, query head, kAttentionBlock tokens): lse, where none was given. Queries
//   lie in the lanes of panels (panel.h), keys pass by in tiles.
// prompt_scores: range (b, kv head, kAttentionBlock tokens). Keys lie in the lanes, queries pass
// by. Memory: keys, or queries, are widened once per block of the others; scratch is O(1), never T
// x T. Order:  keys ascending; queries ascending, token by token. Tokens are counted without
// padding:
//   neither the thread count nor the rest of the batch changes a bit.
#include <algorithm>
#include <cfloat>
#include <cmath>
#include <vector>

#include "cpu/arena.h"
#include "cpu/codec.h"
#include "cpu/features.h"
#include "cpu/panel.h"
#include "cpu/softmax.h"

namespace less::cpu::LESS_ISA {
namespace {

constexpr int64_t kRows = 96;  // that pass by at once: a multiple of every kGroup

// What a thread needs for its blocks of tokens; they are counted without padding.
class Blocks {
 public:
  explicit Blocks(const PromptScoresParams& p)
      : p_(p),
        keys_(
            stored(p.k_dtype, const_cast<void*>(p.k), const_cast<float*>(p.k_scale), nullptr, p.D)),
        G_(p.Q / p.K),
        arena_(Arena::size(p.D * kLanes) + Arena::size(kRows * p.D) + Arena::size(kRows * kLanes) +
               Arena::size(p.D) + Arena::size(kLanes) * 2),
        panel_(arena_.take(p.D * kLanes)),
        rows_(arena_.take(kRows * p.D)),
        logits_(arena_.take(kRows * kLanes)),
        row_(arena_.take(p.D)),
        sums_(arena_.take(kLanes)),
        tops_(arena_.take(kLanes)) {}

  // lse of a block of a query head's tokens.
  void masses(int64_t head, int64_t block) {
    gather(head / p_.Q);
    const int64_t kv = head / p_.Q * p_.K + head % p_.Q / G_;
    if (block == 0) write_padding(head / p_.Q, p_.lse + head * p_.T);
    for_panels(block, [&](int64_t first, int64_t count) {
      for (int64_t i = 0; i < count; ++i) {
        query(head * p_.T + token_[first + i], row_);
        put_lane(row_, p_.D, i, panel_);
      }
      mass(kv, first, first + count);
      for (int64_t i = 0; i < count; ++i) {
        p_.lse[head * p_.T + token_[first + i]] = tops_[i] + std::log(sums_[i]);
      }
    });
  }

  // score of a block of a kv head's tokens.
  void scores(int64_t kv, int64_t block) {
    gather(kv / p_.K);
    if (block == 0) write_padding(kv / p_.K, p_.score + kv * p_.T);
    for_panels(block, [&](int64_t first, int64_t count) {
      for (int64_t i = 0; i < count; ++i) {
        key(kv * p_.T + token_[first + i], row_);
        put_lane(row_, p_.D, i, panel_);
      }
      score(kv / p_.K * p_.Q + kv % p_.K * G_, first);
      for (int64_t i = 0; i < count; ++i) p_.score[kv * p_.T + token_[first + i]] = sums_[i];
    });
  }

 private:
  int64_t tokens() const { return int64_t(token_.size()); }

  // The valid tokens of a row of the batch.
  void gather(int64_t b) {
    if (b == row_of_batch_) return;
    row_of_batch_ = b;
    token_.clear();
    for (int64_t t = 0; t < p_.T; ++t) {
      if (p_.valid == nullptr || p_.valid[b * p_.T + t]) token_.push_back(t);
    }
  }

  void write_padding(int64_t b, float* of_tokens) const {
    for (int64_t t = 0; t < p_.T && p_.valid != nullptr; ++t) {
      if (!p_.valid[b * p_.T + t]) of_tokens[t] = 0.0f;
    }
  }

  // run(first, count) for the panels of tokens of a block.
  template <typename Run>
  void for_panels(int64_t block, const Run& run) const {
    const int64_t end = std::min(tokens(), (block + 1) * kAttentionBlock);
    for (int64_t first = block * kAttentionBlock; first < end; first += kLanes) {
      run(first, std::min(kLanes, end - first));
    }
  }

  void query(int64_t at, float* out) const { widen(p_.q, p_.q_dtype, at * p_.D, p_.D, out); }

  void key(int64_t at, float* out) const { decode_row(keys_, at, p_.D, out); }

  // logits_ of the panel and `count` rows.
  void multiply(int64_t count) {
    const Vec scale(p_.scale);
    for_groups<kGroup<kPanelVecs>>(count, [&](auto group, int64_t n) {
      Vec l[group][kPanelVecs];
      chained_products<group, kPanelVecs>(rows_ + n * p_.D, panel_, p_.D, l);
      for (int i = 0; i < group; ++i) {
        for (int j = 0; j < kPanelVecs; ++j) {
          Vec x = l[i][j] * scale;
          if (p_.softcap != 0.0f) x = soft_cap(x, p_.softcap);
          x.store(logits_ + (n + i) * kLanes + j * Vec::kSize);
        }
      }
    });
  }

  // tops_ and sums_ of the panel's queries, first and on, over the keys that each sees.
  void mass(int64_t kv, int64_t first, int64_t keys) {
    Vec top[kPanelVecs], sum[kPanelVecs];
    for (int j = 0; j < kPanelVecs; ++j) {
      top[j] = Vec(-FLT_MAX);
      sum[j] = Vec(0.0f);
    }
    for (int64_t tile = 0; tile < keys; tile += kRows) {
      const int64_t count = std::min(kRows, keys - tile);
      for (int64_t n = 0; n < count; ++n) key(kv * p_.T + token_[tile + n], rows_ + n * p_.D);
      multiply(count);
      for (int j = 0; j < kPanelVecs; ++j) {
        const Vec lane(iota() + Int(j * Vec::kSize));
        Vec largest = top[j];
        for (int64_t n = 0; n < count; ++n) {
          float* l = logits_ + n * kLanes + j * Vec::kSize;
          const Int seen = Vec(float(tile + n - first - 1)) < lane;
          const Vec x = select(seen, Vec::load(l), Vec(-kInfinity));
          x.store(l);
          largest = max(largest, x);
        }
        sum[j] = sum[j] * exp(top[j] - largest);
        top[j] = largest;
        for (int64_t n = 0; n < count; ++n) {
          sum[j] = sum[j] + exp(Vec::load(logits_ + n * kLanes + j * Vec::kSize) - largest);
        }
      }
    }
    for (int j = 0; j < kPanelVecs; ++j) {
      top[j].store(tops_ + j * Vec::kSize);
      sum[j].store(sums_ + j * Vec::kSize);
    }
  }

  // sums_ of what the panel's keys, first and on, receive from the group whose first head this is.
  void score(int64_t head, int64_t first) {
    Vec sum[kPanelVecs];
    for (int j = 0; j < kPanelVecs; ++j) sum[j] = Vec(0.0f);
    for (int64_t tile = first * G_; tile < tokens() * G_; tile += kRows) {
      const int64_t count = std::min(kRows, tokens() * G_ - tile);
      const auto at = [&](int64_t m) { return (head + m % G_) * p_.T + token_[m / G_]; };
      for (int64_t n = 0; n < count; ++n) query(at(tile + n), rows_ + n * p_.D);
      multiply(count);
      for (int64_t n = 0; n < count; ++n) {
        const int64_t i = (tile + n) / G_;
        const Vec lse(p_.lse[at(tile + n)]), fade(power(p_.decay, tokens() - 1 - i));
        for (int j = 0; j < kPanelVecs; ++j) {
          const Vec lane(iota() + Int(j * Vec::kSize));
          const Vec e = exp(Vec::load(logits_ + n * kLanes + j * Vec::kSize) - lse);
          const Int seen = lane < Vec(float(i - first + 1));
          sum[j] = fma(select(seen, e, Vec(0.0f)), fade, sum[j]);
        }
      }
    }
    for (int j = 0; j < kPanelVecs; ++j) sum[j].store(sums_ + j * Vec::kSize);
  }

  const PromptScoresParams& p_;
  const Stored keys_;  // [B, K, T, D], only read
  const int64_t G_;
  Arena arena_;
  float* const panel_;   // [D][kLanes]
  float* const rows_;    // [kRows, D]
  float* const logits_;  // [kRows][kLanes]
  float* const row_;     // [D]
  float* const sums_;    // [kLanes]
  float* const tops_;    // [kLanes]
  std::vector<int64_t> token_;
  int64_t row_of_batch_ = -1;
};

}  // namespace

void prompt_masses(const PromptScoresParams& p, int64_t begin, int64_t end) {
  Blocks blocks(p);
  const int64_t count = (p.T + kAttentionBlock - 1) / kAttentionBlock;
  for (int64_t item = begin; item < end; ++item) blocks.masses(item / count, item % count);
}

void prompt_scores(const PromptScoresParams& p, int64_t begin, int64_t end) {
  Blocks blocks(p);
  const int64_t count = (p.T + kAttentionBlock - 1) / kAttentionBlock;
  for (int64_t item = begin; item < end; ++item) blocks.scores(item / count, item % count);
}

}  // namespace less::cpu::LESS_ISA
