#include "head_at_a_time.h"

#include "cpu/kernels.h"

namespace less::bench {

void head_at_a_time(const DecodeStepParams& p) {
  const int64_t Q = p.spec.Q, G = Q / p.spec.K;
  DecodeStepParams one = p;
  one.B = one.spec.Q = one.spec.K = one.layout.K = 1;
  const auto row = [](const HeadRows& rows, int64_t b, int64_t h) {
    HeadRows alone = rows;
    alone.data = static_cast<char*>(rows.data) + offset(rows, b, h, 0) * bytes_of(rows.dtype);
    return alone;
  };
  for (int64_t query = 0; query < p.B * Q; ++query) {
    const int64_t b = query / Q, h = query % Q, kv = h / G;
    // A page whose only head is that kv head.
    one.layout.slots[0] = p.layout.slots[kv];
    one.layout.first[0] = p.layout.first[kv];
    one.layout.nbytes = p.layout.first[kv] * kPageAlign + head_span(p.layout, nullptr, kv).nbytes;
    one.pool.data = page(p.pool, b);
    one.q = row(p.q, b, h);
    one.k = row(p.k, b, kv);
    one.v = row(p.v, b, kv);
    one.out = row(p.out, b, h);
    cpu::decode_step(one, 0, 1);
  }
}

}  // namespace less::bench
