// out = sum_i e^(l_i - m) v_i / sum_i e^(l_i - m), l_i = scale q.k_i + weight_i, m the largest l so
// far: what has been summed up is rescaled whenever m grows.
//
// Range:  (b, query head).
// Memory: k and v once per query head, from the caches where the heads of a group follow.
// Order:  slots ascending, then the token.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "cpu/features.h"
#include "cpu/softmax.h"
#include "head_at_a_time.h"

namespace less::cpu::LESS_ISA {
namespace {

template <typename T>
class Online {
 public:
  Online(const DecodeStepParams& p, float* out) : D_(p.spec.D), out_(out) {
    std::fill(out_, out_ + padded(D_), 0.0f);
  }

  LESS_INLINE void add(const float* q, const T* k, const T* v, float scale, float weight) {
    Vec dot(0.0f);
    for (int64_t d = 0; d < D_; d += Vec::kSize) {
      dot = fma(Vec::load(q + d), Vec::load(k + d), dot);
    }
    const float logit = scale * sum(dot) + weight;
    float share = 1.0f;
    if (logit > top_) {
      const Vec shrink(std::exp(top_ - logit));
      for (int64_t d = 0; d < D_; d += Vec::kSize) (Vec::load(out_ + d) * shrink).store(out_ + d);
      total_ *= std::exp(top_ - logit);
      top_ = logit;
    } else {
      share = std::exp(logit - top_);
    }
    total_ += share;
    const Vec part(share);
    for (int64_t d = 0; d < D_; d += Vec::kSize) {
      fma(part, Vec::load(v + d), Vec::load(out_ + d)).store(out_ + d);
    }
  }

  float total() const { return total_; }

 private:
  int64_t D_;
  float* out_;
  float top_ = -kInfinity;
  float total_ = 0.0f;
};

template <typename T>
void attend(const DecodeStepParams& p, int64_t begin, int64_t end) {
  const int64_t Q = p.spec.Q, G = Q / p.spec.K, D = p.spec.D;
  static thread_local std::vector<float> scratch;
  if (int64_t(scratch.size()) < 4 * padded(D)) scratch.resize(4 * padded(D));
  float *q = scratch.data(), *out = q + padded(D), *wide = out + padded(D);
  T* token = reinterpret_cast<T*>(wide + padded(D));
  for (int64_t item = begin; item < end; ++item) {
    const int64_t b = item / Q, query = item % Q, kv = query / G;
    widen(p.q.data, p.q.dtype, offset(p.q, b, query, 0), D, q);
    Online<T> online(p, out);
    const Slots slots = head(p.layout, page(p.pool, b), kv).slots;
    const T *k = static_cast<const T*>(slots.k), *v = static_cast<const T*>(slots.v);
    const float scale = p.spec.scale;
    for (int64_t s = 0; s < slots.S; ++s) {
      online.add(q, k + s * D, v + s * D, scale, slots.weight[s]);
    }
    T* new_v = token + D;
    widen(p.k.data, p.k.dtype, offset(p.k, b, kv, 0), D, wide);
    narrow(wide, D, token);
    widen(p.v.data, p.v.dtype, offset(p.v, b, kv, 0), D, wide);
    narrow(wide, D, new_v);
    online.add(q, token, new_v, scale, 0.0f);
    const Vec inverse(1.0f / online.total());
    for (int64_t d = 0; d < D; d += Vec::kSize) (Vec::load(out + d) * inverse).store(out + d);
    narrow(out, D, p.out.dtype, offset(p.out, b, query, 0), p.out.data);
  }
}

}  // namespace

void online_attention(const DecodeStepParams& p, int64_t begin, int64_t end) {
  switch (p.layout.k_dtype) {
    case DType::f32:
      return attend<float>(p, begin, end);
    case DType::bf16:
      return attend<bf16>(p, begin, end);
    case DType::fp16:
      return attend<fp16>(p, begin, end);
    default:
      return;  // compared in 16 and 32 bits only
  }
}

}  // namespace less::cpu::LESS_ISA
