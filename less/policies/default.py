"""Who stays where nobody says."""

from __future__ import annotations

from less.policies.h2o import H2O

DECAY = 0.98  # of the scores, per token


def default_policy(capacity: int) -> H2O:
    """H2O with decaying scores, half of it recent: the best rule that needs no training.

    docs/policies.md has the measurement.
    """
    return H2O(heavy=capacity - capacity // 2, recent=capacity // 2, decay=DECAY)
