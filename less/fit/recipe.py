"""How a sidekick is trained, and what is reported of it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from less._check import require_int
from less.fit import objective
from less.sidekick import TENSORS


@dataclass(frozen=True)
class Recipe:
    """How each layer is trained.

    Attributes:
        kind: Kind of map, a name in ``less.layer.kinds.KINDS``.
        loss: Error of a query's attention output after the output projection: its l2 norm
            ("norm") or its mean square ("squared", the paper's).
        rank: Features R.
        hidden: Hidden width E, of kinds that have a hidden layer.
        steps: Adam steps per layer. A step takes one chunk per policy.
        lr: Peak learning rate; it rises over `warmup` steps and falls to 0 as a half cosine.
        warmup: Steps of linear rise.
        rows: Queries sampled per chunk and step, all past the policy's capacity.
        held_rows: Queries per held-back chunk that the reported losses are measured on.
        seed: With the layer's index, seeds everything that is drawn for that layer.

    Raises:
        ValueError: a setting is out of range.
    """

    kind: str = "exp"
    loss: str = "norm"
    rank: int = 8
    hidden: int = 64
    steps: int = 1000
    lr: float = 1e-2
    warmup: int = 10
    rows: int = 32
    held_rows: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse settings out of range, by name."""
        if self.kind not in TENSORS:
            raise ValueError(f"Recipe: kind must be one of {sorted(TENSORS)}, got {self.kind!r}")
        if self.loss not in objective.LOSSES:
            raise ValueError(
                f"Recipe: loss must be one of {sorted(objective.LOSSES)}, got {self.loss!r}"
            )
        for name in ("rank", "hidden", "rows", "held_rows"):
            require_int("Recipe", name, getattr(self, name), 1)
        for name in ("steps", "warmup", "seed"):
            require_int("Recipe", name, getattr(self, name), 0)
        check_lr(self)

    def rate(self, step: int) -> float:
        """The learning rate of a step."""
        return half_cosine(self.lr, step, self.steps, self.warmup)


def check_lr(settings: Any) -> None:
    """Refuse a learning rate that is no positive number.

    Raises:
        ValueError: ``settings.lr`` is such.
    """
    lr = settings.lr
    if not (isinstance(lr, (int, float)) and math.isfinite(lr) and lr > 0):
        raise ValueError(f"{type(settings).__name__}: lr must be a positive number, got {lr!r}")


def half_cosine(lr: float, step: int, steps: int, warmup: int) -> float:
    """A learning rate that rises over `warmup` steps and falls to 0 as a half cosine."""
    rise = min(1.0, (step + 1) / max(1, warmup))
    return lr * rise * 0.5 * (1 + math.cos(math.pi * step / max(1, steps)))


@dataclass(frozen=True)
class LayerRecord:
    """What came of a layer: the recipe's loss on held-back chunks, one per policy.

    Attributes:
        layer: Index.
        eviction: Of eviction alone.
        start: The same with the maps that training started from.
        sidekick: The same with the trained maps.
        seconds: Wall time of the layer.
    """

    layer: int
    eviction: list[float]
    start: list[float]
    sidekick: list[float]
    seconds: float

    @property
    def helps(self) -> bool:
        """Whether the maps are better than eviction alone, mean over the policies."""
        return self.ratio < 1.0

    @property
    def ratio(self) -> float:
        """Sidekick's loss over eviction's, mean over the policies."""
        ratios = [
            s / e if e > 0 else 1.0 for s, e in zip(self.sidekick, self.eviction, strict=True)
        ]
        return sum(ratios) / len(ratios)


@dataclass(frozen=True)
class Progress:
    """Where a run stands, for whoever shows it.

    Attributes:
        layer: Layer at work.
        layers: Number of layers.
        phase: "capture", "train" or "done" (with this layer); "tune", of all layers together.
        fraction: Part of this layer's work that is done.
        record: The layer's record, in phase "done".
        resumed: The layer was read from an earlier run's file.
    """

    layer: int
    layers: int
    phase: str
    fraction: float
    record: LayerRecord | None = None
    resumed: bool = False
