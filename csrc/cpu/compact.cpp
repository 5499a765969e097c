// The call's tokens join the slots. Of slots and call the S highest ranks stay, of equals the older
// leaves first; what leaves is folded, H += psi(k)^T v, z += psi(k), and forgotten.
//
// Range:  heads (b,k); one call owns each head whole.
// Memory: the keys and values that leave are read once, those of the call that stay are copied;
//         scratch is one tile of tokens, and a few bytes for each candidate.
// Order:  leavers fold in ascending position; kept tokens of the call take the free slots in
//         ascending order: neither the thread count nor the rest of the batch changes a bit.
#include <algorithm>
#include <cstring>
#include <optional>
#include <type_traits>
#include <vector>

#include "cpu/feature_panel.h"
#include "cpu/fold.h"

namespace less::cpu::LESS_ISA {
namespace {

constexpr int64_t kTokens = 2 * kLanes;  // that are folded at once

struct Candidate {
  float rank;
  int32_t position;
  int32_t source;  // slot, or S + index in the call
};

bool leaves_before(const Candidate& a, const Candidate& b) {
  return a.rank != b.rank ? a.rank < b.rank : a.position < b.position;
}

float rank_of(const CompactParams& p, int64_t n, int32_t position, float score) {
  if (position >= n - p.rule.recent || position < p.rule.sinks) return kInfinity;
  if (!p.rule.by_score) return -kInfinity;
  const float rank = p.rule.per_age ? score / float(n - position) : score;
  return rank == rank ? rank : -kInfinity;
}

template <typename T>
class Head {
 public:
  explicit Head(const CompactParams& p)
      : p_(p),
        arena_(p.H == nullptr ? 0
                              : FeaturePanel::size(p.psi) + Arena::size(p.D * kLanes) +
                                    Arena::size(p.R * kTokens) + Arena::size(kTokens * p.D) +
                                    Arena::size(p.D) + Arena::size(features_scratch(p.psi))) {
    if (p.H == nullptr) return;
    psi_.emplace(p.psi, arena_);
    keys_ = arena_.take(p.D * kLanes);
    features_ = arena_.take(p.R * kTokens);
    values_ = arena_.take(kTokens * p.D);
    row_ = arena_.take(p.D);
    scratch_ = arena_.take(features_scratch(p.psi));
  }

  void run(int64_t row) {
    const int64_t b = row / p_.K, S = p_.slots.S, T_ = p_.T;
    k_ = static_cast<const T*>(p_.k) + row * T_ * p_.D;
    v_ = static_cast<const T*>(p_.v) + row * T_ * p_.D;
    slot_k_ = static_cast<T*>(p_.slots.k) + row * S * p_.D;
    slot_v_ = static_cast<T*>(p_.slots.v) + row * S * p_.D;
    int32_t* position = p_.slots.position + row * S;
    float* score = p_.slots.score + row * S;
    const float* slot_score = p_.slot_score + row * S;
    const float* chunk_score = p_.chunk_score + row * T_;
    const float* rank = p_.rank == nullptr ? nullptr : p_.rank + row * (S + T_);

    int64_t n = p_.seen[b];
    chunk_position_.assign(T_, -1);
    for (int64_t t = 0; t < T_; ++t) {
      if (p_.valid == nullptr || p_.valid[b * T_ + t]) chunk_position_[t] = int32_t(n++);
    }
    tokens_.clear();
    const auto add = [&](int64_t source, int32_t at, float s) {
      if (at < 0) return;
      float r = rank == nullptr ? rank_of(p_, n, at, s) : rank[source];
      if (r != r) r = -kInfinity;
      tokens_.push_back({r, at, int32_t(source)});
    };
    for (int64_t s = 0; s < S; ++s) add(s, position[s], slot_score[s]);
    for (int64_t t = 0; t < T_; ++t) add(S + t, chunk_position_[t], chunk_score[t]);

    std::copy(slot_score, slot_score + S, score);
    const int64_t leaving = std::max<int64_t>(0, int64_t(tokens_.size()) - S);
    if (leaving > 0) {
      choose(leaving, position);
      if (p_.H != nullptr) fold(row);
      for (int32_t source : leaving_) {
        if (source < S) {
          position[source] = -1;
          score[source] = 0.0f;
          p_.slots.weight[row * S + source] = 0.0f;
        } else {
          chunk_position_[source - S] = -1;
        }
      }
    }
    int64_t slot = 0;
    for (int64_t t = 0; t < T_; ++t) {
      if (chunk_position_[t] < 0) continue;
      while (position[slot] >= 0) ++slot;
      std::memcpy(slot_k_ + slot * p_.D, k_ + t * p_.D, p_.D * sizeof(T));
      std::memcpy(slot_v_ + slot * p_.D, v_ + t * p_.D, p_.D * sizeof(T));
      if constexpr (kScaled) {
        p_.slots.k_scale[row * S + slot] = p_.k_scale[row * T_ + t];
        p_.slots.v_scale[row * S + slot] = p_.v_scale[row * T_ + t];
      }
      position[slot] = chunk_position_[t];
      score[slot] = chunk_score[t];
    }
  }

 private:
  static constexpr bool kScaled = std::is_same_v<T, int8_t>;

  // Lists the sources of the `leaving` lowest candidates by ascending position. Only slots need
  // sorting: the call's tokens are younger, and in order.
  void choose(int64_t leaving, const int32_t* position) {
    const int64_t S = p_.slots.S;
    std::nth_element(tokens_.begin(), tokens_.begin() + (leaving - 1), tokens_.end(),
                     leaves_before);
    leaving_.clear();
    leaves_call_.assign(p_.T, 0);
    for (int64_t i = 0; i < leaving; ++i) {
      const int32_t source = tokens_[i].source;
      if (source < S) {
        leaving_.push_back(source);
      } else {
        leaves_call_[source - S] = 1;
      }
    }
    std::sort(leaving_.begin(), leaving_.end(),
              [position](int32_t a, int32_t b) { return position[a] < position[b]; });
    for (int64_t t = 0; t < p_.T; ++t) {
      if (leaves_call_[t]) leaving_.push_back(int32_t(S + t));
    }
  }

  // The key or value of a candidate, as floats.
  void load(const T* slots, const T* call, const float* slot_scale, const float* call_scale,
            int64_t row, int64_t source, float* out) const {
    const int64_t D = p_.D, S = p_.slots.S;
    const bool kept = source < S;
    const int64_t i = kept ? source : source - S;
    float scale = 1.0f;
    if constexpr (kScaled) scale = kept ? slot_scale[row * S + i] : call_scale[row * p_.T + i];
    widen_row((kept ? slots : call) + i * D, scale, D, out);
  }

  void load_key(int64_t row, int64_t source, float* out) const {
    load(slot_k_, k_, p_.slots.k_scale, p_.k_scale, row, source, out);
  }

  void load_value(int64_t row, int64_t source, float* out) const {
    load(slot_v_, v_, p_.slots.v_scale, p_.v_scale, row, source, out);
  }

  // Folds those who leave. Few are taken one by one, by the loops of decode_step:
  // a panel that is hardly filled costs more.
  void fold(int64_t row) {
    const int64_t D = p_.D, R = p_.R, head = row % p_.K, leaving = int64_t(leaving_.size());
    const bool few = leaving < kLanes / 2;
    if (!few) psi_->load(head);
    for (int64_t first = 0; first < leaving; first += kTokens) {
      const int64_t count = std::min(kTokens, leaving - first);
      const int32_t* source = leaving_.data() + first;
      for (int64_t n = 0; n < count; ++n) load_value(row, source[n], values_ + n * D);
      if (few) {
        for (int64_t n = 0; n < count; ++n) {
          load_key(row, source[n], row_);
          features(p_.psi, head, row_, scratch_, features_ + n * R);
        }
      } else {
        for (int64_t lane = 0; lane < count; lane += kLanes) {
          const int64_t rows = std::min(kLanes, count - lane);
          if (rows < kLanes) std::fill(keys_, keys_ + D * kLanes, 0.0f);
          for (int64_t n = 0; n < rows; ++n) {
            load_key(row, source[lane + n], row_);
            put_lane(row_, D, n, keys_);
          }
          psi_->run(keys_, features_ + lane, kTokens);
        }
      }
      fold_tokens(features_, few ? 1 : kTokens, few ? R : 1, values_, D, count, R, D,
                  p_.H + row * R * D, p_.z + row * R);
    }
  }

  const CompactParams& p_;
  Arena arena_;
  std::optional<FeaturePanel> psi_;
  float* keys_ = nullptr;      // [D][kLanes]
  float* features_ = nullptr;  // [R, kTokens], or [kTokens, R] of few
  float* values_ = nullptr;    // [kTokens, D]
  float* row_ = nullptr;       // [D]
  float* scratch_ = nullptr;   // of features()
  std::vector<int32_t> chunk_position_;
  std::vector<Candidate> tokens_;
  std::vector<int32_t> leaving_;      // sources, by ascending position
  std::vector<uint8_t> leaves_call_;  // [T]
  const T* k_ = nullptr;
  const T* v_ = nullptr;
  T* slot_k_ = nullptr;
  T* slot_v_ = nullptr;
};

template <typename T>
void compact_heads(const CompactParams& p, int64_t begin, int64_t end) {
  Head<T> head(p);
  for (int64_t row = begin; row < end; ++row) head.run(row);
}

}  // namespace

void compact(const CompactParams& p, int64_t begin, int64_t end) {
  switch (p.slots.dtype) {
    case DType::f32:
      return compact_heads<float>(p, begin, end);
    case DType::bf16:
      return compact_heads<bf16>(p, begin, end);
    case DType::fp16:
      return compact_heads<fp16>(p, begin, end);
    case DType::i8:
      return compact_heads<int8_t>(p, begin, end);
    case DType::fp8:
      return;  // no op lets it in
  }
}

}  // namespace less::cpu::LESS_ISA
