// y[b,n,t,:] = map_n(x[b,n,t,:])
//
// Range:  rows (b,n,t), t fastest: a head's weights stay in cache over its rows.
// Memory: weights once per head and call, 4 (D E + E R) bytes; x and y are small beside them.
// Order:  see features.h; a row's bits depend on nothing but the row.
#include <vector>

#include "cpu/features.h"

namespace less::cpu::LESS_ISA {

void feature_map(const FeatureMapParams& p, int64_t begin, int64_t end) {
  const FeatureMaps& m = p.maps;
  std::vector<float> scratch(features_scratch(m) + m.D);
  float* x = scratch.data() + features_scratch(m);
  for (int64_t row = begin; row < end; ++row) {
    const int64_t head = row / p.T % p.heads;
    const int64_t from = offset(p.x, row / (p.T * p.heads), head, row % p.T);
    widen(p.x.data, p.x.dtype, from, m.D, x);
    features(m, head, x, scratch.data(), p.y + row * m.R);
  }
}

}  // namespace less::cpu::LESS_ISA
