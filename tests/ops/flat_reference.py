"""The reference on a layer's loose tensors: the arguments of ``tests.ops.flat``, in any dtype."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from less import reference
from less.layer import LayerSpec, Maps, Rows, Slots, State
from less.reference import *  # noqa: F403


def _state(H, z):
    return None if H is None or z is None else State(H, z)


def _maps(maps, kind):
    return None if maps is None else Maps(kind, maps)


def phi(q, maps, kind):
    return reference.phi(q, Maps(kind, maps))


def psi(k, maps, kind):
    return reference.psi(k, Maps(kind, maps))


def fold(H, z, psi_k, v, keep=None):
    after = reference.fold(State(H, z), psi_k, v, keep)
    return after.H, after.z


def run(q, k, v, policy, maps=None, kind="exp", **options):
    return reference.run(q, k, v, policy, _maps(maps, kind), **options)


def parallel(q, k, v, left, maps=None, kind="exp", **options):
    return reference.parallel(q, k, v, left, _maps(maps, kind), **options)


def chunk_attention(
    q, k, v, valid, slot_k, slot_v, position, score, weight, *, chunk_k_scale=None,
    chunk_v_scale=None, k_scale=None, v_scale=None, phi_q=None, H=None, z=None, scale,
    softcap=0.0, decay=1.0, scores=True,
):  # fmt: skip
    """Returns what has out, slot_score, chunk_score and share."""
    S = slot_k.shape[2]
    step = reference.chunk_attention(
        q,
        Rows(k, v, chunk_k_scale, chunk_v_scale),
        valid,
        Slots(position, slot_k, slot_v, weight, score, k_scale, v_scale),
        LayerSpec(q.shape[1], scale, softcap, decay, scores),
        phi_q=phi_q,
        state=_state(H, z),
    )
    return _attended(step, S)


def _attended(step, S):
    return SimpleNamespace(
        out=step.out,
        slot_score=step.score[..., :S],
        chunk_score=step.score[..., S:],
        share=step.share,
    )


def _compacted(after):
    s = after.slots
    return SimpleNamespace(
        slot_k=s.k, slot_v=s.v, position=s.position, score=s.score, weight=s.weight,
        k_scale=s.k_scale, v_scale=s.v_scale, seen=after.seen,
        H=None if after.state is None else after.state.H,
        z=None if after.state is None else after.state.z,
    )  # fmt: skip


def compact(
    k, v, chunk_score, valid, slot_k, slot_v, position, score, weight, seen, *, chunk_k_scale=None,
    chunk_v_scale=None, k_scale=None, v_scale=None, rule=None, rank=None, H=None, z=None,
    maps=None, kind="exp",
):  # fmt: skip
    """Returns what has slot_k, slot_v, position, score, weight, seen, H, z and the scales."""
    spec = LayerSpec(k.shape[1], 1.0, rule=rule, victim="forget" if maps is None else "fold")
    after = reference.compact(
        Rows(k, v, chunk_k_scale, chunk_v_scale),
        valid,
        torch.cat([score, chunk_score], 2),
        Slots(position, slot_k, slot_v, weight, score, k_scale, v_scale),
        seen,
        spec,
        rank=rank,
        state=_state(H, z),
        maps=_maps(maps, kind),
    )
    return _compacted(after)


def decode_step(
    q, k, v, valid, slot_k, slot_v, position, score, weight, seen, *, H=None, z=None, maps=None,
    kind="exp", scale, softcap=0.0, decay=1.0, rule, scores=True,
):  # fmt: skip
    """Returns both of the above."""
    spec = LayerSpec(
        q.shape[1], scale, softcap, decay, scores, rule, "forget" if maps is None else "fold"
    )
    attended, after = reference.decode_step(
        q,
        Rows(k, v),
        valid,
        Slots(position, slot_k, slot_v, weight, score),
        _state(H, z),
        seen,
        spec,
        _maps(maps, kind),
    )
    return _attended(attended, slot_k.shape[2]), _compacted(after)
