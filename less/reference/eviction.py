"""Who stays and who leaves: a call's tokens join the slots."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from less.dtypes import ROW_TYPES
from less.layer import LayerSpec, Maps, Rows, Slots, Space, State
from less.layer.rows import noted_score
from less.policies.base import Candidates, rank_by_rule
from less.reference.codec import (
    decode,
    encode,
    keys_out_of_space,
    slot_floats,
    values_out_of_space,
)
from less.reference.maps import fold, psi
from less.reference.merge import merged, nearest
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
    slots: Slots,
    new: Rows,
    score: Tensor,
    seen: Tensor,
    valid: Tensor | None = None,
    space: Space | None = None,
) -> Candidates:
    """The tokens that compete for the slots: those in them, then the call's.

    Args:
        slots: What is kept, S slots.
        new: The call's tokens, T of them.
        score: Scores after the call [B, K, S + T].
        seen: int64 [B], tokens seen before the call.
        valid: bool [B, T], False for padding, or None.
        space: Of the rows; keys and values are taken back out of it.
    """
    B, K, T, _ = new.k.shape
    position, after = chunk_position(seen, valid, B, T)
    (held_k, held_v), (k, v) = slot_floats(slots), floats(new)
    keys, values = torch.cat([held_k, k], 2), torch.cat([held_v, v], 2)
    if space is not None:
        keys, values = keys_out_of_space(keys, space), values_out_of_space(values, space)
    return Candidates(
        position=torch.cat([slots.position, position[:, None].expand(B, K, T)], 2),
        score=score,
        weight=torch.cat([slots.log_weight, slots.scores.new_zeros(B, K, T)], 2),
        seen=after,
        k=keys,
        v=values,
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
    sinks: int = 0,
    space: Space | None = None,
) -> Compacted:
    """Let a call's tokens join the slots; fold, merge or forget what no longer fits.

    Capacity is S. Kept slots stay where they are; kept tokens of the call take the free slots in
    ascending order, the older token the lower slot.

    Of W hot slots, the first ``sinks`` belong to the first tokens for good, and the others are a
    ring of the last W - sinks tokens. Those never compete. A token that is in the ring no longer is
    encoded, and competes with the others for the S - W slots that are not hot.

    Merging, each token that leaves goes to the nearest one that stays and is not protected (its
    rank is below infinity), by weights and keys as they were before any mean: ``nearest`` and
    ``merged`` say how. Means are of decoded rows, in float32, and are encoded once.

    Scores count as slots note them (``noted_score``): rules rank by those, and those weigh.

    Args:
        new: The call's tokens, T of them, in the dtype of the slots; of the hot ones, where there
            are such.
        valid: bool [B, T] or None.
        score: Scores after the call, of slots and tokens [B, K, S + T].
        slots: What is kept.
        seen: int64 [B], tokens seen before the call.
        spec: The rule, and what becomes of who leaves: ``"fold"`` needs ``state`` and ``maps``,
            ``"merge"`` slots with log-weights.
        rank: The policy's ranks [B, K, S + T]; None: by the spec's rule.
        state: The low-rank state.
        maps: The layer's feature maps.
        sinks: Of the hot slots.
        space: Of the rows: psi is taken of keys outside of it, of a centred kind without their
            mean.
    """
    B, K, S = slots.position.shape
    W = slots.hot_slots
    T = new.k.shape[2]
    at, after_seen = chunk_position(seen, valid, B, T)
    position = torch.cat([slots.position, at[:, None].expand(B, K, T)], 2)
    score = noted_score(score, slots.score.dtype)
    if rank is None:
        if spec.rule is None:
            raise ValueError("compact: rank must be given where the spec has no rule")
        rank = rank_by_rule(spec.rule.for_slots(S), position, score, after_seen)
    hot = torch.zeros_like(position, dtype=torch.bool)
    if W:
        ring = position >= (after_seen - (W - sinks)).view(B, 1, 1)
        hot = (position >= 0) & ((position < sinks) | ring)
    keep = survivors(torch.where(hot, -1, position), rank, S - W)
    leaves = (position >= 0) & ~keep & ~hot
    stored = _candidate_rows(slots, new)
    if spec.victim == "fold":
        if state is None or maps is None:
            raise ValueError("compact: victim 'fold' needs state and maps")
        k, v = (decode(*stored[n], getattr(slots.rows, n)) for n in ("k", "v"))
        if space is not None:
            k = keys_out_of_space(k, space, mean=not maps.centred)
        state = fold(state, psi(k, maps), v, leaves)
    tokens = _Tokens(position, score, _weights(slots, T))
    if spec.victim == "merge":
        if slots.weight is None:
            raise ValueError("compact: victim 'merge' needs slots with log-weights")
        tokens = _merge(tokens, stored, slots, leaves, keep & (rank < torch.inf))
    after = _Writer(slots)
    for b in range(B):
        for h in range(K):
            if W:
                moves = hot[b, h].nonzero()[:, 0]
                moves = moves[moves >= S] - S
                token = at[b, moves].long()
                place = torch.where(token < sinks, token, sinks + (token - sinks) % (W - sinks))
                for label in ("k", "v", "k_scale", "v_scale"):
                    if (x := getattr(new, label)) is not None:
                        after.tensors[f"hot_{label}"][b, h, place] = x[b, h, moves]
                after.take(b, h, place, tokens, S + moves)
                stays = hot[b, h, :W].nonzero()[:, 0]
                after.take(b, h, stays, tokens, stays)
            stays = W + keep[b, h, W:S].nonzero()[:, 0]
            joins = torch.cat([keep[b, h, :W].nonzero()[:, 0], S + keep[b, h, S:].nonzero()[:, 0]])
            joins = joins[position[b, h, joins].argsort()]
            free = W + (~keep[b, h, W:S]).nonzero()[: len(joins), 0]
            which, place = torch.cat([stays, joins]), torch.cat([stays, free])
            for label, (codes, scale) in stored.items():
                after.tensors[label][b, h, place - W] = codes[b, h, which]
                if scale is not None:
                    after.tensors[f"{label}_scale"][b, h, place - W] = scale[b, h, which]
            after.take(b, h, place, tokens, which)
    return Compacted(after.slots(), state, after_seen)


def _candidate_rows(slots: Slots, new: Rows) -> dict[str, tuple[Tensor, Tensor | None]]:
    """The rows of slots and call as slots that are not hot store them, [B, K, S + T, ...]."""
    found = {}
    for label in ("k", "v"):
        kind = getattr(slots.rows, label)
        mine, mine_scale = getattr(slots, label), getattr(slots, f"{label}_scale")
        codes = new_codes = getattr(new, label)
        scale = new_scale = getattr(new, f"{label}_scale")
        if slots.hot_slots:
            hot = [getattr(slots, f"hot_{label}"), getattr(slots, f"hot_{label}_scale")]
            both = [
                None if x is None else torch.cat([x, y], 2)
                for x, y in zip(hot, (new_codes, new_scale), strict=True)
            ]
            hot_type = ROW_TYPES[new_codes.dtype]
            assert both[0] is not None
            codes, scale = encode(decode(both[0], both[1], hot_type), kind)
        W = slots.hot_slots
        codes = torch.cat([codes[:, :, :W], mine, codes[:, :, W:].to(mine.dtype)], 2)
        if mine_scale is not None and scale is not None:
            scale = torch.cat([scale[:, :, :W], mine_scale, scale[:, :, W:]], 2)
        found[label] = codes, scale
    return found


@dataclass(frozen=True)
class _Tokens:
    """What slots note of tokens beside their rows, [B, K, S + T] each.

    weight: log-weights, or int32 counts where slots count.
    """

    position: Tensor
    score: Tensor
    weight: Tensor


def _weights(slots: Slots, T: int) -> Tensor:
    """The weights of slots and call, each of whose T tokens stands for itself."""
    held = slots.weight.int() if slots.weight is not None and slots.counts else slots.log_weight
    return torch.nn.functional.pad(held, (0, T), value=1 if slots.counts else 0)


def _merge(
    tokens: _Tokens,
    stored: dict[str, tuple[Tensor, Tensor | None]],
    slots: Slots,
    leaves: Tensor,
    target: Tensor,
) -> _Tokens:
    """Merge who leaves into those who stay; ``stored`` is written where a row changes."""
    rows = {}
    for n in ("k", "v"):
        x = decode(*stored[n], getattr(slots.rows, n))
        rows[n] = x.to(torch.promote_types(x.dtype, torch.float32), copy=True)
    after = {n: x.clone() for n, x in vars(tokens).items()}
    changed = torch.zeros_like(leaves)
    B, K, _ = leaves.shape
    for b in range(B):
        for h in range(K):
            k, v = rows["k"][b, h], rows["v"][b, h]
            position, score, weight = (x[b, h] for x in vars(tokens).values())
            into = nearest(k, score, position, leaves[b, h], target[b, h])
            found = merged(k, v, score, weight, position, into)
            rows["k"][b, h], rows["v"][b, h] = found[:2]
            for name, y in zip(("score", "weight", "position"), found[2:], strict=True):
                after[name][b, h] = y
            changed[b, h, into[into >= 0]] = True
    for label, x in rows.items():
        new_codes, new_scale = encode(x, getattr(slots.rows, label))
        codes, scale = stored[label]
        codes = codes.clone()
        codes[changed] = new_codes[changed]
        if scale is not None and new_scale is not None:
            scale = torch.where(changed, new_scale, scale)
        stored[label] = codes, scale
    return _Tokens(**after)


class _Writer:
    """Slots on their way to become others: nobody in them, rows as they were."""

    def __init__(self, slots: Slots) -> None:
        self._old = slots
        self.tensors = {n: x.clone() for n, x in slots.tensors().items()}
        self.tensors["position"].fill_(-1)
        for name in ("score", "weight"):
            if name in self.tensors:
                self.tensors[name].zero_()

    def take(self, b: int, h: int, place: Tensor, tokens: _Tokens, which: Tensor) -> None:
        """Put tokens into slots, all but their rows."""
        for name, x in vars(tokens).items():
            if name in self.tensors:
                mine, taken = self.tensors[name], x[b, h, which]
                if name == "score":
                    taken = noted_score(taken, mine.dtype)
                mine[b, h, place] = taken.to(mine.dtype)

    def slots(self) -> Slots:
        """What became of them."""
        return self._old.holding(self.tensors)
