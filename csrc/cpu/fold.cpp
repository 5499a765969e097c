// H[b,k,r,:] += sum_n psi_k[b,k,n,r] v[b,k,n,:]     z[b,k,r] += sum_n psi_k[b,k,n,r]
//
// Range:  heads (b,k); one call owns each head whole.
// Memory: H of a head (4 R D bytes) stays in the first-level cache; psi_k and v are read once.
// Order:  n ascending for every element: the thread count never changes a bit.
#include "cpu/simd.h"
#include "params.h"

namespace less::cpu::LESS_ISA {
namespace {

template <typename T>
void fold_heads(const FoldParams& p, int64_t begin, int64_t end) {
  const T* v = static_cast<const T*>(p.v);
  for (int64_t head = begin; head < end; ++head) {
    float* H = p.H + head * p.R * p.D;
    float* z = p.z + head * p.R;
    for (int64_t n = 0; n < p.N; ++n) {
      const int64_t token = head * p.N + n;
      if (p.keep != nullptr && !p.keep[token]) continue;
      const float* psi = p.psi_k + token * p.R;
      const T* row = v + token * p.D;
      for (int64_t r = 0; r < p.R; ++r) z[r] += psi[r];
      int64_t d = 0;
      for (; d + Vec::kSize <= p.D; d += Vec::kSize) {
        const Vec value = Vec::load(row + d);
        for (int64_t r = 0; r < p.R; ++r) {
          float* h = H + r * p.D + d;
          fma(Vec(psi[r]), value, Vec::load(h)).store(h);
        }
      }
      if (d < p.D) {
        const int tail = int(p.D - d);
        const Vec value = Vec::load(row + d, tail);
        for (int64_t r = 0; r < p.R; ++r) {
          float* h = H + r * p.D + d;
          fma(Vec(psi[r]), value, Vec::load(h, tail)).store(h, tail);
        }
      }
    }
  }
}

}  // namespace

void fold(const FoldParams& p, int64_t begin, int64_t end) {
  switch (p.v_dtype) {
    case DType::f32:
      return fold_heads<float>(p, begin, end);
    case DType::bf16:
      return fold_heads<bf16>(p, begin, end);
    case DType::fp16:
      return fold_heads<fp16>(p, begin, end);
    case DType::i8:
      return;  // no op lets it in
  }
}

}  // namespace less::cpu::LESS_ISA
