"""Several tensors in one piece of memory, as the ops take a layer's constants."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from less.layer.layout import aligned

PIECE_ALIGN = 128


def in_one_piece(
    tensors: Mapping[str, Tensor], order: Sequence[str], device: torch.device | str
) -> tuple[Tensor, dict[str, Tensor]]:
    """Copy tensors into one piece of memory.

    Args:
        tensors: By name.
        order: Of the names that there may be.
        device: Where to.

    Returns:
        uint8 [bytes], each tensor at a multiple of 128 bytes; and views of it by name.
    """
    ordered = {n: tensors[n] for n in order if n in tensors}
    at, offsets = 0, {}
    for n, x in ordered.items():
        offsets[n] = at
        at += aligned(x.nbytes, PIECE_ALIGN)
    source = next(iter(ordered.values())).device
    memory = torch.zeros(at, dtype=torch.uint8, device=source)

    def view(n: str) -> Tensor:
        x = ordered[n]
        return memory.narrow(0, offsets[n], x.nbytes).view(x.dtype).view(x.shape)

    for n, x in ordered.items():
        view(n).copy_(x)
    memory = memory.to(device)
    return memory, {n: view(n) for n in ordered}
