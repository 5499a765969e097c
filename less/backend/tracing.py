"""Fake kernels, by which torch traces through an op without running it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Fake = Callable[..., Any]


def fake(op: str) -> Callable[[Fake], Fake]:
    """Register a fake kernel that refuses tensors of several devices.

    torch runs it where any tensor of a call is on meta, though others have values; what it returned
    would then be memory that nobody wrote.

    Args:
        op: The op's name.
    """
    schema = getattr(torch.ops.less, op).default._schema

    def register(kernel: Fake) -> Fake:
        @functools.wraps(kernel)
        def checked(*args: Any, **kwargs: Any) -> Any:
            given = dict(zip((a.name for a in schema.arguments), args, strict=False)) | kwargs
            tensors = {n: x for n, x in given.items() if isinstance(x, Tensor) and n != "layer"}
            (first, x), *others = tensors.items()
            for name, y in others:
                if y.device != x.device:
                    raise RuntimeError(
                        f"{op}: {name} must be on the device of {first}, {x.device}, got {y.device}"
                    )
            layer = given.get("layer", x)
            if layer.device.type == "meta" != x.device.type:
                raise RuntimeError(f"{op}: layer must be on a CPU, got meta")
            return kernel(*args, **kwargs)

        registered: Fake = torch.library.register_fake(f"less::{op}")(checked)
        return registered

    return register
