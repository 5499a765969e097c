// What slots note of their tokens beside rows: scores, and log-weights or counts. Where a kernel
// knows whether rows are packed, it says so; else the slots do.
#pragma once

#include "common/layout.h"
#include "common/merge.h"
#include "cuda/convert.h"

namespace less::cuda {

LESS_DEVICE uint16_t half_of(float score) {
  return bits_of<uint16_t>(__float2half_rn(within_half(score)));
}

// A score as slots note it.
LESS_DEVICE float noted_score(bool few, float score) {
  return few ? __half2float(bits_of<__half>(half_of(score))) : score;
}

// A score's bits as they are stored, and what they say: who asks for several waits for none before
// all are asked for.
LESS_DEVICE uint32_t score_bits_at(bool few, const Slots& slots, int64_t s) {
  if (few) return slots.half[s];             // narrow: lanes take slots side by side
  return bits_of<uint32_t>(slots.score[s]);  // narrow: lanes take slots side by side
}

LESS_DEVICE float score_of_bits(bool few, uint32_t bits) {
  return few ? __half2float(bits_of<__half>(uint16_t(bits))) : bits_of<float>(bits);
}

LESS_DEVICE float score_at(bool few, const Slots& slots, int64_t s) {
  return score_of_bits(few, score_bits_at(few, slots, s));
}

LESS_DEVICE void put_score(bool few, const Slots& slots, int64_t s, float score) {
  if (few) {
    store(slots.half + s, half_of(score));  // narrow: lanes take slots side by side
  } else {
    store(slots.score + s, score);  // narrow: lanes take slots side by side
  }
}

// Notes a score, and returns it as it is noted.
LESS_DEVICE float note_score(bool few, const Slots& slots, int64_t s, float score) {
  if (!few) {
    store(slots.score + s, score);  // narrow: lanes take slots side by side
    return score;
  }
  const uint16_t half = half_of(score);
  store(slots.half + s, half);  // narrow: lanes take slots side by side
  return score_of_bits(true, half);
}

// What a token that stands for itself alone has as weight: a log-weight, or a count.
LESS_DEVICE float weight_of_one(bool few) { return few ? 1.0f : 0.0f; }

LESS_DEVICE uint32_t weight_bits_at(bool few, const Slots& slots, int64_t s) {
  if (few) return slots.count[s];             // narrow: lanes take slots side by side
  return bits_of<uint32_t>(slots.weight[s]);  // narrow: lanes take slots side by side
}

LESS_DEVICE float weight_of_bits(bool few, uint32_t bits) {
  return few ? float(bits) : bits_of<float>(bits);
}

// A slot's log-weight, or its count.
LESS_DEVICE float weight_at(bool few, const Slots& slots, int64_t s) {
  return weight_of_bits(few, weight_bits_at(few, slots, s));
}

LESS_DEVICE void put_weight(bool few, const Slots& slots, int64_t s, float weight) {
  if (few) {
    store(slots.count + s, uint16_t(weight));  // narrow: lanes take slots side by side
  } else {
    store(slots.weight + s, weight);  // narrow: lanes take slots side by side
  }
}

// The weight of two tokens that become one.
LESS_DEVICE float both_weights(bool few, float a, float b) {
  return few ? merged_count(a, b) : merged_weight(a, b);
}

// The log-weight of a slot that holds a token.
LESS_DEVICE float log_weight_of_bits(bool few, uint32_t bits) {
  return few ? logf(weight_of_bits(true, bits)) : weight_of_bits(false, bits);
}

}  // namespace less::cuda
