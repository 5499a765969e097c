"""PTX's fundamental types, and what stands for them in the C++ that is made."""

from __future__ import annotations

_C_TYPES = {
    "pred": "bool",
    "b8": "uint8_t", "u8": "uint8_t", "s8": "int8_t",
    "b16": "uint16_t", "u16": "uint16_t", "s16": "int16_t", "f16": "uint16_t", "bf16": "uint16_t",
    "e4m3x2": "uint16_t", "e5m2x2": "uint16_t",
    "b32": "uint32_t", "u32": "uint32_t", "s32": "int32_t", "f32": "float",
    "f16x2": "uint32_t", "bf16x2": "uint32_t",
    "b64": "uint64_t", "u64": "uint64_t", "s64": "int64_t", "f64": "double",
}  # fmt: skip
TYPES = frozenset(_C_TYPES)

_BYTES = {"uint8": 1, "int8": 1, "uint16": 2, "int16": 2, "uint32": 4, "int32": 4, "float": 4}
_BYTES |= {"uint64": 8, "int64": 8, "double": 8, "bool": 1}


def c_type(ptx: str) -> str:
    """The C++ type of a value. Half types and pairs are their bits."""
    return _C_TYPES[ptx]


def size(ptx: str) -> int:
    """Bytes of a value."""
    return _BYTES[_C_TYPES[ptx].removesuffix("_t")]


def storage(ptx: str) -> str:
    """The C++ type of a register: its bits, whatever instructions make of them."""
    return "bool" if ptx == "pred" else f"uint{8 * size(ptx)}_t"


def is_float(ptx: str) -> bool:
    """Whether the C++ type is a float."""
    return ptx in ("f32", "f64")


def is_signed(ptx: str) -> bool:
    """Whether it is a signed integer."""
    return ptx[0] == "s"


def unsigned(ptx: str) -> str:
    """The unsigned integer type of the same size."""
    return f"u{8 * size(ptx)}"


def doubled(ptx: str) -> str:
    """The integer type of twice the size: u32 becomes u64."""
    return f"{ptx[0]}{16 * size(ptx)}"
