"""The feature maps of one layer in one piece of memory, as the ops take them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from less.dtypes import CODES

#: The numbers of ``MapKind`` in csrc/params.h.
KINDS = {"paper": 0, "exp": 1}
#: Every tensor that a kind may have, in the order in which they lie, with its shape in letters.
SHAPES = {
    "q_w1": "QDE",
    "q_w1_scale": "QE",
    "q_w2": "QER",
    "q_w2_scale": "QR",
    "q_bias": "QR",
    "k_w1": "KDE",
    "k_w1_scale": "KE",
    "k_w2": "KER",
    "k_w2_scale": "KR",
    "k_bias": "KR",
    "k_mix": "KRR",
    "k_scale": "KR",
    "k_mix_scale": "KR",
}
MATRICES = ("q_w1", "q_w2", "k_w1", "k_w2")
_ALIGN = 128


@dataclass(frozen=True)
class Maps:
    """One layer's feature maps.

    Attributes:
        kind: ``"paper"`` or ``"exp"``.
        tensors: By the names of ``less.sidekick``.
    """

    kind: str
    tensors: Mapping[str, Tensor]


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
        if kind not in KINDS:
            raise ValueError(f"maps: kind must be one of {sorted(KINDS)}, got {kind!r}")
        unknown = tensors.keys() - SHAPES.keys()
        if unknown:
            raise ValueError(f"maps: unknown tensors {sorted(unknown)}")
        ordered = {n: tensors[n] for n in SHAPES if n in tensors}
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

    @property
    def rank(self) -> int:
        """Features R."""
        return int(self.tensors["q_w2"].shape[-1])

    def to(self, device: torch.device | str) -> PackedMaps:
        """A copy on another device."""
        return PackedMaps.pack(self.tensors, self.kind, device)

    def described(self) -> tuple[int, int, int, int, int]:
        """Kind, dtype of the matrices, hidden width E, rank R, and which tensors there are."""
        there = sum(1 << i for i, n in enumerate(SHAPES) if n in self.tensors)
        w1 = self.tensors["q_w1"]
        return KINDS[self.kind], CODES[w1.dtype], int(w1.shape[2]), self.rank, there
