// What slots note of their tokens beside rows: scores, and log-weights or counts.
#pragma once

#include <cmath>

#include "common/half.h"
#include "common/layout.h"
#include "common/merge.h"
#include "cpu/simd.h"

namespace less::cpu::LESS_ISA {

// A score as slots of a layout note it.
inline float noted_score(const Layout& of, float score) {
  return packed(of.v_dtype) ? to_float(from_float<fp16>(within_half(score))) : score;
}

inline float score_at(const Slots& slots, int64_t s) {
  return slots.half == nullptr ? slots.score[s] : to_float(fp16{slots.half[s]});
}

inline void put_score(const Slots& slots, int64_t s, float score) {
  if (slots.half == nullptr) {
    slots.score[s] = score;
  } else {
    slots.half[s] = from_float<fp16>(within_half(score)).bits;
  }
}

// What a token that stands for itself alone has as weight: a log-weight, or a count.
inline float weight_of_one(const Slots& slots) { return slots.half == nullptr ? 0.0f : 1.0f; }

// A slot's log-weight, or its count.
inline float weight_at(const Slots& slots, int64_t s) {
  if (slots.count != nullptr) return float(slots.count[s]);
  return slots.weight == nullptr ? weight_of_one(slots) : slots.weight[s];
}

inline void put_weight(const Slots& slots, int64_t s, float weight) {
  if (slots.weight != nullptr) slots.weight[s] = weight;
  if (slots.count != nullptr) slots.count[s] = uint16_t(weight);
}

// The weight of two tokens that become one.
inline float both_weights(const Slots& slots, float a, float b) {
  return slots.half == nullptr ? merged_weight(a, b) : merged_count(a, b);
}

inline bool has_weights(const Slots& slots) {
  return slots.weight != nullptr || slots.count != nullptr;
}

// The log-weight of a slot that holds a token.
inline float log_weight_at(const Slots& slots, int64_t s) {
  return slots.count == nullptr ? slots.weight[s] : std::log(float(slots.count[s]));
}

}  // namespace less::cpu::LESS_ISA
