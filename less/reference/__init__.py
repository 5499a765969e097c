"""The whole method in plain torch: the executable specification.

Any device, any floating dtype. Accumulation is float32, or float64 where the input is float64;
float64 runs of this package are the ground truth of every other test. Nothing here is fast.

Letters: B batch rows, Q query heads, K kv heads, G = Q/K, T tokens of a call, S slots, N = S + T,
D head dim, R rank, E hidden width of the feature maps.

Source: Dong et al., "Get More with LESS: Synthesizing Recurrence with KV Cache Compression for
Efficient LLM Inference", ICML 2024, arXiv:2402.09398.
"""

from less.reference.attention import Attended, capped, chunk_attention, prompt_scores
from less.reference.codec import (
    decode,
    encode,
    keys_out_of_space,
    query_shift,
    rotate,
    slot_floats,
    values_out_of_space,
)
from less.reference.eviction import Compacted, candidates, chunk_position, compact, survivors
from less.reference.maps import EXP_CLAMP, centroid_map, feature_map, fold, phi, psi
from less.reference.numbers import dequantize, floats, quantize, rounded
from less.reference.trajectory import (
    Trajectory,
    decode_step,
    evict_schedule,
    parallel,
    run,
    spec_of,
)

__all__ = [
    "EXP_CLAMP",
    "Attended",
    "Compacted",
    "Trajectory",
    "candidates",
    "capped",
    "centroid_map",
    "chunk_attention",
    "chunk_position",
    "compact",
    "decode",
    "decode_step",
    "dequantize",
    "encode",
    "evict_schedule",
    "feature_map",
    "floats",
    "fold",
    "keys_out_of_space",
    "parallel",
    "phi",
    "prompt_scores",
    "psi",
    "quantize",
    "query_shift",
    "rotate",
    "rounded",
    "run",
    "slot_floats",
    "spec_of",
    "survivors",
    "values_out_of_space",
]
