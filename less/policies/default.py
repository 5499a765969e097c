"""Who stays where nobody says."""

from __future__ import annotations

from less.policies.h2o import H2O

DECAY = 0.98  # of the scores, per token


def default_policy(capacity: int) -> H2O:
    """H2O with decaying scores, half of it recent.

    Of the rules that need no training it loses least on two of three models and is level with the
    others on the third: docs/policies.md.
    """
    return H2O(heavy=capacity - capacity // 2, recent=capacity // 2, decay=DECAY)


def merging_policy(capacity: int) -> H2O:
    """H2O for a cache that merges: decaying scores, a quarter of it recent.

    docs/memory.md has the figures.
    """
    recent = capacity // 4
    return H2O(heavy=capacity - recent, recent=recent, decay=DECAY)
