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
from less.fit.recipe import LayerRecord, Recipe
from less.fit.schedule import schedule
from less.fit.start import Trainable
from less.layer.kinds import KEY_MEAN, KINDS
from less.policies import Policy


@dataclass
class _Data:
    """One layer's captured tensors with every policy's schedule, and rows drawn from them."""

    captured: Captured
    policies: Sequence[Policy]
    left: list[Tensor]  # per policy, [N, K, T]
    held: int
    generator: torch.Generator
    _queue: list[int] = field(default_factory=list)

    @property
    def train_chunks(self) -> int:
        return len(self.captured.q) - self.held

    def draw(self, policy: int, chunk: int, rows: int, gone_mass: bool = False) -> objective.Rows:
        """Rows of one chunk, drawn without repetition from the positions past the capacity."""
        c = self.captured
        first, T = self.policies[policy].capacity, c.q.shape[2]
        order = torch.randperm(T - first, generator=self.generator)[:rows]
        position = (order.sort().values + first)[None].to(c.q.device)
        one = slice(chunk, chunk + 1)
        return objective.prepare(
            c.q[one],
            c.k[one],
            c.v[one],
            c.out[one],
            self.left[policy][one],
            position,
            c.scale,
            c.softcap,
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
        """Mean loss over the held-back rows, per policy."""
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
    policies: Sequence[Policy],
    recipe: Recipe,
    layer: int,
    held: int,
    tick: Callable[[float], None] = lambda fraction: None,
    start: Mapping[str, Tensor] | None = None,
) -> tuple[dict[str, Tensor], LayerRecord]:
    """Train one layer's maps.

    Args:
        captured: From `LayerWalk.capture`; its last `held` chunks are not trained on.
        policies: Trained for all at once, one chunk each per step, losses relative to eviction's.
        recipe: How.
        layer: Index; part of the seed and of the record.
        held: Chunks held back.
        tick: Called with the fraction done.
        start: A layer's maps to begin at, with their ``key_mean``; None: drawn, matched in mass.

    Returns:
        The maps (float32, on the captured tensors' device) and the record. Centred maps are trained
        on keys without their mean, which comes with them; under a soft-cap, on keys as they are.
    """
    begun = time.perf_counter()
    generator = torch.Generator().manual_seed(recipe.seed * 100_003 + layer)
    c = captured
    left = [schedule(c.q, c.k, c.v, p, c.scale, c.softcap) for p in policies]
    mean = None
    if KINDS[recipe.kind].centred and not c.softcap:
        # As a cache's space rounds it. Every logit of a query moves by the same.
        known = None if start is None else start.get(KEY_MEAN)
        mean = (key_mean(c.k) if known is None else known).half().float().to(c.k.device)
        captured = replace(c, k=c.k.float() - mean[:, None])
    data = _Data(captured, policies, left, held, generator)
    weight = captured.o_weight.float()
    error = objective.LOSSES[recipe.loss]
    chunks = range(data.train_chunks, data.train_chunks + held)
    held_rows = [[data.draw(p, c, recipe.held_rows) for c in chunks] for p in range(len(policies))]
    eviction = data.losses(held_rows, None, recipe)
    trainable = Trainable(
        recipe.kind, captured.q, captured.k, recipe.rank, recipe.hidden, generator
    )
    if start is not None:
        trainable.begin_at(start)
    else:
        some = [(p, c) for p in range(len(policies)) for c in range(min(4, data.train_chunks))]
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
        for p in range(len(policies)):
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
