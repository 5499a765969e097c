"""Policies as dicts and text: in a sidekick's config, in ``LessConfig``, on a command line."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection, Mapping
from typing import Any

from less.policies.base import Policy
from less.policies.h2o import H2O
from less.policies.registry import find
from less.policies.sink_recent import SinkRecent

#: Short names of a command line; the caller brings them to a capacity.
SHORT: dict[str, Policy] = {"h2o": H2O(heavy=1, recent=1), "sinks": SinkRecent(sinks=4, recent=1)}


def policy_from_dict(d: Mapping[str, Any], argument: str = "policy") -> Policy:
    """Build a policy from ``Policy.to_dict``'s result.

    Args:
        d: The class's name under "name", and its settings.
        argument: What gave it, for the message.

    Raises:
        ValueError: No registered policy has the name, or a setting is unknown or out of range.
    """
    settings = dict(d)
    name = settings.pop("name", None)
    cls = find(argument, name)
    if not dataclasses.is_dataclass(cls):
        raise ValueError(f"{argument}: {name} must be a dataclass to be read from its settings")
    try:
        policy = cls(**settings)
    except TypeError as e:
        raise ValueError(f"{argument}: bad settings for {name}: {settings}: {e}") from e
    assert isinstance(policy, Policy)
    return policy


def policy_to_dict(policy: Policy) -> dict[str, Any]:
    """``policy.to_dict()``, once it is sure that ``policy_from_dict`` takes it back from JSON.

    Raises:
        TypeError: The policy is no dataclass.
        ValueError: A setting does not fit into JSON, or the policy cannot be read back.
    """
    settings = policy.to_dict()
    name = settings["name"]
    try:
        text = json.dumps(settings)
    except (TypeError, ValueError) as e:
        raise ValueError(f"policy: the settings of {name} do not fit into JSON: {e}") from e
    again = json.dumps(policy_from_dict(json.loads(text)).to_dict())
    if again != text:
        raise ValueError(f"policy: {name} is read back with other settings: {text} as {again}")
    return settings


def policy_from_text(argument: str, given: object, others: Collection[str] = ()) -> Policy:
    """The policy that a command line names.

    Args:
        argument: What gave it, for the message.
        given: A name in ``SHORT``, or ``Policy.to_dict``'s result, as JSON or as it is.
        others: Names that the caller understands by itself, for the message.

    Returns:
        The policy, at any capacity.

    Raises:
        ValueError: It is none of these, or ``policy_from_dict`` refuses it.
    """
    if isinstance(given, str) and given in SHORT:
        return SHORT[given]
    settings = given
    if isinstance(given, str) and given.lstrip().startswith("{"):
        try:
            settings = json.loads(given)
        except ValueError as e:
            raise ValueError(f"{argument}: {given} is not JSON: {e}") from e
    if not isinstance(settings, Mapping):
        names = ", ".join([*SHORT, *others])
        raise ValueError(
            f"{argument} must be one of {names}, or a policy's name and settings as JSON, such as "
            f'{{"name": "H2O", "heavy": 32, "recent": 32}}; got {given!r}'
        )
    return policy_from_dict(settings, argument)
