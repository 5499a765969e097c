// One token of every row, a layer's whole step in one pass over its slots:
//
//   out = (phi H + sum e^l v) / (phi z + sum e^l),  l = scale q.k + weight, over slots and token
//   (with a soft-cap, softcap tanh(scale q.k / softcap) + weight)
//   score <- decay score + sum over the group of softmax; the victim has the lowest rank, of equals
//   the lowest position; H += psi(k)^T v, z += psi(k) of the victim; the token takes its slot.
//
// Range:  (kv head, b), b fastest: a head's maps stay in cache over the rows of a batch.
// Memory: k and v of the slots, position, weight are read once, score, H and z read and written.
//         Nothing is allocated: logits live in the thread's scratch.
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

namespace less::cpu::LESS_ISA {
namespace {

// The candidate with the lowest rank; of equal ranks the lowest position.
struct Lowest {
  float rank = kInfinity;
  int32_t position = INT32_MAX;
  int64_t source = -1;

  void offer(float r, int32_t at, int64_t from) {
    if (r < rank || (r == rank && at < position)) *this = {r, at, from};
  }
};

// Ranks of Vec::kSize candidates; n: tokens seen, the new one included.
LESS_INLINE Vec ranks(const Rule& rule, int32_t n, Int position, Vec score) {
  Vec rank(-kInfinity);
  if (rule.by_score) {
    // max() puts -inf in the place of a NaN.
    rank = max(rule.per_age ? score / to_vec(Int(n) - position) : score, rank);
  }
  const Int recent = position > Int(int32_t(std::max<int64_t>(n - rule.recent - 1, -1)));
  const Int sink = Int(int32_t(std::min<int64_t>(rule.sinks, INT32_MAX))) > position;
  return select(recent | sink, Vec(kInfinity), rank);
}

template <typename T>
class Head {
 public:
  explicit Head(const DecodeStepParams& p)
      : p_(p), G_(p.Q / p.K), S_(p.slots.S), width_(padded(p.D)), stride_(padded(p.slots.S + 1)) {
    Scratch scratch(total_floats());
    q_ = scratch.floats(G_ * width_);
    out_ = scratch.floats(G_ * width_);
    logit_ = scratch.floats(G_ * stride_);
    weight_ = kScaled ? scratch.floats(G_ * stride_) : nullptr;
    top_ = scratch.floats(G_);
    total_ = scratch.floats(G_);
    key_ = scratch.floats(width_);
    value_ = scratch.floats(width_);
    new_k_ = reinterpret_cast<T*>(scratch.floats(width_));
    new_v_ = reinterpret_cast<T*>(scratch.floats(width_));
    features_ = scratch.floats(padded(p.R));
    hidden_ = scratch.floats(hidden_floats());
  }

  // Work item (head, b), of [0, K B); `last`: no other follows.
  void run(int64_t item, bool last) {
    head_ = item / p_.B;
    b_ = item % p_.B;
    row_ = b_ * p_.K + head_;
    const int64_t next = (item + 1) % p_.B * p_.K + (item + 1) / p_.B;
    next_k_ = last ? nullptr : slot_keys(next);
    if (p_.valid != nullptr && !p_.valid[b_]) return clear();
    slot_k_ = slot_keys(row_);
    slot_v_ = static_cast<T*>(p_.slots.v) + row_ * S_ * p_.D;
    position_ = p_.slots.position + row_ * S_;
    score_ = p_.slots.score + row_ * S_;
    held_ = 0;
    for (int64_t s = 0; s < S_; ++s) held_ += position_[s] >= 0;
    load();
    logits();
    softmax();
    if (!last) prefetch_numbers(next);
    weigh();
    if (p_.H != nullptr) merge();
    for (int64_t g = 0; g < G_; ++g) {
      narrow(out_ + g * width_, p_.D, p_.q_dtype, query(g) * p_.D, p_.out);
    }
    if (p_.victim == Victim::none) return;
    const float score = p_.scores ? add_scores() : 0.0f;
    int64_t slot = held_ < S_ ? first_free() : choose(score);
    if (held_ == S_ && p_.victim == Victim::fold) fold(slot);
    if (slot < S_) take(slot, score);
  }

 private:
  static constexpr bool kScaled = std::is_same_v<T, int8_t>;

  T* slot_keys(int64_t row) const { return static_cast<T*>(p_.slots.k) + row * S_ * p_.D; }

  // What the next head needs before and after its keys.
  void prefetch_numbers(int64_t row) const {
    const int64_t bytes = S_ * 4;
    prefetch(p_.slots.position + row * S_, bytes);
    prefetch(p_.slots.weight + row * S_, bytes);
    prefetch(p_.slots.score + row * S_, bytes);
    if (kScaled) {
      prefetch(p_.slots.k_scale + row * S_, bytes);
      prefetch(p_.slots.v_scale + row * S_, bytes);
    }
    if (p_.H != nullptr) {
      prefetch(p_.H + row * p_.R * p_.D, p_.R * p_.D * 4);
      prefetch(p_.z + row * p_.R, p_.R * 4);
    }
  }

  int64_t query(int64_t g) const { return b_ * p_.Q + head_ * G_ + g; }

  int64_t hidden_floats() const {
    if (p_.H == nullptr) return 0;
    return std::max(features_scratch(p_.phi), features_scratch(p_.psi));
  }

  int64_t total_floats() const {
    constexpr auto line = Scratch::padded_floats;
    return 2 * line(G_ * width_) + (kScaled ? 2 : 1) * line(G_ * stride_) + 2 * line(G_) +
           4 * line(width_) + line(padded(p_.R)) + line(hidden_floats());
  }

  void clear() {
    const int64_t bytes = p_.D * (p_.q_dtype == DType::f32 ? 4 : 2);
    std::memset(static_cast<char*>(p_.out) + query(0) * bytes, 0, G_ * bytes);
  }

  // The queries, padded with zeros, and the token's key and value as the slots will hold them.
  void load() {
    for (int64_t g = 0; g < G_; ++g) {
      float* q = q_ + g * width_;
      widen(p_.q, p_.q_dtype, query(g) * p_.D, p_.D, q);
      std::fill(q + p_.D, q + width_, 0.0f);
    }
    widen(p_.k, p_.kv_dtype, row_ * p_.D, p_.D, key_);
    widen(p_.v, p_.kv_dtype, row_ * p_.D, p_.D, value_);
    if constexpr (kScaled) {
      new_k_scale_ = quantize_row(key_, p_.D, new_k_);
      new_v_scale_ = quantize_row(value_, p_.D, new_v_);
    } else {
      narrow(key_, p_.D, new_k_);
      narrow(value_, p_.D, new_v_);
    }
  }

  // f(first, count) for each run of slots that hold a token: one run, all slots, in steady state.
  template <typename F>
  LESS_INLINE void for_each_run(F f) const {
    if (held_ == S_) return f(0, S_);
    for (int64_t s = 0; s < S_;) {
      const int64_t first = s;
      while (s < S_ && position_[s] >= 0) ++s;
      if (s > first) f(first, s - first);
      while (s < S_ && position_[s] < 0) ++s;
    }
  }

  // logit_[g] = l over slots and token, -inf for empty slots and the padding.
  void logits() {
    for_each_run([this](int64_t first, int64_t count) {
      dots_of_rows(q_, G_, width_, slot_k_ + first * p_.D, count, p_.D, logit_ + first, stride_,
                   slot_v_);
    });
    dots_of_rows<T>(q_, G_, width_, new_k_, 1, p_.D, logit_ + S_, stride_, nullptr);
    const float* weight = p_.slots.weight + row_ * S_;
    const float* k_scale = kScaled ? p_.slots.k_scale + row_ * S_ : nullptr;
    const Vec scale(p_.scale);
    for (int64_t g = 0; g < G_; ++g) {
      float* l = logit_ + g * stride_;
      l[S_] *= kScaled ? new_k_scale_ * p_.scale : p_.scale;
      if (p_.softcap != 0.0f) {
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
        if (position_[s] < 0) l[s] = -kInfinity;
      }
    }
  }

  // Soft-caps a query's q.k of the slots and its scaled one of the token; adds the weights.
  void cap(float* l, const float* k_scale, const float* weight) {
    const Vec scale(p_.scale);
    for_each(l, S_, [=, this](Vec a, int64_t s, int n) {
      if constexpr (kScaled) a = a * load_some(k_scale + s, n);
      return soft_cap(a * scale, p_.softcap) + load_some(weight + s, n);
    });
    soft_cap(Vec(l[S_]), p_.softcap).store(l + S_, 1);
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
      const float* v_scale = p_.slots.v_scale + row_ * S_;
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
      add_weighted_rows(p + first, heads, stride_, slot_v_ + first * p_.D, count, p_.D, out, width_,
                        next_k_);
    });
    add_weighted_rows<T>(p + S_, heads, stride_, new_v_, 1, p_.D, out, width_, nullptr);
  }

  void merge() {
    const float* H = p_.H + row_ * p_.R * p_.D;
    const float* z = p_.z + row_ * p_.R;
    double share = 0.0;
    for (int64_t g = 0; g < G_; ++g) {
      features(p_.phi, head_ * G_ + g, q_ + g * width_, hidden_, features_);
      share += merge_state(features_, H, z, p_.R, p_.D, top_[g], total_[g], out_ + g * width_);
    }
    if (p_.share != nullptr) p_.share[row_] += share;
  }

  // Adds what each slot received to its score; returns what the token itself received.
  float add_scores() {
    for (int64_t g = 0; g < G_; ++g) total_[g] = 1.0f / total_[g];
    const Vec decay(p_.decay);
    for_each(score_, S_, [&](Vec score, int64_t s, int) {
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
    while (position_[slot] >= 0) ++slot;
    return slot;
  }

  // The victim: a slot, or S_ for the token itself. All slots are held.
  int64_t choose(float new_score) const {
    const int32_t n = int32_t(p_.seen[b_] + 1);
    Vec best(kInfinity);
    Int best_position(INT32_MAX), best_slot(-1), slot = iota();
    int64_t s = 0;
    for (; s + Vec::kSize <= S_; s += Vec::kSize) {
      const Int position = Int::load(position_ + s);
      const Vec rank = ranks(p_.rule, n, position, Vec::load(score_ + s));
      const Int older = select(best<rank, Int(0), best_position> position);
      const Int better = (rank < best) | older;
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
      const int32_t at = s < S_ ? position_[s] : n - 1;
      ranks(p_.rule, n, Int(at), Vec(s < S_ ? score_[s] : new_score)).store(rank);
      lowest.offer(rank[0], at, s);
    }
    return lowest.source;
  }

  void fold(int64_t slot) {
    const float *k = key_, *v = value_;
    if (slot < S_) {
      widen(slot_k_ + slot * p_.D, p_.D, key_);
      widen(slot_v_ + slot * p_.D, p_.D, value_);
    } else {
      widen(new_k_, p_.D, key_);
      widen(new_v_, p_.D, value_);
    }
    if constexpr (kScaled) {
      const bool kept = slot < S_;
      scale(key_, kept ? p_.slots.k_scale[row_ * S_ + slot] : new_k_scale_);
      scale(value_, kept ? p_.slots.v_scale[row_ * S_ + slot] : new_v_scale_);
    }
    features(p_.psi, head_, k, hidden_, features_);
    fold_token(features_, v, p_.R, p_.D, p_.H + row_ * p_.R * p_.D, p_.z + row_ * p_.R);
  }

  void scale(float* x, float factor) const {
    for_each(x, p_.D, [factor](Vec a, int64_t, int) { return a * Vec(factor); });
  }

  // The token takes a slot.
  void take(int64_t slot, float score) {
    std::memcpy(slot_k_ + slot * p_.D, new_k_, p_.D * sizeof(T));
    std::memcpy(slot_v_ + slot * p_.D, new_v_, p_.D * sizeof(T));
    if constexpr (kScaled) {
      p_.slots.k_scale[row_ * S_ + slot] = new_k_scale_;
      p_.slots.v_scale[row_ * S_ + slot] = new_v_scale_;
    }
    position_[slot] = int32_t(p_.seen[b_]);
    score_[slot] = score;
    p_.slots.weight[row_ * S_ + slot] = 0.0f;
  }

  const DecodeStepParams& p_;
  const int64_t G_, S_, width_, stride_;
  int64_t head_ = 0, b_ = 0, row_ = 0, held_ = 0;
  T *slot_k_ = nullptr, *slot_v_ = nullptr;
  const T* next_k_ = nullptr;  // the keys of the head that comes next; null: none does
  int32_t* position_ = nullptr;
  float* score_ = nullptr;
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
  Head<T> head(p);
  for (int64_t item = begin; item < end; ++item) head.run(item, item + 1 == end);
}

}  // namespace

void decode_step(const DecodeStepParams& p, int64_t begin, int64_t end) {
  switch (p.slots.dtype) {
    case DType::f32:
      return decode<float>(p, begin, end);
    case DType::bf16:
      return decode<bf16>(p, begin, end);
    case DType::fp16:
      return decode<fp16>(p, begin, end);
    case DType::i8:
      return decode<int8_t>(p, begin, end);
    case DType::fp8:
      return;  // no op lets it in
  }
}

}  // namespace less::cpu::LESS_ISA
