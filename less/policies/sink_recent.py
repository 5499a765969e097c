"""Attention sinks and a window: keep the first tokens and the last ones."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from less.policies.base import Candidates, Policy, Rule, check_count, rank_by_rule


@dataclass(frozen=True)
class SinkRecent(Policy):
    """Keep the first ``sinks`` positions and the ``recent`` last tokens.

    Attributes:
        sinks: First positions, always kept. 0 is a plain window, which wrecks most real models.
        recent: Last tokens, always kept.

    Raises:
        ValueError: A setting is out of range; the message names it.

    Source: Xiao et al., "Efficient Streaming Language Models with Attention Sinks", ICLR 2024,
    arXiv:2309.17453; the lambda-mask of Han et al., arXiv:2308.16137.
    """

    sinks: int = 4
    recent: int = 252
    needs_scores: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Refuse settings that keep nothing."""
        for name in ("sinks", "recent"):
            check_count("SinkRecent", name, getattr(self, name))
        if self.sinks + self.recent == 0:
            raise ValueError("SinkRecent: sinks + recent must keep at least one token, got 0 + 0")

    @property
    def capacity(self) -> int:
        """Tokens kept per head: sinks + recent."""
        return self.sinks + self.recent

    def at_capacity(self, capacity: int) -> SinkRecent:
        """As many sinks, and a shorter or longer window."""
        if capacity < self.sinks + (self.recent > 0):
            raise ValueError(
                f"SinkRecent.at_capacity: {self.sinks} sinks and a window do not fit into "
                f"{capacity} tokens"
            )
        return replace(self, recent=capacity - self.sinks)

    @property
    def rule(self) -> Rule:
        """Sinks and recents, no scores."""
        return Rule(self.recent, self.sinks, by_score=False, per_age=False, capacity=self.capacity)

    def rank(self, tokens: Candidates) -> Tensor:
        """Sinks and recents rank above everything else."""
        return rank_by_rule(self.rule, tokens.position, tokens.score, tokens.seen)
