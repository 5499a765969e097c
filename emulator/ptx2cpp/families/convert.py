"""cvt: between all types, and into pairs."""

from __future__ import annotations

from ..operation import Operation
from ..types import c_type, is_float
from .arithmetic import HALVES
from .registry import family

_ROUND = {"rni": "std::nearbyint", "rzi": "std::trunc", "rmi": "std::floor", "rpi": "std::ceil"}
_FP8 = ("e4m3x2", "e5m2x2")


@family("cvt")
def cvt(x: Operation) -> str:
    if x.flag("pack"):
        return _pack(x)
    source, target = x.type(), x.type()
    if target in _FP8 or source in _FP8:
        return _fp8(x, source, target)
    if target in ("f16x2", "bf16x2"):
        return _pair(x, source, target)
    x.expect(2)
    value = x.value(1, source)
    ftz, saturate = x.flag("ftz"), x.flag("sat")
    if source in HALVES:
        value, source = f"{HALVES[source]}::wide({value})", "f32"
    if is_float(source):
        return _from_float(x, value, source, target, ftz=ftz, saturate=saturate)
    if saturate and not is_float(target) and target not in HALVES:
        return x.assign(0, f"clamp<{c_type(target)}>({value})", target)
    if target in HALVES:
        x.need("rn")
        return x.assign(0, f"{HALVES[target]}::narrow((double){value})", target)
    if is_float(target):
        x.need("rn")
    return x.assign(0, f"({c_type(target)}){value}", target)


def _from_float(
    x: Operation, value: str, source: str, target: str, *, ftz: bool, saturate: bool
) -> str:
    integral = x.one_of(*_ROUND)
    if ftz and source == "f32":
        value = f"flush({value})"
    if integral:
        value = f"{_ROUND[integral]}({value})"
    if target in HALVES or is_float(target):
        x.skip("rn")
        relu = x.flag("relu")
        value = f"saturate({value})" if saturate else value
        value = f"relu({value})" if relu else value
        if target in HALVES:
            return x.assign(0, f"{HALVES[target]}::narrow({value})", target)
        value = f"flush(({c_type(target)}){value})" if ftz and target == "f32" else value
        return x.assign(0, value, target)
    if integral is None:
        raise x.fail("wanted one of .rni .rzi .rmi .rpi")
    nan = "(uint64_t)1 << 63" if source == "f64" or target in ("s64", "u64") else "0"
    return x.assign(0, f"to_integer<{c_type(target)}>({value}, {nan})", target)


def _pair(x: Operation, source: str, target: str) -> str:
    """Two floats, the first into the upper half."""
    x.expect(3)
    x.need("rn")
    if source != "f32":
        raise x.fail(f"from {source} is not translated")
    relu = "relu" if x.flag("relu") else ""
    narrow = f"{HALVES[target]}::narrow"
    upper, lower = (f"{narrow}({relu}({x.value(i, 'f32')}))" for i in (1, 2))
    return x.assign(0, f"(uint32_t){upper} << 16 | {lower}", target)


def _fp8(x: Operation, source: str, target: str) -> str:
    """Two floats or halves to two 8-bit floats, too large becomes the largest; and back."""
    x.need("rn")
    if source in _FP8:
        x.expect(2)
        if target != "f16x2":
            raise x.fail(f"to {target} is not translated")
        return x.assign(0, f"from_{source}({x.value(1, source)})", target)
    x.need("satfinite")
    if source == "f16x2":
        x.expect(2)
        return x.assign(0, f"to_{target}({x.value(1, source)})", target)
    x.expect(3)
    if source != "f32":
        raise x.fail(f"from {source} is not translated")
    return x.assign(0, f"to_{target}({x.value(1, 'f32')}, {x.value(2, 'f32')})", target)


def _pack(x: Operation) -> str:
    """Two integers, saturated, the first above the second; bytes go below what c holds."""
    x.need("sat")
    with_c = x.flag("b32")
    source, target = x.type(), x.type()
    name = {"s8": "int8_t", "u8": "uint8_t", "s16": "int16_t", "u16": "uint16_t"}.get(target)
    if name is None or source != "s32" or with_c != (target in ("s8", "u8")):
        raise x.fail("this form is not translated")
    x.expect(4 if with_c else 3)
    last = x.value(3, "u32") if with_c else "0u"
    return x.assign(0, f"pack<{name}>({x.value(1, 's32')}, {x.value(2, 's32')}, {last})", "u32")
