"""Writes a parsed module as C++ on emulator/ptx.h: one function per kernel.

Registers are unsigned integers of their width, and instructions look at their bits as they like:
as floats, as signed numbers. Jumps are gotos, so all registers are declared at the top. Functions
are not optimised; what they call is: thousands of registers take a compiler thrice as long.
"""

from __future__ import annotations

import re

from . import clocks
from .families import FAMILIES
from .names import c_name
from .operation import Operation
from .parse import Function, Instruction, Label, Module, PtxError, Variable
from .types import size, storage

_HEAD = """\
// Made by ptx2cpp from {source}.
#include "emulator/ptx.h"

using namespace less::emulator::ptx;

namespace {{
"""


def emit(module: Module, source: str, timed: bool = False) -> str:
    """The C++ of a module.

    Args:
        module: As parsed.
        source: Its name, for the first line.
        timed: Whether its threads keep clocks (emulator/timeline.h).

    Raises:
        PtxError: An instruction, a modifier or an operand that is not translated.
    """
    parts = [_HEAD.format(source=source)]
    parts += [_array(variable) for variable in module.variables if variable.space != "shared"]
    functions = {function.name: function for function in module.functions}
    parts += [f"void {c_name(f.name)}(void** P);\n" for f in module.functions if not f.kernel]
    for i, function in enumerate(module.functions):
        name = f"kernel_{i}" if function.kernel else c_name(function.name)
        parts.append(_Emitter(function, name, module.variables, functions, timed).text())
        if function.kernel:
            parts.append(f'const Registered registered_{i}("{function.name}", {name});\n')
    if timed:
        parts.append("\nconst bool clocks = (timed = true);\n")
    return "".join([*parts, "\n}  // namespace\n"])


def _array(variable: Variable) -> str:
    """A variable of the module, with what it starts as."""
    text = f"alignas({variable.align}) uint8_t {c_name(variable.name)}[{max(variable.bytes, 1)}]"
    if variable.initial is None:
        return f"{text} = {{}};\n"
    kind, _, numbers = variable.initial.partition(" ")
    data = bytearray()
    for number in filter(None, (n.strip() for n in numbers.split(","))):
        real = re.fullmatch(r"0[fFdD]([0-9a-fA-F]+)", number)
        if not real and not re.fullmatch(r"-?(?:0[xX][0-9a-fA-F]+|\d+)U?", number):
            raise PtxError(f"{variable.name} holds {number!r}, which is no number", variable.line)
        value = int(real[1], 16) if real else int(number.rstrip("U"), 0)
        data += (value % (1 << 8 * size(kind))).to_bytes(size(kind), "little")
    return f"{text} = {{{', '.join(map(str, data))}}};\n"


class _Emitter:
    """Of one function."""

    def __init__(
        self,
        function: Function,
        name: str,
        module_variables: list[Variable],
        functions: dict[str, Function],
        timed: bool,
    ) -> None:
        self.function = function
        self.numbers = {register: i for i, register in enumerate(function.registers)}
        self.clocks: list[int] | None = [] if timed else None
        self.name = name
        self.functions = functions
        self.variables = [*module_variables, *function.variables]
        known = [*self.variables, *function.params, *function.results]
        self.symbols = {variable.name: variable.space for variable in known}

    def text(self) -> str:
        body = "".join(self._item(item) for item in self.function.body)
        head = f'\n[[gnu::optimize("O0")]] void {self.name}(void** P) {{\n'
        return f"{self._clocks()}{head}{self._declarations(body)}{body}}}\n"

    def _clocks(self) -> str:
        """What the instructions cost, for the whole function."""
        if self.clocks is None:
            return ""
        return f"const uint16_t {self.name}_clocks[] = {{{', '.join(map(str, self.clocks))}}};\n"

    def _registers(self) -> str:
        """When the registers are there."""
        if self.clocks is None:
            return ""
        count = len(self.numbers) or 1
        return f"  Ready registers_[{count}];\n"

    def _declarations(self, body: str) -> str:
        """Of what the body names."""
        used = set(re.findall(r"\b[A-Za-z_]\w*", body))
        registers: dict[str, list[str]] = {}
        for register, kind in self.function.registers.items():
            if c_name(register) in used:
                registers.setdefault(storage(kind), []).append(f"{c_name(register)} = 0")
        lines = [f"  {kind} {', '.join(names)};\n" for kind, names in registers.items()]
        for i, param in enumerate([*self.function.results, *self.function.params]):
            if c_name(param.name) in used:
                lines.append(f"  uint8_t* const {c_name(param.name)} = param(P, {i});\n")
        for variable in self.variables:
            name, bytes_, align = c_name(variable.name), variable.bytes, variable.align
            if name not in used:
                continue
            if variable.space == "shared":
                array = f'shared_array("{variable.name}", {bytes_}, {align})'
                lines.append(f"  const uint32_t {name} = {array};\n")
            elif variable.space in ("local", "param"):
                lines.append(f"  alignas({align}) uint8_t {name}[{bytes_}];\n")
                lines.append(f"  poison({name}, {bytes_});\n")
        return "".join([*lines, self._registers()])

    def _item(self, item: Instruction | Label) -> str:
        if isinstance(item, Label):
            return f"{c_name(item.name)}:;\n"
        family = FAMILIES.get(item.opcode.split(".")[0])
        operation = Operation(item, self.function, self.symbols, self.functions)
        if family is None:
            raise operation.fail("this instruction is not translated")
        code = family(operation)
        operation.finish()
        guard = f"if ({operation.predicate(item.predicate)}) " if item.predicate else ""
        if self.clocks is not None:
            at = f"registers_, {self.name}_clocks + {len(self.clocks)}"
            self.clocks += clocks.encode(item, self.function, self.numbers)
            if clocks.loads(item):
                code += f" arrive({at});"
            guard = f"issue({at}); {guard}"
        return f"  {guard}{{ {code} }}\n"
