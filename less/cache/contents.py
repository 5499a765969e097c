"""What a cache holds, to look at: kept tokens, scores, the low-rank state, bytes, counts."""

from __future__ import annotations

import torch
from torch import Tensor

from less.cache.checks import no_state
from less.cache.holdings import Holdings
from less.cache.paged import PagedLayer
from less.layer import PageLayout
from less.sidekick import Sidekick


class Contents:
    """Mixin: a cache's contents; the cache brings the attributes."""

    layers: int
    native: tuple[int, ...]
    sidekick: Sidekick | None
    _holdings: Holdings

    @property
    def held(self) -> list[PagedLayer]:
        """The layers that this cache holds: all but those that slide."""
        return self._holdings.held

    def positions(self, layer: int) -> Tensor:
        """Row-local positions of the kept tokens, int32 [B, K, S], -1 where a slot is empty.

        S is that of the head with the most slots, here and below.
        """
        self._check_layer("positions", layer)
        return self._holdings.gathered(layer, "position", -1)

    def scores(self, layer: int) -> Tensor:
        """Scores of the kept tokens, float32 [B, K, S]; 0 where the policy uses none."""
        self._check_layer("scores", layer)
        return self._holdings.gathered(layer, "scores", 0)

    def weights(self, layer: int) -> Tensor:
        """Log-weights, float32 [B, K, S]: 0 unless a slot stands for several tokens."""
        self._check_layer("weights", layer)
        return self._holdings.gathered(layer, "log_weight", 0)

    def state(self, layer: int) -> tuple[Tensor, Tensor]:
        """The low-rank state: H [B, K, R, D] and z [B, K, R], float32.

        Raises:
            ValueError: The layer has no low-rank state; the message says why.
        """
        self._check_layer("state", layer)
        states = [views.state for views in self._holdings.views(layer)]
        held = [x for x in states if x is not None] or no_state(layer, self.sidekick)
        return torch.cat([x.H for x in held], 1), torch.cat([x.z for x in held], 1)

    @property
    def seen(self) -> Tensor:
        """Tokens seen by each row, padding left out, int64 [B]; of the layer that is furthest."""
        return torch.stack([self._holdings.seen_of(i) for i in range(self.layers)]).amax(0)

    @property
    def layouts(self) -> tuple[PageLayout | None, ...]:
        """What a page of each layer holds; None for layers that slide."""
        return self._holdings.layouts

    def memory(self) -> dict[str, int]:
        """Bytes held, by purpose.

        Returns:
            ``slots`` (k, v, their scales, positions, scores, log-weights), ``state`` (H, z),
            ``maps`` (the sidekick's weights, and means and scales of channels), ``workspace``
            (counters, and the scratch of a GPU's kernels), ``native`` (k and v of layers that
            slide, which grow until their windows are full), ``total`` of these, and ``full``: the
            k and v that a full cache would hold of the same tokens now, in this cache's dtype,
            or in 16 bits where that has fewer, which full caches are not held in; for layers that
            slide, what they hold. ``slots``, ``state`` and the counters are ``batch`` times
            ``PageLayout.nbytes`` of every layer.
        """
        return self._holdings.memory()

    def stats(self) -> dict[str, list[int] | list[float]]:
        """What happened so far, a list over layers each.

        Returns:
            ``seen``: tokens, summed over rows; ``kept``: tokens in slots, summed over rows, mean
            over kv heads; ``evictions``: their difference; ``memory_share``: mean part of a
            query's attention mass that the low-rank state took. A layer that slides keeps what its
            own window needs and evicts nothing here: its ``kept`` is its ``seen``.
        """
        return self._holdings.stats()

    @property
    def pools(self) -> dict[int, Tensor]:
        """The pages of each layer that this cache holds, uint8 [B, page]: not copies."""
        return {i: pool for i, pool in enumerate(self._holdings.pools) if pool is not None}

    def _check_layer(self, op: str, layer: object) -> None:
        if isinstance(layer, bool) or not isinstance(layer, int):
            raise ValueError(f"{op}: layer must be a whole number, got {layer!r}")
        if not 0 <= layer < self.layers:
            raise ValueError(f"{op}: layer must be in 0 .. {self.layers - 1}, got {layer}")
        if layer in self.native:
            held = [i for i in range(self.layers) if i not in self.native]
            raise ValueError(
                f"{op}: layer {layer} slides: it bounds itself, and this cache holds none of "
                f"its tokens; the layers that it holds are {held}"
            )
