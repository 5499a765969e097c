"""Level tables of few bits: Lloyd-Max of the unit Gaussian, and uniform ones."""

from __future__ import annotations

import functools
import itertools
import math

from bench.simulate.native import FITS, Quantizer
from less.reference import codec


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
# The clip of least squared error for Gaussian numbers.
_CLIP_OF_RMS = {4: 2.45, 3: 2.0, 2: 1.5}


def named(name: str, bits: int, D: int) -> Quantizer:
    """A quantiser of rows of D numbers by its name, RULE[:FIT][/GROUP].

    RULE is ``max``, the uniform levels of the cache; ``lloyd``, Lloyd-Max levels in units of the
    rms; ``rms``, uniform levels up to the best fixed part of the rms; ``fullmax``, uniform levels
    up to the maximum; or ``absmax``, whole numbers times max / (2^(bits-1) - 1). FIT is one of
    ``native.FITS``, by default ``none`` for the last two and ``square`` for the others. GROUP is
    how many numbers share a scale, by default the row. Rows of 8 bits are int8 and of 16 fp16,
    whatever the name.

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
    unit = 1.0
    if rule == "max":  # the cache's own codes and scales
        table = codec.levels(bits).tolist()
        unit = codec.clip(bits, group or D) / table[-1]
    elif rule == "lloyd":
        table = lloyd_max(bits)
    elif rule == "absmax":
        table = whole(bits)
    else:
        table = uniform(bits, _CLIP_OF_RMS[bits] if rule == "rms" else 1)
    by_max = rule not in ("lloyd", "rms")
    return Quantizer("table", tuple(table), by_max, unit, fit, group)
