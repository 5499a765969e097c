// Who stays: the ranking that kernels compute themselves. less.policies.base.rank_by_rule is the
// same in Python.
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
};

// The rank of a token; n: tokens seen, those of the call included. NaN ranks lowest.
LESS_HD float rank_of(const Rule& rule, int64_t n, int32_t position, float score) {
  constexpr float kInfinite = __builtin_huge_valf();
  if (position >= n - rule.recent || position < rule.sinks) return kInfinite;
  if (!rule.by_score) return -kInfinite;
  const float rank = rule.per_age ? score / float(n - position) : score;
  return rank == rank ? rank : -kInfinite;
}

// Of two ranks the lower leaves; of equals the older token.
LESS_HD bool leaves_before(float rank_a, int32_t position_a, float rank_b, int32_t position_b) {
  return rank_a != rank_b ? rank_a < rank_b : position_a < position_b;
}

}  // namespace less
