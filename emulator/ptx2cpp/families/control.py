"""Jumps and calls."""

from __future__ import annotations

from ..names import c_name
from ..operation import Operation
from .registry import family


@family("bra")
def bra(x: Operation) -> str:
    x.expect(1)
    x.skip("uni")
    return f"goto {c_name(x.operands[0])};"


@family("brx")
def brx(x: Operation) -> str:
    x.expect(2)
    x.need("idx")
    x.skip("uni")
    table = x.function.tables.get(x.operands[1])
    if table is None:
        raise x.fail("no such .branchtargets")
    cases = " ".join(f"case {i}: goto {c_name(label)};" for i, label in enumerate(table))
    return f"switch ({x.value(0, 'u32')}) {{ {cases} }} unreachable({x.at});"


@family("ret", "exit")
def ret(x: Operation) -> str:
    x.expect(0)
    x.skip("uni")
    if x.base == "exit" and not x.function.kernel:
        raise x.fail("only in a kernel")
    return "return;"


@family("trap")
def trap(x: Operation) -> str:
    x.expect(0)
    return f"trap({x.at});"


@family("call")
def call(x: Operation) -> str:
    """(results), function, (arguments): both are .param variables, which lie in memory."""
    x.skip("uni")
    operands = list(x.operands)
    groups: list[list[str]] = []
    name = ""
    for operand in operands:
        if operand.startswith("("):
            groups.append([one.strip() for one in operand[1:-1].split(",") if one.strip()])
        elif name:
            raise x.fail("calls through a pointer are not translated")
        else:
            name = operand
            results = groups.pop() if groups else []
    arguments = groups.pop() if groups else []
    function = x.functions.get(name)
    if function is None or function.kernel:
        raise x.fail(f"{name} is no function of this module")
    given = [*results, *arguments]
    if len(given) != len(function.results) + len(function.params):
        raise x.fail(f"{name} takes another number of arguments")
    for one in given:
        if x.symbols.get(one) != "param":
            raise x.fail(f"{one} is no .param variable")
    listed = ", ".join(map(c_name, given)) or "nullptr"
    return f"void* arguments[] = {{{listed}}}; {c_name(name)}(arguments);"
