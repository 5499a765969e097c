"""Level tables of few bits: Lloyd-Max of the unit Gaussian, and uniform ones."""

from __future__ import annotations

import functools
import itertools
import math

from bench.simulate.native import Quantizer


def _density(x: float) -> float:
    return math.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)


def _below(x: float) -> float:
    return 0.5 * math.erfc(-x / math.sqrt(2))


@functools.cache
def lloyd_max(bits: int) -> tuple[float, ...]:
    """The 2^bits levels of least squared error for a unit Gaussian, ascending."""
    n = 1 << bits
    levels = [3 * (2 * i + 1 - n) / n for i in range(n)]
    for _ in range(4000):
        cuts = [-40.0, *((a + b) / 2 for a, b in itertools.pairwise(levels)), 40.0]
        levels = [
            (_density(a) - _density(b)) / (_below(b) - _below(a))
            for a, b in itertools.pairwise(cuts)
        ]
    return tuple(levels)


def rounded(levels: tuple[float, ...], unit: float) -> tuple[float, ...]:
    """Levels as multiples of 1/unit."""
    return tuple(round(x * unit) / unit for x in levels)


def uniform(bits: int, largest: float) -> tuple[float, ...]:
    """2^bits evenly spaced levels from -largest to largest: mid-rise, none of them 0."""
    n = 1 << bits
    return tuple(largest * (2 * i + 1 - n) / (n - 1) for i in range(n))


def symmetric(bits: int) -> tuple[float, ...]:
    """2^bits - 1 whole-number levels around 0, in units of the largest: the usual absmax rows."""
    n = (1 << (bits - 1)) - 1
    return tuple(i / n for i in range(-n, n + 1))


EXACT, HALF, BRAIN, INT8 = (Quantizer(kind) for kind in ("exact", "half", "brain", "int8"))


def lloyd(bits: int, group: int = 0, refit: bool = True, unit: float = 0) -> Quantizer:
    """Lloyd-Max levels in units of the rms."""
    levels = rounded(lloyd_max(bits), unit) if unit else lloyd_max(bits)
    return Quantizer("table", levels, refit=refit, group=group)


def by_rms(bits: int, clip: float, group: int = 0, refit: bool = True) -> Quantizer:
    """Uniform levels up to clip * rms."""
    return Quantizer("table", uniform(bits, clip), refit=refit, group=group)


def by_max(bits: int, clip: float = 1, group: int = 0, refit: bool = False) -> Quantizer:
    """Uniform levels up to clip * max."""
    return Quantizer("table", uniform(bits, clip), by_max=True, refit=refit, group=group)


def absmax(bits: int, group: int = 0) -> Quantizer:
    """Whole numbers times max / (2^(bits-1) - 1)."""
    return Quantizer("table", symmetric(bits), by_max=True, refit=False, group=group)


# The clip of least squared error for Gaussian numbers, in units of rms and of the largest of n.
_CLIP_OF_RMS = {4: 2.45, 3: 2.0, 2: 1.5}
_CLIP_OF_MAX = {
    32: {4: 0.96, 3: 0.86, 2: 0.64},
    64: {4: 0.92, 3: 0.80, 2: 0.58},
    128: {4: 0.88, 3: 0.74, 2: 0.52},
}
NAMES = ("lloyd", "lloyd/32", "rms", "rms/32", "max", "max/32", "fullmax", "absmax", "absmax/32")


def named(name: str, bits: int, D: int) -> Quantizer:
    """A quantiser of rows of D numbers by its name: rule, and the size of groups if any.

    ``lloyd``: Lloyd-Max levels of the rms. ``rms``, ``max``: uniform levels up to the best fixed
    part of rms or maximum. All three with a refitted scale. ``fullmax``: uniform levels up to the
    maximum. ``absmax``: whole numbers times max / (2^(bits-1) - 1). 8 and 16 bits know no rule.
    """
    if bits >= 8:
        return INT8 if bits == 8 else HALF
    rule, _, group = name.partition("/")
    n = int(group or 0)
    if rule == "lloyd":
        return lloyd(bits, n)
    if rule == "rms":
        return by_rms(bits, _CLIP_OF_RMS[bits], n)
    if rule == "max":
        return by_max(bits, _CLIP_OF_MAX[min(n or D, 128)][bits], n, refit=True)
    return by_max(bits, 1, n) if rule == "fullmax" else absmax(bits, n)
