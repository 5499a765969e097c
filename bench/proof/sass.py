"""Reads SASS as ``nvdisasm -c -gi`` prints it, and judges its memory accesses."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from .flow import natural_loops

Line = tuple[str, int]


@dataclass(frozen=True)
class Instruction:
    """One instruction.

    Args:
        address: In bytes from the kernel's start.
        opcode: With its suffixes: ``LDG.E.128``.
        text: All of it.
        lines: Where it comes from: the source's line, then the line that inlined it, and so on.
    """

    address: int
    opcode: str
    text: str
    lines: tuple[Line, ...]


@dataclass
class Kernel:
    """A kernel's code.

    Args:
        name: Mangled.
        code: In the order of addresses.
        loops: Addresses of the instructions in each.
    """

    name: str
    code: list[Instruction] = field(default_factory=list)
    loops: list[frozenset[int]] = field(default_factory=list)

    def main_loop(self, instruction: Instruction) -> frozenset[int] | None:
        """The loop around an instruction that has no loop inside; None where there is none."""
        around = [loop for loop in self.loops if instruction.address in loop]
        smallest = min(around, key=len, default=None)
        if smallest is None or any(loop < smallest for loop in self.loops):
            return None
        return smallest


_SECTION = re.compile(r"^\s*\.section\s+\.text\.(\S+?),")
_LINE = re.compile(r'^\s*//## File "([^"]*)", line (\d+)(?: inlined at "([^"]*)", line (\d+))?')
_CODE = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?(\S+)(.*?);")
_LABEL = re.compile(r"^(\.L_x_\d+):")
_TARGET = re.compile(r"(?<=[`( ,\"])(\.L_x_\d+)")


def parse(text: str) -> list[Kernel]:
    """The kernels in a disassembly, in its order."""
    return [_kernel(name, lines) for name, lines in _sections(text)]


def _sections(text: str) -> list[tuple[str, list[str]]]:
    sections: list[tuple[str, list[str]]] = []
    for line in text.split("\n"):
        section = _SECTION.match(line)
        if section:
            sections.append((section[1], []))
        elif sections:
            sections[-1][1].append(line)
    return sections


def _kernel(name: str, lines: list[str]) -> Kernel:
    kernel = Kernel(name)
    chain: list[Line] = []
    fresh = False  # the next line of source begins a new chain
    labels: dict[str, int] = {}
    pending: list[str] = []
    jumps: dict[int, list[str]] = {}
    ends: set[int] = set()  # after these, nothing falls through
    for line in lines:
        source, label, code = _LINE.match(line), _LABEL.match(line), _CODE.match(line)
        if source:
            if fresh:
                chain = []
            chain.append((source[1], int(source[2])))
            fresh = False
        elif label:
            pending.append(label[1])
        elif code:
            fresh = True
            address, predicate, opcode, rest = int(code[1], 16), code[2], code[3], code[4]
            labels.update((one, address) for one in pending)
            pending = []
            kernel.code.append(
                Instruction(address, opcode, f"{opcode}{rest}".strip(), tuple(chain))
            )
            base = opcode.split(".")[0]
            if base != "BSSY":  # which says where lanes meet again, and goes on
                jumps[address] = _TARGET.findall(line)
            if base in ("BRA", "BRX", "JMP", "EXIT", "RET") and not (
                predicate or re.search(r"\bU?P\d", rest)
            ):
                ends.add(address)
    edges = {at: [labels[to] for to in targets if to in labels] for at, targets in jumps.items()}
    kernel.loops = natural_loops([one.address for one in kernel.code], edges, ends)
    return kernel


# -- what an access is -----------------------------------------------------------------------------

_GLOBAL = re.compile(r"^(LDG|STG|LDGSTS)\b")
_WIDTH = re.compile(r"\.(256|128|64|U16|S16|U8|S8)\b")
_BYTES = {"256": 32, "128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}


def global_bytes(instruction: Instruction) -> int | None:
    """Bytes that a lane moves from or to global memory; None where it does not."""
    if not _GLOBAL.match(instruction.opcode):
        return None
    width = _WIDTH.search(instruction.opcode)
    return _BYTES[width[1]] if width else 4


def is_local(instruction: Instruction) -> bool:
    """Whether it reads or writes local memory: spilled registers, indexed arrays."""
    return instruction.opcode.split(".")[0] in ("LDL", "STL")


def is_generic(instruction: Instruction) -> bool:
    """Whether its address may be of any space, which costs a look-up each time.

    Accesses of another block's shared memory have the same opcodes, but addresses of 32 bits.
    """
    return instruction.opcode.split(".")[0] in ("LD", "ST", "ATOM") and (
        re.search(r"\.64[\]+]", instruction.text) is not None
    )


_CLASSES = (
    ("16-byte loads", r"LDG\S*\.(128|256)"),
    ("narrower loads", r"LDG\b"),
    ("16-byte stores", r"STG\S*\.(128|256)"),
    ("narrower stores", r"STG\b"),
    ("16-byte async copies", r"LDGSTS\S*\.128"),
    ("bulk copies", r"UBLKCP"),
    ("tensor products", r"(HMMA|IMMA|QMMA)\b"),
    ("shared loads", r"LDS(M)?\b"),
    ("shared stores", r"STS\b"),
    ("float arithmetic", r"(FFMA|FMUL|FADD)"),
    ("shuffles", r"SHFL"),
    ("barriers", r"(BAR|SYNCS|UCGABAR)"),
)


def count(instructions: list[Instruction]) -> dict[str, int]:
    """How many instructions of each class that a reader would ask about."""
    totals = dict.fromkeys((name for name, _ in _CLASSES), 0)
    for one in instructions:
        for name, pattern in _CLASSES:
            if re.match(pattern, one.opcode):
                totals[name] += 1
                break
    return totals
