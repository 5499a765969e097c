"""The two backends of a layer's step: the compiled kernels and the plain-torch reference."""

from __future__ import annotations

import warnings

import torch

from less.backend import ops
from less.backend.base import Backend, HalfWrittenError
from less.backend.native import NativeBackend
from less.backend.reference import ReferenceBackend

__all__ = ["Backend", "HalfWrittenError", "NativeBackend", "ReferenceBackend", "choose", "ops"]


def choose(backend: str | None, device: torch.device) -> Backend:
    """Pick the backend for a device.

    Raises:
        ValueError: The name is unknown, or the native kernels were asked for and are not there;
            the message says what is missing.
    """
    if backend not in (None, "native", "reference"):
        raise ValueError(
            f"LessKVCache: backend must be 'native', 'reference' or None, got {backend!r}"
        )
    if backend == "reference":
        return ReferenceBackend()
    missing = ops.missing(device)
    if missing is None:
        return NativeBackend()
    if backend == "native":
        raise ValueError(f"LessKVCache: backend 'native' is not available on {device}: {missing}")
    warnings.warn(
        f"less: {missing}; using the plain-torch reference, which is slow. "
        "Pass backend='reference' to choose it without this warning.",
        RuntimeWarning,
        stacklevel=3,
    )
    return ReferenceBackend()
