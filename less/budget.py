"""From a budget to tokens per layer: bytes counted as the cache counts them, and shapes.

A budget is what a cache's layers hold together. A *shape* deals it out: ``weights`` says how much
of the mean each layer gets, ``deal`` makes whole tokens of it, so that their sum is the budget's.
Where it was measured what each head's slots are worth, ``deal_curves`` deals it out to the heads.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from fractions import Fraction

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from less.layer import PageLayout

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}
BETA = 20.0  # PyramidKV's
_MOST_SLOTS = 1 << 20  # of a head, when a budget is dealt out along curves


def page_bytes(
    kv_heads: int,
    head_dim: int,
    dtype: torch.dtype | str,
    tokens: int,
    rank: int = 0,
    sinks: int | None = None,
    hot: int | None = None,
    hot_dtype: torch.dtype = torch.int8,
    weights: bool | None = None,
) -> int:
    """Bytes of the page of one layer of one sequence: slots, state, header.

    Args:
        kv_heads: Kv heads K.
        head_dim: Head dim D.
        dtype: Of the slots' rows, or a packed format.
        tokens: Slots of each head, at least ``least_tokens``.
        rank: Rank of the low-rank state; 0: there is none.
        sinks: As in ``PageLayout``.
        hot: Likewise.
        hot_dtype: Likewise.
        weights: Likewise.
    """
    return PageLayout(
        kv_heads, head_dim, tokens, dtype, rank, sinks, hot, hot_dtype, weights
    ).nbytes


def least_tokens(dtype: torch.dtype | str, sinks: int | None = None, hot: int | None = None) -> int:
    """The fewest slots that a head may have: one beside its hot ones.

    Args:
        dtype: Of the slots' rows, or a packed format.
        sinks: As in ``PageLayout``.
        hot: Likewise.
    """
    return PageLayout(1, 8, 1 << 24, dtype, 0, sinks, hot).hot_slots + 1


def most_within(budget: int, cost: Callable[[int], int]) -> int:
    """The largest number >= 0 whose cost is within a budget.

    Args:
        budget: What it may cost.
        cost: Of a number; it grows with it.
    """
    if cost(1) > budget:
        return 0
    high = 2
    while cost(high) <= budget:
        high *= 2
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if cost(middle) <= budget else (low, middle)
    return low


def parse_bytes(op: str, value: int | str) -> int:
    """A number of bytes, or a text as "64MiB", "1.5GB" or "800 kB".

    Raises:
        ValueError: It is neither, or less than one byte.
    """
    number: float = -1
    if isinstance(value, str):
        found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmg]i?)?b?\s*", value.lower())
        if found:
            number = math.floor(float(found[1]) * _UNITS[found[2] or ""])
    elif isinstance(value, int) and not isinstance(value, bool):
        number = value
    if number < 1:
        raise ValueError(
            f"{op}: bytes must be a number of bytes or a text as '64MiB' or '1.5GB', got {value!r}"
        )
    return int(number)


def pyramid(layers: int, beta: float = BETA) -> list[float]:
    """Weights that fall in equal steps from the first layer to the last; their mean is 1.

    The last layer gets 1 / beta of the mean, the first 2 - 1 / beta: lower layers attend to many
    tokens, upper ones to few. With beta = 1 all are alike.

    Source: Cai et al., "PyramidKV: Dynamic KV Cache Compression based on Pyramidal Information
    Funneling", arXiv:2406.02069, section 3.2.
    """
    if not (math.isfinite(beta) and beta >= 1):
        raise ValueError(f"pyramid: beta must be 1 or more, got {beta}")
    last = 1.0 / beta
    first = 2.0 - last
    return [first - (first - last) * i / max(layers - 1, 1) for i in range(layers)]


def deal(total: int, weights: Sequence[float]) -> list[int]:
    """Split ``total`` whole tokens in proportion to ``weights``; what rounding leaves goes on.

    Every share is rounded down, and the tokens that are left go to the largest remainders, of equal
    ones to the earlier layer. Exact arithmetic: the same on every machine.
    """
    exact = [Fraction(w) for w in weights]
    ideal = [total * w / sum(exact) for w in exact]
    dealt = [math.floor(x) for x in ideal]
    order = sorted(range(len(ideal)), key=lambda i: (dealt[i] - ideal[i], i))
    for i in order[: total - sum(dealt)]:
        dealt[i] += 1
    return dealt


# Nothing here but sums, products and quotients of float64, which are the same on every machine: the
# processes of a sharded model, and a snapshot's reader, must deal alike.
_Floats = NDArray[np.float64]


def deal_curves(
    curves: Sequence[Tensor],
    capacities: Sequence[int],
    budget: int,
    cost: Callable[[int], int],
    least: int,
) -> list[tuple[int, ...]]:
    """Split a budget among heads by what each one's slots are worth.

    Every head begins with ``least`` slots. The next slots go where the error falls most for what
    they cost, looking ahead over any number of slots: along the convex hull of each head's curve.
    Steps are an eighth of a head's slots; the last one is cut where the budget ends.

    Args:
        curves: Of each layer, [K, n]: the error that a head causes at each capacity.
        capacities: The n capacities, ascending. Between them the error is linear in 1 / slots, and
            never grows; how it goes on beyond the last, ``_beyond`` says.
        budget: What all heads may cost together.
        cost: Of a head with so many slots; it grows with them.
        least: Slots that every head gets.

    Returns:
        The slots of each layer's heads.

    Raises:
        ValueError: The budget does not pay for ``least`` slots of every head.
    """
    error = torch.cat([c.to("cpu", torch.float64) for c in curves]).numpy()
    heads, base = len(error), cost(least)
    spare = budget - heads * base
    if spare < 0:
        raise ValueError(
            f"deal_curves: budget must be {heads * base:,} or more, for {least} slots of each of "
            f"{heads} heads, got {budget:,}"
        )
    sizes = [least]
    while sizes[-1] < _MOST_SLOTS:
        sizes.append((sizes[-1] + max(sizes[-1] // 8, 4)) // 4 * 4)
    costs = np.array([cost(size) for size in sizes], np.int64)
    dearer = np.append(np.flatnonzero(np.diff(costs)), len(sizes) - 1)
    sizes, costs = [sizes[i] for i in dearer], costs[dearer]  # padding may pay for the next size
    gains = _hull(_errors(error, np.array(capacities, np.float64), sizes), costs)
    # By gain; of equal ones the smaller head's step first, then the earlier head's.
    steps, head = np.divmod(np.argsort(-gains.T, axis=None, kind="stable"), heads)
    spent = np.cumsum(np.diff(costs)[steps])
    taken = int(np.searchsorted(spent, spare, side="right"))
    slots = [sizes[n] for n in np.bincount(head[:taken], minlength=heads)]
    if taken < len(head):
        cut, left = int(head[taken]), spare - int(spent[taken - 1] if taken else 0)
        begin = slots[cut]
        slots[cut] += most_within(left + cost(begin), lambda more: cost(begin + more))
    numbers = iter(slots)
    return [tuple(next(numbers) for _ in range(len(layer))) for layer in curves]


def _errors(error: _Floats, capacities: _Floats, sizes: Sequence[int]) -> _Floats:
    """The error of each head at other numbers of slots: [heads, n] to [heads, sizes]."""
    error = np.minimum.accumulate(error, 1)
    at = np.array(sizes, np.float64)
    right = np.clip(np.searchsorted(capacities, at), 1, len(capacities) - 1)
    x0, x1 = capacities[right - 1], capacities[right]
    # 1 at x0, 0 at x1, in proportion to 1 / slots
    part = np.clip((1 / at - 1 / x1) / (1 / x0 - 1 / x1), 0, 1)
    inside = error[:, right] + (error[:, right - 1] - error[:, right]) * part
    return np.where(at > capacities[-1], _beyond(error, capacities, at), inside)


def _beyond(error: _Floats, capacities: _Floats, at: _Floats) -> _Floats:
    """The error at numbers of slots above the last capacity: [heads, n] to [heads, sizes].

    It goes on to fall with the exponent at the curve's end, which is at most 2 because the end of
    a curve is steeper than that of a longer text: error / (1 + exponent / 2 (slots / last - 1))^2.
    """
    (x0, x1), (e0, e1) = capacities[-2:], (error[:, -2, None], error[:, -1, None])
    sums = np.where(e0 + e1 > 0, e0 + e1, 1)
    exponent = np.minimum((e0 - e1) / sums * ((x1 + x0) / (x1 - x0)), 2)
    below = 1 + exponent / 2 * (at / x1 - 1)
    error_beyond: _Floats = e1 / (below * below)
    return error_beyond


def _hull(error: _Floats, costs: NDArray[np.int64]) -> _Floats:
    """The gain per cost of each step along the lower convex hull: [heads, m] to [heads, m - 1]."""
    heads, m = error.shape
    gains, at, steps = np.zeros((heads, m - 1)), np.zeros(heads, np.int64), np.arange(m - 1)
    for first in range(m - 1):
        rows = np.flatnonzero(at == first)
        # The hull goes on to where the mean gain is largest; of equal ones the farthest.
        mean = (error[rows, first, None] - error[rows, :first:-1]) / (
            costs[:first:-1] - costs[first]
        )
        at[rows] = m - 1 - mean.argmax(1)
        within = (steps >= first) & (steps < at[rows, None])
        gains[rows] = np.where(within, mean.max(1, keepdims=True, initial=0), gains[rows])
    return np.minimum.accumulate(gains, 1)
