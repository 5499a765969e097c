"""Measure what each kv head's slots are worth: the error of attention at several capacities.

A layer's captured q, k, v run through the cache itself, token by token, whose victims merge. With o
the attention's output at a capacity, o_full that of a cache which keeps all, and W_h the columns
of the output projection that belong to the query heads of kv head h, the head's error is

    mean over tokens t of |W_h (o_t - o_full,t)|^2

a curve over capacities. ``less.budget.deal_curves`` deals a budget out along such curves.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from less.cache import PagedLayer
from less.fit.capture import Captured
from less.layer import PageLayout
from less.layer.layout import MAX_KV_HEADS
from less.policies.default import merging_policy

_LEAST = 8  # slots; then each half octave
_MOST = 724
_FIRST = 256  # the first token whose output counts
_BLOCK = 64  # tokens whose outputs are compared at once


def grid(length: int) -> tuple[int, ...]:
    """The capacities of a curve, about sqrt(2) apart: 8 .. 724, within three quarters of a chunk.

    Multiples of 4, since a quarter is recent.

    Args:
        length: Tokens of a chunk, at least 32.
    """
    steps = (4 * round(_LEAST / 4 * 2 ** (i / 2)) for i in range(64))
    return tuple(s for s in steps if s <= min(_MOST, length * 3 // 4))


def first_counted(length: int) -> int:
    """The first token of a chunk whose output counts: 256, or a quarter of a short chunk."""
    return min(_FIRST, length // 4)


def measure_curves(
    captured: Captured,
    capacities: Sequence[int],
    tick: Callable[[float], None] = lambda fraction: None,
) -> Tensor:
    """The error that each kv head of a layer causes at each capacity, float32 [N, K, n].

    Args:
        captured: What its attention saw, of N chunks.
        capacities: Slots, n multiples of 4.
        tick: Called with the fraction done.
    """
    q, k, v = (x.float() for x in (captured.q, captured.k, captured.v))
    (B, Q, T, _), K = q.shape, k.shape[1]
    groups = captured.o_weight.float().unflatten(1, (K, -1)).transpose(0, 1)  # [K, hidden, G D]
    gram = groups.transpose(1, 2) @ groups  # |W x|^2 = x^T gram x
    # The output that was captured may have 16 bits, whose rounding is no error of a head.
    keeps_all = _layer(captured, [T])
    full = keeps_all.attend(keeps_all.new_pool(B), q, k, v)
    first = first_counted(T)
    at_once = max(1, MAX_KV_HEADS // K)
    errors = torch.zeros(len(capacities), K, B, dtype=torch.float64, device=q.device)
    for begin in range(0, len(capacities), at_once):
        part = slice(begin, begin + at_once)
        n = len(capacities[part])
        layer = _layer(captured, capacities[part])
        pool = layer.new_pool(B)
        for start in range(0, T, _BLOCK):
            block = [x[:, :, start : start + _BLOCK].repeat(1, n, 1, 1) for x in (q, k, v)]
            out = torch.empty_like(block[0])
            for t in range(out.shape[2]):
                one = slice(t, t + 1)
                layer.attend(pool, *(x[:, :, one] for x in block), out=out[:, :, one])
            off = out.unflatten(1, (n, Q)) - full[:, None, :, start : start + _BLOCK]
            off = off[:, :, :, max(first - start, 0) :]
            rows = off.unflatten(2, (K, -1)).permute(1, 2, 0, 4, 3, 5).flatten(4).flatten(2, 3)
            squares = ((rows @ gram) * rows).sum(3).clamp(min=0)
            errors[part] += squares.unflatten(2, (B, -1)).sum(3)
            tick((begin * T + n * (start + out.shape[2])) / (len(capacities) * T))
    return errors.permute(2, 1, 0).div(T - first).float().cpu()


def _layer(captured: Captured, capacities: Sequence[int]) -> PagedLayer:
    """A layer that merges, whose kv heads are the captured one's, once for each capacity."""
    most, n = max(capacities), len(capacities)
    K, D = captured.k.shape[1], captured.k.shape[3]
    return PagedLayer(
        merging_policy(most),
        PageLayout(n * K, D, tuple(c for c in capacities for _ in range(K)), torch.float32),
        n * captured.q.shape[1],
        scale=captured.scale,
        softcap=captured.softcap or None,
        victim="merge",
        device=captured.q.device,
    )
