// One token of every row, a layer's whole step in one pass over its slots:
//
//   out = (phi H + sum e^l v) / (phi z + sum e^l),  l = scale q.k + weight, over slots and token
//   (with a soft-cap, softcap tanh(scale q.k / softcap) + weight)
//   (of packed rows a slot has a count in place of the weight, which multiplies e^l)
//   score <- decay score + sum over the group of softmax; the victim has the lowest rank, of equals
//   the lowest position; H += psi(k)^T v, z += psi(k) of the victim, or the nearest token takes it
//   in; the token takes its slot.
//   Where there are hot slots the token takes its own of them; who lay there is encoded, and is
//   what a free slot, or the victim's, is for.
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
#include <numeric>

#include "cpu/codec.h"
#include "cpu/distances.h"
#include "cpu/features.h"
#include "cpu/integer_rows.h"
#include "cpu/lowest.h"
#include "cpu/merge.h"
#include "cpu/notes.h"
#include "cpu/quantize.h"
#include "cpu/rows.h"
#include "cpu/scratch.h"
#include "cpu/softmax.h"
#include "cpu/space.h"
#include "cpu/state.h"

namespace less::cpu::LESS_ISA {
namespace {

// Slots whose rows are stored alike.
struct Group {
  int64_t first, count;  // of the head's slots
  Stored k, v;
};

// One head after the other.
class Step {
 public:
  explicit Step(const DecodeStepParams& p)
      : p_(p),
        G_(p.spec.Q / p.spec.K),
        D_(p.spec.D),
        R_(p.maps.phi.w1 == nullptr ? 0 : p.layout.R),
        W_(hot_slots(p.layout)),
        width_(padded(p.spec.D)),
        rotates_(p.maps.space.key_mean != nullptr),
        rounds_(packed(p.layout.v_dtype)),
        merges_(p.spec.victim == Victim::merge),
        scaled_(has_scale(p.layout.v_dtype) || has_scale(p.layout.call_dtype)) {
    Scratch scratch(total_floats());
    const int64_t most = padded(p.layout.S + 1);
    q_ = scratch.floats(G_ * width_);
    plain_q_ = rotates_ && R_ > 0 ? scratch.floats(G_ * width_) : q_;
    out_ = scratch.floats(G_ * width_);
    logit_ = scratch.floats(G_ * most);
    weight_ = scaled_ ? scratch.floats(G_ * most) : nullptr;
    score_ = rounds_ ? scratch.floats(most) : nullptr;
    q_eight_ = reinterpret_cast<int8_t*>(rounds_ ? scratch.floats(G_ * width_ / 4) : nullptr);
    q_scale_ = scratch.floats(G_);
    q_sum_ = reinterpret_cast<int32_t*>(scratch.floats(G_));
    top_ = scratch.floats(G_);
    total_ = scratch.floats(G_);
    key_ = scratch.floats(width_);
    value_ = scratch.floats(width_);
    for (float*& row : new_row_) row = scratch.floats(width_);
    for (float*& row : left_row_) row = scratch.floats(width_);
    features_ = scratch.floats(padded(R_));
    hidden_ = scratch.floats(hidden_floats());
    key_memory_ = merges_ ? scratch.floats(key_scratch(D_)) : nullptr;
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
      float* out = out_ + g * width_;
      if (rotates_) rotate_row(p_.maps.space, Rotation::output, head_, D_, out);
      narrow(out, D_, p_.out.dtype, offset(p_.out, b_, query(g), 0), p_.out.data);
    }
    if (p_.spec.victim == Victim::none) return;
    const Token token{int32_t(seen_), add_scores(), weight_of_one(slots_)};
    if (W_ == 0) return join(token, new_k(), new_v());
    const int64_t slot = hot_slot(p_.layout, seen_);
    const Token left{slots_.position[slot], scores_[slot], weight_of_one(slots_)};
    if (left.position >= 0) encode(slot);
    copy_row(new_k(), 0, group_[0].k, slot);
    copy_row(new_v(), 0, group_[0].v, slot);
    hold(slot, token);
    if (left.position >= 0) join(left, left_k(), left_v());
  }

 private:
  struct Token {
    int32_t position;
    float score;
    float weight;  // or count
  };

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
    const Layout& of = p_.layout;
    group_[0] = {0, W_, hot_keys(of, slots_), hot_values(of, slots_)};
    group_[1] = {W_, S_ - W_, cold_keys(of, slots_), cold_values(of, slots_)};
    seen_ = *seen(own);
    held_ = 0;
    for (int64_t s = 0; s < S_; ++s) held_ += slots_.position[s] >= 0;
  }

  // The token's rows, as its slot will hold them.
  Stored new_k() { return stored(p_.layout.call_dtype, new_row_[0], &new_scale_[0], nullptr, D_); }
  Stored new_v() { return stored(p_.layout.call_dtype, new_row_[1], &new_scale_[1], nullptr, D_); }
  // Those of the token that leaves its hot slot, as another slot will hold them.
  Stored left_k() {
    return stored(p_.layout.k_dtype, left_row_[0], &left_scale_[0], &left_half_[0], D_);
  }
  Stored left_v() {
    return stored(p_.layout.v_dtype, left_row_[1], &left_scale_[1], &left_half_[1], D_);
  }

  // The query head of the group's g-th.
  int64_t query(int64_t g) const { return head_ * G_ + g; }

  int64_t hidden_floats() const {
    return R_ == 0 ? 0 : std::max(features_scratch(p_.maps.phi), features_scratch(p_.maps.psi));
  }

  int64_t total_floats() const {
    constexpr auto line = Scratch::padded_floats;
    const int64_t most = padded(p_.layout.S + 1);
    return (rotates_ && R_ > 0 ? 3 : 2) * line(G_ * width_) + (scaled_ ? 2 : 1) * line(G_ * most) +
           (rounds_ ? line(G_ * width_ / 4) + line(most) : 0) + 4 * line(G_) + 6 * line(width_) +
           line(padded(R_)) + line(hidden_floats()) + (merges_ ? line(key_scratch(D_)) : 0);
  }

  void clear() {
    for (int64_t g = 0; g < G_; ++g) clear_row(p_.out, b_, query(g), 0, D_);
  }

  // The queries, padded with zeros, and the token's key and value as the slots will hold them.
  void load() {
    const Space& space = p_.maps.space;
    for (int64_t g = 0; g < G_; ++g) {
      float *q = q_ + g * width_, *plain = plain_q_ + g * width_;
      widen(p_.q.data, p_.q.dtype, offset(p_.q, b_, query(g), 0), D_, plain);
      std::fill(plain + D_, plain + width_, 0.0f);
      if (plain != q) std::copy(plain, plain + width_, q);
      if (rotates_) rotate_row(space, Rotation::query, head_, D_, q);
      if (rounds_) {
        int8_t* const eight = q_eight_ + g * width_;
        q_scale_[g] = quantize_row(q, D_, eight);
        q_sum_[g] = std::accumulate(eight, eight + D_, int32_t(0));
        widen_row(eight, q_scale_[g], D_, q);
      }
    }
    widen(p_.k.data, p_.k.dtype, offset(p_.k, b_, head_, 0), D_, key_);
    widen(p_.v.data, p_.v.dtype, offset(p_.v, b_, head_, 0), D_, value_);
    if (rotates_) {
      rotate_row(space, Rotation::key, head_, D_, key_);
      rotate_row(space, Rotation::value, head_, D_, value_);
    }
    encode_row(new_k(), 0, key_, D_);
    encode_row(new_v(), 0, value_, D_);
  }

  // The rows of a hot slot, as the other slots hold rows.
  void encode(int64_t slot) {
    decode_row(group_[0].k, slot, D_, key_);
    decode_row(group_[0].v, slot, D_, value_);
    encode_row(left_k(), 0, key_, D_);
    encode_row(left_v(), 0, value_, D_);
  }

  // f(group, first, count) for each run of slots that hold a token, first counted from the group's
  // own: one run a group, all its slots, in steady state.
  template <typename F>
  LESS_INLINE void for_each_run(F f) const {
    for (const Group& group : group_) {
      if (held_ == S_) {
        if (group.count > 0) f(group, 0, group.count);
        continue;
      }
      const int32_t* const position = slots_.position + group.first;
      for (int64_t s = 0; s < group.count;) {
        const int64_t first = s;
        while (s < group.count && position[s] >= 0) ++s;
        if (s > first) f(group, first, s - first);
        while (s < group.count && position[s] < 0) ++s;
      }
    }
  }

  // logit_[g] = l over slots and token, -inf for empty slots and the padding.
  void logits() {
    for_each_run([this](const Group& group, int64_t first, int64_t count) {
      const uint8_t* const rows = group.k.rows + first * group.k.stride;
      float* const l = logit_ + group.first + first;
      if (dots_in_integers(group.k.dtype, q_eight_, q_scale_, q_sum_, G_, width_, rows, count, D_,
                           l, stride_, &stream_)) {
        return;
      }
      dots_of_rows(group.k.dtype, q_, G_, width_, rows, count, D_, l, stride_, &stream_);
    });
    dots_of_rows(p_.layout.call_dtype, q_, G_, width_, new_row_[0], 1, D_, logit_ + S_, stride_,
                 nullptr);
    const float new_scale = has_scale(p_.layout.call_dtype) ? new_scale_[0] : 1.0f;
    for (int64_t g = 0; g < G_; ++g) {
      float* l = logit_ + g * stride_;
      l[S_] *= new_scale * p_.spec.scale;
      if (p_.spec.softcap != 0.0f) soft_cap(Vec(l[S_]), p_.spec.softcap).store(l + S_, 1);
      for (const Group& group : group_) {
        with_scales(group.k, [&](auto scales) { finish(l, group, scales); });
      }
      std::fill(l + S_ + 1, l + stride_, -kInfinity);
      if (held_ == S_) continue;
      for (int64_t s = 0; s < S_; ++s) {
        if (slots_.position[s] < 0) l[s] = -kInfinity;
      }
    }
  }

  // q.k of a group's slots, without the rows' scales, become logits.
  template <typename Scales>
  LESS_INLINE void finish(float* l, const Group& group, Scales scales) const {
    const Vec scale(p_.spec.scale);
    const float softcap = p_.spec.softcap;
    float* const at = l + group.first;
    if (slots_.weight == nullptr) {
      return for_each(at, group.count, [=](Vec a, int64_t s, int n) {
        a = scales.times(a, s, n) * scale;
        return softcap == 0.0f ? a : soft_cap(a, softcap);
      });
    }
    const float* const weight = slots_.weight + group.first;
    if (softcap != 0.0f) {
      return for_each(at, group.count, [=](Vec a, int64_t s, int n) {
        return soft_cap(scales.times(a, s, n) * scale, softcap) + load_some(weight + s, n);
      });
    }
    for_each(at, group.count, [=](Vec a, int64_t s, int n) {
      return fma(scales.times(a, s, n), scale, load_some(weight + s, n));
    });
  }

  const whole16* counts() const { return reinterpret_cast<const whole16*>(slots_.count); }

  // logit_ becomes e^(logit - top_), as often as a slot counts, and total_ its sum.
  void softmax() {
    for (int64_t g = 0; g < G_; ++g) {
      float* l = logit_ + g * stride_;
      // The values' sums ask for them faster than memory gives, exponentials for nothing.
      if (rounds_ && G_ > 1) stream_.read(group_[1].v.rows + (g + 1) * Stream::kAhead / G_);
      top_[g] = largest_of(l, stride_);
      total_[g] = slots_.count == nullptr ? exp_and_sum(l, stride_, top_[g])
                                          : exp_and_sum(l, stride_, top_[g], counts(), S_);
    }
  }

  // out_ = softmax v over slots and token.
  void weigh() {
    std::fill(out_, out_ + G_ * width_, 0.0f);
    const float* p = logit_;
    if (scaled_) {
      // Each head's probabilities take the values' scales on; the scores need them as they are.
      for (int64_t g = 0; g < G_; ++g) {
        const float* from = logit_ + g * stride_;
        float* to = weight_ + g * stride_;
        for (const Group& group : group_) {
          with_scales(group.v, [&](auto scales) {
            for (int64_t s = 0; s < group.count; s += Vec::kSize) {
              const int n = int(std::min<int64_t>(Vec::kSize, group.count - s));
              const Vec x = scales.times(load_some(from + group.first + s, n), s, n);
              if (n == Vec::kSize) {
                x.store(to + group.first + s);
              } else {
                x.store(to + group.first + s, n);
              }
            }
          });
        }
        to[S_] = from[S_] * (has_scale(p_.layout.call_dtype) ? new_scale_[1] : 1.0f);
      }
      p = weight_;
    }
    for_each_run([=, this](const Group& group, int64_t first, int64_t count) {
      const float* const weight = p + group.first + first;
      const uint8_t* const rows = group.v.rows + first * group.v.stride;
      if (add_in_integers(group.v.dtype, weight, G_, stride_, rows, count, D_, out_, width_,
                          &stream_)) {
        return;
      }
      add_weighted_rows(group.v.dtype, weight, G_, stride_, rows, count, D_, out_, width_,
                        &stream_);
    });
    add_weighted_rows(p_.layout.call_dtype, p + S_, G_, stride_, new_row_[1], 1, D_, out_, width_,
                      nullptr);
    for (int64_t g = 0; g < G_; ++g) {
      const Vec inverse(1.0f / total_[g]);
      for_each(out_ + g * width_, width_, [inverse](Vec a, int64_t, int) { return a * inverse; });
    }
  }

  void merge() {
    double share = 0.0;
    for (int64_t g = 0; g < G_; ++g) {
      features(p_.maps.phi, query(g), plain_q_ + g * width_, hidden_, features_);
      // What all logits of the query lack in the space counts where they meet the state.
      const bool counts = rotates_ && !centred(p_.maps.phi.kind);
      const float lacks = counts ? p_.spec.scale * shift(plain_q_ + g * width_) : 0.0f;
      share += merge_state(features_, state_.H, state_.z, R_, D_, top_[g] + lacks, total_[g],
                           out_ + g * width_);
    }
    *state_.share += share;
  }

  float shift(const float* q) const {
    const uint16_t* const key_mean = p_.maps.space.key_mean + head_ * D_;
    Vec total(0.0f);
    for (int64_t d = 0; d < D_; d += Vec::kSize) {
      const int n = int(std::min<int64_t>(Vec::kSize, D_ - d));
      total = fma(load_some(q + d, n), load_half(key_mean + d, n), total);
    }
    return sum(total);
  }

  // Adds what each slot received to its score, and finds scores_; returns what the token itself
  // received.
  float add_scores() {
    scores_ = rounds_ ? score_ : slots_.score;
    if (!p_.spec.scores) {
      for (int64_t s = 0; rounds_ && s < S_; ++s) score_[s] = score_at(slots_, s);
      return 0.0f;
    }
    for (int64_t g = 0; g < G_; ++g) total_[g] = 1.0f / total_[g];
    const Vec decay(p_.spec.decay);
    const auto added = [&](Vec score, int64_t s, int) LESS_LAMBDA_INLINE {
      Vec received(0.0f);
      for (int64_t g = 0; g < G_; ++g) {
        received = fma(Vec(total_[g]), Vec::load(logit_ + g * stride_ + s), received);
      }
      return score * decay + received;
    };
    if (rounds_) {
      auto* const half = reinterpret_cast<fp16*>(slots_.half);
      for (int64_t s = 0; s < S_; s += Vec::kSize) {
        const int n = int(std::min<int64_t>(Vec::kSize, S_ - s));
        const Vec score = within_half(added(load_some(half + s, n), s, n));
        if (n == Vec::kSize) {
          score.store(half + s);
        } else {
          score.store(half + s, n);
        }
        load_some(half + s, n).store(score_ + s);
      }
    } else {
      for_each(slots_.score, S_, added);
    }
    float received = 0.0f;
    for (int64_t g = 0; g < G_; ++g) received += total_[g] * logit_[g * stride_ + S_];
    return noted_score(p_.layout, received);
  }

  // A token takes a slot that is not hot: a free one, or the victim's; or is the victim itself.
  void join(Token token, const Stored& k, const Stored& v) {
    const Group& cold = group_[1];
    int64_t slot = first_free();
    if (slot < 0) {
      slot = choose(token);
      if (p_.spec.victim == Victim::fold) {
        if (slot < S_) {
          fold(cold.k, cold.v, slot - W_);
        } else {
          fold(k, v, 0);
        }
      }
      if (merges_) take_in(slot, token, k, v);
    }
    if (slot == S_) return;
    copy_row(k, 0, cold.k, slot - W_);
    copy_row(v, 0, cold.v, slot - W_);
    hold(slot, token);
  }

  // The lowest empty slot that is not hot; -1: there is none.
  int64_t first_free() const {
    if (held_ == S_) return -1;
    for (int64_t s = W_; s < S_; ++s) {
      if (slots_.position[s] < 0) return s;
    }
    return -1;
  }

  // The victim: a slot, or S_ for the token itself. All slots that are not hot are held.
  int64_t choose(const Token& token) const {
    const Rule rule = for_slots(p_.spec.rule, S_);
    const int64_t n = seen_ + 1;
    const auto rank = [&](auto position, auto from)
                          LESS_LAMBDA_INLINE { return rank_of(rule, n, position, from(scores_)); };
    Lowest lowest = lowest_of(slots_.position, W_, S_, Lowest{}, rank);
    lowest.offer(rank_of(rule, n, token.position, token.score), token.position, S_);
    return lowest.source;
  }

  // A candidate: a slot's, or the token that joins.
  struct Candidate {
    Token token;
    const Stored& k;
    const Stored& v;
    int64_t row;
  };

  // The victim, a slot or S_ for the token, becomes part of the nearest of the others: of a slot's
  // or of the token. Of nobody where all are protected.
  void take_in(int64_t victim, Token& token, const Stored& k, const Stored& v) {
    const Group& cold = group_[1];
    const auto candidate = [&](int64_t source) -> Candidate {
      if (source == S_) return {token, k, v, 0};
      const Token held{slots_.position[source], scores_[source], weight_at(slots_, source)};
      return {held, cold.k, cold.v, source - W_};
    };
    const Candidate i = candidate(victim);
    const Rule rule = for_slots(p_.spec.rule, S_);
    const int64_t n = seen_ + 1;
    float* const distance = logit_;  // [S_ + 1], whose logits are done with
    distance[S_] = kInfinity;
    with_key(i.k, i.row, D_, key_memory_, [&](const auto& key) {
      key.distances(cold.k, cold.count, distance + W_);
      if (!is_protected(rule, n, token.position)) key.distances(k, 1, distance + S_);
    });
    distance[victim] = kInfinity;
    const float w_i = mass_of(i.token.score);
    const auto cost = [&](auto position, auto from) LESS_LAMBDA_INLINE {
      const auto score = from(scores_);
      return merge_cost(rule, n, position, decltype(score)(w_i), mass_of(score), from(distance));
    };
    Lowest nearest = lowest_of(slots_.position, W_, S_, Lowest::finite(), cost);
    nearest.offer(merge_cost(w_i, mass_of(token.score), distance[S_]), token.position, S_);
    if (nearest.source < 0) return;
    const Candidate j = candidate(nearest.source);
    const float part = w_i / (w_i + mass_of(j.token.score));
    merge_row(i.k, i.row, part, D_, key_, value_, j.k, j.row);
    merge_row(i.v, i.row, part, D_, key_, value_, j.v, j.row);
    const Token both{std::max(j.token.position, i.token.position), j.token.score + i.token.score,
                     both_weights(slots_, j.token.weight, i.token.weight)};
    if (nearest.source == S_) {
      token = both;
    } else {
      hold(nearest.source, both);
    }
  }

  void fold(const Stored& k, const Stored& v, int64_t row) {
    decode_row(k, row, D_, key_);
    decode_row(v, row, D_, value_);
    if (rotates_) key_out_of_space(p_.maps.space, p_.maps.psi.kind, head_, D_, key_);
    features(p_.maps.psi, head_, key_, hidden_, features_);
    fold_token(features_, value_, R_, D_, state_.H, state_.z);
  }

  void hold(int64_t slot, const Token& token) {
    slots_.position[slot] = token.position;
    put_score(slots_, slot, token.score);
    put_weight(slots_, slot, token.weight);
  }

  const DecodeStepParams& p_;
  const int64_t G_, D_, R_;  // R: 0 where there are no maps to read the state by
  const int64_t W_, width_;
  const bool rotates_, rounds_;  // rounds: queries too, to 8 bits
  const bool merges_;
  const bool scaled_;  // some rows of values have scales
  Stream stream_;
  int64_t head_ = 0, b_ = 0, S_ = 0, stride_ = 0, held_ = 0, seen_ = 0;
  Slots slots_{};
  State state_{};
  Group group_[2];       // hot slots, and the others
  float *q_, *plain_q_;  // [G, width]: in the space, and as they came
  int8_t* q_eight_;      // [G, width], those in the space in 8 bits, of packed rows
  float* q_scale_;       // [G]
  int32_t* q_sum_;       // [G], of q_eight_
  float* out_;           // [G, width]
  float* logit_;         // [G, stride], then probabilities before they are divided by total_
  float* weight_;        // [G, stride], those times the values' scales
  float* score_;         // [S], those of packed rows, as their slots note them
  const float* scores_ = nullptr;  // [S], those of any rows, as their slots note them
  float *top_, *total_;            // [G]
  float *key_, *value_;            // [width]
  float *new_row_[2], *left_row_[2];
  float new_scale_[2], left_scale_[2];
  uint16_t left_half_[2];
  float* features_;  // [R]
  float* hidden_;
  float* key_memory_;  // of with_key()
};

}  // namespace

void decode_step(const DecodeStepParams& p, int64_t begin, int64_t end) {
  Step step(p);
  for (int64_t item = begin; item < end; ++item) step.run(item, item + 1 == end);
}

}  // namespace less::cpu::LESS_ISA
