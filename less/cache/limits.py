"""Warnings of a cache that goes beyond its sidekick's training."""

from __future__ import annotations

import warnings
from collections.abc import Collection

from less.sidekick import Sidekick


class TrainingLimits:
    """Warns where a cache goes beyond its sidekick's training.

    It warns once of capacities, at the beginning, and once of the length of the text.

    Args:
        sidekick: The cache's sidekick; None: nothing is checked.
        kept: Capacities of the layers that evict.
    """

    def __init__(self, sidekick: Sidekick | None, kept: Collection[int]) -> None:
        self._sidekick = sidekick
        # Columns beyond which the state was not seen in training, until that is said.
        self._columns: int | None = None
        if sidekick is None:
            return
        trained = sidekick.trained_capacities
        other = sorted(c for c in set(kept) if trained and not trained[0] <= c <= trained[-1])
        if other:
            warnings.warn(
                f"LessKVCache: the sidekick {sidekick.name!r} was trained for "
                f"{', '.join(map(str, trained))} tokens per head, and not for "
                f"{', '.join(map(str, other))}: its memory may do harm there; compare it with "
                "sidekick=None, or train one for this budget",
                stacklevel=3,
            )
        length = sidekick.trained_length
        if length is not None and kept:
            self._columns = max(length, min(kept))  # before, nothing has left

    def heed(self, columns: int) -> None:
        """Warn of a text that is longer than the training's.

        Args:
            columns: Columns passed to the layer that is furthest.
        """
        if self._columns is None or columns <= self._columns:
            return
        assert self._sidekick is not None
        self._columns = None
        warnings.warn(
            f"LessKVCache: the sidekick {self._sidekick.name!r} was trained on texts of "
            f"{self._sidekick.trained_length} tokens, and this text has come to {columns}: "
            "beyond its length its memory may do harm; compare it with sidekick=None, or train "
            "one on longer chunks",
            stacklevel=3,
        )
