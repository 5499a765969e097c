"""The PTX tier's instructions on numbers, one kernel each, against numpy and exact fractions."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import pytest
import torch

from .ptx_program import Program, entry, module

N = 128  # values of each operand, one per thread


@dataclass(frozen=True)
class Case:
    """An instruction.

    Args:
        text: With {0} for the destination and {1}, {2}... for the operands.
        types: Of the destination and the operands.
        want: Their result, of Python numbers: ints, floats, raw bits of halves and pairs.
        near: Relative error that is allowed.
    """

    text: str
    types: str
    want: Callable[..., int | float | bool]
    near: float = 0.0


# -- halves, exactly: a number is a Fraction, and is rounded once ----------------------------------

FORMATS = {"f16": (11, -14, 15), "bf16": (8, -126, 127)}  # precision, exponents


def widen(raw: int, kind: str) -> float:
    """The value of a half's bits."""
    bits = np.array([raw], dtype=np.uint16)
    if kind == "f16":
        return float(bits.view(np.float16)[0])
    return float((bits.astype(np.uint32) << 16).view(np.float32)[0])


def narrow(x: Fraction | float, kind: str) -> int:
    """The bits of the nearest half, ties to even."""
    if isinstance(x, float):
        if math.isnan(x):
            return 0x7FFF
        if math.isinf(x):
            return {"f16": 0x7C00, "bf16": 0x7F80}[kind] | (0x8000 if x < 0 else 0)
    sign = 0x8000 if x < 0 or (x == 0 and isinstance(x, float) and math.copysign(1, x) < 0) else 0
    exact = abs(Fraction(x))
    precision, lowest, highest = FORMATS[kind]
    exponent = lowest
    while exact >= Fraction(2) ** (exponent + 1):
        exponent += 1
    mantissa = round(exact / Fraction(2) ** (exponent - precision + 1))  # Python rounds to even
    code = ((exponent - lowest) << (precision - 1)) + mantissa
    return sign | min(code, (highest - lowest + 2) << (precision - 1))


def half(kind: str, function: Callable[..., Fraction | float]) -> Callable[..., int]:
    """A function of exact numbers, as one of bits; NaN and infinity go through floats."""

    def of_bits(*raw: int) -> int:
        values = [widen(one, kind) for one in raw]
        if all(map(math.isfinite, values)):
            result = function(*map(Fraction, values))
            # A zero has the sign that IEEE arithmetic gives it.
            return narrow(result if result else float(function(*values)), kind)
        return narrow(float(function(*values)), kind)

    return of_bits


def pair(function: Callable[..., int]) -> Callable[..., int]:
    """A function of halves, on both halves of pairs."""

    def of_pairs(*raw: int) -> int:
        upper = function(*(one >> 16 for one in raw))
        return upper << 16 | function(*(one & 0xFFFF for one in raw))

    return of_pairs


def fma_of(a: float, b: float, c: float) -> float:
    return a * b + c


def f32(x: float) -> float:
    with np.errstate(all="ignore"):
        return float(np.float32(x))


def exact_fma(a: float, b: float, c: float) -> float:
    """Of float32: rounded once."""
    if not all(map(math.isfinite, (a, b, c))):
        return f32(a * b + c)
    exact = Fraction(a) * Fraction(b) + Fraction(c)
    if exact == 0:
        return a * b + c
    near = np.float32(float(exact))  # near enough: one of its neighbours is the result
    candidates = [
        near,
        np.nextafter(near, np.float32(-np.inf)),
        np.nextafter(near, np.float32(np.inf)),
    ]
    finite = [one for one in candidates if np.isfinite(one)]
    if abs(exact) >= Fraction(float(np.finfo(np.float32).max)) * (1 + Fraction(1, 2**25)):
        return math.copysign(math.inf, exact)

    def distance(one: np.float32) -> tuple[Fraction, int]:
        return abs(Fraction(float(one)) - exact), int(one.view(np.uint32)) & 1

    return float(min(finite, key=distance))


def directed(a: float, b: float, c: float, toward: int) -> float:
    """Of float32: a * b + c, not above (toward -1), not below (1), not further from 0 (0)."""
    near = exact_fma(a, b, c)
    if not all(map(math.isfinite, (a, b, c))):
        return near
    exact = Fraction(a) * Fraction(b) + Fraction(c)
    difference = near if math.isinf(near) else Fraction(near) - exact
    down = toward < 0 or (toward == 0 and exact > 0)
    if (difference > 0) if down else (difference < 0):
        return float(np.nextafter(np.float32(near), np.float32(-np.inf if down else np.inf)))
    return near


def flush(x: float) -> float:
    return math.copysign(0.0, x) if abs(x) < 2.0**-126 else x


def clamp(x: float, low: float, high: float) -> int:
    return int(min(max(x, low), high))


def byte(x: int) -> int:
    return clamp(x, -128, 127) & 255


def positive(x: float) -> float:
    return x if math.isnan(x) else max(x, 0.0)


def signed(x: int, bits: int = 32) -> int:
    x &= (1 << bits) - 1
    return x - (1 << bits) if x >> (bits - 1) else x


def saturated(x: float, bits: int, is_signed: bool, rounding: Callable[[float], float]) -> int:
    low, high = (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if is_signed else (0, (1 << bits) - 1)
    if math.isnan(x):
        return 0
    if math.isinf(x):
        return high if x > 0 else low
    return min(max(int(rounding(x)), low), high)


def prmt(a: int, b: int, selector: int) -> int:
    both = (b << 32 | a).to_bytes(8, "little")
    out = []
    for i in range(4):
        choice = selector >> 4 * i & 15
        byte = both[choice & 7]
        out.append((0xFF if byte & 0x80 else 0) if choice & 8 else byte)
    return int.from_bytes(bytes(out), "little")


def lop3(a: int, b: int, c: int) -> int:
    """(a & b) | (~a & c), whose table is 0xCA."""
    return (a & b) | (~a & c & 0xFFFFFFFF)


def bfe(a: int, at: int, count: int) -> int:
    at, count = at & 255, count & 255
    bits = [a >> min(at + i, 31) & 1 for i in range(min(count, 32))]
    value = sum(bit << i for i, bit in enumerate(bits))
    return signed(value, len(bits)) if bits else 0


def bfi(a: int, b: int, at: int, count: int) -> int:
    at, count = at & 255, count & 255
    mask = (((1 << min(count, 32)) - 1) << at) & 0xFFFFFFFF if at < 32 else 0
    return (b & ~mask) | ((a << at) & mask)


def fp8(x: float, kind: torch.dtype, largest: float) -> int:
    if math.isnan(x):
        return 0x7F
    limited = torch.tensor(min(max(x, -largest), largest))
    return int(limited.to(kind).view(torch.uint8))


def e4m3(upper: float, lower: float) -> int:
    return fp8(upper, torch.float8_e4m3fn, 448.0) << 8 | fp8(lower, torch.float8_e4m3fn, 448.0)


def e5m2(upper: float, lower: float) -> int:
    return fp8(upper, torch.float8_e5m2, 57344.0) << 8 | fp8(lower, torch.float8_e5m2, 57344.0)


def from_e4m3(raw: int) -> int:
    value = float(torch.tensor(raw, dtype=torch.uint8).view(torch.float8_e4m3fn))
    return narrow(value, "f16")


def truncated(a: int, b: int) -> int:
    quotient = abs(a) // abs(b) if b else 0
    return (-quotient if (a < 0) != (b < 0) else quotient) if b else -1


def with_nan(a: float, b: float, choose: Callable[[float, float], float]) -> float:
    if math.isnan(a) or math.isnan(b):
        return b if math.isnan(a) else a
    if a == b == 0:
        return choose((math.copysign(1, a), a), (math.copysign(1, b), b))[1]  # type: ignore
    return choose(a, b)


def compare(a: float, b: float, unordered: bool) -> bool:
    return unordered if math.isnan(a) or math.isnan(b) else a < b


INTEGERS = [
    Case("add.s32 {0}, {1}, {2};", "s32 s32 s32", lambda a, b: a + b),
    Case("add.sat.s32 {0}, {1}, {2};", "s32 s32 s32",
         lambda a, b: clamp(a + b, -(2**31), 2**31 - 1)),
    Case("sub.u64 {0}, {1}, {2};", "u64 u64 u64", lambda a, b: a - b),
    Case("add.s16 {0}, {1}, {2};", "s16 s16 s16", lambda a, b: a + b),
    Case("mul.lo.s32 {0}, {1}, {2};", "s32 s32 s32", lambda a, b: a * b),
    Case("mul.lo.u16 {0}, {1}, {2};", "u16 u16 u16", lambda a, b: a * b),
    Case("mul.hi.u32 {0}, {1}, {2};", "u32 u32 u32", lambda a, b: a * b >> 32),
    Case("mul.hi.s64 {0}, {1}, {2};", "s64 s64 s64", lambda a, b: a * b >> 64),
    Case("mul.wide.s32 {0}, {1}, {2};", "s64 s32 s32", lambda a, b: a * b),
    Case("mul.wide.u16 {0}, {1}, {2};", "u32 u16 u16", lambda a, b: a * b),
    Case("mad.lo.s32 {0}, {1}, {2}, {3};", "s32 s32 s32 s32", lambda a, b, c: a * b + c),
    Case("mad.wide.u32 {0}, {1}, {2}, {3};", "u64 u32 u32 u64", lambda a, b, c: a * b + c),
    Case("div.s32 {0}, {1}, {2};", "s32 s32 s32", truncated),
    Case("div.u64 {0}, {1}, {2};", "u64 u64 u64", truncated),
    Case("rem.s32 {0}, {1}, {2};", "s32 s32 s32", lambda a, b: a - b * truncated(a, b) if b else a),
    Case("min.s32 {0}, {1}, {2};", "s32 s32 s32", min),
    Case("max.u32 {0}, {1}, {2};", "u32 u32 u32", max),
    Case("neg.s64 {0}, {1};", "s64 s64", lambda a: -a),
    Case("abs.s32 {0}, {1};", "s32 s32", abs),
    Case("and.b32 {0}, {1}, {2};", "u32 u32 u32", lambda a, b: a & b),
    Case("xor.b64 {0}, {1}, {2};", "u64 u64 u64", lambda a, b: a ^ b),
    Case("not.b32 {0}, {1};", "u32 u32", lambda a: ~a),
    Case("cnot.b32 {0}, {1};", "u32 u32", lambda a: int(a == 0)),
    Case("shl.b32 {0}, {1}, {2};", "u32 u32 u6", lambda a, n: a << n),
    Case("shr.s32 {0}, {1}, {2};", "s32 s32 u6", lambda a, n: a >> n),
    Case("shr.u64 {0}, {1}, {2};", "u64 u64 u6", lambda a, n: a >> n),
    Case("shf.l.wrap.b32 {0}, {1}, {2}, {3};", "u32 u32 u32 u6",
         lambda a, b, n: ((b << 32 | a) << (n & 31)) >> 32),
    Case("shf.r.clamp.b32 {0}, {1}, {2}, {3};", "u32 u32 u32 u6",
         lambda a, b, n: (b << 32 | a) >> min(n, 32)),
    Case("lop3.b32 {0}, {1}, {2}, {3}, 0xCA;", "u32 u32 u32 u32", lop3),
    Case("prmt.b32 {0}, {1}, {2}, {3};", "u32 u32 u32 u32", prmt),
    Case("bfe.s32 {0}, {1}, {2}, {3};", "s32 u32 u6 u6", bfe),
    Case("bfi.b32 {0}, {1}, {2}, {3}, {4};", "u32 u32 u32 u6 u6", bfi),
    Case("clz.b32 {0}, {1};", "u32 u32", lambda a: 32 - a.bit_length()),
    Case("clz.b64 {0}, {1};", "u32 u64", lambda a: 64 - a.bit_length()),
    Case("popc.b64 {0}, {1};", "u32 u64", lambda a: a.bit_count()),
    Case("brev.b32 {0}, {1};", "u32 u32", lambda a: int(f"{a:032b}"[::-1], 2)),
    Case("bfind.u32 {0}, {1};", "u32 u32", lambda a: a.bit_length() - 1),
    Case("bfind.s32 {0}, {1};", "u32 s32", lambda a: (a if a >= 0 else ~a).bit_length() - 1),
    Case("selp.b32 {0}, {1}, {2}, %p1;", "u32 u32 u32", lambda a, b: b),
    Case("slct.b32.s32 {0}, {1}, {2}, {3};", "u32 u32 u32 s32", lambda a, b, c: a if c >= 0 else b),
    Case("setp.ltu.f32 %p2, {1}, {2}; selp.u32 {0}, 1, 0, %p2;", "u32 f32 f32",
         lambda a, b: compare(a, b, True)),
    Case("setp.lt.f32 %p2, {1}, {2}; selp.u32 {0}, 1, 0, %p2;", "u32 f32 f32",
         lambda a, b: compare(a, b, False)),
    Case("setp.nan.f32 %p2, {1}, {2}; selp.u32 {0}, 1, 0, %p2;", "u32 f32 f32",
         lambda a, b: math.isnan(a) or math.isnan(b)),
    Case("setp.lo.u32 %p2|%p3, {1}, {2}; selp.u32 {0}, 1, 0, %p3;", "u32 u32 u32",
         lambda a, b: a >= b),
    Case("setp.lt.and.s32 %p2, {1}, {2}, %p1; selp.u32 {0}, 1, 0, %p2;", "u32 s32 s32",
         lambda a, b: 0),
    Case("setp.ge.or.s64 %p2, {1}, {2}, %p1; selp.u32 {0}, 1, 0, %p2;", "u32 s64 s64",
         lambda a, b: a >= b),
    Case("set.gt.u32.s32 {0}, {1}, {2};", "u32 s32 s32", lambda a, b: 0xFFFFFFFF if a > b else 0),
    Case("dp4a.s32.s32 {0}, {1}, {2}, {3};", "s32 u32 u32 s32",
         lambda a, b, c: c + sum(signed(a >> i, 8) * signed(b >> i, 8) for i in (0, 8, 16, 24))),
    Case("mov.b64 {0}, {{{1}, {2}}};", "u64 u32 u32", lambda a, b: b << 32 | a),
    Case("mov.b64 {{{0}, _}}, {1};", "u32 u64", lambda a: a & 0xFFFFFFFF),
    Case("cvt.s32.s8 {0}, {1};", "s32 u16", lambda a: signed(a, 8)),
    Case("cvt.u64.u32 {0}, {1};", "u64 u32", lambda a: a),
    Case("cvt.sat.s8.s32 {0}, {1};", "s16 s32", lambda a: clamp(a, -128, 127)),
    Case("cvt.pack.sat.s8.s32.b32 {0}, {1}, {2}, {3};", "u32 s32 s32 u32",
         lambda a, b, c: (c & 0xFFFF) << 16 | byte(a) << 8 | byte(b)),
]  # fmt: skip

FLOATS = [
    Case("add.f32 {0}, {1}, {2};", "f32 f32 f32", lambda a, b: f32(a + b)),
    Case("add.rn.ftz.f32 {0}, {1}, {2};", "f32 f32 f32",
         lambda a, b: flush(f32(flush(a) + flush(b)))),
    Case("sub.f32 {0}, {1}, {2};", "f32 f32 f32", lambda a, b: f32(a - b)),
    Case("mul.f32 {0}, {1}, {2};", "f32 f32 f32", lambda a, b: f32(a * b)),
    Case("add.sat.f32 {0}, {1}, {2};", "f32 f32 f32",
         lambda a, b: 0.0 if math.isnan(a + b) else min(max(f32(a + b), 0.0), 1.0)),
    Case("fma.rn.f32 {0}, {1}, {2}, {3};", "f32 f32 f32 f32", exact_fma),
    Case("fma.rm.f32 {0}, {1}, {2}, {3};", "f32 f32 f32 f32",
         lambda a, b, c: directed(a, b, c, -1)),
    Case("fma.rp.f32 {0}, {1}, {2}, {3};", "f32 f32 f32 f32",
         lambda a, b, c: directed(a, b, c, 1)),
    Case("add.rz.f32 {0}, {1}, {2};", "f32 f32 f32", lambda a, b: directed(a, 1.0, b, 0)),
    Case("mul.rm.f32 {0}, {1}, {2};", "f32 f32 f32",
         lambda a, b: directed(a, b, 0.0, -1) if a * b else a * b),
    Case("div.rn.f32 {0}, {1}, {2};", "f32 f32 f32",
         lambda a, b: float(np.float32(a) / np.float32(b))),
    Case("min.f32 {0}, {1}, {2};", "f32 f32 f32", lambda a, b: with_nan(a, b, min)),
    Case("max.NaN.f32 {0}, {1}, {2};", "f32 f32 f32",
         lambda a, b: math.nan if math.isnan(a) or math.isnan(b) else with_nan(a, b, max)),
    Case("neg.f32 {0}, {1};", "f32 f32", lambda a: -a),
    Case("abs.f32 {0}, {1};", "f32 f32", abs),
    Case("copysign.f32 {0}, {1}, {2};", "f32 f32 f32", lambda a, b: math.copysign(b, a)),
    Case("sqrt.rn.f32 {0}, {1};", "f32 f32", lambda a: float(np.sqrt(np.float32(a)))),
    Case("rcp.approx.ftz.f32 {0}, {1};", "f32 f32",
         lambda a: flush(float(np.float32(1) / np.float32(flush(a)))), 1e-6),
    Case("rsqrt.approx.f32 {0}, {1};", "f32 f32",
         lambda a: float(1 / np.sqrt(np.float64(a))), 1e-6),
    Case("ex2.approx.ftz.f32 {0}, {1};", "f32 f32",
         lambda a: flush(f32(np.exp2(np.float64(a)))), 1e-6),
    Case("lg2.approx.f32 {0}, {1};", "f32 f32", lambda a: float(np.log2(np.float64(a))), 1e-6),
    Case("tanh.approx.f32 {0}, {1};", "f32 f32", math.tanh, 1e-3),
    Case("fma.rn.f64 {0}, {1}, {1}, {2};", "f64 f64 f64",
         lambda a, b: float(np.float64(a) * a + b), 1e-15),
    Case("div.rn.f64 {0}, {1}, {2};", "f64 f64 f64",
         lambda a, b: float(np.float64(a) / np.float64(b))),
    Case("testp.subnormal.f32 %p2, {1}; selp.u32 {0}, 1, 0, %p2;", "u32 f32",
         lambda a: 0 < abs(a) < 2.0**-126),
    Case("cvt.rzi.s32.f32 {0}, {1};", "s32 f32", lambda a: saturated(a, 32, True, math.trunc)),
    Case("cvt.rni.s32.f32 {0}, {1};", "s32 f32", lambda a: saturated(a, 32, True, round)),
    Case("cvt.rmi.u32.f32 {0}, {1};", "u32 f32", lambda a: saturated(a, 32, False, math.floor)),
    Case("cvt.rni.f32.f32 {0}, {1};", "f32 f32", lambda a: float(np.rint(a))),
    Case("cvt.rn.f32.s64 {0}, {1};", "f32 s64", lambda a: float(np.float32(np.int64(a)))),
    Case("cvt.rn.f32.u32 {0}, {1};", "f32 u32", lambda a: float(np.float32(np.uint32(a)))),
    Case("cvt.f64.f32 {0}, {1};", "f64 f32", lambda a: a),
    Case("cvt.rn.f32.f64 {0}, {1};", "f32 f64", f32),
    Case("cvt.rn.f16.f32 {0}, {1};", "f16 f32", lambda a: narrow(a, "f16")),
    Case("cvt.rn.bf16.f32 {0}, {1};", "bf16 f32", lambda a: narrow(a, "bf16")),
    Case("cvt.f32.f16 {0}, {1};", "f32 f16", lambda a: widen(a, "f16")),
    Case("cvt.f32.bf16 {0}, {1};", "f32 bf16", lambda a: widen(a, "bf16")),
    Case("cvt.rn.f16.s32 {0}, {1};", "f16 s32", lambda a: narrow(Fraction(a), "f16")),
    Case("cvt.rn.f16x2.f32 {0}, {1}, {2};", "f16x2 f32 f32",
         lambda a, b: narrow(a, "f16") << 16 | narrow(b, "f16")),
    Case("cvt.rn.relu.bf16x2.f32 {0}, {1}, {2};", "bf16x2 f32 f32",
         lambda a, b: narrow(positive(a), "bf16") << 16 | narrow(positive(b), "bf16")),
    Case("cvt.rn.satfinite.e4m3x2.f32 {0}, {1}, {2};", "u16 f32 f32", e4m3),
    Case("cvt.rn.satfinite.e5m2x2.f32 {0}, {1}, {2};", "u16 f32 f32", e5m2),
    Case("cvt.rn.satfinite.e4m3x2.f16x2 {0}, {1};", "u16 f16x2",
         lambda a: e4m3(widen(a >> 16, "f16"), widen(a & 0xFFFF, "f16"))),
    Case("cvt.rn.f16x2.e4m3x2 {0}, {1};", "f16x2 u16",
         lambda a: from_e4m3(a >> 8) << 16 | from_e4m3(a & 255)),
]  # fmt: skip

HALVES = [
    case
    for kind in ("f16", "bf16")
    for name, operands, function in (
        ("add", 2, lambda a, b: a + b),
        ("sub", 2, lambda a, b: a - b),
        ("mul", 2, lambda a, b: a * b),
        ("fma.rn", 3, fma_of),
    )
    for case in (
        Case(f"{name}.{kind} {{0}}, {', '.join(f'{{{i + 1}}}' for i in range(operands))};",
             " ".join([kind] * (operands + 1)), half(kind, function)),
        Case(f"{name}.{kind}x2 {{0}}, {', '.join(f'{{{i + 1}}}' for i in range(operands))};",
             " ".join([f"{kind}x2"] * (operands + 1)), pair(half(kind, function))),
    )
]  # fmt: skip
HALVES += [
    Case("neg.f16x2 {0}, {1};", "f16x2 f16x2", lambda a: a ^ 0x80008000),
    Case("abs.bf16 {0}, {1};", "bf16 bf16", lambda a: a & 0x7FFF),
    Case("min.f16x2 {0}, {1}, {2};", "f16x2 f16x2 f16x2",
         pair(lambda a, b: narrow(with_nan(widen(a, "f16"), widen(b, "f16"), min), "f16"))),
    Case("max.bf16 {0}, {1}, {2};", "bf16 bf16 bf16",
         lambda a, b: narrow(with_nan(widen(a, "bf16"), widen(b, "bf16"), max), "bf16")),
    Case("setp.gt.f16 %p2, {1}, {2}; selp.u32 {0}, 1, 0, %p2;", "u32 f16 f16",
         lambda a, b: widen(a, "f16") > widen(b, "f16")),
]  # fmt: skip
CASES = [*INTEGERS, *FLOATS, *HALVES]

WIDTH = {"u6": 32, "f16": 16, "bf16": 16, "f16x2": 32, "bf16x2": 32}


def width(kind: str) -> int:
    return WIDTH.get(kind) or int(kind[1:])


def operands(kind: str, seed: int) -> np.ndarray:
    """Bits of N values of a type: its special ones, and random ones of every size."""
    random = np.random.default_rng(seed)
    if kind == "u6":
        return random.integers(0, 40, N, dtype=np.uint64)
    if kind in ("f32", "f64"):
        kind_of = np.float32 if kind == "f32" else np.float64
        tiny, largest = np.finfo(kind_of).smallest_subnormal, np.finfo(kind_of).max
        special = [
            0.0,
            -0.0,
            1.0,
            -1.5,
            2.5,
            -3.5,
            np.inf,
            -np.inf,
            np.nan,
            tiny,
            -3 * tiny,
            largest,
        ]
        values = np.array(special, dtype=kind_of)
        rest = random.standard_normal(N - len(values)) * 2.0 ** random.integers(
            -30, 30, N - len(values)
        )
        values = np.concatenate([values, rest.astype(kind_of)])
        bits = values.view(np.uint32 if kind == "f32" else np.uint64)
    else:
        bits = random.integers(0, 1 << min(width(kind), 63), N, dtype=np.uint64)
        bits >>= (
            random.integers(0, width(kind), N, dtype=np.uint64) if kind[0] in "us" else np.uint64(0)
        )
        if kind[0] in "us":
            top = np.uint64(1 << (width(kind) - 1))
            bits[:6] = [0, 1, top, top - np.uint64(1), 2 * int(top) - 1, 7]
            bits[6:20] = np.uint64(2 * int(top) - 1) - random.integers(0, 200, 14, dtype=np.uint64)
    return random.permutation(bits.astype(np.uint64))


def value(bits: int, kind: str) -> int | float:
    """Bits as the number that a case's function takes."""
    if kind == "f32":
        return float(np.array([bits], dtype=np.uint32).view(np.float32)[0])
    if kind == "f64":
        return float(np.array([bits], dtype=np.uint64).view(np.float64)[0])
    return signed(bits, width(kind)) if kind[0] == "s" else bits


def is_nan(bits: int, kind: str) -> bool:
    mask = {"f16": (0x7C00, 0x3FF), "bf16": (0x7F80, 0x7F)}[kind]
    return bits & mask[0] == mask[0] and bits & mask[1] != 0


def kernel(number: int, case: Case) -> str:
    """Its operands lie at in[operand][thread], in 8 bytes each; its result at out[thread]."""
    kinds = case.types.split()
    names = {16: "%h", 32: "%a", 64: "%w"}
    registers = [f"{names[width(kind)]}{i + 1}" for i, kind in enumerate(kinds)]
    lines = ["mul.wide.u32 %w8, %tid, 8;", "add.s64 %in, %in, %w8;", "add.s64 %out, %out, %w8;"]
    lines += ["setp.ne.u32 %p1, %tid, %tid;"]  # false
    for i, (kind, register) in enumerate(zip(kinds[1:], registers[1:], strict=True)):
        lines.append(f"ld.global.b{width(kind)} {register}, [%in+{i * N * 8}];")
    lines.append(case.text.format(*registers))
    lines.append(f"st.global.b{width(kinds[0])} [%out], {registers[0]};")
    return entry(f"case_{number}", {"in": "u64", "out": "u64"}, "\n".join(lines))


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Program:
    kernels = [kernel(i, case) for i, case in enumerate(CASES)]
    return Program(tmp_path_factory.mktemp("arithmetic"), module(*kernels))


@pytest.mark.parametrize("number", range(len(CASES)), ids=[case.text for case in CASES])
def test_an_instruction_gives_what_its_definition_says(program: Program, number: int) -> None:
    case = CASES[number]
    to, *sources = case.types.split()
    given = np.stack([operands(kind, 10 * number + i) for i, kind in enumerate(sources)])
    out = np.zeros(N, dtype=np.uint64)
    assert program.run(f"case_{number}", given.copy(), out, threads=N) == []
    for thread in range(N):
        values = [value(int(given[i, thread]), kind) for i, kind in enumerate(sources)]
        with np.errstate(all="ignore"):
            want = case.want(*values)
        got = int(out[thread])
        where = f"{case.text} of {values}: got {got:#x}, wanted {want}"
        if to in ("f32", "f64"):
            number_got = value(got, to)
            same = number_got == want and math.copysign(1, number_got) == math.copysign(1, want)
            close = math.isclose(number_got, want, rel_tol=case.near, abs_tol=case.near * 1e-30)
            assert same or (case.near and close) or (math.isnan(want) and math.isnan(number_got)), (
                where
            )
        elif to in ("f16", "bf16"):
            assert got == want or (is_nan(got, to) and is_nan(int(want), to)), where
        elif to in ("f16x2", "bf16x2"):
            for shift in (0, 16):
                a, b = got >> shift & 0xFFFF, int(want) >> shift & 0xFFFF
                kind = to.removesuffix("x2")
                assert a == b or (is_nan(a, kind) and is_nan(b, kind)), where
        elif "e4m3" in case.text or "e5m2" in case.text:
            for shift in (0, 8):
                a, b = got >> shift & 0xFF, int(want) >> shift & 0xFF
                assert a == b, where
        else:
            assert got == int(want) & ((1 << width(to)) - 1), where
