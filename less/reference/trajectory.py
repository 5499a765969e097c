"""Whole steps, and whole runs of a layer."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from less.layer import LayerSpec, Maps, Rows, Slots, State
from less.policies import Policy
from less.policies.base import checked_rank
from less.reference.attention import Attended, capped, chunk_attention
from less.reference.eviction import Compacted, candidates, compact
from less.reference.maps import phi, psi
from less.reference.numbers import accumulator


def decode_step(
    q: Tensor,
    new: Rows,
    valid: Tensor | None,
    slots: Slots,
    state: State | None,
    seen: Tensor,
    spec: LayerSpec,
    maps: Maps | None = None,
    policy: Policy | None = None,
) -> tuple[Attended, Compacted]:
    """A call's tokens through a layer: attend, score, evict, fold. One token, or T at once.

    ``chunk_attention`` and then ``compact``, whose arguments these are.

    Args:
        q: [B, Q, T, D].
        new: The call's tokens in the slots' dtype, T of them.
        valid: bool [B, T], False for padding, or None.
        slots: What is kept.
        state: What the others became, with ``maps``.
        seen: int64 [B], tokens seen before the call.
        spec: The layer's constants.
        maps: The layer's feature maps.
        policy: Who stays, asked for its ranks; None: by the spec's rule.
    """
    attended = chunk_attention(
        q,
        new,
        valid,
        slots,
        spec,
        phi_q=phi(q, maps) if maps is not None else None,
        state=state,
    )
    rank = None
    if policy is not None:
        rank = checked_rank(policy, candidates(slots, new, attended.score, seen, valid))
    after = compact(
        new, valid, attended.score, slots, seen, spec, rank=rank, state=state, maps=maps
    )
    return attended, after


def spec_of(
    policy: Policy,
    q_heads: int,
    head_dim: int,
    maps: Maps | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    victim: str | None = None,
) -> LayerSpec:
    """The constants of a layer under a policy.

    Args:
        policy: Who stays.
        q_heads: Query heads.
        head_dim: Head dim D.
        maps: The layer's feature maps.
        scale: Factor of q.k, 1/sqrt(D) by default.
        softcap: As in ``LayerSpec``.
        victim: As in ``LayerSpec``; None: folded where there are maps, else forgotten.
    """
    if victim is None:
        victim = "forget" if maps is None else "fold"
    return LayerSpec(
        q_heads=q_heads,
        scale=1.0 / math.sqrt(head_dim) if scale is None else scale,
        softcap=softcap,
        decay=policy.decay,
        scores=policy.needs_scores,
        rule=policy.rule,
        victim=victim,
    )


@dataclass(frozen=True)
class Trajectory:
    """A layer's run over T tokens, call by call.

    Attributes:
        out: [B, Q, T, D].
        positions: Positions held after each call, a list of int32 [B, K, S].
        scores: Scores after each call, a list of [B, K, S].
        H: Final state [B, K, R, D], or None.
        z: Final state [B, K, R], or None.
        left: int64 [B, K, T]: tokens seen when the token had just left; T + 1 if it never did.
    """

    out: Tensor
    positions: list[Tensor]
    scores: list[Tensor]
    H: Tensor | None
    z: Tensor | None
    left: Tensor


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    policy: Policy,
    maps: Maps | None = None,
    *,
    prompt: int = 1,
    chunk: int = 1,
    scale: float | None = None,
    softcap: float = 0.0,
    victim: str | None = None,
) -> Trajectory:
    """Run a layer from an empty cache: a prompt, then chunks (single tokens by default).

    Args:
        q: [B, Q, T, D].
        k: [B, K, T, D].
        v: [B, K, T, D].
        policy: Who stays.
        maps: Feature maps of the layer; None is eviction alone.
        prompt: Tokens of the first call.
        chunk: Tokens of each later call.
        scale: Factor of q.k, 1/sqrt(D) by default.
        softcap: As in ``chunk_attention``.
        victim: As in ``spec_of``.
    """
    B, K, T, D = k.shape
    spec = spec_of(policy, q.shape[1], D, maps, scale, softcap, victim)
    numbers, at = accumulator(k), k.device
    slots = Slots.empty(B, K, policy.capacity, D, k.dtype, numbers, at)
    seen = torch.zeros(B, dtype=torch.int64, device=at)
    state = None
    if maps is not None:
        R = maps.rank
        state = State(torch.zeros(B, K, R, D, dtype=numbers), torch.zeros(B, K, R, dtype=numbers))
    left = torch.full((B, K, T), T + 1, dtype=torch.int64, device=at)
    outs, positions, scores = [], [], []
    start = 0
    while start < T:
        stop = min(T, prompt if start == 0 else start + chunk)
        new = Rows(k[:, :, start:stop], v[:, :, start:stop])
        attended, after = decode_step(
            q[:, :, start:stop], new, None, slots, state, seen, spec, maps, policy
        )
        slots, state, seen = after.slots, after.state, after.seen
        held = torch.zeros(B, K, T + 1, dtype=torch.bool, device=at)
        held.scatter_(2, torch.where(slots.position >= 0, slots.position, T).long(), True)
        gone = ~held[..., :T] & (torch.arange(T, device=at) < stop) & (left > T)
        left = torch.where(gone, stop, left)
        outs.append(attended.out)
        positions.append(slots.position)
        scores.append(slots.score)
        start = stop
    H, z = (None, None) if state is None else (state.H, state.z)
    return Trajectory(torch.cat(outs, 2), positions, scores, H, z, left)


def evict_schedule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    policy: Policy,
    *,
    prompt: int = 1,
    scale: float | None = None,
    softcap: float = 0.0,
) -> Tensor:
    """The steps at which a policy lets go of each token, without a low-rank state.

    Valid because a policy sees nothing of the state, and scores never depend on it.

    Returns:
        ``Trajectory.left``, int64 [B, K, T].
    """
    return run(q, k, v, policy, prompt=prompt, scale=scale, softcap=softcap).left


def parallel(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    left: Tensor,
    maps: Maps | None = None,
    *,
    scale: float | None = None,
    softcap: float = 0.0,
    rows: Tensor | None = None,
) -> Tensor:
    """The recurrence of ``run`` as masks over [T, T]: differentiable, all queries at once.

    A query at position t sees a token at p <= t exactly while t < left[p], and through the
    low-rank state from then on.

    Args:
        q: [B, Q, T, D].
        k: [B, K, T, D].
        v: [B, K, T, D].
        left: int64 [B, K, T] from ``run`` or ``evict_schedule``.
        maps: Feature maps of the layer; None is eviction alone.
        scale: Factor of q.k, 1/sqrt(D) by default.
        softcap: As in ``chunk_attention``.
        rows: int64 [M]: the query positions to compute; all by default.

    Returns:
        [B, Q, T, D], or [B, Q, M, D].
    """
    B, K, T, D = k.shape
    Q = q.shape[1]
    dtype = accumulator(k)
    scale = 1.0 / math.sqrt(D) if scale is None else scale
    t = torch.arange(T, device=k.device) if rows is None else rows
    query = q.index_select(2, t).to(dtype).view(B, K, Q // K, len(t), D)
    token = torch.arange(T, device=k.device)
    gone = left[:, :, None, :] <= t[:, None]
    seen = token[None, :] <= t[:, None]
    kept = seen & ~gone
    logits = capped(torch.einsum("bkgtd,bknd->bkgtn", query, k.to(dtype)) * scale, softcap)
    logits = logits.masked_fill(~kept[:, :, None], -torch.inf)
    top = logits.amax(-1, keepdim=True)
    if maps is None:
        p = (logits - top).exp()
        out = torch.einsum("bkgtn,bknd->bkgtd", p / p.sum(-1, keepdim=True), v.to(dtype))
        return out.reshape(B, Q, len(t), D).to(q.dtype)
    phi_q = phi(query.reshape(B, Q, len(t), D), maps).view(B, K, Q // K, len(t), -1)
    low = torch.einsum("bkgtr,bknr->bkgtn", phi_q, psi(k, maps))
    low = low * (seen & gone)[:, :, None].to(dtype)
    # One common maximum for both parts: every exponent is <= 0. A low-rank part without mass
    # is left out: its factor could be infinite.
    tiny = torch.finfo(dtype).tiny
    total = low.detach().sum(-1, keepdim=True)
    there = total > tiny
    log_low = torch.where(there, total.clamp(min=tiny).log(), -torch.inf)
    top = torch.maximum(top, log_low).detach()
    mass = (logits - top).exp() + low * torch.where(there, (-top).exp(), 0.0)
    out = torch.einsum("bkgtn,bknd->bkgtd", mass, v.to(dtype)) / mass.sum(-1, keepdim=True)
    return out.reshape(B, Q, len(t), D).to(q.dtype)
