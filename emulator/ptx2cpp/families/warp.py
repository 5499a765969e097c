"""What the lanes of a warp do together."""

from __future__ import annotations

from ..operation import Operation
from ..types import c_type
from .registry import family


@family("shfl")
def shfl(x: Operation) -> str:
    x.expect(5)
    x.need("sync")
    mode = x.need("up", "down", "bfly", "idx")
    x.type()
    to, valid = x.destination_pair(0)
    values = ", ".join(x.value(i, "u32") for i in (1, 2, 3, 4))
    code = f"bool valid; const uint32_t got = shuffle(Shuffle::{mode}, {values}, &valid, {x.at}); "
    code += x.assign(to, "got", "b32")
    return code + (" " + x.assign(valid, "valid", "pred") if valid else "")


@family("vote")
def vote(x: Operation) -> str:
    x.expect(3)
    x.need("sync")
    mode = x.need("all", "any", "uni", "ballot")
    kind = x.type()
    call = f"vote_{mode}({x.value(1, 'pred')}, {x.value(2, 'u32')}, {x.at})"
    return x.assign(0, call, kind)


@family("match")
def match(x: Operation) -> str:
    x.expect(3)
    x.need("sync")
    mode = x.need("any", "all")
    value, mask = x.value(1, x.type()), x.value(2, "u32")
    if mode == "any":
        return x.assign(0, f"match_any({value}, {mask}, {x.at})", "b32")
    to, same = x.destination_pair(0)
    code = f"const uint32_t who = match_all({value}, {mask}, {x.at}); {x.assign(to, 'who', 'b32')}"
    return code + (" " + x.assign(same, "who != 0", "pred") if same else "")


@family("redux")
def redux(x: Operation) -> str:
    x.expect(3)
    x.need("sync")
    name = x.need("add", "min", "max", "and", "or", "xor")
    kind = x.type()
    call = f"reduce_{name}<{c_type(kind)}>({x.value(1, kind)}, {x.value(2, 'u32')}, {x.at})"
    return x.assign(0, call, kind)


@family("elect")
def elect(x: Operation) -> str:
    """The lowest lane of the mask."""
    x.expect(2)
    x.need("sync")
    to, leader = x.destination_pair(0)
    if leader is None:
        raise x.fail("wanted d|p")
    code = f"const uint32_t first = elect({x.value(1, 'u32')}, {x.at}); "
    code += x.assign(leader, "first == (uint32_t)lane()", "pred")
    return f"{code} {x.assign(to, 'first', 'b32')}"


@family("ldmatrix")
def ldmatrix(x: Operation) -> str:
    x.expect(2)
    x.need("sync")
    x.need("aligned")
    x.need("m8n8")
    number = int(x.need("x1", "x2", "x4")[1])
    transposed = "true" if x.flag("trans") else "false"
    x.space()
    x.need("b16")
    to = x.vector(0)
    if len(to) != number:
        raise x.fail(f"wanted {number} destinations")
    code = f"uint32_t d[{number}]; ldmatrix(d, {number}, {x.address(1, 'shared')}, {transposed}, "
    return f"{code}{x.at}); " + " ".join(x.assign(d, f"d[{i}]", "b32") for i, d in enumerate(to))


_PRODUCTS = {  # types of d, a, b, c: shape, what follows the fragments, C++ of d's
    ("f32", "f16", "f16", "f32"): ("m16n8k16", ", false", "float"),
    ("f32", "bf16", "bf16", "f32"): ("m16n8k16", ", true", "float"),
    ("s32", "s8", "s8", "s32"): ("m16n8k32", "", "int32_t"),
}


@family("mma")
def mma(x: Operation) -> str:
    x.expect(4)
    shape = "m16n8k32" if "m16n8k32" in x.modifiers else "m16n8k16"
    for name in ("sync", "aligned", shape, "row", "col"):
        x.need(name)
    kinds = tuple(x.type() for _ in range(4))
    known, more, element = _PRODUCTS.get(kinds, ("", "", ""))
    if known != shape:
        wanted = ", ".join(f"{of[0]} of .{'.'.join(types)}" for types, of in _PRODUCTS.items())
        raise x.fail(f"only {wanted} are translated")
    d, a, b, c = (x.vector(i) for i in range(4))
    if [len(d), len(a), len(b), len(c)] != [4, 4, 2, 4]:
        raise x.fail("wanted fragments of 4, 4, 2 and 4 registers")
    sums = kinds[0]
    code = f"const uint32_t a[4] = {{{', '.join(x.value(r, 'b32') for r in a)}}}; "
    code += f"const uint32_t b[2] = {{{', '.join(x.value(r, 'b32') for r in b)}}}; "
    code += f"const {element} c[4] = {{{', '.join(x.value(r, sums) for r in c)}}}; "
    code += f"{element} d[4]; mma_{shape}(d, a, b, c{more}, {x.at}); "
    return code + " ".join(x.assign(r, f"d[{i}]", sums) for i, r in enumerate(d))
