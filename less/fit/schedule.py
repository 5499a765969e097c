"""When a policy lets go of each token: the mask under which a sidekick is trained.

A policy sees nothing of the low-rank state, so its whole run over captured q, k, v is known
before training. It is run here token by token, all chunks at once, by its rule or, where it has
none, by its own `rank`; ``tests/test_fit.py`` holds it to ``less.reference.evict_schedule`` and to
the cache.
"""

from __future__ import annotations

import torch
from torch import Tensor

from less import reference
from less.layer import Rows, Slots
from less.policies import Policy, SinkRecent
from less.policies.base import checked_rank, rank_by_rule


def schedule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    policy: Policy,
    scale: float | None = None,
    softcap: float = 0.0,
) -> Tensor:
    """The number of tokens seen when each token had just left, decoding from the first token on.

    Args:
        q: [B, Q, T, D].
        k: [B, K, T, D].
        v: [B, K, T, D].
        policy: Who stays.
        scale: Factor of q.k, 1/sqrt(D) by default.
        softcap: What scale q.k is held within; 0: nothing.

    Returns:
        int64 [B, K, T]; T + 1 where the token is kept to the end.

    Raises:
        TypeError: What the policy's `rank` gives is no tensor.
        ValueError: It is not floating point, or not one number per candidate.
    """
    B, K, T, D = k.shape
    if type(policy) is SinkRecent:
        return _sink_recent(policy, B, K, T, k.device)
    scale = D**-0.5 if scale is None else scale
    return _decode(q.float(), k.float(), v.float(), policy, scale, softcap)


def _sink_recent(policy: SinkRecent, B: int, K: int, T: int, device: torch.device) -> Tensor:
    """Token p outside the sinks leaves when it is `recent` tokens old."""
    token = torch.arange(T, device=device)
    # While fewer tokens than the capacity were seen, the slots of missing sinks stand empty.
    left = (token + 1 + policy.recent).clamp(max=T + 1)
    left = torch.where(token < policy.sinks, T + 1, left)
    return left.expand(B, K, T).clone()


@torch.no_grad()
def _decode(
    q: Tensor, k: Tensor, v: Tensor, policy: Policy, scale: float, softcap: float
) -> Tensor:
    """Slots 0..C-1 hold the kept tokens, slot C the newest, which then takes a victim's slot."""
    B, K, T, D = k.shape
    G, C = q.shape[1] // K, policy.capacity
    at = k.device
    left = torch.full((B, K, T), T + 1, dtype=torch.int64, device=at)
    position = torch.full((B, K, C + 1), -1, dtype=torch.int32, device=at)
    score = torch.zeros(B, K, C + 1, device=at)
    weight = torch.zeros(B, K, C, device=at)
    slot_k = torch.zeros(B, K, C + 1, D, device=at)
    rule = policy.rule
    slot_v = torch.zeros_like(slot_k) if rule is None else None  # no rule reads values
    query = q.view(B, K, G, T, D)
    for t in range(T):
        new = min(t, C)
        held = new + 1
        slot_k[:, :, new] = k[:, :, t]
        if slot_v is not None:
            slot_v[:, :, new] = v[:, :, t]
        position[:, :, new] = t
        score[:, :, new] = 0.0
        if policy.needs_scores:
            logits = query[:, :, :, t] @ slot_k[:, :, :held].transpose(2, 3) * scale
            received = reference.capped(logits, softcap).softmax(-1).sum(2)
            score[:, :, :held] = score[:, :, :held] * policy.decay + received
        if held <= C:
            continue
        seen = torch.full((B,), t, dtype=torch.int64, device=at)
        if rule is not None:
            rank = rank_by_rule(rule, position, score, seen + 1)
        else:
            assert slot_v is not None
            old, new_one = slice(None, C), slice(C, None)
            slots = Slots(
                position=position[:, :, old],
                k=slot_k[:, :, old],
                v=slot_v[:, :, old],
                weight=weight,
                score=score[:, :, old],
            )
            newest = Rows(slot_k[:, :, new_one], slot_v[:, :, new_one])
            tokens = reference.candidates(slots, newest, score, seen)
            rank = checked_rank(policy, tokens)
        rank = rank.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
        lowest = rank == rank.amin(2, keepdim=True)
        victim = position.masked_fill(~lowest, T).argmin(2, keepdim=True)  # of equals the oldest
        left.scatter_(2, position.gather(2, victim).long(), t + 1)
        position.scatter_(2, victim, position[:, :, C:].clone())
        score.scatter_(2, victim, score[:, :, C:].clone())
        row = victim[..., None].expand(B, K, 1, D)
        slot_k.scatter_(2, row, slot_k[:, :, C:].clone())
        if slot_v is not None:
            slot_v.scatter_(2, row, slot_v[:, :, C:].clone())
    return left
