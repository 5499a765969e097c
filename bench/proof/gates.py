"""What every kernel must show in its machine code, and how its source excuses an access."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from .ptxas import Resources
from .sass import Instruction, Kernel, Line, global_bytes, is_generic, is_local


@dataclass(frozen=True)
class Excuse:
    """A comment in a kernel's source that allows a line accesses of less than 16 bytes in loops.

    ``// narrow: <reason>`` stands at the end of the line, or on lines of its own directly above.

    Args:
        file: Below csrc/cuda.
        line: Of the code.
        reason: Why its accesses are as they are.
    """

    file: str
    line: int
    reason: str


def excuses(file: str, text: str) -> dict[int, Excuse]:
    """The excuses in a file's text, by line of code."""
    found: dict[int, Excuse] = {}
    above: list[str] = []  # comments without code, up to the line before
    for number, line in enumerate(text.split("\n"), 1):
        code, _, comment = (part.strip() for part in line.partition("//"))
        if code:
            said = _NARROW.search(comment) or _NARROW.search(" ".join(above))
            if said:
                found[number] = Excuse(file, number, said[1])
        above = [*above, comment] if comment and not code else []
    return found


_NARROW = re.compile(r"\bnarrow: (.+)")


def judge(
    kernel: Kernel,
    resources: Resources,
    demangled: str,
    excuse_of: Callable[[Line], Excuse | None],
    used: dict[Excuse, set[str]] | None = None,
) -> list[str]:
    """What is wrong with a kernel; nothing where it passes.

    Args:
        kernel: Its code.
        resources: What ptxas says it takes.
        demangled: Its name.
        excuse_of: The excuse of a line of source, if it has one.
        used: Gets the excuses that were needed, with the kernels' names without arguments.
    """
    wrong = []
    if resources.spilled:
        wrong.append(f"spills {resources.spilled} bytes")
    if resources.stack:
        wrong.append(f"has a stack of {resources.stack} bytes")
    for what, test in (("local memory", is_local), ("generic addresses", is_generic)):
        found = [one for one in kernel.code if test(one)]
        if found:
            wrong.append(f"{len(found)} accesses by {what}, first {where(found[0])}")
    narrow: Counter[str] = Counter()
    for one in kernel.code:
        width = global_bytes(one)
        if width is None or width >= 16 or kernel.main_loop(one) is None:
            continue
        given = [excuse for line in one.lines if (excuse := excuse_of(line))]
        if not given:
            narrow[f"{width}-byte {one.opcode} in a loop, {where(one)}"] += 1
        if used is not None:
            for excuse in given:
                used.setdefault(excuse, set()).add(demangled.split("<")[0])
    return wrong + [f"{times} x {what}" for what, times in sorted(narrow.items())]


def where(instruction: Instruction) -> str:
    """The lines of the project that an instruction comes from: innermost first."""
    own = [line for line in instruction.lines if "/csrc/" in line[0]]
    shown = [f"{short_name(file)}:{number}" for file, number in own or instruction.lines]
    return " < ".join(shown[:4]) or f"at {instruction.address:#x}"


def short_name(file: str) -> str:
    """A path below csrc/cuda, and of other files without folders."""
    return file.partition("/csrc/cuda/")[2] or Path(file).name
