"""Numbers: integers, floats, halves and pairs of halves, bits, comparisons.

`.approx` is as exact as the host's function, which is more than the GPU's.
"""

from __future__ import annotations

from ..operation import Operation
from ..types import c_type, doubled, is_float, is_signed, size, unsigned
from .registry import family

_OF_HALVES = [
    "add",
    "sub",
    "mul",
    "fma",
    "min",
    "max",
    "min_nan",
    "max_nan",
    "neg",
    "abs",
    "ex2",
    "tanh",
]
_DIRECTED = ("add", "sub", "mul", "fma")  # in another rounding mode than to nearest
HALVES = {"f16": "F16", "bf16": "BF16", "f16x2": "F16", "bf16x2": "BF16"}


def _float(x: Operation, kind: str, expression: str, ftz: bool, count: int, sat: bool) -> str:
    """Put operands a, b, c into a formula of floats; .ftz and .sat around it."""
    values = [x.value(i + 1, kind) for i in range(count)]
    if ftz:
        values = [f"flush({value})" for value in values]
    result = expression.format(*values)
    if ftz:
        result = f"flush({result})"
    return f"saturate({result})" if sat else result


def _arithmetic(
    x: Operation, name: str, count: int, formula: str | None, integer: str | None
) -> str:
    """An operation on any type: `formula` of floats, `integer` of integers, else of halves."""
    x.expect(count + 1)
    kind = x.type()
    if kind in HALVES:
        if name not in _OF_HALVES:
            raise x.fail(f"not of {kind}")
        x.skip("rn", "noftz")
        relu = "_relu" if name == "fma" and x.flag("relu") else ""
        values = ", ".join(x.value(i + 1, kind) for i in range(count))
        call = f"half_{name}{relu}<{HALVES[kind]}>"
        pair = kind.endswith("x2")
        return x.assign(0, f"both<{call}>({values})" if pair else f"{call}({values})", kind)
    if is_float(kind) and formula is not None:
        x.skip("rn", "full", "approx")
        mode = x.one_of("rm", "rp", "rz") if kind == "f32" and name in _DIRECTED else None
        if mode:
            values = ", ".join(["{}"] * count)
            formula = f"directed_{name}<Direction::{mode}>({values})"
        ftz = kind == "f32" and x.flag("ftz")
        return x.assign(0, _float(x, kind, formula, ftz, count, x.flag("sat")), kind)
    if is_float(kind) or integer is None:
        raise x.fail(f"not of {kind}")
    return x.assign(0, integer.format(*(x.value(i + 1, kind) for i in range(count))), kind)


def _wrapping(kind: str, operator: str) -> str:
    """An integer formula that wraps around, as unsigned numbers of at least 32 bits do."""
    wide = f"uint{max(32, 8 * size(kind))}_t"
    return f"({wide}){{}} {operator} ({wide}){{}}"


def _peek_type(x: Operation) -> str:
    kind = x.type()
    x.modifiers.append(kind)
    return kind


@family("add", "sub")
def add_sub(x: Operation) -> str:
    kind = _peek_type(x)
    operator = "+" if x.base == "add" else "-"
    if kind == "s32" and x.flag("sat"):
        x.type()
        a, b = x.value(1, "s32"), x.value(2, "s32")
        return x.assign(0, f"clamp<int32_t>((int64_t){a} {operator} (int64_t){b})", "s32")
    return _arithmetic(x, x.base, 2, f"{{}} {operator} {{}}", _wrapping(kind, operator))


@family("mul", "mad")
def mul_mad(x: Operation) -> str:
    kind = _peek_type(x)
    if kind in HALVES or is_float(kind):
        if x.base == "mad":
            return fma(x)
        return _arithmetic(x, "mul", 2, "{} * {}", None)
    x.expect(3 if x.base == "mul" else 4)
    x.type()
    part = x.need("lo", "hi", "wide")
    a, b = x.value(1, kind), x.value(2, kind)
    result = kind
    if part == "wide":
        result = doubled(kind)
        product = f"({c_type(result)}){a} * ({c_type(result)}){b}"
    elif part == "hi":
        product = f"high_product({a}, {b})"
    else:
        product = _wrapping(kind, "*").format(a, b)
    if x.base == "mad":
        wide = f"uint{max(32, 8 * size(result))}_t"
        product = f"({wide})({product}) + ({wide}){x.value(3, result)}"
    return x.assign(0, product, result)


@family("fma")
def fma(x: Operation) -> str:
    return _arithmetic(x, "fma", 3, "std::fma({}, {}, {})", None)


@family("div")
def div(x: Operation) -> str:
    return _arithmetic(x, "div", 2, "{} / {}", "quotient({}, {})")


@family("rem")
def rem(x: Operation) -> str:
    return _arithmetic(x, "rem", 2, None, "remainder_of({}, {})")


@family("min", "max")
def min_max(x: Operation) -> str:
    name = "minimum" if x.base == "min" else "maximum"
    nan = "_nan" if x.flag("NaN") else ""
    return _arithmetic(x, f"{x.base}{nan}", 2, f"{name}{nan}({{}}, {{}})", f"{name}({{}}, {{}})")


@family("neg", "abs")
def neg_abs(x: Operation) -> str:
    if x.base == "neg":
        kind = _peek_type(x)
        wide = f"uint{max(32, 8 * size(kind))}_t"
        return _arithmetic(x, "neg", 1, "-{}", f"({wide})0 - ({wide}){{}}")
    return _arithmetic(x, "abs", 1, "std::fabs({})", "magnitude({})")


@family("rcp", "sqrt", "rsqrt", "ex2", "lg2", "sin", "cos", "tanh")
def transcendental(x: Operation) -> str:
    formulas = {
        "rcp": "1 / {}", "sqrt": "std::sqrt({})", "rsqrt": "1 / std::sqrt({})",
        "ex2": "std::exp2({})", "lg2": "std::log2({})", "sin": "std::sin({})",
        "cos": "std::cos({})", "tanh": "std::tanh({})",
    }  # fmt: skip
    kind = _peek_type(x)
    if kind in HALVES:
        x.skip("approx", "ftz")
    return _arithmetic(x, x.base, 1, formulas[x.base], None)


@family("copysign")
def copysign(x: Operation) -> str:
    return _arithmetic(x, "copysign", 2, "std::copysign({1}, {0})", None)


@family("testp")
def testp(x: Operation) -> str:
    tests = {
        "finite": "std::isfinite({})", "infinite": "std::isinf({})",
        "number": "!std::isnan({})", "notanumber": "std::isnan({})",
        "normal": "std::isnormal({})", "subnormal": "(std::fpclassify({}) == FP_SUBNORMAL)",
    }  # fmt: skip
    kind = x.type()
    return x.assign(0, tests[x.need(*tests)].format(x.value(1, kind)), "pred")


# -- bits ------------------------------------------------------------------------------------------


@family("and", "or", "xor")
def logic(x: Operation) -> str:
    x.expect(3)
    kind = x.type()
    operator = {"and": "&", "or": "|", "xor": "^"}[x.base]
    return x.assign(0, f"{x.value(1, kind)} {operator} {x.value(2, kind)}", kind)


@family("not", "cnot")
def invert(x: Operation) -> str:
    x.expect(2)
    kind = x.type()
    operator = "!" if kind == "pred" or x.base == "cnot" else "~"
    return x.assign(0, f"{operator}{x.value(1, kind)}", kind)


@family("shl", "shr")
def shift(x: Operation) -> str:
    x.expect(3)
    kind = x.type()
    sign = kind if x.base == "shr" and is_signed(kind) else unsigned(kind)
    return x.assign(0, f"{x.base}({x.value(1, sign)}, {x.value(2, 'u32')})", sign)


@family("shf")
def funnel_shift(x: Operation) -> str:
    x.expect(4)
    kind = x.type()
    name = f"funnel_{x.need('l', 'r')}_{x.need('wrap', 'clamp')}"
    return x.assign(0, f"{name}({', '.join(x.value(i, 'u32') for i in (1, 2, 3))})", kind)


@family("lop3")
def lop3(x: Operation) -> str:
    x.expect(5)
    kind = x.type()
    return x.assign(0, f"lop3({', '.join(x.value(i, 'u32') for i in (1, 2, 3, 4))})", kind)


@family("prmt")
def prmt(x: Operation) -> str:
    x.expect(4)
    kind = x.type()
    return x.assign(0, f"prmt({', '.join(x.value(i, 'u32') for i in (1, 2, 3))})", kind)


@family("bfe")
def bfe(x: Operation) -> str:
    x.expect(4)
    kind = x.type()
    return x.assign(0, f"bfe({x.value(1, kind)}, {x.value(2, 'u32')}, {x.value(3, 'u32')})", kind)


@family("bfi")
def bfi(x: Operation) -> str:
    x.expect(5)
    kind = x.type()
    values = [x.value(1, kind), x.value(2, kind), x.value(3, "u32"), x.value(4, "u32")]
    return x.assign(0, f"bfi({', '.join(values)})", kind)


@family("clz", "popc", "brev", "bfind")
def count_bits(x: Operation) -> str:
    x.expect(2)
    kind = x.type()
    shift_amount = "_shift" if x.flag("shiftamt") else ""
    result = kind if x.base == "brev" else "u32"
    return x.assign(0, f"{x.base}{shift_amount}({x.value(1, kind)})", result)


@family("dp4a")
def dp4a(x: Operation) -> str:
    x.expect(4)
    second, first = x.type(), x.type()
    result = "s32" if "s" in first + second else "u32"
    bytes_of = {"s32": "int8_t", "u32": "uint8_t"}
    call = f"dot4<{bytes_of[first]}, {bytes_of[second]}>"
    return x.assign(0, f"{call}({', '.join(x.value(i, 'u32') for i in (1, 2, 3))})", result)


# -- comparisons -----------------------------------------------------------------------------------

_ORDER = {
    "eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">=",
    "lo": "<", "ls": "<=", "hi": ">", "hs": ">=",
}  # fmt: skip


def _comparison(x: Operation, kind: str, a: str, b: str) -> str:
    """Compare two values; of floats, a comparison with NaN is false, or true with the letter u."""
    name = x.need(*_ORDER, *(f"{order}u" for order in _ORDER), "num", "nan")
    real = is_float(kind) or kind in HALVES
    if name in ("num", "nan"):
        return f"{'!' if name == 'num' else ''}unordered({a}, {b})"
    unordered = name.endswith("u")
    if unordered and not real:
        raise x.fail(f".{name} of {kind}")
    test = f"({a} {_ORDER[name.removesuffix('u') if unordered else name]} {b})"
    if not real:
        return test
    return f"({test} || unordered({a}, {b}))" if unordered else f"({test} && !unordered({a}, {b}))"


def _combiner(x: Operation, operand: int) -> str:
    """What .and, .or, .xor with a further predicate add to a test."""
    combine = x.one_of("and", "or", "xor")
    if combine is None:
        x.expect(operand)
        return ""
    operator = {"and": "&&", "or": "||", "xor": "!="}[combine]
    return f" {operator} {x.value(operand, 'pred')}"


def _compared(x: Operation, kind: str) -> str:
    """The two operands of a comparison, widened or flushed, compared."""
    a, b = x.value(1, kind), x.value(2, kind)
    if kind in HALVES:
        a, b = f"{HALVES[kind]}::wide({a})", f"{HALVES[kind]}::wide({b})"
    elif x.flag("ftz"):
        a, b = f"flush({a})", f"flush({b})"
    return _comparison(x, kind, a, b)


@family("setp")
def setp(x: Operation) -> str:
    kind = x.type()
    if kind.endswith("x2"):
        raise x.fail("pairs are not translated")
    first, second = x.destination_pair(0)
    test, more = _compared(x, kind), _combiner(x, 3)
    if second is None:
        return x.assign(first, f"{test}{more}", "pred")
    code = f"const bool test = {test}; const bool other = !test{more}; "
    code += x.assign(first, f"test{more}", "pred")
    return f"{code} {x.assign(second, 'other', 'pred')}"


@family("set")
def set_(x: Operation) -> str:
    kind, result = x.type(), x.type()
    test = f"({_compared(x, kind)}{_combiner(x, 3)})"
    yes = {"u32": "~0u", "s32": "-1", "f32": "1.0f"}.get(result)
    if yes is None:
        raise x.fail(f"a result of {result} is not translated")
    return x.assign(0, f"{test} ? {yes} : 0", result)


@family("selp")
def selp(x: Operation) -> str:
    x.expect(4)
    kind = x.type()
    kind = kind.replace("f", "b") if is_float(kind) else kind  # bits pass as they are
    return x.assign(0, f"{x.value(3, 'pred')} ? {x.value(1, kind)} : {x.value(2, kind)}", kind)


@family("slct")
def slct(x: Operation) -> str:
    x.expect(4)
    x.flag("ftz")
    test, kind = x.type(), x.type()
    kind = kind.replace("f", "b") if is_float(kind) else kind
    choice = f"{x.value(3, test)} >= 0 ? {x.value(1, kind)} : {x.value(2, kind)}"
    return x.assign(0, choice, kind)
