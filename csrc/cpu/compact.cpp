// The call's tokens join the slots. Of slots and call the S highest ranks stay, of equals the older
// leaves first; what leaves is folded, H += psi(k)^T v, z += psi(k), or becomes part of the nearest
// token that stays, or is forgotten.
//
// With W hot slots, the first tokens and the last ones have those, and do not compete. What leaves
// the ring of the last ones is encoded, as is the rest of the call, and competes for the S - W
// others. psi is taken of keys outside of their space, of a centred kind without their mean; values
// fold in it.
//
// Range:  heads (b,k); one call owns each head whole.
// Memory: the keys and values that leave are read once, those of the call that stay are copied;
//         scratch is one tile of tokens, a few bytes for each candidate, and where tokens merge the
//         rows of those that stay as floats.
// Order:  leavers fold, or merge, in ascending position; of those who join, the older takes the
//         lower slot: neither the thread count nor the rest of the batch changes a bit.
#include <algorithm>
#include <optional>
#include <utility>
#include <vector>

#include "cpu/codec.h"
#include "cpu/feature_panel.h"
#include "cpu/fold.h"
#include "cpu/merge.h"
#include "cpu/notes.h"
#include "cpu/space.h"

namespace less::cpu::LESS_ISA {
namespace {

constexpr int64_t kTokens = 2 * kLanes;  // that are folded at once

struct Candidate {
  float rank;
  int32_t position;
  int32_t source;  // slot, or layout.S + index in the call
};

// A token that may take others in.
struct Target {
  int32_t source;
  int32_t position;
  float score;
  float weight;  // log-weight, or count
  float mass;    // of its score and of those whom it has taken in
  bool changed;
};

// The keys or values of a head and of its call.
struct Kept {
  SlotRows slots;
  Stored call;
};

class Compaction {
 public:
  explicit Compaction(const CompactParams& p)
      : p_(p),
        D_(p.spec.D),
        R_(p.layout.R),
        S_(p.layout.S),
        folds_(p.spec.victim == Victim::fold),
        merges_(p.spec.victim == Victim::merge),
        arena_(total_floats()),
        coded_(D_),
        row_(D_) {
    if (folds_ || merges_) {
      keys_ = arena_.take(D_ * kLanes);
      values_ = arena_.take(kTokens * D_);
      rows_ = arena_.take(kLanes * D_);
    }
    if (folds_) {
      psi_.emplace(p.maps.psi, arena_);
      features_ = arena_.take(R_ * kTokens);
      scratch_ = arena_.take(features_scratch(p.maps.psi));
    }
    if (merges_) {
      target_keys_ = arena_.take(S_ * D_);
      target_weight_ = arena_.take(S_);
      mean_keys_ = arena_.take(S_ * D_);
      mean_values_ = arena_.take(S_ * D_);
    }
  }

  void run(int64_t row) {
    const int64_t b = row / p_.spec.K, h = row % p_.spec.K, T_ = p_.T;
    unsigned char* const own = page(p_.pool, b);
    if (own == nullptr) return;
    const Head head = less::head(p_.layout, own, h);
    const Slots& slots = head.slots;
    const int64_t S = slots.S;
    const int64_t W = slots.W, K = p_.spec.K;
    k_ = {key_rows(p_.layout, slots), call_rows(p_.call.k, p_.call.k_scale, b, h, K, T_)};
    v_ = {value_rows(p_.layout, slots), call_rows(p_.call.v, p_.call.v_scale, b, h, K, T_)};
    int32_t* position = slots.position;
    const float* const slot_score = noted_scores(p_.score + row * (S_ + T_));
    const float* const call_score = slot_score + S_;
    const float* rank = p_.rank == nullptr ? nullptr : p_.rank + row * (S_ + T_);

    const Rule rule = for_slots(p_.spec.rule, S);
    int64_t n = *seen(own);
    chunk_position_.assign(T_, -1);
    for (int64_t t = 0; t < T_; ++t) {
      if (p_.valid == nullptr || p_.valid[b * T_ + t]) chunk_position_[t] = int32_t(n++);
    }
    // Whether a token of the hot slots or of the call does not compete.
    const auto stays_hot = [&](int32_t at) { return W > 0 && is_hot(p_.layout, at, n); };
    tokens_.clear();
    const auto add = [&](int64_t source, int32_t at, float s) {
      if (at < 0) return;
      float r = rank == nullptr ? rank_of(rule, n, at, s) : rank[source];
      if (r != r) r = -kInfinity;
      tokens_.push_back({r, at, int32_t(source)});
    };
    for (int64_t s = 0; s < S; ++s) {
      if (s >= W || !stays_hot(position[s])) add(s, position[s], slot_score[s]);
    }
    for (int64_t t = 0; t < T_; ++t) {
      if (!stays_hot(chunk_position_[t])) add(S_ + t, chunk_position_[t], call_score[t]);
    }

    if (slots.half == nullptr) {
      std::copy(slot_score, slot_score + S, slots.score);
    } else {
      for (int64_t s = 0; s < S; ++s) put_score(slots, s, slot_score[s]);
    }
    const auto hold = [&](int64_t slot, int32_t at, float score) {
      position[slot] = at;
      put_score(slots, slot, score);
      put_weight(slots, slot, at < 0 ? 0.0f : weight_of_one(slots));
    };
    const auto leave = [&](int64_t slot) { hold(slot, -1, 0.0f); };
    const int64_t leaving = std::max<int64_t>(0, int64_t(tokens_.size()) - (S - W));
    if (leaving > 0) {
      choose(leaving, position);
      if (folds_) fold(h, head.state);
      if (merges_) merge(leaving, slots, slot_score);
      for (int32_t source : leaving_) {
        if (source < S_) {
          leave(source);
        } else {
          chunk_position_[source - S_] = -1;
        }
      }
      if (merges_) put_means(slots);
    }
    joining_.clear();
    for (int64_t s = 0; s < W; ++s) {
      if (position[s] >= 0 && !stays_hot(position[s])) joining_.push_back(int32_t(s));
    }
    std::sort(joining_.begin(), joining_.end(),
              [position](int32_t a, int32_t b) { return position[a] < position[b]; });
    for (int64_t t = 0; t < T_; ++t) {
      const int32_t at = chunk_position_[t];
      if (at >= 0 && !stays_hot(at)) joining_.push_back(int32_t(S_ + t));
    }
    int64_t slot = W;
    for (int32_t source : joining_) {
      while (position[slot] >= 0) ++slot;
      const int32_t target = leaving > 0 && merges_ ? mean_of_[source] : -1;
      if (target >= 0) {
        put_mean(target, slots, slot);
      } else {
        take(k_, slot, source);
        take(v_, slot, source);
        // The call's scores follow those of S_ slots.
        hold(slot, source < S_ ? position[source] : chunk_position_[source - S_],
             slot_score[source]);
      }
      if (source < W) leave(source);
    }
    for (int64_t t = 0; W > 0 && t < T_; ++t) {
      const int32_t at = chunk_position_[t];
      if (at < 0 || !stays_hot(at)) continue;
      const int64_t place = hot_slot(p_.layout, at);
      copy_row(k_.call, t, k_.slots.hot, place);
      copy_row(v_.call, t, v_.slots.hot, place);
      hold(place, at, call_score[t]);
    }
  }

 private:
  int64_t total_floats() const {
    constexpr auto size = Arena::size;
    if (!folds_ && !merges_) return 0;
    const int64_t tile = size(D_ * kLanes) + size(kTokens * D_) + size(kLanes * D_);
    if (merges_) return tile + 3 * size(S_ * D_) + size(S_);
    return tile + FeaturePanel::size(p_.maps.psi) + size(R_ * kTokens) +
           size(features_scratch(p_.maps.psi));
  }

  // Scores of slots and call, as slots note them.
  const float* noted_scores(const float* score) {
    if (!packed(p_.layout.v_dtype)) return score;
    score_.resize(S_ + p_.T);
    for (int64_t i = 0; i < S_ + p_.T; ++i) score_[i] = noted_score(p_.layout, score[i]);
    return score_.data();
  }

  // The rows of a candidate, and which of them is its own.
  std::pair<const Stored*, int64_t> find(const Kept& x, int64_t source) const {
    if (source >= S_) return {&x.call, source - S_};
    if (source < x.slots.W) return {&x.slots.hot, source};
    return {&x.slots.cold, source - x.slots.W};
  }

  // A candidate's row takes a slot that is not hot.
  void take(const Kept& x, int64_t slot, int64_t source) {
    const auto [rows, i] = find(x, source);
    const int64_t W = x.slots.W;
    if (W == 0) return copy_row(*rows, i, x.slots.cold, slot);
    decode_row(*rows, i, D_, row_.data());
    encode_row(x.slots.cold, slot - W, row_.data(), D_);
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

  // out [count, D]: the keys or values of candidates, those of the call last, as floats: those that
  // a slot that is not hot has of them.
  void load(const Kept& x, const int32_t* source, int64_t count, float* out) {
    if (x.slots.W > 0) {
      for (int64_t n = 0; n < count; ++n) load_encoded(x, source[n], out + n * D_);
      return;
    }
    int64_t slots = 0;
    while (slots < count && source[slots] < S_) ++slots;
    decode_rows(x.slots.cold, slots, [=](int64_t n) { return source[n]; }, D_, out);
    const auto token = [=, S = S_](int64_t n) { return source[slots + n] - S; };
    decode_rows(x.call, count - slots, token, D_, out + slots * D_);
  }

  void load_encoded(const Kept& x, int64_t source, float* out) {
    const auto [rows, i] = find(x, source);
    decode_row(*rows, i, D_, out);
    if (rows == &x.slots.cold) return;
    float scale;
    uint16_t half;
    const Stored one{x.slots.cold.dtype, coded_.data(), 0, &scale, &half};
    encode_row(one, 0, out, D_);
    decode_row(one, 0, D_, out);
  }

  // Keys, as psi takes them.
  void load_keys(int64_t head, const int32_t* source, int64_t count, float* out) {
    load(k_, source, count, out);
    const Space& space = p_.maps.space;
    if (space.key_mean == nullptr) return;
    for (int64_t n = 0; n < count; ++n) {
      key_out_of_space(space, p_.maps.psi.kind, head, D_, out + n * D_);
    }
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
      load(v_, source, count, values_);
      if (few) {
        load_keys(head, source, count, rows_);
        for (int64_t n = 0; n < count; ++n) {
          features(p_.maps.psi, head, rows_ + n * D, scratch_, features_ + n * R);
        }
      } else {
        for (int64_t lane = 0; lane < count; lane += kLanes) {
          const int64_t rows = std::min(kLanes, count - lane);
          load_keys(head, source + lane, rows, rows_);
          if (rows < kLanes) std::fill(keys_, keys_ + D * kLanes, 0.0f);
          for (int64_t n = 0; n < rows; ++n) put_lane(rows_ + n * D, D, n, keys_);
          psi_->run(keys_, features_ + lane, kTokens);
        }
      }
      fold_tokens(features_, few ? 1 : kTokens, few ? R : 1, values_, D, count, R, D, state.H,
                  state.z);
    }
  }

  // Those who stay and are not protected become targets, in ascending position.
  void gather_targets(int64_t leaving, const Slots& slots, const float* score) {
    targets_.clear();
    for (size_t i = leaving; i < tokens_.size(); ++i) {
      const Candidate& t = tokens_[i];
      if (!(t.rank < kInfinity)) continue;
      const float mass = mass_of(score[t.source]);
      targets_.push_back({t.source, t.position, score[t.source], weight_of(slots, t.source), mass,
                          /*changed=*/false});
    }
    std::sort(targets_.begin(), targets_.end(),
              [](const Target& a, const Target& b) { return a.position < b.position; });
    sources_.clear();
    for (size_t j = 0; j < targets_.size(); ++j) {
      sources_.push_back(targets_[j].source);
      target_weight_[j] = targets_[j].mass;
    }
    const int64_t N = int64_t(targets_.size());
    load(k_, sources_.data(), N, target_keys_);
    load(v_, sources_.data(), N, mean_values_);
    std::copy(target_keys_, target_keys_ + N * D_, mean_keys_);
  }

  float weight_of(const Slots& slots, int64_t source) const {
    return source < S_ ? weight_at(slots, source) : weight_of_one(slots);
  }
  int32_t position(const Slots& slots, int64_t source) const {
    return source < S_ ? slots.position[source] : chunk_position_[source - S_];
  }

  // Those who leave become part of their targets, which they find by weights and keys as they are
  // before any mean.
  void merge(int64_t leaving, const Slots& slots, const float* score) {
    gather_targets(leaving, slots, score);
    const int64_t N = int64_t(targets_.size());
    for (int64_t first = 0; first < leaving && N > 0; first += kLanes) {
      const int32_t* source = leaving_.data() + first;
      const int64_t count = std::min(kLanes, leaving - first);
      load(k_, source, count, rows_);
      load(v_, source, count, values_);
      if (count < kLanes) std::fill(keys_, keys_ + D_ * kLanes, 0.0f);
      float weight[kLanes] = {};
      for (int64_t n = 0; n < count; ++n) {
        put_lane(rows_ + n * D_, D_, n, keys_);
        weight[n] = mass_of(score[source[n]]);
      }
      int32_t nearest[kLanes];
      nearest_targets(target_keys_, target_weight_, N, D_, keys_, weight, nearest);
      for (int64_t n = 0; n < count; ++n) {
        if (nearest[n] < 0) continue;
        const int64_t j = nearest[n];
        Target& target = targets_[j];
        const float part = weight[n] / (weight[n] + target.mass);
        move_towards(rows_ + n * D_, part, D_, mean_keys_ + j * D_);
        move_towards(values_ + n * D_, part, D_, mean_values_ + j * D_);
        target.mass += weight[n];
        target.position = std::max(target.position, position(slots, source[n]));
        target.score += score[source[n]];
        target.weight = both_weights(slots, target.weight, weight_of(slots, source[n]));
        target.changed = true;
      }
    }
  }

  // Writes the means of slots that stay where they are, and notes where those of the others are.
  void put_means(const Slots& slots) {
    mean_of_.assign(S_ + p_.T, -1);
    for (size_t j = 0; j < targets_.size(); ++j) {
      const Target& target = targets_[j];
      if (!target.changed) continue;
      if (target.source >= slots.W && target.source < S_) {
        put_mean(int64_t(j), slots, target.source);
      } else {
        mean_of_[target.source] = int32_t(j);
      }
    }
  }

  // A target, with all that it has taken in, takes a slot.
  void put_mean(int64_t j, const Slots& slots, int64_t slot) {
    const Target& target = targets_[j];
    encode_row(k_.slots.cold, slot - slots.W, mean_keys_ + j * D_, D_);
    encode_row(v_.slots.cold, slot - slots.W, mean_values_ + j * D_, D_);
    slots.position[slot] = target.position;
    put_score(slots, slot, target.score);
    put_weight(slots, slot, target.weight);
  }

  const CompactParams& p_;
  const int64_t D_, R_;
  const int64_t S_;  // where the call's candidates begin, whatever slots a head has
  const bool folds_, merges_;
  Arena arena_;
  std::optional<FeaturePanel> psi_;
  float* keys_ = nullptr;             // [D][kLanes]
  float* features_ = nullptr;         // [R, kTokens], or [kTokens, R] of few
  float* values_ = nullptr;           // [kTokens, D]
  float* rows_ = nullptr;             // [kLanes, D]
  float* scratch_ = nullptr;          // of features()
  float* target_keys_ = nullptr;      // [targets, D], before any mean
  float* target_weight_ = nullptr;    // [targets], likewise
  float* mean_keys_ = nullptr;        // [targets, D]
  float* mean_values_ = nullptr;      // [targets, D]
  std::vector<unsigned char> coded_;  // a row of at most 8 bits a number
  std::vector<float> row_;            // [D]
  std::vector<float> score_;          // [S + T]
  std::vector<int32_t> chunk_position_;
  std::vector<Candidate> tokens_;
  std::vector<int32_t> leaving_;      // sources, by ascending position
  std::vector<int32_t> joining_;      // who takes a slot that is not hot, likewise
  std::vector<uint8_t> leaves_call_;  // [T]
  std::vector<Target> targets_;
  std::vector<int32_t> sources_;  // of targets_
  std::vector<int32_t> mean_of_;  // by source: the target that joins with a mean; -1: none
  Kept k_{}, v_{};
};

}  // namespace

void compact(const CompactParams& p, int64_t begin, int64_t end) {
  Compaction compaction(p);
  for (int64_t row = begin; row < end; ++row) compaction.run(row);
}

}  // namespace less::cpu::LESS_ISA
