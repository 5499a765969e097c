"""One layer's training: rows drawn from its captured tensors, Adam on its maps.

The objective is the paper's (l2 after the output projection under the policy's mask).

Source: arXiv:2402.09398, section 3.3.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from less.fit import objective
from less.fit.calibrate import key_mean
from less.fit.capture import Captured
from less.fit.eviction import Eviction
from less.fit.recipe import LayerRecord, Recipe
from less.fit.schedule import schedule
from less.fit.start import Trainable
from less.layer.kinds import KEY_MEAN, KINDS


@dataclass
class _Data:
    """One layer's captured tensors with the schedule of every eviction, and rows drawn from them.

    Keys have no mean where the maps are centred: ``captured``'s and those of ``taken``, which are
    keys and values as the state takes them.
    """

    captured: Captured
    taken: tuple[Tensor, Tensor]
    evictions: Sequence[Eviction]
    left: list[Tensor]  # per eviction, [N, K, T]
    held: int
    generator: torch.Generator
    _queue: list[int] = field(default_factory=list)

    @property
    def train_chunks(self) -> int:
        return len(self.captured.q) - self.held

    def draw(self, which: int, chunk: int, rows: int, gone_mass: bool = False) -> objective.Rows:
        """Rows of one chunk, drawn without repetition from those for which a token has left."""
        c = self.captured
        first, T = min(self.evictions[which].capacities), c.q.shape[2]
        order = torch.randperm(T - first, generator=self.generator)[:rows]
        position = (order.sort().values + first)[None].to(c.q.device)
        one = slice(chunk, chunk + 1)
        return objective.prepare(
            c.q[one],
            c.k[one],
            c.v[one],
            c.out[one],
            self.left[which][one],
            position,
            c.scale,
            c.softcap,
            taken=(self.taken[0][one], self.taken[1][one]),
            gone_mass=gone_mass,
        )

    def next_chunk(self) -> int:
        """Training chunks in a shuffled order, again and again."""
        if not self._queue:
            self._queue = torch.randperm(self.train_chunks, generator=self.generator).tolist()
        return self._queue.pop()

    def losses(
        self, held_rows: Sequence[Sequence[objective.Rows]], maps: Any, recipe: Recipe
    ) -> list[float]:
        """Mean loss over the held-back rows, per eviction."""
        error = objective.LOSSES[recipe.loss]
        weight = self.captured.o_weight.float()
        with torch.no_grad():
            return [
                sum(
                    float(error(objective.attend(r, maps, recipe.kind), r.target, weight))
                    for r in rows
                )
                / len(rows)
                for rows in held_rows
            ]


def fit_layer(
    captured: Captured,
    evictions: Sequence[Eviction],
    recipe: Recipe,
    layer: int,
    held: int,
    tick: Callable[[float], None] = lambda fraction: None,
    start: Mapping[str, Tensor] | None = None,
) -> tuple[dict[str, Tensor], LayerRecord]:
    """Train one layer's maps.

    Args:
        captured: From `LayerWalk.capture`; its last `held` chunks are not trained on.
        evictions: Trained for all at once, one chunk each per step, losses relative to eviction's.
            Those by which nothing leaves are passed over. Where they have spaces, centred maps take
            the mean of keys from there.
        recipe: How.
        layer: Index; part of the seed and of the record.
        held: Chunks held back.
        tick: Called with the fraction done.
        start: A layer's maps to begin at, with their ``key_mean``; None: drawn, matched in mass.

    Returns:
        The maps (float32, on the captured tensors' device) and the record. Centred maps are trained
        on keys without their mean, which comes with them; under a soft-cap, on keys as they are.
        Where nothing leaves there are no maps.
    """
    begun = time.perf_counter()
    generator = torch.Generator().manual_seed(recipe.seed * 100_003 + layer)
    c = captured
    evictions = [e for e in evictions if min(e.capacities) < c.q.shape[2]]
    if not evictions:
        return {}, LayerRecord(layer, [0.0], [0.0], [0.0], time.perf_counter() - begun)
    left = [schedule(c.q, c.k, c.v, e, c.scale, c.softcap) for e in evictions]
    taken = evictions[0].cold(c.k, c.v)
    mean = None
    if KINDS[recipe.kind].centred and not c.softcap:
        # As a cache's space rounds it. Every logit of a query moves by the same.
        mean = _mean(c, evictions, start).half().float().to(c.k.device)
        captured = replace(c, k=c.k.float() - mean[:, None])
        taken = taken[0] - mean[:, None], taken[1]
    data = _Data(captured, taken, evictions, left, held, generator)
    weight = captured.o_weight.float()
    error = objective.LOSSES[recipe.loss]
    chunks = range(data.train_chunks, data.train_chunks + held)
    held_rows = [[data.draw(p, c, recipe.held_rows) for c in chunks] for p in range(len(evictions))]
    eviction = data.losses(held_rows, None, recipe)
    trainable = Trainable(recipe.kind, captured.q, taken[0], recipe.rank, recipe.hidden, generator)
    if start is not None:
        trainable.begin_at(start)
    else:
        some = [(p, c) for p in range(len(evictions)) for c in range(min(4, data.train_chunks))]
        trainable.match_mass([data.draw(p, c, recipe.rows, gone_mass=True) for p, c in some])
    with torch.no_grad():
        at_start = data.losses(held_rows, trainable.maps(), recipe)
    optimizer = torch.optim.Adam(trainable.leaves.values(), lr=recipe.lr, betas=(0.9, 0.97))
    for step in range(recipe.steps):
        for group in optimizer.param_groups:
            group["lr"] = recipe.rate(step)
        optimizer.zero_grad()
        maps = trainable.maps()
        loss = torch.zeros((), device=captured.q.device)
        for p in range(len(evictions)):
            rows = data.draw(p, data.next_chunk(), recipe.rows)
            out = objective.attend(rows, maps, recipe.kind)
            # Relative to eviction's, else the smallest budget alone would be trained for.
            loss = loss + error(out, rows.target, weight) / max(eviction[p], 1e-30)
        loss.backward()
        optimizer.step()
        tick((step + 1) / recipe.steps)
    final = {n: t.detach().clone() for n, t in trainable.maps().items()}
    losses = data.losses(held_rows, final, recipe)
    if mean is not None:
        final[KEY_MEAN] = mean
    return final, LayerRecord(layer, eviction, at_start, losses, time.perf_counter() - begun)


def _mean(
    captured: Captured, evictions: Sequence[Eviction], start: Mapping[str, Tensor] | None
) -> Tensor:
    """The mean of keys [K, D] that a layer's maps are centred on."""
    if (space := evictions[0].space) is not None:
        return space.key_mean
    known = None if start is None else start.get(KEY_MEAN)
    return key_mean(captured.k) if known is None else known
