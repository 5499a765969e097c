"""One instruction in translation: its modifiers, its operands as C++, its place.

A family (families/) takes the modifiers that it understands; what is left in the end is an error,
so nothing is ever ignored because nobody knew it.
"""

from __future__ import annotations

import re

from .names import c_name
from .parse import Function, Instruction, PtxError
from .types import TYPES, c_type, is_signed, size, storage

SPECIAL = {
    **{f"%tid.{axis}": f"thread_index().{axis}" for axis in "xyz"},
    **{f"%ntid.{axis}": f"block_size().{axis}" for axis in "xyz"},
    **{f"%ctaid.{axis}": f"block_index().{axis}" for axis in "xyz"},
    **{f"%nctaid.{axis}": f"grid_size().{axis}" for axis in "xyz"},
    "%laneid": "lane()",
    "%warpid": "warp_index()",
    "%nwarpid": "warp_count()",
    "%lanemask_eq": "(1u << lane())",
    "%lanemask_lt": "((1u << lane()) - 1u)",
    "%lanemask_le": "(((1u << lane()) << 1) - 1u)",
    "%lanemask_ge": "(~0u << lane())",
    "%lanemask_gt": "(~0u << lane() << 1)",
    "%cluster_ctarank": "cluster_rank()",
    "%cluster_nctarank": "cluster_blocks()",
    # Clusters lie along x; see less::cuda::launch.
    "%cluster_ctaid.x": "cluster_rank()",
    "%cluster_ctaid.y": "0u",
    "%cluster_ctaid.z": "0u",
    "%cluster_nctaid.x": "cluster_blocks()",
    "%cluster_nctaid.y": "1u",
    "%cluster_nctaid.z": "1u",
    "%clusterid.x": "(block_index().x / cluster_blocks())",
    "%clusterid.y": "block_index().y",
    "%clusterid.z": "block_index().z",
    "%nclusterid.x": "(grid_size().x / cluster_blocks())",
    "%nclusterid.y": "grid_size().y",
    "%nclusterid.z": "grid_size().z",
}


class Operation:
    """An instruction of a function.

    Args:
        instruction: As parsed.
        function: Where it stands.
        symbols: State space of each variable that can be named here.
        functions: Those that can be called.
    """

    def __init__(
        self,
        instruction: Instruction,
        function: Function,
        symbols: dict[str, str],
        functions: dict[str, Function],
    ) -> None:
        self.base, *self.modifiers = instruction.opcode.split(".")
        self.instruction = instruction
        self.operands = instruction.operands
        self.function = function
        self.symbols = symbols
        self.functions = functions

    @property
    def at(self) -> str:
        """The place, as the runtime's `Where`."""
        place = self.instruction.place
        return f'{{"{place.file}", {place.line}}}'

    def fail(self, what: str) -> PtxError:
        """An error that names this instruction; raise it."""
        operands = ", ".join(self.operands)
        return PtxError(f"{self.instruction.opcode} {operands}: {what}", self.instruction.line)

    def finish(self) -> None:
        """Raise if a modifier was understood by nobody."""
        if self.modifiers:
            raise self.fail(f"modifier .{self.modifiers[0]} is not translated")

    # -- modifiers ---------------------------------------------------------------------------------

    def flag(self, name: str) -> bool:
        """Take a modifier; whether it was there."""
        if name in self.modifiers:
            self.modifiers.remove(name)
            return True
        return False

    def one_of(self, *names: str) -> str | None:
        """Take the first of these modifiers that is there, else None."""
        return next((name for name in names if self.flag(name)), None)

    def need(self, *names: str) -> str:
        """Take one of these modifiers, which must be there."""
        found = self.one_of(*names)
        if found is None:
            raise self.fail(f"wanted one of .{' .'.join(names)}")
        return found

    def skip(self, *names: str) -> None:
        """Take modifiers that make no difference here."""
        self.modifiers = [name for name in self.modifiers if name not in names]

    def type(self) -> str:
        """Take the last type."""
        found = next((m for m in reversed(self.modifiers) if m in TYPES), None)
        if found is None:
            raise self.fail("no type")
        self.modifiers.reverse()
        self.modifiers.remove(found)
        self.modifiers.reverse()
        return found

    def expect(self, *counts: int) -> None:
        """Check the number of operands."""
        if len(self.operands) not in counts:
            raise self.fail(f"wanted {' or '.join(map(str, counts))} operands")

    # -- operands ----------------------------------------------------------------------------------

    def predicate(self, name: str) -> str:
        """A predicate register, perhaps negated, as a bool."""
        if name.lstrip("!") in self.function.registers:
            return ("!" if name[0] == "!" else "") + c_name(name.lstrip("!"))
        if re.fullmatch(r"-?\d+", name):
            return "true" if int(name) else "false"
        raise self.fail(f"{name} is no predicate")

    def value(self, operand: int | str, kind: str) -> str:
        """An operand as a C++ value of c_type(kind)."""
        text = self.operands[operand] if isinstance(operand, int) else operand
        if kind == "pred":
            return self.predicate(text)
        if text in self.function.registers:
            return self._register(text, kind)
        if text in SPECIAL:
            return f"(({c_type(kind)}){SPECIAL[text]})"
        real = re.fullmatch(r"0[fFdD]([0-9a-fA-F]{8}|[0-9a-fA-F]{16})", text)
        if real:
            return self._bits(int(real[1], 16), len(real[1]) // 2, kind)
        number = re.fullmatch(r"(-?)(0[xX][0-9a-fA-F]+|\d+)U?", text)
        if number:
            value = int(text.rstrip("U"), 0) if text != "0" else 0
            return self._bits(value % (1 << 8 * size(kind)), size(kind), kind)
        if text == "WARP_SZ":
            return "32u"
        return self._symbol(text, kind)

    def _register(self, name: str, kind: str) -> str:
        own = self.function.registers[name]
        register = c_name(name)
        if own == "pred":
            raise self.fail(f"{name} is a predicate")
        if kind in ("f32", "f64"):
            if size(own) != size(kind):
                raise self.fail(f"{name} has {8 * size(own)} bits, not those of {kind}")
            return f"as_{kind}({register})"
        return register if storage(own) == c_type(kind) else f"(({c_type(kind)}){register})"

    def _bits(self, value: int, bytes_given: int, kind: str) -> str:
        if bytes_given != size(kind):
            raise self.fail(f"a constant of {bytes_given} bytes for {kind}")
        text = f"0x{value:x}{'ull' if size(kind) == 8 else 'u'}"
        if kind in ("f32", "f64"):
            return f"as_{kind}({text})"
        return text if c_type(kind) in ("uint32_t", "uint64_t") else f"(({c_type(kind)}){text})"

    def _symbol(self, text: str, kind: str) -> str:
        match = re.fullmatch(r"([\w$%]+)(?:\s*\+\s*(-?\d+))?", text)
        space = self.symbols.get(match[1]) if match else None
        if match is None or space is None:
            raise self.fail(f"operand {text} is not known")
        name, offset = c_name(match[1]), f" + {match[2]}" if match[2] else ""
        address = name if space == "shared" else f"address({name})"
        return f"(({c_type(kind)})({address}{offset}))"

    def assign(self, operand: int | str, expression: str, kind: str) -> str:
        """The statement that gives a register a value of c_type(kind)."""
        name = self.operands[operand] if isinstance(operand, int) else operand
        if name == "_":
            return f"(void)({expression});"
        own = self.function.registers.get(name)
        if own is None:
            raise self.fail(f"{name} is no register")
        register = c_name(name)
        if (own == "pred") != (kind == "pred"):
            raise self.fail(f"{name} is of type {own}, not {kind}")
        if kind == "pred":
            return f"{register} = ({expression});"
        if size(own) < size(kind):
            raise self.fail(f"{name} is narrower than {kind}")
        if kind in ("f32", "f64"):
            return f"{register} = bits({c_type(kind)}({expression}));"
        if is_signed(kind) and size(own) > size(kind):  # the sign fills the register
            wide = c_type(f"s{8 * size(own)}")
            return f"{register} = ({storage(own)})({wide})({c_type(kind)})({expression});"
        return f"{register} = ({c_type(kind)})({expression});"

    def vector(self, operand: int) -> list[str]:
        """The elements of {a, b}; of one operand, itself."""
        text = self.operands[operand]
        return [part.strip() for part in text.strip("{}").split(",")]

    def destination_pair(self, operand: int) -> tuple[str, str | None]:
        """The two destinations of d|p; the second is None where there is none."""
        first, _, second = self.operands[operand].partition("|")
        return first.strip(), second.strip() or None

    def space(self) -> str:
        """Take the state space; "generic" where none is named."""
        names = {
            "global": "global", "shared": "shared", "shared::cta": "shared",
            "shared::cluster": "shared", "local": "local", "const": "const",
            "param": "param", "param::entry": "param", "param::func": "param",
        }  # fmt: skip
        return names.get(self.one_of(*names) or "", "generic")

    def address(self, operand: int, space: str) -> str:
        """The C++ pointer for [register], [symbol], [either + number]."""
        text = self.operands[operand].strip("[] \n\t")
        match = re.fullmatch(r"([\w$%]+)(?:\s*\+\s*(-?(?:0[xX])?[0-9a-fA-F]+))?", text)
        if match is None:
            raise self.fail(f"address {text} is not known")
        base, offset = match[1], f" + {match[2]}" if match[2] not in (None, "0") else ""
        if space == "shared":
            return f"shared_at({self.value(base, 'u32')}{offset}, {self.at})"
        if base in self.symbols:
            if self.symbols[base] == "shared":
                raise self.fail(f"{base} is shared memory, the access is not")
            return f"({c_name(base)}{offset})"
        return f"(pointer({self.value(base, 'u64')}){offset})"
