// Who stays: the ranking that kernels compute themselves. less.policies.base.rank_by_rule is the
// same in Python.
//
// Score and Position are float and int32_t, or a machine's vectors of them, which have the same
// operators; a comparison of vectors is a mask, and select() takes one.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/dtype.h"

namespace less {

// Positions >= seen - recent and < sinks stay; of the others the highest scores, or scores per
// token of age, or, not by_score, the youngest.
struct Rule {
  int64_t recent;
  int64_t sinks;
  bool by_score;
  bool per_age;
  int64_t capacity;  // slots that `recent` is meant for; 0: it is the same for every head
};

// The rule of a head with S slots, which keeps recent tokens in proportion, the newest at least.
LESS_HD Rule for_slots(Rule rule, int64_t S) {
  if (rule.capacity > 0 && rule.recent > 0) {
    const int64_t share = rule.recent * S / rule.capacity;
    rule.recent = share > 1 ? share : 1;
  }
  return rule;
}

template <typename T>
LESS_HD T select(bool condition, T a, T b) {
  return condition ? a : b;
}

// Whether a token stays whatever its score; n: tokens seen, those of the call included.
template <typename Position>
LESS_HD auto is_protected(const Rule& rule, int64_t n, Position position)
    -> decltype(position > position) {
  const int64_t old = n - rule.recent - 1;
  const Position youngest(int32_t(old > -1 ? old : -1));
  const Position first_other(int32_t(rule.sinks < INT32_MAX ? rule.sinks : INT32_MAX));
  return (position > youngest) | (first_other > position);
}

// The rank of a token; n: tokens seen, those of the call included. NaN ranks lowest.
template <typename Position, typename Score>
LESS_HD Score rank_of(const Rule& rule, int64_t n, Position position, Score score) {
  constexpr float kInfinite = __builtin_huge_valf();
  const Score lowest(-kInfinite);
  Score rank = lowest;
  if (rule.by_score) {
    rank = rule.per_age ? score / Score(Position(int32_t(n)) - position) : score;
    rank = select(lowest < rank, rank, lowest);
  }
  return select(is_protected(rule, n, position), Score(kInfinite), rank);
}

// Of two ranks, neither NaN, the lower leaves; of equals the older token.
template <typename Position, typename Score>
LESS_HD auto leaves_before(Score rank_a, Position position_a, Score rank_b, Position position_b)
    -> decltype(rank_a < rank_b) {
  using Mask = decltype(rank_a < rank_b);
  const Mask older = select(rank_b < rank_a, Mask(0), Mask(position_b > position_a));
  return Mask((rank_a < rank_b) | older);
}

}  // namespace less
