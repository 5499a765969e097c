"""Who stays and who leaves: a call's tokens join the slots."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from less.layer import LayerSpec, Maps, Rows, Slots, State
from less.policies.base import Candidates, rank_by_rule
from less.reference.maps import fold, psi
from less.reference.numbers import floats


def survivors(position: Tensor, rank: Tensor, capacity: int) -> Tensor:
    """Mark the ``capacity`` highest ranks of each head; of equals the older leaves first.

    Args:
        position: int32 [B, K, N], -1 where there is no token.
        rank: float32 [B, K, N]; NaN counts as the lowest.
        capacity: Tokens to keep.

    Returns:
        bool [B, K, N].
    """
    rank = torch.where(rank.isnan(), -torch.inf, rank)
    order = position.argsort(dim=2, stable=True)
    order = order.gather(2, rank.gather(2, order).argsort(dim=2, stable=True))
    order = order.gather(2, (position >= 0).gather(2, order).long().argsort(dim=2, stable=True))
    keep = torch.zeros_like(position, dtype=torch.bool)
    keep.scatter_(2, order[..., max(0, order.shape[2] - capacity) :], True)
    return keep & (position >= 0)


def chunk_position(seen: Tensor, valid: Tensor | None, B: int, T: int) -> tuple[Tensor, Tensor]:
    """Positions [B, T] int32 of a call's tokens, -1 for padding, and the tokens seen after it."""
    if valid is None:
        valid = torch.ones(B, T, dtype=torch.bool, device=seen.device)
    position = torch.where(valid, seen[:, None] + valid.cumsum(1) - 1, -1)
    return position.to(torch.int32), seen + valid.sum(1)


def candidates(
    slots: Slots, new: Rows, score: Tensor, seen: Tensor, valid: Tensor | None = None
) -> Candidates:
    """The tokens that compete for the slots: those in them, then the call's.

    Args:
        slots: What is kept, S slots.
        new: The call's tokens, T of them.
        score: Scores after the call [B, K, S + T].
        seen: int64 [B], tokens seen before the call.
        valid: bool [B, T], False for padding, or None.
    """
    B, K, T, _ = new.k.shape
    position, after = chunk_position(seen, valid, B, T)
    (held_k, held_v), (k, v) = floats(slots.rows), floats(new)
    unweighted = slots.weight.new_zeros(B, K, T)
    return Candidates(
        position=torch.cat([slots.position, position[:, None].expand(B, K, T)], 2),
        score=score,
        weight=torch.cat([slots.weight, unweighted], 2),
        seen=after,
        k=torch.cat([held_k, k], 2),
        v=torch.cat([held_v, v], 2),
    )


@dataclass(frozen=True)
class Compacted:
    """A layer after an eviction.

    Attributes:
        slots: What is kept.
        state: What the others became, or None.
        seen: int64 [B], tokens seen.
    """

    slots: Slots
    state: State | None
    seen: Tensor


def compact(
    new: Rows,
    valid: Tensor | None,
    score: Tensor,
    slots: Slots,
    seen: Tensor,
    spec: LayerSpec,
    *,
    rank: Tensor | None = None,
    state: State | None = None,
    maps: Maps | None = None,
) -> Compacted:
    """Let a call's tokens join the slots; fold or forget what no longer fits.

    Capacity is S. Kept slots stay where they are; kept tokens of the call take the free slots in
    ascending order, the older token the lower slot.

    Args:
        new: The call's tokens in the slots' dtype, T of them.
        valid: bool [B, T] or None.
        score: Scores after the call, of slots and tokens [B, K, S + T].
        slots: What is kept.
        seen: int64 [B], tokens seen before the call.
        spec: The rule, and what becomes of who leaves: ``"fold"`` needs ``state`` and ``maps``.
        rank: The policy's ranks [B, K, S + T]; None: by the spec's rule.
        state: The low-rank state.
        maps: The layer's feature maps.
    """
    B, K, S = slots.position.shape
    tokens = candidates(slots, new, score, seen, valid)
    if rank is None:
        if spec.rule is None:
            raise ValueError("compact: rank must be given where the spec has no rule")
        rank = rank_by_rule(spec.rule, tokens.position, score, tokens.seen)
    keep = survivors(tokens.position, rank, S)
    if spec.victim == "fold":
        if state is None or maps is None:
            raise ValueError("compact: victim 'fold' needs state and maps")
        leaves = (tokens.position >= 0) & ~keep
        state = fold(state, psi(tokens.k, maps), tokens.v, leaves)
    stays = keep[..., :S]
    after = replace(
        slots,
        position=torch.where(stays, slots.position, -1),
        score=torch.where(stays, score[..., :S], 0.0),
        weight=torch.where(stays, slots.weight, 0.0),
        **{n: x.clone() for n, x in vars(slots.rows).items() if x is not None},
    )
    for b in range(B):
        for h in range(K):
            joins = keep[b, h, S:].nonzero()[:, 0]
            free = (~stays[b, h]).nonzero()[: len(joins), 0]
            for name, x in vars(new).items():
                if x is not None:
                    mine = getattr(after, name)
                    mine[b, h, free] = x[b, h, joins].to(mine.dtype)
            after.position[b, h, free] = tokens.position[b, h, S + joins]
            after.score[b, h, free] = score[b, h, S + joins]
    return Compacted(after, state, tokens.seen)
