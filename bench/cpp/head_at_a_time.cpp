#include "head_at_a_time.h"

#include "cpu/kernels.h"
#include "layer.h"

namespace less::bench {

void head_at_a_time(const DecodeStepParams& p) {
  const int64_t G = p.Q / p.K, row_bytes = p.D * bytes_of(p.slots.dtype);
  const auto at = [](const void* array, int64_t bytes) {
    return static_cast<const char*>(array) + bytes;
  };
  for (int64_t query = 0; query < p.B * p.Q; ++query) {
    const int64_t row = query / G;
    DecodeStepParams one = p;
    one.q = at(p.q, query * p.D * bytes_of(p.q_dtype));
    one.k = at(p.k, row * p.D * bytes_of(p.kv_dtype));
    one.v = at(p.v, row * p.D * bytes_of(p.kv_dtype));
    one.seen = p.seen + row / p.K;
    one.slots.k = const_cast<char*>(at(p.slots.k, row * p.slots.S * row_bytes));
    one.slots.v = const_cast<char*>(at(p.slots.v, row * p.slots.S * row_bytes));
    if (p.slots.dtype == DType::i8) {
      one.slots.k_scale = p.slots.k_scale + row * p.slots.S;
      one.slots.v_scale = p.slots.v_scale + row * p.slots.S;
    }
    one.slots.position = p.slots.position + row * p.slots.S;
    one.slots.score = p.slots.score + row * p.slots.S;
    one.slots.weight = p.slots.weight + row * p.slots.S;
    one.out = const_cast<char*>(at(p.out, query * p.D * bytes_of(p.q_dtype)));
    one.B = one.Q = one.K = 1;
    cpu::decode_step(one, 0, 1);
  }
}

}  // namespace less::bench
