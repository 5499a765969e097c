"""Reads the text of a PTX module.

What is kept: functions with their parameters, registers, variables and instructions, and for each
instruction the line of PTX it stands in and the line of source that nvcc made it from.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import PurePosixPath

from .types import TYPES, size


class PtxError(ValueError):
    """Something that is not translated: named, with its line."""

    def __init__(self, what: str, line: int) -> None:
        super().__init__(f"PTX line {line}: {what}")


@dataclass(frozen=True)
class Place:
    """A line of the source."""

    file: str
    line: int


@dataclass
class Instruction:
    """One instruction; operands of a vector or an address stay one text."""

    opcode: str
    operands: list[str]
    line: int
    place: Place
    scope: tuple[int, ...]
    predicate: str | None = None  # "%p1" or "!%p1"


@dataclass
class Label:
    """A place to jump to."""

    name: str
    scope: tuple[int, ...]


@dataclass
class Variable:
    """A parameter, or an array in some state space."""

    name: str
    space: str
    bytes: int  # 0: as many as the launch says
    align: int
    line: int
    initial: str | None = None  # of a variable of the module: "type numbers"


@dataclass
class Function:
    """A kernel or a device function."""

    name: str
    kernel: bool
    results: list[Variable]
    params: list[Variable]
    line: int
    registers: dict[str, str] = field(default_factory=dict)  # name: type
    variables: list[Variable] = field(default_factory=list)
    body: list[Instruction | Label] = field(default_factory=list)
    tables: dict[str, list[str]] = field(default_factory=dict)  # .branchtargets


@dataclass
class Module:
    """All of a .ptx file."""

    functions: list[Function] = field(default_factory=list)
    variables: list[Variable] = field(default_factory=list)


def parse(text: str, helpers: frozenset[str] = frozenset()) -> Module:
    """Parse a module.

    Args:
        text: The PTX.
        helpers: Names of files whose code is never the place of an instruction: where they were
            inlined is, so that a report names the kernel's line and not its wrapper's.

    Raises:
        PtxError: A construct that is not known.
    """
    return _Parser(helpers).module(text)


def split_operands(text: str) -> list[str]:
    """Split at the commas that are in no bracket."""
    parts, depth, start = [], 0, 0
    for i, char in enumerate(text):
        if char in "{[(":
            depth += 1
        elif char in "}])":
            depth -= 1
        elif char == "," and depth == 0:
            parts.append(text[start:i].strip())
            start = i + 1
    rest = text[start:].strip()
    return [*parts, rest] if rest else parts


_NAME = r"[A-Za-z_$%][\w$]*"
_LINE_DIRECTIVE = re.compile(r"\.(version|target|address_size|file|loc)\b")
_HEADER = re.compile(r"(?:\.(?:visible|weak|extern|common)\s+)*\.(entry|func)\b")
_SIGNATURE = re.compile(
    rf"\.(entry|func)\s*(?:\(([^)]*)\)\s*)?({_NAME})\s*(?:\(([^)]*)\))?", flags=re.S
)
_VARIABLE = re.compile(
    r"(?:\.(?:visible|weak|extern|common)\s+)*\.(shared|local|param|const|global)\s+"
    rf"(?:\.align\s+(\d+)\s+)?\.(\w+)\s+({_NAME})\s*(\[\s*\d*\s*\])?\s*(?:=\s*(.*))?$",
    flags=re.S,
)
_PARAM = re.compile(
    r"\.(?:param|reg)\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+(?:\.ptr\s+(?:\.\w+\s+)*?"
    rf"(?:\.align\s+\d+\s+)?)?({_NAME})\s*(?:\[\s*(\d+)\s*\])?$"
)
_LOC = re.compile(
    r"\.loc\s+(\d+)\s+(\d+)\s+(\d+)"
    r"(?:\s*,\s*function_name\s+[^,]+,\s*inlined_at\s+(\d+)\s+(\d+)\s+(\d+))?"
)


def _statements(text: str) -> Iterator[tuple[str, str, int]]:
    """Yield (kind, text, line): "{", "}", "label", "line", "header" or "statement"."""
    text = re.sub(r"//[^\n]*", "", text)
    for removed in (r"/\*.*?\*/", r"\.section\s[^{]*\{[^}]*\}"):
        text = re.sub(removed, lambda m: "\n" * m[0].count("\n"), text, flags=re.S)
    start, line, depth = 0, 1, 0
    first = 0  # line in which the statement at hand began
    for mark in re.finditer(r"[;{}\n]|(?<!:):(?!:)", text):
        char, so_far = mark[0], text[start : mark.start()].strip()
        if so_far and not first:
            first = line
        if char == "\n":
            line += 1
            if not (depth == 0 and _LINE_DIRECTIVE.match(so_far)):
                continue
            yield "line", so_far, first
        elif depth:  # in a vector or an initial value
            depth += {"{": 1, "}": -1}.get(char, 0)
            continue
        elif char == "{" and so_far and not _HEADER.match(so_far):
            depth = 1
            continue
        elif char == "{" and so_far:
            yield "header", so_far, first
        elif char in "{}":
            if so_far:
                raise PtxError(f"a statement without its semicolon: {so_far!r}", line)
            yield char, "", line
        elif char == ";":
            yield "statement", so_far, first
        elif re.fullmatch(_NAME, so_far):
            yield "label", so_far, first
        else:  # a colon in a string
            continue
        start, first = mark.end(), 0


class _Parser:
    def __init__(self, helpers: frozenset[str]) -> None:
        self.helpers = helpers
        self.files: dict[int, str] = {}
        self.inlined: dict[tuple[int, int, int], tuple[int, int, int]] = {}
        self.place = Place("?", 0)
        self.result = Module()
        self.function: Function | None = None
        self.scopes: list[tuple[int, dict[str, str]]] = []  # open ones, inside a function
        self.count = 0

    def module(self, text: str) -> Module:
        for number, path in re.findall(r'^\s*\.file\s+(\d+)\s+"([^"]+)"', text, flags=re.M):
            # As the emulator's short_name() has it.
            _, own, below = path.partition("csrc/cuda/")
            self.files[int(number)] = below if own else PurePosixPath(path).name
        for kind, what, line in _statements(text):
            if kind == "line":
                self.locate(what)
            elif kind == "header":
                self.header(what, line)
            elif self.function is None:
                self.toplevel(what, line)
            elif kind == "{":
                self.open()
            elif kind == "}":
                self.close()
            elif kind == "label":
                self.function.body.append(Label(what, self.scope))
            else:
                self.statement(self.function, what, line)
        for function in self.result.functions:
            _resolve_labels(function)
        return self.result

    @property
    def scope(self) -> tuple[int, ...]:
        return tuple(number for number, _ in self.scopes)

    def open(self) -> None:
        self.count += 1
        self.scopes.append((self.count, {}))

    def close(self) -> None:
        self.scopes.pop()
        if not self.scopes:
            self.function = None

    def locate(self, text: str) -> None:
        loc = _LOC.match(text)
        if not loc:
            return
        here = (int(loc[1]), int(loc[2]), int(loc[3]))
        if loc[4]:
            self.inlined[here] = (int(loc[4]), int(loc[5]), int(loc[6]))
        else:
            self.inlined.pop(here, None)
        seen = set()
        while self.files.get(here[0]) in self.helpers and here in self.inlined:
            if here in seen:
                break
            seen.add(here)
            here = self.inlined[here]
        self.place = Place(self.files.get(here[0], "?"), here[1])

    def toplevel(self, text: str, line: int) -> None:
        if _HEADER.match(text) or not text:  # a declaration without its body
            return
        variable = _variable(text, line)
        if variable is None:
            raise PtxError(f"not known outside a function: {text!r}", line)
        self.result.variables.append(variable)

    def header(self, text: str, line: int) -> None:
        pattern = (
            rf"\.(entry|func)\s*(?:\.noreturn\s*)?(?:\(([^)]*)\)\s*)?({_NAME})\s*(?:\(([^)]*)\))?"
        )
        match = re.search(pattern, text, flags=re.S)
        if match is None:
            raise PtxError(f"not known: {text!r}", line)
        kind, results, name, params = match.groups()
        self.function = Function(
            name, kind == "entry", _params(results, line), _params(params, line), line
        )
        self.result.functions.append(self.function)
        self.place = Place("?", 0)
        self.open()

    def statement(self, function: Function, text: str, line: int) -> None:
        if text.startswith(".reg"):
            self.declare(function, text, line)
            return
        if re.match(r"\.pragma|\.callprototype|$", text):
            return
        if text.startswith(".branchtargets"):
            label = function.body.pop()
            assert isinstance(label, Label)
            names = text.removeprefix(".branchtargets").split(",")
            function.tables[label.name] = [name.strip() for name in names]
            return
        variable = _variable(text, line)
        if variable is not None:
            if len(self.scopes) > 1:
                new = f"{variable.name}__{self.scopes[-1][0]}"
                self.scopes[-1][1][variable.name] = new
                variable.name = new
            function.variables.append(variable)
            return
        if text.startswith("."):
            raise PtxError(f"not known in a function: {text!r}", line)
        function.body.append(self.instruction(text, line))

    def declare(self, function: Function, text: str, line: int) -> None:
        match = re.match(r"\.reg\s+\.(\w+)\s+(.*)$", text, flags=re.S)
        if match is None or match[1] not in TYPES:
            raise PtxError(f"registers of an unknown type: {text!r}", line)
        for name in match[2].split(","):
            name = name.strip()
            many = re.fullmatch(rf"({_NAME})<(\d+)>", name)
            if many:
                for i in range(int(many[2])):
                    function.registers[f"{many[1]}{i}"] = match[1]
            elif len(self.scopes) > 1:
                new = f"{name}__{self.scopes[-1][0]}"
                self.scopes[-1][1][name] = new
                function.registers[new] = match[1]
            else:
                function.registers[name] = match[1]

    def instruction(self, text: str, line: int) -> Instruction:
        for _, renamed in self.scopes[1:]:
            if renamed:
                names = "|".join(re.escape(name) for name in renamed)
                text = re.sub(
                    rf"(?<![\w$%.])({names})(?![\w$])",
                    lambda m, renamed=renamed: renamed[m[1]],  # type: ignore[misc]
                    text,
                )
        match = re.match(r"(?:@\s*(!?\s*[\w$%]+)\s+)?([\w.:]+)\s*(.*)$", text, flags=re.S)
        if match is None:
            raise PtxError(f"no instruction: {text!r}", line)
        predicate = match[1].replace(" ", "") if match[1] else None
        operands = split_operands(match[3])
        return Instruction(match[2], operands, line, self.place, self.scope, predicate)


def _variable(text: str, line: int) -> Variable | None:
    match = _VARIABLE.match(text)
    if match is None:
        return None
    space, align, kind, name, count, initial = match.groups()
    if kind not in TYPES:
        raise PtxError(f"a variable of an unknown type: {text!r}", line)
    elements = 1 if count is None else int(count.strip("[] ") or 0)
    bytes_each = size(kind)
    if initial is not None:
        initial = f"{kind} {initial.strip().strip('{}')}"
    return Variable(name, space, elements * bytes_each, int(align or bytes_each), line, initial)


def _params(text: str | None, line: int) -> list[Variable]:
    params = []
    for one in split_operands(text or ""):
        match = _PARAM.match(one)
        if match is None or match[2] not in TYPES:
            raise PtxError(f"a parameter that is not known: {one!r}", line)
        bytes_each = size(match[2])
        count = int(match[4] or 1)
        align = int(match[1] or bytes_each)
        params.append(Variable(match[3], "param", count * bytes_each, align, line))
    return params


def _resolve_labels(function: Function) -> None:
    """Give labels of inner scopes names of their own, and jumps the label that they mean."""
    outermost = 1
    names: dict[tuple[str, tuple[int, ...]], str] = {}
    for item in function.body:
        if isinstance(item, Label):
            inner = len(item.scope) > outermost
            name = f"{item.name}__{item.scope[-1]}" if inner else item.name
            names[item.name, item.scope] = name
            item.name = name
    for item in function.body:
        if isinstance(item, Instruction) and item.opcode.split(".")[0] == "bra":
            target = item.operands[0]
            scopes = (item.scope[:n] for n in range(len(item.scope), 0, -1))
            found = next((names[target, s] for s in scopes if (target, s) in names), None)
            if found is None:
                raise PtxError(f"a jump to {target}, which is no label", item.line)
            item.operands[0] = found
