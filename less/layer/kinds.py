"""The kinds of feature maps: one row each, read by whoever holds, packs, draws or trains maps.

A kind is a row of ``KINDS`` here, its formula in ``less.reference.feature_map``, its number in
``MapKind`` of csrc/params.h and its kernels; tensors that no kind had before go into ``ORDER``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from less.layer.space import SPACE

#: Every tensor that a layer may have, those of its space and then of its maps, in the order in
#: which they lie in memory; ``read_maps`` of csrc/ops/layer.h reads them in it. Each one's place is
#: its bit in ``present``.
ORDER = (
    *SPACE,
    "q_w1",
    "q_w1_scale",
    "q_w2",
    "q_w2_scale",
    "q_bias",
    "k_w1",
    "k_w1_scale",
    "k_w2",
    "k_w2_scale",
    "k_bias",
    "k_mix",
    "k_scale",
    "k_mix_scale",
    "centroids",
    "centroids_scale",
    "q_factor",
    "k_factor",
    "k_weight",
    "k_offset",
)
#: What a layer of a sidekick may note beside the maps of a centred kind, float32 [K, D]: the mean
#: of the keys that they were trained with.
KEY_MEAN = "key_mean"


@dataclass(frozen=True)
class MapKind:
    """A kind of feature maps.

    Letters: Q query heads, K kv heads, D head dim, R rank, and E hidden width, which a kind
    without a hidden layer does not have.

    Attributes:
        number: Its number in ``MapKind`` of csrc/params.h.
        tensors: Tensor name -> shape in letters, in the order of the files. Names that begin with
            ``q_`` belong to phi, with ``k_`` to psi, others to both.
        matrices: Which of them are matrices of a layer, [heads, in, out]: nearly all of the bytes,
            and what may be held in 16 or 8 bits.
        centred: Whether psi takes keys without the mean of their space, so that the state stands
            in the coordinates of the slots' logits and nothing is added where they meet. Such a
            layer of a sidekick may have ``KEY_MEAN``.
    """

    number: int
    tensors: Mapping[str, str]
    matrices: tuple[str, ...]
    centred: bool = False

    @cached_property
    def scales(self) -> dict[str, str]:
        """Of int8 matrices: their scales' shapes, one scale per output column."""
        return {
            f"{name}_scale": self.tensors[name][0] + self.tensors[name][-1]
            for name in self.matrices
        }

    def size(self, tensors: Mapping[str, Tensor], letter: str) -> int:
        """The size that a letter stands for in a layer's tensors; 0 where no shape has it."""
        for name, letters in self.tensors.items():
            if letter in letters:
                return int(tensors[name].shape[letters.index(letter)])
        return 0


def present(tensors: Mapping[str, Tensor]) -> int:
    """Which tensors there are, as the ops take it: bit i for ``ORDER[i]``."""
    return sum(1 << i for i, name in enumerate(ORDER) if name in tensors)


_Q_LAYERS = {"q_w1": "QDE", "q_w2": "QER"}
_K_LAYERS = {"k_w1": "KDE", "k_w2": "KER"}
_MATRICES = (*_Q_LAYERS, *_K_LAYERS)

KINDS: dict[str, MapKind] = {
    # arXiv:2402.09398, section 3.2
    "paper": MapKind(
        number=0,
        tensors={
            **_Q_LAYERS,
            **_K_LAYERS,
            "k_mix": "KRR",
            "k_scale": "KR",
            "k_mix_scale": "KR",
        },
        matrices=_MATRICES,
    ),
    # docs/training.md
    "exp": MapKind(
        number=1,
        tensors={**_Q_LAYERS, "q_bias": "QR", **_K_LAYERS, "k_bias": "KR"},
        matrices=_MATRICES,
    ),
    # docs/training.md
    "centroid": MapKind(
        number=2,
        tensors={
            "centroids": "KDR",
            "q_factor": "Q",
            "q_bias": "QR",
            "k_factor": "K",
            "k_bias": "KR",
            "k_weight": "KD",
            "k_offset": "K",
        },
        matrices=("centroids",),
        centred=True,
    ),
}


def kind_of(op: str, name: object) -> MapKind:
    """The row of a kind.

    Args:
        op: Who asks, for the message.
        name: The kind's name.

    Raises:
        ValueError: There is none of that name.
    """
    if not isinstance(name, str) or name not in KINDS:
        raise ValueError(f"{op}: kind must be one of {sorted(KINDS)}, got {name!r}")
    return KINDS[name]
