"""What is compared: eviction and LESS at one budget, and eviction at equal bytes.

A *method* is a policy and, perhaps, a sidekick. "Equal bytes" gives eviction, beside its budget,
the tokens that the low-rank state's bytes would have bought, rounded up in eviction's favour.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from less import H2O, Policy, Sidekick, SinkRecent
from less.budget import most_within, page_bytes
from less.config import default_policy

SINKS = 4  # a window without the first tokens measures the lost sink, not lost context


@dataclass(frozen=True)
class Method:
    """One row of the table.

    Attributes:
        name: As it is printed.
        policy: Who stays in the slots; None is the full cache.
        sidekick: Feature maps, None for eviction alone.
        extra: Tokens beyond the budget, bought with the bytes named in ``name``.
    """

    name: str
    policy: Policy | None
    sidekick: Sidekick | None = None
    extra: int = 0


FULL = Method("full cache", None)
BASELINE = "H2O"  # the row whose loss to full attention the others recover


def tokens_bought(nbytes: float, budget: int, sidekick: Sidekick, dtype: torch.dtype) -> int:
    """Tokens per head beyond a budget that so many bytes of a layer buy, rounded up.

    Args:
        nbytes: Bytes of one layer of one sequence.
        budget: Tokens per head that there are already.
        sidekick: Which says how many heads of what size.
        dtype: Of the slots.
    """

    def cost(extra: int) -> int:
        return page_bytes(sidekick.kv_heads, sidekick.head_dim, dtype, budget + extra)

    return most_within(cost(0) + math.ceil(nbytes) - 1, cost) + 1


def state_bytes(budget: int, sidekick: Sidekick, dtype: torch.dtype) -> int:
    """Bytes of the low-rank state in one layer of one sequence."""
    K, D = sidekick.kv_heads, sidekick.head_dim
    return page_bytes(K, D, dtype, budget, sidekick.rank) - page_bytes(K, D, dtype, budget)


def standard_methods(
    budget: int,
    dtype: torch.dtype,
    sidekick: Sidekick | None = None,
    sidekick_policy: Policy | None = None,
    paper: Sidekick | None = None,
) -> list[Method]:
    """The rows of the table, the full cache first.

    Args:
        budget: Tokens per head, C.
        dtype: Of the slots.
        sidekick: The one under test; None leaves out LESS and the rows at its bytes, and has the
            default policy in their place.
        sidekick_policy: The score rule that it was trained with; it is brought to `budget`.
            Plain H2O if None.
        paper: Sidekick of the paper's own recipe, shown under plain H2O.
    """
    plain = H2O(heavy=budget - budget // 2, recent=budget // 2)
    methods = [FULL]
    if budget > SINKS:
        methods.append(Method("sinks + recent", SinkRecent(sinks=SINKS, recent=budget - SINKS)))
    methods.append(Method(BASELINE, plain))
    if sidekick is None:
        free = default_policy(budget)
        return [*methods, Method(rule_name(free), free)]
    rule = (sidekick_policy or plain).at_capacity(budget)
    extra = tokens_bought(state_bytes(budget, sidekick, dtype), budget, sidekick, dtype)
    methods.append(Method("H2O, equal bytes", plain.at_capacity(budget + extra), extra=extra))
    if rule != plain:
        name = f"{rule_name(rule)}, equal bytes"
        methods.append(Method(name, rule.at_capacity(budget + extra), extra=extra))
    if paper is not None:
        methods.append(Method("LESS, paper's recipe", plain, paper))
    methods.append(Method("LESS", rule, sidekick))
    return methods


def equal_bytes_with_maps(
    policy: Policy, sidekick: Sidekick, dtype: torch.dtype, batch: int = 1
) -> Method:
    """Eviction that also gets the tokens that the maps' weights would buy.

    The maps are weights: one copy serves every row of the batch, so they count 1/batch a row.

    Args:
        policy: Eviction at the budget.
        sidekick: The one whose bytes are matched.
        dtype: Of the slots.
        batch: Rows that share the maps.
    """
    budget = policy.capacity
    maps = sidekick.nbytes / (sidekick.layers * batch)
    state = state_bytes(budget, sidekick, dtype)
    extra = tokens_bought(maps + state, budget, sidekick, dtype)
    name = f"{rule_name(policy)}, equal bytes + maps"
    return Method(name, policy.at_capacity(policy.capacity + extra), extra=extra)


def rule_name(policy: Policy) -> str:
    """Short name of an eviction rule, for the table."""
    if isinstance(policy, SinkRecent):
        return "sinks + recent"
    if isinstance(policy, H2O):
        decayed = "decayed " if policy.decay != 1.0 else ""
        return decayed + "H2O" + (" per age" if policy.per_age else "")
    return type(policy).__name__
