// One token of every row, a layer's whole step in one pass over its slots:
//
//   out = (phi H + sum e^l v) / (phi z + sum e^l),  l = scale q.k + weight, over slots and token
//   (with a soft-cap, softcap tanh(scale q.k / softcap) + weight)
//   score <- decay score + sum over the group of softmax; the victim has the lowest rank, of equals
//   the lowest position; H += psi(k)^T v, z += psi(k) of the victim; the token takes its slot.
//
// Range:  (kv head, b), b fastest: a head's maps stay in cache over the rows of a batch.
// Memory: a head's fields are read in the order in which they lie, and then the next head's: one
//         stream (rows.h). Score, H and z, and one slot, are written. Nothing is allocated: logits
//         live in the thread's scratch.
// Order:  slots ascending, then the token; one owner per head: neither the thread count nor the
//         rest of the batch changes a bit.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>

#include "cpu/features.h"
#include "cpu/quantize.h"
#include "cpu/rows.h"
#include "cpu/scratch.h"
#include "cpu/softmax.h"
#include "cpu/state.h"
#include "cpu/types.h"

namespace less::cpu::LESS_ISA {
namespace {

// The candidate that leaves before all others.
struct Lowest {
  float rank = kInfinity;
  int32_t position = INT32_MAX;
  int64_t source = -1;

  void offer(float r, int32_t at, int64_t from) {
    if (leaves_before(r, at, rank, position)) *this = {r, at, from};
  }
};

// One head after the other.
template <typename T>
class Step {
 public:
  explicit Step(const DecodeStepParams& p)
      : p_(p),
        G_(p.spec.Q / p.spec.K),
        D_(p.spec.D),
        R_(p.maps.phi.w1 == nullptr ? 0 : p.layout.R),
        width_(padded(p.spec.D)) {
    Scratch scratch(total_floats());
    const int64_t most = padded(p.layout.S + 1);
    q_ = scratch.floats(G_ * width_);
    out_ = scratch.floats(G_ * width_);
    logit_ = scratch.floats(G_ * most);
    weight_ = kScaled ? scratch.floats(G_ * most) : nullptr;
    top_ = scratch.floats(G_);
    total_ = scratch.floats(G_);
    key_ = scratch.floats(width_);
    value_ = scratch.floats(width_);
    new_k_ = reinterpret_cast<T*>(scratch.floats(width_));
    new_v_ = reinterpret_cast<T*>(scratch.floats(width_));
    features_ = scratch.floats(padded(R_));
    hidden_ = scratch.floats(hidden_floats());
  }

  // Work item (head, b), of [0, K B); `last`: no other follows.
  void run(int64_t item, bool last) {
    head_ = item / p_.B;
    b_ = item % p_.B;
    unsigned char* const own = page(p_.pool, b_);
    if (own == nullptr || (p_.valid != nullptr && !p_.valid[b_])) return clear();
    stream_.enter(head_span(p_.layout, own, head_), last ? Span{} : span(item + 1));
    enter(own);
    load();
    logits();
    softmax();
    weigh();
    if (R_ > 0) merge();
    for (int64_t g = 0; g < G_; ++g) {
      narrow(out_ + g * width_, D_, p_.out.dtype, offset(p_.out, b_, query(g), 0), p_.out.data);
    }
    if (p_.spec.victim == Victim::none) return;
    const float score = p_.spec.scores ? add_scores() : 0.0f;
    const int64_t slot = held_ < S_ ? first_free() : choose(score);
    if (held_ == S_ && p_.spec.victim == Victim::fold) fold(slot);
    if (slot < S_) take(slot, score);
  }

 private:
  static constexpr bool kScaled = std::is_same_v<T, int8_t>;

  // What a work item reads; empty where its row has no page.
  Span span(int64_t item) const {
    unsigned char* const own = page(p_.pool, item % p_.B);
    return own == nullptr ? Span{} : head_span(p_.layout, own, item / p_.B);
  }

  void enter(unsigned char* own) {
    const Head h = head(p_.layout, own, head_);
    slots_ = h.slots;
    state_ = h.state;
    S_ = slots_.S;
    stride_ = padded(S_ + 1);
    slot_k_ = static_cast<T*>(slots_.k);
    slot_v_ = static_cast<T*>(slots_.v);
    seen_ = *seen(own);
    held_ = 0;
    for (int64_t s = 0; s < S_; ++s) held_ += slots_.position[s] >= 0;
  }

  // The query head of the group's g-th.
  int64_t query(int64_t g) const { return head_ * G_ + g; }

  int64_t hidden_floats() const {
    return R_ == 0 ? 0 : std::max(features_scratch(p_.maps.phi), features_scratch(p_.maps.psi));
  }

  int64_t total_floats() const {
    constexpr auto line = Scratch::padded_floats;
    const int64_t most = padded(p_.layout.S + 1);
    return 2 * line(G_ * width_) + (kScaled ? 2 : 1) * line(G_ * most) + 2 * line(G_) +
           4 * line(width_) + line(padded(R_)) + line(hidden_floats());
  }

  void clear() {
    for (int64_t g = 0; g < G_; ++g) clear_row(p_.out, b_, query(g), 0, D_);
  }

  // The queries, padded with zeros, and the token's key and value as the slots will hold them.
  void load() {
    for (int64_t g = 0; g < G_; ++g) {
      float* q = q_ + g * width_;
      widen(p_.q.data, p_.q.dtype, offset(p_.q, b_, query(g), 0), D_, q);
      std::fill(q + D_, q + width_, 0.0f);
    }
    widen(p_.k.data, p_.k.dtype, offset(p_.k, b_, head_, 0), D_, key_);
    widen(p_.v.data, p_.v.dtype, offset(p_.v, b_, head_, 0), D_, value_);
    if constexpr (kScaled) {
      new_k_scale_ = quantize_row(key_, D_, new_k_);
      new_v_scale_ = quantize_row(value_, D_, new_v_);
    } else {
      narrow(key_, D_, new_k_);
      narrow(value_, D_, new_v_);
    }
  }

  // f(first, count) for each run of slots that hold a token: one run, all slots, in steady state.
  template <typename F>
  LESS_INLINE void for_each_run(F f) const {
    if (held_ == S_) return f(0, S_);
    for (int64_t s = 0; s < S_;) {
      const int64_t first = s;
      while (s < S_ && slots_.position[s] >= 0) ++s;
      if (s > first) f(first, s - first);
      while (s < S_ && slots_.position[s] < 0) ++s;
    }
  }

  // logit_[g] = l over slots and token, -inf for empty slots and the padding.
  void logits() {
    for_each_run([this](int64_t first, int64_t count) {
      dots_of_rows(q_, G_, width_, slot_k_ + first * D_, count, D_, logit_ + first, stride_,
                   &stream_);
    });
    dots_of_rows<T>(q_, G_, width_, new_k_, 1, D_, logit_ + S_, stride_, nullptr);
    const float *weight = slots_.weight, *k_scale = slots_.k_scale;
    const Vec scale(p_.spec.scale);
    for (int64_t g = 0; g < G_; ++g) {
      float* l = logit_ + g * stride_;
      l[S_] *= kScaled ? new_k_scale_ * p_.spec.scale : p_.spec.scale;
      if (p_.spec.softcap != 0.0f) {
        cap(l, k_scale, weight);
      } else {
        for_each(l, S_, [=](Vec a, int64_t s, int n) {
          if constexpr (kScaled) a = a * load_some(k_scale + s, n);
          return fma(a, scale, load_some(weight + s, n));
        });
      }
      std::fill(l + S_ + 1, l + stride_, -kInfinity);
      if (held_ == S_) continue;
      for (int64_t s = 0; s < S_; ++s) {
        if (slots_.position[s] < 0) l[s] = -kInfinity;
      }
    }
  }

  // Soft-caps a query's q.k of the slots and its scaled one of the token; adds the weights.
  void cap(float* l, const float* k_scale, const float* weight) {
    const Vec scale(p_.spec.scale);
    for_each(l, S_, [=, this](Vec a, int64_t s, int n) {
      if constexpr (kScaled) a = a * load_some(k_scale + s, n);
      return soft_cap(a * scale, p_.spec.softcap) + load_some(weight + s, n);
    });
    soft_cap(Vec(l[S_]), p_.spec.softcap).store(l + S_, 1);
  }

  // logit_ becomes e^(logit - top_), total_ its sum.
  void softmax() {
    for (int64_t g = 0; g < G_; ++g) {
      float* l = logit_ + g * stride_;
      top_[g] = largest_of(l, stride_);
      total_[g] = exp_and_sum(l, stride_, top_[g]);
    }
  }

  // out_ = softmax v over slots and token.
  void weigh() {
    std::fill(out_, out_ + G_ * width_, 0.0f);
    if constexpr (kScaled) {
      // Each head's probabilities take the values' scales on; the scores need them as they are.
      const float* v_scale = slots_.v_scale;
      for (int64_t g = 0; g < G_; ++g) {
        const float* p = logit_ + g * stride_;
        float* weight = weight_ + g * stride_;
        for (int64_t s = 0; s < S_; s += Vec::kSize) {
          const int n = int(std::min<int64_t>(Vec::kSize, S_ - s));
          (Vec::load(p + s) * load_some(v_scale + s, n)).store(weight + s, n);
        }
        weight[S_] = p[S_] * new_v_scale_;
      }
      weigh(weight_, G_, out_);
    } else {
      weigh(logit_, G_, out_);
    }
    for (int64_t g = 0; g < G_; ++g) {
      const Vec inverse(1.0f / total_[g]);
      for_each(out_ + g * width_, width_, [inverse](Vec a, int64_t, int) { return a * inverse; });
    }
  }

  void weigh(const float* p, int64_t heads, float* out) {
    for_each_run([=, this](int64_t first, int64_t count) {
      add_weighted_rows(p + first, heads, stride_, slot_v_ + first * D_, count, D_, out, width_,
                        &stream_);
    });
    add_weighted_rows<T>(p + S_, heads, stride_, new_v_, 1, D_, out, width_, nullptr);
  }

  void merge() {
    double share = 0.0;
    for (int64_t g = 0; g < G_; ++g) {
      features(p_.maps.phi, query(g), q_ + g * width_, hidden_, features_);
      share +=
          merge_state(features_, state_.H, state_.z, R_, D_, top_[g], total_[g], out_ + g * width_);
    }
    *state_.share += share;
  }

  // Adds what each slot received to its score; returns what the token itself received.
  float add_scores() {
    for (int64_t g = 0; g < G_; ++g) total_[g] = 1.0f / total_[g];
    const Vec decay(p_.spec.decay);
    for_each(slots_.score, S_, [&](Vec score, int64_t s, int) {
      Vec received(0.0f);
      for (int64_t g = 0; g < G_; ++g) {
        received = fma(Vec(total_[g]), Vec::load(logit_ + g * stride_ + s), received);
      }
      return score * decay + received;
    });
    float received = 0.0f;
    for (int64_t g = 0; g < G_; ++g) received += total_[g] * logit_[g * stride_ + S_];
    return received;
  }

  int64_t first_free() const {
    int64_t slot = 0;
    while (slots_.position[slot] >= 0) ++slot;
    return slot;
  }

  // The victim: a slot, or S_ for the token itself. All slots are held.
  int64_t choose(float new_score) const {
    const Rule& rule = p_.spec.rule;
    const int64_t n = seen_ + 1;
    Vec best(kInfinity);
    Int best_position(INT32_MAX), best_slot(-1), slot = iota();
    int64_t s = 0;
    for (; s + Vec::kSize <= S_; s += Vec::kSize) {
      const Int position = Int::load(slots_.position + s);
      const Vec rank = rank_of(rule, n, position, Vec::load(slots_.score + s));
      const Int better = leaves_before(rank, position, best, best_position);
      best = select(better, rank, best);
      best_position = select(better, position, best_position);
      best_slot = select(better, slot, best_slot);
      slot = slot + Int(Vec::kSize);
    }
    float rank[Vec::kSize];
    int32_t position[Vec::kSize], from[Vec::kSize];
    best.store(rank);
    best_position.store(position);
    best_slot.store(from);
    Lowest lowest;
    for (int i = 0; i < Vec::kSize; ++i) lowest.offer(rank[i], position[i], from[i]);
    for (; s <= S_; ++s) {
      const int32_t at = s < S_ ? slots_.position[s] : int32_t(seen_);
      lowest.offer(rank_of(rule, n, at, s < S_ ? slots_.score[s] : new_score), at, s);
    }
    return lowest.source;
  }

  void fold(int64_t slot) {
    const float *k = key_, *v = value_;
    if (slot < S_) {
      widen(slot_k_ + slot * D_, D_, key_);
      widen(slot_v_ + slot * D_, D_, value_);
    } else {
      widen(new_k_, D_, key_);
      widen(new_v_, D_, value_);
    }
    if constexpr (kScaled) {
      const bool kept = slot < S_;
      scale(key_, kept ? slots_.k_scale[slot] : new_k_scale_);
      scale(value_, kept ? slots_.v_scale[slot] : new_v_scale_);
    }
    features(p_.maps.psi, head_, k, hidden_, features_);
    fold_token(features_, v, R_, D_, state_.H, state_.z);
  }

  void scale(float* x, float factor) const {
    for_each(x, D_, [factor](Vec a, int64_t, int) { return a * Vec(factor); });
  }

  // The token takes a slot.
  void take(int64_t slot, float score) {
    std::memcpy(slot_k_ + slot * D_, new_k_, D_ * sizeof(T));
    std::memcpy(slot_v_ + slot * D_, new_v_, D_ * sizeof(T));
    if constexpr (kScaled) {
      slots_.k_scale[slot] = new_k_scale_;
      slots_.v_scale[slot] = new_v_scale_;
    }
    slots_.position[slot] = int32_t(seen_);
    slots_.score[slot] = score;
    slots_.weight[slot] = 0.0f;
  }

  const DecodeStepParams& p_;
  const int64_t G_, D_, R_, width_;  // R: 0 where there are no maps to read the state by
  Stream stream_;
  int64_t head_ = 0, b_ = 0, S_ = 0, stride_ = 0, held_ = 0, seen_ = 0;
  Slots slots_{};
  State state_{};
  T *slot_k_ = nullptr, *slot_v_ = nullptr;
  float new_k_scale_ = 0.0f, new_v_scale_ = 0.0f;
  float *q_, *out_;      // [G, width]
  float* logit_;         // [G, stride], then probabilities before they are divided by total_
  float* weight_;        // [G, stride], of int8 slots: those times the values' scales
  float *top_, *total_;  // [G]
  float *key_, *value_;  // [width]
  T *new_k_, *new_v_;    // [D]
  float* features_;      // [R]
  float* hidden_;
};

template <typename T>
void decode(const DecodeStepParams& p, int64_t begin, int64_t end) {
  Step<T> step(p);
  for (int64_t item = begin; item < end; ++item) step.run(item, item + 1 == end);
}

}  // namespace

void decode_step(const DecodeStepParams& p, int64_t begin, int64_t end) {
  with_type<RowTypes>(p.layout.k_dtype,
                      [&](auto type) { decode<typename decltype(type)::type>(p, begin, end); });
}

}  // namespace less::cpu::LESS_ISA
