// The call's tokens join the slots. Of slots and call the S highest ranks stay, of equals the older
// leaves first; what leaves is folded, H += psi(k)^T v, z += psi(k), and forgotten.
//
// Range:  heads (b,k); one call owns each head whole.
// Memory: the keys and values that leave are read once, those of the call that stay are copied.
// Order:  leavers fold in ascending position; kept tokens of the call take the free slots in
//         ascending order: neither the thread count nor the rest of the batch changes a bit.
#include <algorithm>
#include <cstring>
#include <type_traits>
#include <vector>

#include "cpu/features.h"

namespace less::cpu::LESS_ISA {
namespace {

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
      : p_(p), scratch_(p.H == nullptr ? 0 : features_scratch(p.psi) + p.R + 2 * p.D) {}

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
      std::nth_element(tokens_.begin(), tokens_.begin() + (leaving - 1), tokens_.end(),
                       leaves_before);
      std::sort(tokens_.begin(), tokens_.begin() + leaving,
                [](const Candidate& a, const Candidate& b) { return a.position < b.position; });
      for (int64_t i = 0; i < leaving; ++i) {
        const int64_t source = tokens_[i].source;
        if (p_.H != nullptr) fold(row, source);
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

  void fold(int64_t row, int64_t source) {
    const int64_t D = p_.D, R = p_.R, S = p_.slots.S;
    float* psi = scratch_.data() + features_scratch(p_.psi);
    float* key = psi + R;
    float* value = key + D;
    float k_scale = 1.0f, v_scale = 1.0f;
    if constexpr (kScaled) {
      const int64_t at = source < S ? row * S + source : row * p_.T + (source - S);
      k_scale = (source < S ? p_.slots.k_scale : p_.k_scale)[at];
      v_scale = (source < S ? p_.slots.v_scale : p_.v_scale)[at];
    }
    widen_row(source < S ? slot_k_ + source * D : k_ + (source - S) * D, k_scale, D, key);
    widen_row(source < S ? slot_v_ + source * D : v_ + (source - S) * D, v_scale, D, value);
    features(p_.psi, row % p_.K, key, scratch_.data(), psi);
    float* z = p_.z + row * R;
    for (int64_t r = 0; r < R; ++r) {
      z[r] += psi[r];
      const Vec weight(psi[r]);
      for_each(p_.H + (row * R + r) * D, D, [weight, value](Vec h, int64_t d, int n) {
        return fma(weight, n == Vec::kSize ? Vec::load(value + d) : Vec::load(value + d, n), h);
      });
    }
  }

  const CompactParams& p_;
  std::vector<float> scratch_;
  std::vector<int32_t> chunk_position_;
  std::vector<Candidate> tokens_;
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
  }
}

}  // namespace less::cpu::LESS_ISA
