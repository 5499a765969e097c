"""The feature maps of one layer in one piece of memory, as the ops take them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from less.dtypes import CODES
from less.layer.kinds import KINDS, ORDER, kind_of

_ALIGN = 128


@dataclass(frozen=True)
class Maps:
    """One layer's feature maps.

    Attributes:
        kind: A name in ``less.layer.kinds.KINDS``.
        tensors: By the names of its row.
    """

    kind: str
    tensors: Mapping[str, Tensor]

    @property
    def rank(self) -> int:
        """Features R."""
        return KINDS[self.kind].size(self.tensors, "R")


@dataclass(frozen=True)
class PackedMaps(Maps):
    """One layer's feature maps, in one piece of memory.

    Attributes:
        memory: uint8 [bytes]: the tensors one after the other, each at a multiple of 128 bytes;
            ``tensors`` are views of it.
    """

    memory: Tensor

    @classmethod
    def pack(
        cls, tensors: Mapping[str, Tensor], kind: str, device: torch.device | str = "cpu"
    ) -> PackedMaps:
        """Copy a layer of a sidekick into one piece of memory.

        Args:
            tensors: By name: a layer of a ``Sidekick``.
            kind: Its kind.
            device: Where to.

        Raises:
            ValueError: The kind or a name is unknown.
        """
        row = kind_of("maps", kind)
        unknown = tensors.keys() - row.tensors.keys() - row.scales.keys()
        if unknown:
            raise ValueError(f"maps: kind {kind!r} has no tensors {sorted(unknown)}")
        ordered = {n: tensors[n] for n in ORDER if n in tensors}
        at, offsets = 0, {}
        for n, x in ordered.items():
            offsets[n] = at
            at += -(-x.numel() * x.element_size() // _ALIGN) * _ALIGN
        memory = torch.zeros(at, dtype=torch.uint8, device=device)
        views = {}
        for n, x in ordered.items():
            nbytes = x.numel() * x.element_size()
            view = memory[offsets[n] : offsets[n] + nbytes].view(x.dtype).view(x.shape)
            view.copy_(x)
            views[n] = view
        return cls(kind, views, memory)

    def to(self, device: torch.device | str) -> PackedMaps:
        """A copy on another device."""
        return PackedMaps.pack(self.tensors, self.kind, device)

    def described(self) -> tuple[int, int, int, int, int]:
        """Kind, dtype of the matrices, hidden width E, rank R, and which tensors there are."""
        row = KINDS[self.kind]
        dtype = self.tensors[row.matrices[0]].dtype
        hidden, present = row.size(self.tensors, "E"), row.present(self.tensors)
        return row.number, CODES[dtype], hidden, self.rank, present
