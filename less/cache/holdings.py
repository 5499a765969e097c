"""What a cache holds: a pool of pages for each of its layers, and what is counted of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from less.cache.paged import PagedLayer
from less.cache.session import Session, sliding_tensors
from less.layer import Paged, PageLayout, PageViews, allocate


class Holdings:
    """The layers of a cache with their memory, which is allocated here.

    Args:
        layers: One for each layer of the model; None for those that slide.
        batch: Batch rows B: row b has page b of every pool.
        device: Where the pools lie.
        session: Has the layers that slide.

    Attributes:
        layers: As given.
        pools: The pages of each layer, uint8 [B, page]; None for those that slide.
    """

    def __init__(
        self,
        layers: Sequence[PagedLayer | None],
        batch: int,
        device: torch.device,
        session: Session,
    ) -> None:
        self.layers = tuple(layers)
        self.batch, self.session = batch, session
        pools = iter(allocate([at.layout for at in self.held], batch, device))
        self.pools: list[Tensor | None] = [None if at is None else next(pools) for at in layers]

    @property
    def held(self) -> list[PagedLayer]:
        """The layers that have pages: all but those that slide."""
        return [at for at in self.layers if at is not None]

    @property
    def bounded(self) -> list[int]:
        """The capacities of all heads of the layers that evict."""
        return [n for at in self.held if at.policy.evicts for n in at.layout.capacities]

    @property
    def layouts(self) -> tuple[PageLayout | None, ...]:
        """What a page of each layer holds; None for layers that slide."""
        return tuple(None if at is None else at.layout for at in self.layers)

    def at(self, layer: int) -> tuple[PagedLayer, Paged]:
        """A layer that has pages, and those."""
        paged, pool = self.layers[layer], self.pools[layer]
        assert paged is not None  # callers have refused layers that slide
        assert pool is not None
        return paged, Paged(pool)

    def views(self, layer: int) -> list[PageViews]:
        """What a layer's pages hold, as tensors: not copies."""
        paged, at = self.at(layer)
        return paged.layout.views(at.pool)

    def gathered(self, layer: int, field: str, empty: int) -> Tensor:
        """A copy of what the slots of a layer have in a field, [B, K, S].

        S is that of the head with the most slots; others are filled up with ``empty``.
        """
        parts = [getattr(views.slots, field) for views in self.views(layer)]
        S = max(x.shape[2] for x in parts)
        full = [torch.nn.functional.pad(x, (0, S - x.shape[2]), value=empty) for x in parts]
        return torch.cat(full, 1)

    def reserve(self) -> None:
        """Scratch for the decode steps, where the backend takes any."""
        for i, paged in enumerate(self.layers):
            if paged is not None:
                paged.backend.reserve(paged.plan, self.at(i)[1], self.batch)

    def copy(self, other: Holdings) -> None:
        """Make every page what it is in other holdings of the same layers."""
        for mine, theirs in zip(self.pools, other.pools, strict=True):
            if mine is not None and theirs is not None:
                mine.copy_(theirs)

    def clear(self) -> None:
        """Make every page an empty one."""
        for at, pool in zip(self.layers, self.pools, strict=True):
            if at is not None and pool is not None:
                at.layout.clear(pool)

    def scratch(self, device: torch.device) -> Tensor:
        """Memory for a copy of any layer's pages, uint8 [bytes of the largest]."""
        largest = max((x.numel() for x in self.pools if x is not None), default=0)
        return torch.empty(largest, dtype=torch.uint8, device=device)

    def reorder(self, rows: Tensor, scratch: Tensor) -> None:
        """Make row i what row ``rows[i]`` was: int64 [B]; ``scratch`` is written."""
        for pool in self.pools:
            if pool is not None:
                copy = scratch[: pool.numel()].view_as(pool)
                torch.index_select(pool, 0, rows, out=copy)
                pool.copy_(copy)

    def seen_of(self, layer: int) -> Tensor:
        """Tokens that a layer has seen, int64 [B]; of one that slides too."""
        if self.layers[layer] is None:
            return self.session.sliding_seen[layer]
        paged, at = self.at(layer)
        return paged.layout.seen(at.pool)

    def memory(self) -> dict[str, int]:
        """``LessKVCache.memory``."""
        state = pages = maps = 0
        shared: set[int] = set()  # layers of one space share its memory
        for at in self.held:
            pages += at.layout.nbytes
            state += at.layout.bytes_of("H", "z")
            memory = at.plan.memory
            if memory is not None and memory.data_ptr() not in shared:
                maps += memory.nbytes
                shared.add(memory.data_ptr())
        counters = sum(at.layout.header_bytes for at in self.held)
        pages, state, counters = (self.batch * n for n in (pages, state, counters))
        scratch = next((at.backend.workspace for at in self.held), 0)
        sliding_counters = sum(x.nbytes for x in self.session.sliding_seen.values())
        workspace = counters + scratch + sliding_counters
        slots = pages - state - counters
        full = sliding = sum(
            x.untyped_storage().nbytes()
            for _, at in self.session.made()
            for x in sliding_tensors(at).values()
        )
        for i, paged in enumerate(self.layers):
            if paged is not None:
                layout = paged.layout
                number = max(2, layout.format.k.bits // 8)
                per_token = 2 * layout.kv_heads * layout.head_dim * number
                full += int(self.seen_of(i).sum()) * per_token
        return {
            "slots": slots,
            "state": state,
            "maps": maps,
            "workspace": workspace,
            "native": sliding,
            "total": slots + state + maps + workspace + sliding,
            "full": full,
        }

    def stats(self) -> dict[str, list[int] | list[float]]:
        """``LessKVCache.stats``."""
        seen = [int(self.seen_of(i).sum()) for i in range(len(self.layers))]
        kept, share = [], []
        for i, (n, paged) in enumerate(zip(seen, self.layers, strict=True)):
            if paged is None:
                kept.append(n)
                share.append(0.0)
                continue
            runs = self.views(i)
            held = sum(int((at.slots.position >= 0).sum()) for at in runs)
            kept.append(held // paged.layout.kv_heads)
            mass = sum(float(at.share.sum()) for at in runs)
            share.append(mass / (n * paged.plan.spec.q_heads) if n else 0.0)
        return {
            "seen": seen,
            "kept": kept,
            "evictions": [n - h for n, h in zip(seen, kept, strict=True)],
            "memory_share": share,
        }
