"""Heavy hitters: keep what has received the most attention, and the most recent tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from less.policies.base import Candidates, Policy, Rule, check_count, rank_by_rule

_NEEDED: Any = None  # has no default; without this one, H2O(64) would be Python's bare TypeError


@dataclass(frozen=True)
class H2O(Policy):
    """Keep the ``recent`` last tokens and, of the others, the ``heavy`` highest scores.

    A token's score is the softmax weight that it has received from every query since it came,
    summed over the query heads of its group: score <- decay * score + weight.

    Attributes:
        heavy: Tokens kept for their scores.
        recent: Last tokens, always kept.
        sinks: First positions of the text, always kept; they are part of ``heavy``.
        decay: What a score keeps per token, in (0, 1]; 1 is the paper's sum.
        per_age: Rank by score per token of age, instead of by score.

    Raises:
        TypeError: ``heavy`` or ``recent`` is not given.
        ValueError: A setting is out of range; the message names it.

    Source: Zhang et al., "H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large
    Language Models", NeurIPS 2023, arXiv:2306.14048.
    """

    heavy: int = _NEEDED
    recent: int = _NEEDED
    sinks: int = 0
    decay: float = 1.0
    per_age: bool = False

    def __post_init__(self) -> None:
        """Refuse settings that keep nothing or contradict each other."""
        if self.heavy is None or self.recent is None:
            missing = [n for n in ("heavy", "recent") if getattr(self, n) is None]
            raise TypeError(
                f"H2O: {' and '.join(missing)} must be given: H2O(heavy=32, recent=32) keeps the "
                "32 highest scores and the last 32 tokens of each head"
            )
        for name in ("heavy", "recent", "sinks"):
            check_count("H2O", name, getattr(self, name))
        if self.heavy + self.recent == 0:
            raise ValueError("H2O: heavy + recent must keep at least one token, got 0 + 0")
        if self.sinks > self.heavy:
            raise ValueError(
                f"H2O: sinks are part of heavy and must not exceed it, got sinks={self.sinks}, "
                f"heavy={self.heavy}"
            )
        if isinstance(self.decay, bool) or not isinstance(self.decay, (int, float)):
            raise ValueError(f"H2O: decay must be a number in (0, 1], got {self.decay!r}")
        if not (math.isfinite(self.decay) and 0.0 < self.decay <= 1.0):
            raise ValueError(f"H2O: decay must be in (0, 1], got {self.decay}")
        if not isinstance(self.per_age, bool):
            raise ValueError(f"H2O: per_age must be True or False, got {self.per_age!r}")

    @property
    def capacity(self) -> int:
        """Tokens kept per head: heavy + recent."""
        return self.heavy + self.recent

    def at_capacity(self, capacity: int) -> H2O:
        """Heavy and recent tokens in proportion, at least one each; sinks as many as they are."""
        if capacity < (self.heavy > 0) + (self.recent > 0):
            raise ValueError(
                f"H2O.at_capacity: heavy and recent tokens need 2 or more, got {capacity}"
            )
        recent = round(capacity * self.recent / self.capacity)
        recent = min(max(recent, int(self.recent > 0)), capacity - int(self.heavy > 0))
        return replace(self, heavy=capacity - recent, recent=recent)

    @property
    def rule(self) -> Rule:
        """Rank by score; recent tokens and sinks are protected."""
        return Rule(
            self.recent,
            self.sinks,
            by_score=True,
            per_age=self.per_age,
            capacity=self.capacity,
        )

    def rank(self, tokens: Candidates) -> Tensor:
        """Rank by score; recents and sinks stay."""
        return rank_by_rule(self.rule, tokens.position, tokens.score, tokens.seen)
