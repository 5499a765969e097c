"""Level tables of few bits: Lloyd-Max of the unit Gaussian, and uniform ones."""

from __future__ import annotations

import functools
import itertools
import math

from bench.simulate.native import FITS, Quantizer


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


def uniform(bits: int, largest: float) -> tuple[float, ...]:
    """2^bits evenly spaced levels from -largest to largest: mid-rise, none of them 0."""
    n = 1 << bits
    return tuple(largest * (2 * i + 1 - n) / (n - 1) for i in range(n))


def whole(bits: int) -> tuple[float, ...]:
    """2^bits - 1 whole-number levels around 0, in units of the largest: the usual absmax rows."""
    n = (1 << (bits - 1)) - 1
    return tuple(i / n for i in range(-n, n + 1))


EXACT, HALF, BRAIN, INT8 = (Quantizer(kind) for kind in ("exact", "half", "brain", "int8"))
RULES = ("lloyd", "rms", "max", "fullmax", "absmax")
# The clip of least squared error for Gaussian numbers, in units of rms and of the largest of n.
_CLIP_OF_RMS = {4: 2.45, 3: 2.0, 2: 1.5}
_CLIP_OF_MAX = {
    16: {4: 0.98, 3: 0.90, 2: 0.70},
    32: {4: 0.96, 3: 0.86, 2: 0.64},
    64: {4: 0.92, 3: 0.80, 2: 0.58},
    128: {4: 0.88, 3: 0.74, 2: 0.52},
    256: {4: 0.84, 3: 0.68, 2: 0.48},
}


def _clip_of_max(bits: int, n: int) -> float:
    """The table's clip, between its sizes by the logarithm, beyond them that of its ends."""
    sizes = list(_CLIP_OF_MAX)
    n = min(max(n, sizes[0]), sizes[-1])
    low = max(size for size in sizes if size <= n)
    high = min(size for size in sizes if size >= n)
    part = math.log2(n / low) / math.log2(high / low) if high > low else 0.0
    return (1 - part) * _CLIP_OF_MAX[low][bits] + part * _CLIP_OF_MAX[high][bits]


def named(name: str, bits: int, D: int) -> Quantizer:
    """A quantiser of rows of D numbers by its name, RULE[:FIT][/GROUP].

    RULE is ``lloyd``, Lloyd-Max levels in units of the rms; ``rms`` or ``max``, uniform levels up
    to the best fixed part of rms or maximum; ``fullmax``, uniform levels up to the maximum; or
    ``absmax``, whole numbers times max / (2^(bits-1) - 1). FIT is one of ``native.FITS``, by
    default ``none`` for the last two and ``square`` for the others. GROUP is how many numbers
    share a scale, by default the row. Rows of 8 bits are int8 and of 16 fp16, whatever the name.

    Raises:
        ValueError: There is no such rule or fit.
    """
    rule_fit, _, size = name.partition("/")
    rule, _, fit = rule_fit.partition(":")
    fit = fit or ("none" if rule in ("fullmax", "absmax") else "square")
    if rule not in RULES or fit not in FITS or not (size or "0").isdecimal():
        raise ValueError(
            f"quantizer must be RULE[:FIT][/GROUP], RULE of {', '.join(RULES)}, FIT of "
            f"{', '.join(FITS)}, got {name!r}"
        )
    group = int(size or 0)
    if bits >= 8:
        return INT8 if bits == 8 else HALF
    levels = {
        "lloyd": lambda: lloyd_max(bits),
        "rms": lambda: uniform(bits, _CLIP_OF_RMS[bits]),
        "max": lambda: uniform(bits, _clip_of_max(bits, group or D)),
        "fullmax": lambda: uniform(bits, 1),
        "absmax": lambda: whole(bits),
    }[rule]()
    by_max = rule not in ("lloyd", "rms")
    return Quantizer("table", levels, by_max=by_max, fit=fit, group=group)
