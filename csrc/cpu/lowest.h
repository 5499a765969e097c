// The lowest of many candidates: of equals the older, whatever the order in which they are seen.
#pragma once

#include <cstdint>

#include "common/rule.h"
#include "cpu/simd.h"

namespace less::cpu::LESS_ISA {

struct Lowest {
  float key = kInfinity;
  int32_t position = INT32_MAX;
  int64_t source = -1;  // whose they are; -1: nobody's

  // Nobody, whom a candidate of an infinite key does not replace.
  static LESS_INLINE Lowest finite() { return {kInfinity, INT32_MIN, -1}; }

  LESS_INLINE void offer(float k, int32_t at, int64_t from) {
    if (leaves_before(k, at, key, position)) *this = {k, at, from};
  }
};

// The lowest of `best` and the candidates first .. end - 1, whose position [end] has theirs.
// key(position, from): the keys, none of them NaN, of a vector of candidates, or of one: from(p)
// are their elements of an array.
template <typename Key>
LESS_INLINE Lowest lowest_of(const int32_t* position, int64_t first, int64_t end, Lowest best,
                             Key key) {
  Vec lowest(best.key);
  Int lowest_position(best.position), lowest_source(-1), source = iota() + Int(int32_t(first));
  int64_t s = first;
  for (; s + Vec::kSize <= end; s += Vec::kSize) {
    const Int at = Int::load(position + s);
    const Vec k = key(at, [s](const float* p) LESS_LAMBDA_INLINE { return Vec::load(p + s); });
    const Int better = leaves_before(k, at, lowest, lowest_position);
    lowest = select(better, k, lowest);
    lowest_position = select(better, at, lowest_position);
    lowest_source = select(better, source, lowest_source);
    source = source + Int(Vec::kSize);
  }
  float keys[Vec::kSize];
  int32_t positions[Vec::kSize], sources[Vec::kSize];
  lowest.store(keys);
  lowest_position.store(positions);
  lowest_source.store(sources);
  for (int i = 0; i < Vec::kSize; ++i) {
    if (sources[i] >= 0) best.offer(keys[i], positions[i], sources[i]);
  }
  for (; s < end; ++s) {
    const float k = key(position[s], [s](const float* p) LESS_LAMBDA_INLINE { return p[s]; });
    best.offer(k, position[s], s);
  }
  return best;
}

}  // namespace less::cpu::LESS_ISA
