"""Warnings of a cache that goes beyond what it was trained or measured for."""

from __future__ import annotations

import warnings
from collections.abc import Collection

import torch
from torch import Tensor

from less.calibration import Calibration
from less.dtypes import row_format
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
        self._heed(columns, f"this text has come to {columns}")

    def expect(self, columns: int) -> None:
        """Warn, before any text, of texts that may be longer than the training's.

        Args:
            columns: The most tokens that a text may have.
        """
        self._heed(columns, f"texts may come to {columns} here")

    def _heed(self, columns: int, said: str) -> None:
        if self._columns is None or columns <= self._columns:
            return
        assert self._sidekick is not None
        self._columns = None
        warnings.warn(
            f"LessKVCache: the sidekick {self._sidekick.name!r} was trained on texts of "
            f"{self._sidekick.trained_length} tokens, and {said}: "
            "beyond its length its memory may do harm; compare it with sidekick=None, or train "
            "one on longer chunks",
            stacklevel=4,
        )


class BiasedKeys:
    """Warns of keys whose channels have large means, which few bits do not fit uncalibrated.

    It looks at prompts, and warns once per cache. Some models add large biases to their keys
    (Qwen 2 and 2.5): a row's scale then follows the mean, which says nothing, and what
    distinguishes keys drowns in the rounding.

    Args:
        calibration: The cache's; with one nothing is looked at.
        dtype: Of the slots; only packed formats are looked at.

    Attributes:
        looks: Whether there is something left to warn of.
    """

    #: The part of keys' mean square that their mean makes up, above which it warns.
    LARGEST = 0.9
    #: A call's tokens, below which a mean is large by chance.
    TOKENS = 16

    def __init__(self, calibration: Calibration | None, dtype: torch.dtype | str) -> None:
        few = isinstance(dtype, str) and row_format("LessKVCache", dtype).packed
        self.looks = few and calibration is None
        self._dtype = dtype

    def heed(self, k: Tensor, columns: int) -> None:
        """Look at a call's keys.

        Args:
            k: [B, K, T, D].
            columns: Columns that the layer has seen before.
        """
        if not self.looks or columns or k.shape[2] < self.TOKENS or k.device.type == "meta":
            return
        if k.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return
        x = k.detach().float()
        square = x.square().mean((0, 2)).sum(-1)
        share = x.mean((0, 2)).square().sum(-1) / square.clamp(min=1e-30)
        largest = float(share.max())
        if not largest > self.LARGEST:
            return
        self.looks = False
        warnings.warn(
            f"LessKVCache: the mean of a head's keys makes up {100 * largest:.1f} % of their "
            f"square, so that {self._dtype} rows lose much of what distinguishes them; measure "
            "means with less-kv calibrate, and pass Calibration.from_pretrained(folder)",
            stacklevel=4,
        )
