"""The feature maps of one layer in one piece of memory, as the ops take them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from less._check import require_shape
from less.dtypes import CODES
from less.layer.kinds import KINDS, ORDER, kind_of, present
from less.layer.pieces import in_one_piece


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

    @property
    def centred(self) -> bool:
        """Whether its kind takes keys without the mean of their space."""
        return KINDS[self.kind].centred


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
            ValueError: The kind or a name is unknown, a matrix is missing, or matrices differ in
                dtype.
        """
        row = kind_of("maps", kind)
        unknown = tensors.keys() - row.tensors.keys() - row.scales.keys()
        if unknown:
            raise ValueError(f"maps: kind {kind!r} has no tensors {sorted(unknown)}")
        missing = [n for n in row.matrices if n not in tensors]
        if missing:
            raise ValueError(f"maps: kind {kind!r} needs tensors {missing}")
        dtypes = {tensors[n].dtype for n in row.matrices}
        if len(dtypes) > 1:
            names = ", ".join(sorted(map(str, dtypes)))
            raise ValueError(f"maps: matrices must share a dtype, got {names}")
        memory, views = in_one_piece(tensors, ORDER, device)
        return cls(kind, views, memory)

    def to(self, device: torch.device | str) -> PackedMaps:
        """A copy on another device."""
        return PackedMaps.pack(self.tensors, self.kind, device)

    def check(self, op: str, q_heads: int, kv_heads: int, head_dim: int) -> None:
        """Refuse tensors that are not of these shapes, for the width and rank of their own.

        Args:
            op: Who asks, for the message.
            q_heads: Query heads Q.
            kv_heads: Kv heads K.
            head_dim: Head dim D.

        Raises:
            ValueError: A tensor has another shape; the message names it.
        """
        row = KINDS[self.kind]
        sizes = {"Q": q_heads, "K": kv_heads, "D": head_dim, "R": self.rank}
        sizes["E"] = row.size(self.tensors, "E")
        shapes = {**row.tensors, **row.scales}
        for n, x in self.tensors.items():
            require_shape(op, f"maps' {n}", x, [sizes[letter] for letter in shapes[n]])

    def described(self) -> tuple[int, int, int, int, int]:
        """Kind, dtype of the matrices, hidden width E, rank R, and which tensors there are."""
        row = KINDS[self.kind]
        dtype = self.tensors[row.matrices[0]].dtype
        hidden = row.size(self.tensors, "E")
        return row.number, CODES[dtype], hidden, self.rank, present(self.tensors)
