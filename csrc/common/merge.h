// Merging: a token i that leaves becomes part of the token j that stays, of least
//
//   cost = w_i w_j / (w_i + w_j) |k_i - k_j|^2,  w = score + 1e-6,
//
// of equal costs of the older; j moves by w_i / (w_i + w_j) of the way to i.
// less/reference/merge.py is the same in Python. Score is float, or a machine's vector of them, as
// in rule.h.
#pragma once

#include <cmath>

#include "common/dtype.h"
#include "common/rule.h"

namespace less {

// What a token of this score weighs: no token weighs nothing.
template <typename Score>
LESS_HD Score mass_of(Score score) {
  return score + Score(1e-6f);
}

// What merging costs, of masses and the keys' squared distance. NaN and infinity are no costs:
// both become infinity, at which nobody is a target.
template <typename Score>
LESS_HD Score merge_cost(Score mass_i, Score mass_j, Score far) {
  const Score infinite(__builtin_huge_valf());
  const Score cost = mass_i * mass_j / (mass_i + mass_j) * far;
  return select(cost < infinite, cost, infinite);
}

// The same of a token that may be protected.
template <typename Position, typename Score>
LESS_HD Score merge_cost(const Rule& rule, int64_t n, Position position, Score mass_i, Score mass_j,
                         Score far) {
  const Score infinite(__builtin_huge_valf());
  return select(is_protected(rule, n, position), infinite, merge_cost(mass_i, mass_j, far));
}

// log(e^a + e^b) of finite log-weights.
LESS_HD float merged_weight(float a, float b) {
  const float most = a > b ? a : b, least = a > b ? b : a;
  return most + log1pf(expf(least - most));
}

// What slots of packed rows note of tokens, in 16 bits: the nearest fp16 of a score, and a number
// of tokens; neither is more than this. NaN stays NaN.
constexpr float kMostScore = 65504.0f;
constexpr float kMostTokens = 32767.0f;

template <typename Score>
LESS_HD Score within_half(Score score) {
  return select(Score(kMostScore) < score, Score(kMostScore), score);
}

LESS_HD float merged_count(float a, float b) { return a + b < kMostTokens ? a + b : kMostTokens; }

}  // namespace less
