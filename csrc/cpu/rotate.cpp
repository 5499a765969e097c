// y = x in a layer's space, or back out of it (common/space.h)
//
// Range:  rows [b, head, t], t fastest.
// Memory: x read and y written once.
// Order:  a row's bits depend on nothing but the row.
#include <vector>

#include "cpu/quantize.h"
#include "cpu/space.h"
#include "params.h"

namespace less::cpu::LESS_ISA {

void rotate(const RotateParams& p, int64_t begin, int64_t end) {
  std::vector<int8_t> eight;
  for (int64_t n = begin; n < end; ++n) {
    const int64_t t = n % p.T, row = n / p.T, h = row % p.heads, b = row / p.heads;
    float* const y = p.y + n * p.D;
    if (p.valid != nullptr && !p.valid[b * p.T + t]) {
      std::fill(y, y + p.D, 0.0f);
      continue;
    }
    widen(p.x.data, p.x.dtype, offset(p.x, b, h, t), p.D, y);
    rotate_row(p.space, p.rotation, h / (p.heads / p.K), p.D, y);
    if (p.rotation == Rotation::rounded_query) {
      eight.resize(p.D);
      const float scale = quantize_row(y, p.D, eight.data());
      widen_row(eight.data(), scale, p.D, y);
    }
  }
}

}  // namespace less::cpu::LESS_ISA
