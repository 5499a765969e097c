"""The sidekick: the feature maps' weights of every layer, built, checked, loaded and saved.

A sidekick holds, per layer, the tensors of phi (per query head) and psi (per kv head). What they
compute is in ``less.reference.phi`` and ``less.reference.psi``; here are their names, shapes and
files (names and shapes: ``less.layer.kinds``).

    kind "paper"   q_w1 [Q,D,E]  q_w2 [Q,E,R]  k_w1 [K,D,E]  k_w2 [K,E,R]
                   k_mix [K,R,R]  k_scale [K,R]  k_mix_scale [K,R]
    kind "exp"     q_w1 [Q,D,E]  q_w2 [Q,E,R]  q_bias [Q,R]
                   k_w1 [K,D,E]  k_w2 [K,E,R]  k_bias [K,R]
    kind "centroid"
                   centroids [K,D,R]  q_factor [Q]  q_bias [Q,R]  k_factor [K]  k_bias [K,R]
                   k_weight [K,D]  k_offset [K];  key_mean [K,D] where keys were centred

A layer may have no tensors, hence no maps. The matrices (w1, w2, centroids) are all but all of the
bytes, and may be float32, bfloat16, float16 or int8; the rest, a few numbers per head whose size
runs from 1e-8 up, is float32 always. Of int8 matrices each output column has a scale, matrix =
scale * int8 (``less.reference.quantize``):

    int8           q_w1_scale [Q,E]  q_w2_scale [Q,R]  k_w1_scale [K,E]  k_w2_scale [K,R]
                   centroids_scale [K,R]

A saved sidekick is a folder: ``model.safetensors`` (tensors named ``layers.<i>.<name>``) and
``config.json`` (shapes, the model it belongs to, a few of that model's weights, the policies and
the text it was trained with, and the other file's sha256, which loading compares).

Source: arXiv:2402.09398, section 3.2 (the paper's maps); docs/training.md (exp and centroid maps).
"""

from less.sidekick.files import (
    CONFIG_FILE,
    FORMAT,
    FORMAT_VERSION,
    TENSORS_FILE,
    shipped,
    shipped_names,
)
from less.sidekick.identity import model_identity
from less.sidekick.kinds import MATRICES, SCALES, TENSORS
from less.sidekick.parts import check_part, part_slice
from less.sidekick.sidekick import Sidekick

__all__ = [
    "CONFIG_FILE",
    "FORMAT",
    "FORMAT_VERSION",
    "MATRICES",
    "SCALES",
    "TENSORS",
    "TENSORS_FILE",
    "Sidekick",
    "check_part",
    "model_identity",
    "part_slice",
    "shipped",
    "shipped_names",
]
