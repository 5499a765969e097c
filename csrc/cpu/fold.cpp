// H[b,k,r,:] += sum_n psi_k[b,k,n,r] v[b,k,n,:]     z[b,k,r] += sum_n psi_k[b,k,n,r]
//
// Range:  heads (b,k); one call owns each head whole.
// Memory: H of a head (4 R D bytes) stays in the first-level cache; psi_k and v are read once.
//         Runs of tokens that are folded are read where they lie.
// Order:  n ascending for every element: the thread count never changes a bit.
#include "cpu/fold.h"

#include "cpu/types.h"
#include "params.h"

namespace less::cpu::LESS_ISA {
namespace {

template <typename T>
void fold_heads(const FoldParams& p, int64_t begin, int64_t end) {
  const T* v = static_cast<const T*>(p.v);
  for (int64_t head = begin; head < end; ++head) {
    const int64_t first = head * p.N;
    for (int64_t n = 0; n < p.N;) {
      int64_t run = p.N - n;
      if (p.keep != nullptr) {
        while (n < p.N && !p.keep[first + n]) ++n;
        for (run = 0; n + run < p.N && p.keep[first + n + run];) ++run;
      }
      fold_tokens(p.psi_k + (first + n) * p.R, 1, p.R, v + (first + n) * p.D, p.D, run, p.R, p.D,
                  p.H + head * p.R * p.D, p.z + head * p.R);
      n += run;
    }
  }
}

}  // namespace

void fold(const FoldParams& p, int64_t begin, int64_t end) {
  with_type<FloatTypes>(
      p.v_dtype, [&](auto type) { fold_heads<typename decltype(type)::type>(p, begin, end); });
}

}  // namespace less::cpu::LESS_ISA
