"""Number formats of rows and maps, and the codes by which kernels know them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

#: Dtypes of queries, keys and values that a caller passes.
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
#: Formats whose rows have a float32 scale each: the largest number of each.
EIGHT_BITS = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
#: Dtypes that the matrices of feature maps may have.
MAP_DTYPES = (*FLOATS, torch.int8)
#: Dtypes that hot rows may have.
HOT_DTYPES = (torch.int8, torch.float16, torch.float32)

#: The numbers of ``DType`` in csrc/common/dtype.h; float64 is the reference's alone.
CODES = {
    torch.float32: 0,
    torch.bfloat16: 1,
    torch.float16: 2,
    torch.int8: 3,
    torch.float8_e4m3fn: 4,
    torch.float64: -1,
}


@dataclass(frozen=True)
class RowType:
    """How one row of D numbers is stored.

    Attributes:
        name: A dtype's name, or ``b4``, ``b3``, ``b2`` of packed rows.
        code: Its number in ``DType`` of csrc/common/dtype.h.
        bits: Of each number.
        stored: What a row's memory consists of: bytes, where rows are packed.
        scale: Of the one scale that each row has; None: it has none.
    """

    name: str
    code: int
    bits: int
    stored: torch.dtype
    scale: torch.dtype | None = None

    @property
    def packed(self) -> bool:
        """Whether a byte holds several numbers."""
        return self.bits < 8

    def width(self, D: int) -> int:
        """Elements of ``stored`` that a row of D numbers takes."""
        return D * self.bits // (8 * self.stored.itemsize)


def _row_type(dtype: torch.dtype, code: int) -> RowType:
    scale = torch.float32 if dtype in EIGHT_BITS else None
    return RowType(name(dtype), code, 8 * dtype.itemsize, dtype, scale)


def name(dtype: torch.dtype) -> str:
    """A dtype without the package's name: ``float16``."""
    return str(dtype).removeprefix("torch.")


#: Rows whose numbers are of a torch dtype.
ROW_TYPES = {dtype: _row_type(dtype, code) for dtype, code in CODES.items()}
#: Packed rows, by their bits a number: codes of ``less.reference.codec`` and a float16 scale.
PACKED = {
    bits: RowType(f"b{bits}", code, bits, torch.uint8, torch.float16)
    for bits, code in ((4, 5), (3, 6), (2, 7))
}


@dataclass(frozen=True)
class RowFormat:
    """How the keys and values of slots are stored.

    Attributes:
        k: Rows of keys.
        v: Rows of values.
    """

    k: RowType
    v: RowType

    @property
    def packed(self) -> bool:
        """Whether its rows have few bits: they live in a space of their own, with hot rows."""
        return self.k.packed or self.v.packed


#: Formats beside the torch dtypes: bits of keys and of values.
FORMATS = {
    f"k{k}v{v}": RowFormat(PACKED.get(k, ROW_TYPES[torch.int8]), PACKED[v])
    for k, v in ((8, 4), (4, 4), (4, 3), (4, 2), (3, 3), (3, 2), (2, 2))
}
#: The format that loses least at given bytes where victims merge (docs/memory.md).
MERGING_ROWS = "k4v4"


def row_format(op: str, dtype: object) -> RowFormat:
    """The format that a ``dtype`` argument names.

    Args:
        op: Who asks, for the message.
        dtype: A torch dtype, or a name in ``FORMATS``.

    Raises:
        ValueError: It is neither.
    """
    if isinstance(dtype, str) and dtype in FORMATS:
        return FORMATS[dtype]
    if isinstance(dtype, torch.dtype) and dtype in ROW_TYPES:
        return RowFormat(ROW_TYPES[dtype], ROW_TYPES[dtype])
    known = ", ".join((*(name(d) for d in CODES), *FORMATS))
    raise ValueError(f"{op}: dtype must be one of {known}, got {dtype}")


def format_name(dtype: torch.dtype | str) -> str:
    """The name of a format: ``float16``, ``k4v4``."""
    return dtype if isinstance(dtype, str) else name(dtype)


def has_scale(dtype: torch.dtype) -> bool:
    """Whether each row has a float32 scale."""
    return dtype in EIGHT_BITS


def state_dtype(dtype: torch.dtype | str) -> torch.dtype:
    """The dtype of scores, log-weights and state beside rows of ``dtype``."""
    return torch.float64 if dtype == torch.float64 else torch.float32
