"""Keep everything: a layer that is never evicted from, up to a stated maximum."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from less.policies.base import Candidates, Policy, Rule, check_count, rank_by_rule


@dataclass(frozen=True)
class Full(Policy):
    """Keep every token, ``max_tokens`` at most; one more is refused, never evicted.

    For single layers of a cache (the first ones, say) whose others are bounded. Its memory is
    allocated at once like everybody's, so the maximum must be known; it has no low-rank state, for
    nothing ever gets there.

    Attributes:
        max_tokens: Tokens that there is room for, padding counted too.

    Raises:
        ValueError: ``max_tokens`` is no whole number above 0.
    """

    max_tokens: int
    needs_scores: ClassVar[bool] = False
    evicts: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Refuse a maximum of nothing."""
        check_count("Full", "max_tokens", self.max_tokens)
        if self.max_tokens == 0:
            raise ValueError("Full: max_tokens must be 1 or more, got 0")

    @property
    def capacity(self) -> int:
        """Tokens that there is room for."""
        return self.max_tokens

    def at_capacity(self, capacity: int) -> Full:
        """Another maximum."""
        return replace(self, max_tokens=capacity)

    @property
    def rule(self) -> Rule:
        """All are recent."""
        return Rule(self.max_tokens, 0, by_score=False, per_age=False)

    def rank(self, tokens: Candidates) -> Tensor:
        """All rank alike: they fit."""
        return rank_by_rule(self.rule, tokens.position, tokens.score, tokens.seen)
