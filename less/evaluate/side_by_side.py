"""Several caches under one pass of a model: each takes a block of the batch's rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

import torch
from torch import Tensor

from less._check import require_int
from less.cache import LessKVCache
from less.cache.session import Session


class SideBySide(LessKVCache):
    """Stands where one ``LessKVCache`` would, and deals the rows to its members in order.

    A model step at batch 1 mostly reads the weights; comparing seven methods one after the other
    reads them seven times. Here every method is a block of rows of one batch: the model's layers
    run once for all, and each member attends to its own rows with its own slots, policy and maps.

    Args:
        caches: Of one model shape, device and scale; batches, policies, formats of rows, sidekicks
            and calibrations may differ.

    Raises:
        ValueError: no cache, or two that do not fit the same model.
    """

    def __init__(self, caches: Sequence[LessKVCache]) -> None:
        if not caches:
            raise ValueError("SideBySide: caches must hold at least one cache, got none")
        first = caches[0]
        for name in ("layers", "q_heads", "kv_heads", "head_dim", "device", "scale", "softcap"):
            for i, cache in enumerate(caches):
                if getattr(cache, name) != getattr(first, name):
                    raise ValueError(
                        f"SideBySide: caches[{i}] must have {name}={getattr(first, name)} like "
                        f"caches[0], got {getattr(cache, name)}"
                    )
        if any(cache.native for cache in caches):
            raise ValueError(
                "SideBySide: caches must hold every layer, got layers "
                f"{list(first.native)} that slide: run the caches of such a model one after "
                "the other"
            )
        # Not LessKVCache.__init__: that would allocate slots of its own.
        self.caches = list(caches)
        self.native = ()
        self.layers = first.layers
        self.q_heads, self.kv_heads = first.q_heads, first.kv_heads
        self.head_dim, self.scale, self.softcap = first.head_dim, first.scale, first.softcap
        self.dtype, self.device = first.dtype, first.device
        self.policies, self.backend = first.policies, first.backend
        self.sidekick, self.calibration = None, None  # members have checked their own
        rooms = [cache.max_columns for cache in caches]
        self.max_columns = min((room for room in rooms if room is not None), default=None)
        self.batch = sum(cache.batch for cache in caches)
        self.session = Session(self.layers, self.batch, self.device, ())
        self.session.columns = [first.columns] * self.layers

    def attend(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        valid: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """``LessKVCache.attend`` of every member on its rows; shapes as there, B of all."""
        out = torch.empty_like(q) if out is None else out
        row = 0
        for cache in self.caches:
            rows = slice(row, row + cache.batch)
            mine = valid[rows] if valid is not None else None
            out[rows] = cache.attend(layer, q[rows], k[rows], v[rows], mine)
            row += cache.batch
        self.session.columns[layer] += q.shape[2]
        return out

    def advance(self, steps: int) -> None:
        """``LessKVCache.advance`` of every member.

        Raises:
            ValueError: It is no whole number >= 0, or more than a member has room for.
        """
        require_int("advance", "steps", steps, 0)
        if self.max_columns is not None and self.columns + steps > self.max_columns:
            raise ValueError(
                f"advance: the caches have room for {self.max_columns} tokens, padding included, "
                f"got {self.columns + steps}; build them with a larger max_tokens"
            )
        for cache in self.caches:
            cache.advance(steps)
        self.session.columns = [columns + steps for columns in self.session.columns]

    @property
    def seen(self) -> Tensor:
        """Tokens seen by each row of each member, int64 [B]."""
        return torch.cat([cache.seen for cache in self.caches])

    @property
    def layouts(self) -> NoReturn:
        """Refuse: every member has its own."""
        self._refuse("layouts")

    @property
    def at_once(self) -> int:
        """The fewest of the members."""
        return min(cache.at_once for cache in self.caches)

    def memory(self) -> dict[str, int]:
        """Bytes of all members together, as ``LessKVCache.memory`` counts them."""
        each = [cache.memory() for cache in self.caches]
        return {name: sum(bytes_[name] for bytes_ in each) for name in each[0]}

    def reset(self) -> None:
        """Reset every member."""
        for cache in self.caches:
            cache.reset()
        self.session.reset()

    def _refuse(self, name: str) -> NoReturn:
        raise NotImplementedError(f"SideBySide: {name}: ask the members, `.caches`")

    def positions(self, layer: int) -> NoReturn:
        """Refuse: every member has its own."""
        self._refuse("positions")

    def scores(self, layer: int) -> NoReturn:
        """Refuse: every member has its own."""
        self._refuse("scores")

    def weights(self, layer: int) -> NoReturn:
        """Refuse: every member has its own."""
        self._refuse("weights")

    def state(self, layer: int) -> NoReturn:
        """Refuse: every member has its own."""
        self._refuse("state")

    def stats(self) -> NoReturn:
        """Refuse: every member has its own."""
        self._refuse("stats")

    def reorder(self, rows: Tensor) -> NoReturn:
        """Refuse: rows never leave their member, so there is no beam search."""
        self._refuse("reorder")

    def state_dict(self) -> NoReturn:
        """Refuse: every member has its own."""
        self._refuse("state_dict")

    def load_state_dict(self, d: object) -> NoReturn:
        """Refuse: every member has its own."""
        self._refuse("load_state_dict")
