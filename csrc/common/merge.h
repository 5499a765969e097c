// Merging: a token i that leaves becomes part of the token j of least
//
//   cost = w_i w_j / (w_i + w_j) |k_i - k_j|^2,  w = score + 1e-6,
//
// of equal costs of the older; j moves by w_i / (w_i + w_j) of the way to i.
// less/reference/merge.py is the same in Python.
#pragma once

#include <cmath>

#include "common/dtype.h"

namespace less {

// Added to a score, so that tokens without attention have a weight.
constexpr float kLeastMass = 1e-6f;

LESS_HD float mass_of(float score) { return score + kLeastMass; }

// far: |k_i - k_j|^2.
LESS_HD float merge_cost(float mass_i, float mass_j, float far) {
  return mass_i * (mass_j / (mass_i + mass_j)) * far;
}

// log(e^a + e^b) of finite log-weights.
LESS_HD float merged_weight(float a, float b) {
  const float most = a > b ? a : b, less = a > b ? b : a;
  return most + log1pf(expf(less - most));
}

}  // namespace less
