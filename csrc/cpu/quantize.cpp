// eight[n,:] = round(x[n,:] / scale[n]), scale[n] = max|x[n,:]| / 127
//
// Range:  rows n, tokens fastest.
// Memory: x read twice, the second time from the first-level cache; out written once.
// Order:  a row's bits depend on nothing but the row.
#include "cpu/quantize.h"

#include "cpu/types.h"
#include "params.h"

namespace less::cpu::LESS_ISA {
namespace {

template <typename T>
void quantize_rows(const QuantizeParams& p, int64_t begin, int64_t end) {
  for (int64_t n = begin; n < end; ++n) {
    const int64_t head = n / p.T;
    const int64_t from = offset(p.x, head / p.heads, head % p.heads, n % p.T);
    int8_t* row = static_cast<int8_t*>(p.eight) + n * p.D;
    p.scale[n] = quantize_row(static_cast<const T*>(p.x.data) + from, p.D, row);
  }
}

}  // namespace

void quantize(const QuantizeParams& p, int64_t begin, int64_t end) {
  with_type<FloatTypes>(
      p.x.dtype, [&](auto type) { quantize_rows<typename decltype(type)::type>(p, begin, end); });
}

}  // namespace less::cpu::LESS_ISA
