"""Checks of arguments: a refusal names the function, the argument, what was wanted, what came."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor


def shape_text(shape: Sequence[Any]) -> str:
    """A shape as the messages print it: ``[2, 8, T, 128]``."""
    return "[" + ", ".join(str(s) for s in shape) + "]"


def require_tensor(op: str, name: str, x: object) -> Tensor:
    """Return ``x`` if it is a tensor.

    Raises:
        TypeError: It is something else.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}: {name} must be a torch.Tensor, got {type(x).__name__}")
    return x


def require_shape(op: str, name: str, x: Tensor, wanted: Sequence[int | str]) -> None:
    """Refuse a tensor whose shape differs; a letter stands for any size >= 1.

    Raises:
        ValueError: The shape differs.
    """
    ok = x.dim() == len(wanted) and all(
        (got >= 1 if isinstance(want, str) else got == want)
        for got, want in zip(x.shape, wanted, strict=True)
    )
    if not ok:
        raise ValueError(
            f"{op}: {name} must have shape {shape_text(wanted)}, got {shape_text(x.shape)}"
        )


def require_int(op: str, name: str, x: object, minimum: int) -> int:
    """Return ``x`` if it is a whole number >= minimum.

    Raises:
        ValueError: It is not.
    """
    if isinstance(x, bool) or not isinstance(x, int) or x < minimum:
        raise ValueError(f"{op}: {name} must be a whole number >= {minimum}, got {x!r}")
    return x
