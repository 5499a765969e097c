// Merging: a token i that leaves becomes part of the token j that stays, of least
//
//   cost = w_i w_j / (w_i + w_j) |k_i - k_j|^2,  w = score + 1e-6
//
// of equals the older; less/reference/merge.py is the same in Python. Score is float, or a
// machine's vector of them, as in rule.h.
#pragma once

#include "common/dtype.h"
#include "common/rule.h"

namespace less {

// What a token of this score weighs: no token weighs nothing.
template <typename Score>
LESS_HD Score merge_weight(Score score) {
  return score + Score(1e-6f);
}

// What merging costs, of weights and the keys' squared distance. NaN and infinity are no costs:
// both become infinity, at which nobody is a target.
template <typename Score>
LESS_HD Score merge_cost(Score w_i, Score w_j, Score distance) {
  const Score infinite(__builtin_huge_valf());
  const Score cost = w_i * w_j / (w_i + w_j) * distance;
  return select(cost < infinite, cost, infinite);
}

// The same of a token that may be protected.
template <typename Position, typename Score>
LESS_HD Score merge_cost(const Rule& rule, int64_t n, Position position, Score w_i, Score w_j,
                         Score distance) {
  const Score infinite(__builtin_huge_valf());
  return select(is_protected(rule, n, position), infinite, merge_cost(w_i, w_j, distance));
}

}  // namespace less
