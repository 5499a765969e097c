"""What an instruction costs the clock of its thread, as emulator/timeline.h has it."""

from __future__ import annotations

import re

from .parse import Function, Instruction

CAUSES = ("issue", "arithmetic", "special", "division", "shared", "shuffle", "tensor")
FREE = 12  # Cause::count: a move between registers, which machine code does without
END = 0xFFFF
ENDS = 0x100  # beside the cause: all before it must have begun
_SPECIAL = ("ex2", "lg2", "rcp", "sqrt", "rsqrt", "sin", "cos", "tanh", "div")
_SHUFFLES = ("shfl", "vote", "redux", "match", "elect")
_RESULTLESS = ("st", "red", "bra", "brx", "bar", "barrier", "membar", "fence", "cp", "mbarrier",
               "ret", "exit", "trap", "call", "prefetch", "prefetchu", "griddepcontrol",
               "nanosleep", "setmaxnreg")  # fmt: skip

_ENDING = ("bra", "brx", "bar", "barrier", "membar", "fence", "mbarrier", "ret", "exit", "trap",
           "call", "griddepcontrol")  # fmt: skip


def loads(instruction: Instruction) -> bool:
    """Whether its result comes from a memory that other threads see."""
    base, *modifiers = instruction.opcode.split(".")
    return base == "atom" or (base in ("ld", "ldu") and not {"param", "const"} & set(modifiers))


def _cause(base: str, modifiers: list[str], operands: list[str], function: Function) -> int:
    real = any(re.fullmatch(r"f(16|32|64)", m) for m in modifiers)
    whole = any(re.fullmatch(r"[su](8|16|32|64)", m) for m in modifiers)
    if base in ("mov", "cvta") and (operands[1] in function.registers or "{" in "".join(operands)):
        return FREE
    if base in ("div", "rem") and not real:
        return CAUSES.index("division")
    if base in _SPECIAL or (base == "cvt" and real and whole):
        return CAUSES.index("special")
    if base in _SHUFFLES:
        return CAUSES.index("shuffle")
    if base == "mma":
        return CAUSES.index("tensor")
    if base == "ldmatrix" or (base == "ld" and not {"param", "const"} & set(modifiers)):
        return CAUSES.index("shared")
    return CAUSES.index("arithmetic")


def encode(instruction: Instruction, function: Function, numbers: dict[str, int]) -> list[int]:
    """The instruction as the clock reads it: cause, sources, end, destinations, end.

    Args:
        instruction: As parsed.
        function: Where it stands.
        numbers: Of its registers.
    """
    base, *modifiers = instruction.opcode.split(".")

    def registers(text: str) -> list[int]:
        return [numbers[name] for name in re.findall(r"[%\w$]+", text) if name in numbers]

    results = 0 if base in _RESULTLESS else 1
    to = registers(instruction.operands[0]) if results else []
    of = [number for text in instruction.operands[results:] for number in registers(text)]
    of += registers(instruction.predicate or "")
    cause = _cause(base, modifiers, instruction.operands, function)
    ends = base in _ENDING or "wait_group" in modifiers or "wait_all" in modifiers
    return [cause | ENDS * ends, *of, END, *to, END]
