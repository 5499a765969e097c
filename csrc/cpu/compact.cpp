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
#include "cpu/types.h"

namespace less::cpu::LESS_ISA {
namespace {

constexpr int64_t kTokens = 2 * kLanes;  // that are folded at once

struct Candidate {
  float rank;
  int32_t position;
  int32_t source;  // slot, or layout.S + index in the call
};

// The keys or values of a head and of its call.
template <typename T>
struct Kept {
  T* slots;           // [S, D]
  float* slot_scale;  // [S]
  const T* call;      // [T, D], a stride apart
  const float* call_scale;
  int64_t stride;
};

template <typename T>
class Compaction {
 public:
  explicit Compaction(const CompactParams& p)
      : p_(p),
        D_(p.spec.D),
        R_(p.layout.R),
        S_(p.layout.S),
        folds_(p.spec.victim == Victim::fold),
        arena_(folds_ ? FeaturePanel::size(p.maps.psi) + Arena::size(D_ * kLanes) +
                            Arena::size(R_ * kTokens) + Arena::size(kTokens * D_) +
                            Arena::size(D_) + Arena::size(features_scratch(p.maps.psi))
                      : 0) {
    if (!folds_) return;
    psi_.emplace(p.maps.psi, arena_);
    keys_ = arena_.take(D_ * kLanes);
    features_ = arena_.take(R_ * kTokens);
    values_ = arena_.take(kTokens * D_);
    row_ = arena_.take(D_);
    scratch_ = arena_.take(features_scratch(p.maps.psi));
  }

  void run(int64_t row) {
    const int64_t b = row / p_.spec.K, h = row % p_.spec.K, T_ = p_.T;
    unsigned char* const own = page(p_.pool, b);
    if (own == nullptr) return;
    const Head head = less::head(p_.layout, own, h);
    const Slots& slots = head.slots;
    const int64_t S = slots.S;
    k_ = kept(slots.k, slots.k_scale, p_.call.k, p_.call.k_scale, b, h);
    v_ = kept(slots.v, slots.v_scale, p_.call.v, p_.call.v_scale, b, h);
    int32_t* position = slots.position;
    float* score = slots.score;
    const float* slot_score = p_.score + row * (S_ + T_);
    const float* call_score = slot_score + S_;
    const float* rank = p_.rank == nullptr ? nullptr : p_.rank + row * (S_ + T_);

    int64_t n = *seen(own);
    chunk_position_.assign(T_, -1);
    for (int64_t t = 0; t < T_; ++t) {
      if (p_.valid == nullptr || p_.valid[b * T_ + t]) chunk_position_[t] = int32_t(n++);
    }
    tokens_.clear();
    const auto add = [&](int64_t source, int32_t at, float s) {
      if (at < 0) return;
      float r = rank == nullptr ? rank_of(p_.spec.rule, n, at, s) : rank[source];
      if (r != r) r = -kInfinity;
      tokens_.push_back({r, at, int32_t(source)});
    };
    for (int64_t s = 0; s < S; ++s) add(s, position[s], slot_score[s]);
    for (int64_t t = 0; t < T_; ++t) add(S_ + t, chunk_position_[t], call_score[t]);

    std::copy(slot_score, slot_score + S, score);
    const int64_t leaving = std::max<int64_t>(0, int64_t(tokens_.size()) - S);
    if (leaving > 0) {
      choose(leaving, position);
      if (folds_) fold(h, head.state);
      for (int32_t source : leaving_) {
        if (source < S_) {
          position[source] = -1;
          score[source] = 0.0f;
          slots.weight[source] = 0.0f;
        } else {
          chunk_position_[source - S_] = -1;
        }
      }
    }
    int64_t slot = 0;
    for (int64_t t = 0; t < T_; ++t) {
      if (chunk_position_[t] < 0) continue;
      while (position[slot] >= 0) ++slot;
      take(k_, slot, t);
      take(v_, slot, t);
      position[slot] = chunk_position_[t];
      score[slot] = call_score[t];
    }
  }

 private:
  static constexpr bool kScaled = std::is_same_v<T, int8_t>;

  Kept<T> kept(void* slots, float* slot_scale, const HeadRows& call, const float* call_scale,
               int64_t b, int64_t h) const {
    return {.slots = static_cast<T*>(slots),
            .slot_scale = slot_scale,
            .call = static_cast<const T*>(call.data) + offset(call, b, h, 0),
            .call_scale = kScaled ? call_scale + (b * p_.spec.K + h) * p_.T : nullptr,
            .stride = call.t};
  }

  // Token t of the call takes a slot.
  void take(const Kept<T>& x, int64_t slot, int64_t t) const {
    std::memcpy(x.slots + slot * D_, x.call + t * x.stride, D_ * sizeof(T));
    if constexpr (kScaled) x.slot_scale[slot] = x.call_scale[t];
  }

  // Lists the sources of the `leaving` lowest candidates by ascending position. Only slots need
  // sorting: the call's tokens are younger, and in order.
  void choose(int64_t leaving, const int32_t* position) {
    std::nth_element(tokens_.begin(), tokens_.begin() + (leaving - 1), tokens_.end(),
                     [](const Candidate& a, const Candidate& b) {
                       return leaves_before(a.rank, a.position, b.rank, b.position);
                     });
    leaving_.clear();
    leaves_call_.assign(p_.T, 0);
    for (int64_t i = 0; i < leaving; ++i) {
      const int32_t source = tokens_[i].source;
      if (source < S_) {
        leaving_.push_back(source);
      } else {
        leaves_call_[source - S_] = 1;
      }
    }
    std::sort(leaving_.begin(), leaving_.end(),
              [position](int32_t a, int32_t b) { return position[a] < position[b]; });
    for (int64_t t = 0; t < p_.T; ++t) {
      if (leaves_call_[t]) leaving_.push_back(int32_t(S_ + t));
    }
  }

  // The key or value of a candidate, as floats.
  void load(const Kept<T>& x, int64_t source, float* out) const {
    const bool slot = source < S_;
    const int64_t i = slot ? source : source - S_;
    float scale = 1.0f;
    if constexpr (kScaled) scale = slot ? x.slot_scale[i] : x.call_scale[i];
    widen_row(slot ? x.slots + i * D_ : x.call + i * x.stride, scale, D_, out);
  }

  // Folds those who leave. Few are taken one by one, by the loops of decode_step:
  // a panel that is hardly filled costs more.
  void fold(int64_t head, const State& state) {
    const int64_t D = D_, R = R_, leaving = int64_t(leaving_.size());
    const bool few = leaving < kLanes / 2;
    if (!few) psi_->load(head);
    for (int64_t first = 0; first < leaving; first += kTokens) {
      const int64_t count = std::min(kTokens, leaving - first);
      const int32_t* source = leaving_.data() + first;
      for (int64_t n = 0; n < count; ++n) load(v_, source[n], values_ + n * D);
      if (few) {
        for (int64_t n = 0; n < count; ++n) {
          load(k_, source[n], row_);
          features(p_.maps.psi, head, row_, scratch_, features_ + n * R);
        }
      } else {
        for (int64_t lane = 0; lane < count; lane += kLanes) {
          const int64_t rows = std::min(kLanes, count - lane);
          if (rows < kLanes) std::fill(keys_, keys_ + D * kLanes, 0.0f);
          for (int64_t n = 0; n < rows; ++n) {
            load(k_, source[lane + n], row_);
            put_lane(row_, D, n, keys_);
          }
          psi_->run(keys_, features_ + lane, kTokens);
        }
      }
      fold_tokens(features_, few ? 1 : kTokens, few ? R : 1, values_, D, count, R, D, state.H,
                  state.z);
    }
  }

  const CompactParams& p_;
  const int64_t D_, R_;
  const int64_t S_;  // where the call's candidates begin, whatever slots a head has
  const bool folds_;
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
  Kept<T> k_{}, v_{};
};

template <typename T>
void compact_heads(const CompactParams& p, int64_t begin, int64_t end) {
  Compaction<T> compaction(p);
  for (int64_t row = begin; row < end; ++row) compaction.run(row);
}

}  // namespace

void compact(const CompactParams& p, int64_t begin, int64_t end) {
  with_type<RowTypes>(p.layout.k_dtype, [&](auto type) {
    compact_heads<typename decltype(type)::type>(p, begin, end);
  });
}

}  // namespace less::cpu::LESS_ISA
