"""From a budget to tokens per layer: bytes counted as the cache counts them, and shapes.

A budget is what a cache's layers hold together. A *shape* deals it out: ``weights`` says how much
of the mean each layer gets, ``deal`` makes whole tokens of it, so that their sum is the budget's.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from fractions import Fraction

import torch

from less.layer import PageLayout

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}
BETA = 20.0  # PyramidKV's


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
