"""Eviction policies: who stays in the slots."""

from less.policies.base import Candidates, Policy, Rule
from less.policies.full import Full
from less.policies.h2o import H2O
from less.policies.sink_recent import SinkRecent

__all__ = ["H2O", "Candidates", "Full", "Policy", "Rule", "SinkRecent", "policy_from_dict"]

_BUILT_IN: dict[str, type[Policy]] = {"Full": Full, "H2O": H2O, "SinkRecent": SinkRecent}


def policy_from_dict(d: dict[str, object]) -> Policy:
    """Build a built-in policy from ``Policy.to_dict``'s result.

    Raises:
        ValueError: The name is not a built-in policy's, or a setting is unknown or out of range.
    """
    settings = dict(d)
    name = settings.pop("name", None)
    if not isinstance(name, str) or name not in _BUILT_IN:
        raise ValueError(f"policy: name must be one of {sorted(_BUILT_IN)}, got {name!r}")
    try:
        return _BUILT_IN[name](**settings)
    except TypeError as e:
        raise ValueError(f"policy: bad settings for {name}: {settings}") from e
