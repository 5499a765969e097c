"""Moves, loads, stores, atomics, and addresses."""

from __future__ import annotations

from ..operation import Operation
from ..types import c_type, is_float, size, storage
from .registry import family

_SCOPES = ("cta", "cluster", "gpu", "sys")
_CACHE = (
    "ca", "cg", "cs", "lu", "cv", "wb", "wt", "nc",
    *(f"L1::{how}" for how in ("evict_normal", "evict_unchanged", "evict_first", "evict_last",
                               "no_allocate")),
    *(f"L2::{how}" for how in ("evict_normal", "evict_first", "evict_last", "cache_hint",
                               "64B", "128B", "256B")),
)  # fmt: skip
_UNCHECKED = ("param", "local", "const")  # no other thread's, or nobody's to write


@family("mov")
def mov(x: Operation) -> str:
    x.expect(2)
    kind = x.type()
    if kind == "pred":
        return x.assign(0, x.value(1, "pred"), "pred")
    bits = storage(kind)
    raw = {"uint16_t": "b16", "uint32_t": "b32", "uint64_t": "b64"}.get(bits)
    if raw is None:
        raise x.fail(f"of {kind} is not translated")
    if x.operands[0].startswith("{"):
        parts = x.vector(0)
        width = 8 * size(raw) // len(parts)
        code = f"const {bits} all = {x.value(1, raw)}; "
        return code + " ".join(
            x.assign(part, f"all >> {i * width}", f"b{width}") for i, part in enumerate(parts)
        )
    if x.operands[1].startswith("{"):
        parts = x.vector(1)
        width = 8 * size(raw) // len(parts)
        terms = (
            f"({bits}){x.value(part, f'b{width}')} << {i * width}" for i, part in enumerate(parts)
        )
        return x.assign(0, " | ".join(terms), raw)
    return x.assign(0, x.value(1, raw), raw)


def _semantics(x: Operation, what: str) -> tuple[str, str, str]:
    """The runtime's Access, and the fences before and after."""
    scope = x.one_of(*_SCOPES)
    order = x.one_of("weak", "relaxed", "acquire", "release", "volatile")
    x.skip(*_CACHE)
    kind = f"Access::{'relaxed_' if order not in (None, 'weak') else ''}{what}"
    wall = f"fence({'true' if scope in ('gpu', 'sys') else 'false'}); "
    return (kind, wall if order == "release" else "", wall if order == "acquire" else "")


def _shape(x: Operation) -> tuple[str, int]:
    """Type and number of elements."""
    number = x.one_of("v2", "v4", "v8")
    kind = x.type()
    elements = int(number[1]) if number else 1
    if elements * size(kind) > 16:
        raise x.fail("accesses of more than 16 bytes are not translated")
    if is_float(kind):
        kind = f"b{8 * size(kind)}"  # bits pass as they are
    return kind, elements


def _drop_hint(x: Operation, count: int) -> None:
    """Forget the operand of .L2::cache_hint."""
    if "L2::cache_hint" in x.modifiers:
        x.expect(count + 1)
        x.operands.pop()
    x.expect(count)


@family("ld", "ldu")
def ld(x: Operation) -> str:
    _drop_hint(x, 2)
    space = x.space()
    kind, elements = _shape(x)
    access, _, after = _semantics(x, "read")
    values = x.vector(0)
    if len(values) != elements:
        raise x.fail(f"wanted {elements} destinations")
    call = f"<{c_type(kind)}, {elements}>({x.address(1, space)}"
    if space in _UNCHECKED:
        code = f"const auto v = peek{call}); "
    else:
        code = f"const auto v = load{call}, {access}, {x.at}); {after}"
    return code + " ".join(x.assign(value, f"v.of[{i}]", kind) for i, value in enumerate(values))


@family("st")
def st(x: Operation) -> str:
    _drop_hint(x, 2)
    space = x.space()
    kind, elements = _shape(x)
    access, before, _ = _semantics(x, "write")
    values = x.vector(1)
    if len(values) != elements:
        raise x.fail(f"wanted {elements} sources")
    bits = storage(kind)
    listed = ", ".join(x.value(value, f"u{8 * size(kind)}") for value in values)
    given = f"Values<{bits}, {elements}>{{{{{listed}}}}}"
    if space in _UNCHECKED:
        return f"poke({x.address(0, space)}, {given});"
    return f"{before}store({x.address(0, space)}, {given}, {access}, {x.at});"


_ATOMIC = {
    "add": "old + x", "min": "minimum(old, x)", "max": "maximum(old, x)", "exch": "x",
    "cas": "old == x ? y : old", "inc": "old >= x ? 0u : old + 1u",
    "dec": "old == 0u || old > x ? x : old - 1u", "and": "old & x", "or": "old | x",
    "xor": "old ^ x",
}  # fmt: skip


@family("atom", "red")
def atom(x: Operation) -> str:
    first = 1 if x.base == "atom" else 0
    space = x.space()
    scope = x.one_of(*_SCOPES)
    order = x.one_of("relaxed", "acquire", "release", "acq_rel")
    name = x.need(*_ATOMIC)
    x.skip("L2::cache_hint" if "L2::cache_hint" in x.modifiers else "")
    x.expect(first + (3 if name == "cas" else 2))
    kind = x.type()
    if kind.endswith("x2") or kind in ("f16", "bf16"):
        raise x.fail(f"of {kind} is not translated")
    if kind[0] == "b":
        kind = f"u{kind[1:]}"
    c = c_type(kind)
    wall = f"fence({'true' if scope in (None, 'gpu', 'sys') else 'false'}); "
    before = wall if order in ("release", "acq_rel") else ""
    after = wall if order in ("acquire", "acq_rel") else ""
    code = f"const {c} x = {x.value(first + 1, kind)}; "
    if name == "cas":
        code += f"const {c} y = {x.value(first + 2, kind)}; "
    change = f"[&]({c} old) -> {c} {{ return {_ATOMIC[name]}; }}"
    code += f"{before}const {c} old = atomic<{c}>({x.address(first, space)}, {change}, {x.at}); "
    return code + after + (x.assign(0, "old", kind) if x.base == "atom" else "(void)old;")


@family("cvta")
def cvta(x: Operation) -> str:
    """Generic addresses are the host's; shared ones are offsets; all others are the host's too."""
    x.expect(2)
    x.type()
    to = x.flag("to")
    space = x.space()
    value = x.value(1, "u64")
    if space == "shared":
        convert = "shared_offset" if to else "generic_shared"
        return x.assign(0, f"{convert}({value}, {x.at})", "u64")
    return x.assign(0, value, "u64")


@family("mapa")
def mapa(x: Operation) -> str:
    """The address that a block of the cluster has for what this one has at its own."""
    x.expect(3)
    kind = x.type()
    if x.space() != "shared" or kind != "u32":
        raise x.fail("only of shared::cluster.u32")
    return x.assign(0, f"map_shared({x.value(1, 'u32')}, {x.value(2, 'u32')}, {x.at})", "u32")


@family("prefetch", "prefetchu")
def prefetch(x: Operation) -> str:
    """Changes when, never what."""
    x.skip("L1", "L2", "global", "L2::evict_last", "L2::evict_normal")
    return ";"


@family("createpolicy")
def createpolicy(x: Operation) -> str:
    """A hint to the L2 cache; its value is used by hints alone."""
    x.type()
    x.skip("fractional", "L2::evict_first", "L2::evict_last", "L2::evict_normal",
           "L2::evict_unchanged")  # fmt: skip
    return x.assign(0, "0", "b64")
