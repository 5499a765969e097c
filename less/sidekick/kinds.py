"""The kinds of feature maps as a sidekick and its files know them: ``less.layer.kinds``, by name.

The rows stand in ``less.layer.kinds``, because layers come before sidekicks.
"""

from __future__ import annotations

from less.layer.kinds import KEY_MEAN, KINDS, ORDER, MapKind, kind_of

__all__ = ["KEY_MEAN", "KINDS", "MATRICES", "SCALES", "TENSORS", "MapKind", "kind_of"]

#: Tensor name -> shape in letters, per kind. The order is the order of the files.
TENSORS: dict[str, dict[str, str]] = {name: dict(kind.tensors) for name, kind in KINDS.items()}
#: The matrices of all kinds.
MATRICES = tuple(n for n in ORDER if any(n in kind.matrices for kind in KINDS.values()))
#: Of int8 matrices: their scales' shapes, one scale per output column.
SCALES = {name: letters for kind in KINDS.values() for name, letters in kind.scales.items()}
