"""Number formats of rows and maps, and the codes by which kernels know them."""

from __future__ import annotations

import torch

#: Dtypes of queries, keys and values that a caller passes.
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
#: Formats whose rows have a float32 scale each: the largest number of each.
EIGHT_BITS = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
#: Dtypes that the matrices of feature maps may have.
MAP_DTYPES = (*FLOATS, torch.int8)

#: The numbers of ``DType`` in csrc/common/dtype.h; float64 is the reference's alone.
CODES = {
    torch.float32: 0,
    torch.bfloat16: 1,
    torch.float16: 2,
    torch.int8: 3,
    torch.float8_e4m3fn: 4,
    torch.float64: -1,
}


def has_scale(dtype: torch.dtype) -> bool:
    """Whether each row has a float32 scale."""
    return dtype in EIGHT_BITS


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of scores, log-weights and state beside rows of ``dtype``."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def name(dtype: torch.dtype) -> str:
    """A dtype without the package's name: ``float16``."""
    return str(dtype).removeprefix("torch.")
