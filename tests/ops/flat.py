"""The ops on a layer's loose tensors, as tests make them.

The tensors of a layer go into a page of a pool, the op runs on the pool, and what it wrote comes
back into the tensors. So a test says ``slot_k``, ``position`` or ``H``, and not where they lie.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch

from less.backend import ops
from less.backend.ops import fold, prompt_scores, quantize
from less.layer import Call, LayerSpec, PackedMaps, Paged, PageLayout, Rows, allocate, encode
from less.layer.kinds import KINDS

__all__ = [
    "chunk_attention",
    "compact",
    "decode_step",
    "decode_step_workspace",
    "feature_map",
    "fold",
    "phi",
    "prompt_scores",
    "psi",
    "quantize",
]


def sizes(maps):
    """Q, K, D and R of a layer's maps."""
    row = next(row for row in KINDS.values() if row.tensors.keys() <= maps.keys())
    return tuple(row.size(maps, letter) for letter in "QKDR")


def plan_of(Q, K, D, S, dtype, R=0, maps=None, kind="exp", victim=None, **spec):
    """A layer's plan; its state may come without maps, which no cache has but an op takes."""
    if maps is not None:
        assert kind in KINDS
    device = next(iter(maps.values())).device if maps is not None else "cpu"
    packed = None if maps is None else PackedMaps.pack(maps, kind, device)
    layout = PageLayout(K, D, S, dtype, R)
    made = LayerSpec(
        **{"q_heads": Q, "scale": 1.0, "victim": victim or ("fold" if maps else "forget")} | spec
    )
    return SimpleNamespace(
        spec=made,
        layout=layout,
        maps=packed,
        space=None,
        memory=None if packed is None else packed.memory,
        encoded=encode(made, layout, packed),
    )


def filled(plan, tensors, pages=None):
    """A pool whose page b holds row b of the tensors, by their names in a page."""
    B = tensors["position"].shape[0]
    pool = allocate([plan.layout], B, tensors["position"].device)[0]
    (views,) = plan.layout.views(pool)
    for name, view in views.tensors().items():
        if tensors.get(name) is not None:
            view.copy_(tensors[name])
    return pool, views.tensors()


def take_back(views, tensors):
    for name, view in views.items():
        if tensors.get(name) is not None:
            tensors[name].copy_(view)


def chunk_attention(
    q, k, v, valid, slot_k, slot_v, position, score, weight, *, chunk_k_scale=None,
    chunk_v_scale=None, k_scale=None, v_scale=None, phi_q=None, H=None, z=None, out=None, scale,
    softcap=0.0, decay=1.0, scores=True,
):  # fmt: skip
    """Returns out, the slots' scores, those of the call's tokens, and the state's share."""
    K, S, D = slot_k.shape[1:]
    R = 0 if H is None else H.shape[2]
    plan = plan_of(
        q.shape[1], K, D, S, slot_k.dtype, R, scale=scale, softcap=softcap, decay=decay,
        scores=scores,
    )  # fmt: skip
    pool, _ = filled(
        plan,
        {"k": slot_k, "v": slot_v, "position": position, "score": score, "weight": weight,
         "k_scale": k_scale, "v_scale": v_scale, "H": H, "z": z},
    )  # fmt: skip
    new = Rows(k, v, chunk_k_scale, chunk_v_scale)
    step = ops.chunk_attention(q, new, valid, Paged(pool), plan, out=out, phi_q=phi_q)
    return step.out, step.score[..., :S], step.score[..., S:], step.share


def compact(
    k, v, chunk_score, slot_score, valid, slot_k, slot_v, position, score, weight, seen, *,
    chunk_k_scale=None, chunk_v_scale=None, k_scale=None, v_scale=None, H=None, z=None, maps=None,
    kind="exp", rule=None, rank=None,
):  # fmt: skip
    """Writes the slots, the state and seen."""
    K, S, D = slot_k.shape[1:]
    R = 0 if H is None else H.shape[2]
    Q = K if maps is None else sizes(maps)[0]
    plan = plan_of(Q, K, D, S, slot_k.dtype, R, maps, kind, rule=rule)
    tensors = {"k": slot_k, "v": slot_v, "position": position, "score": score, "weight": weight,
               "seen": seen, "k_scale": k_scale, "v_scale": v_scale, "H": H, "z": z}  # fmt: skip
    pool, views = filled(plan, tensors)
    new = Rows(k, v, chunk_k_scale, chunk_v_scale)
    both = torch.cat([slot_score, chunk_score], 2)
    ops.compact(new, valid, both, Paged(pool), plan, rank=rank)
    take_back(views, tensors)


def decode_step(
    q, k, v, valid, out, slot_k, slot_v, position, score, weight, seen, *, k_scale=None,
    v_scale=None, H=None, z=None, share=None, workspace=None, maps=None, kind="exp", scale,
    softcap=0.0, decay=1.0, scores=True, rule, victim="fold", dependent=False,
):  # fmt: skip
    """Writes out, the slots, the state, share and seen."""
    K, S, D = slot_k.shape[1:]
    R = 0 if H is None else H.shape[2]
    if victim == "fold" and maps is None:
        victim = "forget"
    plan = plan_of(
        q.shape[1], K, D, S, slot_k.dtype, R, maps, kind, victim, scale=scale, softcap=softcap,
        decay=decay, scores=scores, rule=rule, dependent=dependent,
    )  # fmt: skip
    tensors = {"k": slot_k, "v": slot_v, "position": position, "score": score, "weight": weight,
               "seen": seen, "k_scale": k_scale, "v_scale": v_scale, "H": H, "z": z,
               "share": share}  # fmt: skip
    pool, views = filled(plan, tensors)
    ops.decode_step(Call(q, k, v, valid, out), Paged(pool), plan, workspace)
    take_back(views, tensors)


def decode_step_workspace(slot_k, Q, maps):
    B, K, S, D = slot_k.shape
    R = 0 if maps is None else sizes(maps)[3]
    plan = plan_of(Q, K, D, S, slot_k.dtype, R, maps)
    pool = allocate([plan.layout], B, slot_k.device)[0]
    return ops.decode_step_workspace(pool, plan, B)


def phi(q, maps, kind):
    return feature_map(q, maps, kind, query=True)


def psi(k, maps, kind):
    return feature_map(k, maps, kind, query=False)


def feature_map(x, maps, kind, query):
    Q, K, D, R = sizes(maps)
    plan = plan_of(Q, K, D, 1, torch.float32, R, maps, kind)
    return ops.feature_map(x, plan, query)
