"""Eviction policies: who stays in the slots."""

from less.policies.base import Candidates, Policy, Rule
from less.policies.full import Full
from less.policies.h2o import H2O
from less.policies.registry import import_policies
from less.policies.sink_recent import SinkRecent
from less.policies.written import policy_from_dict, policy_from_text, policy_to_dict

__all__ = [
    "H2O",
    "Candidates",
    "Full",
    "Policy",
    "Rule",
    "SinkRecent",
    "import_policies",
    "policy_from_dict",
    "policy_from_text",
    "policy_to_dict",
]
