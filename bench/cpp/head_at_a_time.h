// What decode_step is compared with where query heads share a kv head.
#pragma once

#include "cpu/dispatch.h"
#include "params.h"

// Attention alone, one query head and one key at a time with an online softmax, as CPU runtimes
// commonly have it: k and v of a kv head are read once for each of its query heads.
// Work items: (b, query head). Slots in float32, bfloat16 or float16; all of them held.
LESS_CPU_KERNEL(online_attention, DecodeStepParams)

namespace less::bench {

// Attention alone by decode_step's own loops, called for one query head after the other.
void head_at_a_time(const DecodeStepParams& p);

}  // namespace less::bench
