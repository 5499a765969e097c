"""The policy that a sidekick was trained with."""

from __future__ import annotations

from less.policies import Policy, policy_from_dict
from less.policies.base import checked_at_capacity
from less.sidekick.sidekick import Sidekick


def trained_policy(sidekick: Sidekick, budget: int) -> Policy | None:
    """The policy that a sidekick was trained with, brought to `budget`; None where it names none.

    Of several, the one whose own budget is nearest.

    Raises:
        ValueError: the sidekick's config names a policy that no imported module defines.
    """
    listed = sidekick.config.get("policies") or sidekick.config.get("policy") or []
    if isinstance(listed, dict):
        listed = [listed]
    policies = [policy_from_dict(entry) for entry in listed]
    if not policies:
        return None
    nearest = min(policies, key=lambda policy: abs(policy.capacity - budget))
    return checked_at_capacity(nearest, budget)
