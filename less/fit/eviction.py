"""How the layers of a cache evict: what training replays.

It follows from a policy alone, for float32 rows and heads that are alike, or from a ``LessConfig``:
then the cache is built as it will be served, with a state of the maps' rank, and its policies,
slots of heads, rows and spaces are those that training sees.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from less import reference
from less.calibration import Calibration
from less.config import LessConfig
from less.dtypes import RowType
from less.hf.models import ModelFacts
from less.layer import PageLayout, Space
from less.layer.kinds import KEY_MEAN, KINDS
from less.policies import Policy
from less.policies.base import checked_at_capacity
from less.sidekick import Sidekick


@dataclass(frozen=True)
class Eviction:
    """How a layer's cache evicts.

    Attributes:
        policy: Who stays; of heads that differ in slots, at the largest.
        layout: Slots of each head, and their rows, without a state. None: as many as the policy
            keeps, of float32.
        space: Of the layout's rows; None: as a ``PagedLayer`` has it.
    """

    policy: Policy
    layout: PageLayout | None = None
    space: Space | None = None

    @property
    def capacities(self) -> tuple[int, ...]:
        """Slots of each kv head; one number for all of them without a layout."""
        return (self.policy.capacity,) if self.layout is None else self.layout.capacities

    def cold(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values as they leave: what packed rows, hot before, have made of them.

        Args:
            k: [B, K, T, D].
            v: [B, K, T, D].

        Returns:
            float32 [B, K, T, D] each.
        """
        layout = self.layout
        if layout is None or not layout.format.packed:
            return k.float(), v.float()
        space = self.space or Space.of(layout.kv_heads, layout.head_dim)

        def rounded(x: Tensor, name: str, kind: RowType) -> Tensor:
            x = reference.rotate(x.cpu(), space, name)
            for stored in (layout.hot_type, kind):
                x = reference.decode(*reference.encode(x, stored), stored)
            return x

        keys = reference.keys_out_of_space(rounded(k, "key", layout.format.k), space)
        values = reference.values_out_of_space(rounded(v, "value", layout.format.v), space)
        return keys.to(k.device), values.to(v.device)


@dataclass(frozen=True)
class Served:
    """A cache that maps are trained for.

    Attributes:
        layers: How each layer evicts; None: nothing leaves it.
        policy: Who stays, at the mean number of slots of the heads that evict.
        budgets: The fewest and the most slots of these heads.
    """

    layers: tuple[Eviction | None, ...]
    policy: Policy
    budgets: tuple[int, ...]


def check_evicts(policies: Sequence[Policy]) -> None:
    """Refuse a policy under which nothing is evicted.

    Raises:
        ValueError: naming it.
    """
    for policy in policies:
        if not policy.evicts:
            raise ValueError(f"train: policies must evict tokens, got {type(policy).__name__}")


def served(
    model: Any,
    facts: ModelFacts,
    given: Policy | LessConfig,
    calibration: Calibration | None,
    kind: str,
    rank: int,
) -> Served:
    """How the layers of a cache evict.

    Args:
        model: The model, whole.
        facts: What is known of it.
        given: A policy; or a cache's config, whose ``sidekick`` and ``calibration`` are not used.
        calibration: Of the config's rows and budgets.
        kind: Of the maps.
        rank: Of the state.

    Raises:
        ValueError: The config has no cache for this model, or one without a state.
    """
    if isinstance(given, Policy):
        check_evicts([given])
        own = Eviction(given)
        layers = tuple(None if i in facts.windows else own for i in range(facts.layers))
        return Served(layers, given, (given.capacity,))
    cache = given.cache(
        model, sidekick=_placeholder(facts, calibration, kind, rank), calibration=calibration
    )
    evictions: list[Eviction | None] = [None] * facts.layers
    for i, layout in enumerate(cache.layouts):
        policy = cache.policies[i]
        if layout is not None and policy is not None and policy.evicts:
            own_space = None if calibration is None else calibration.space(i)
            if own_space is not None and facts.softcap:
                own_space = own_space.without_key_mean()
            evictions[i] = Eviction(policy, replace(layout, rank=0), own_space)
    kept = [e for e in evictions if e is not None]
    slots = [n for e in kept for n in e.capacities]
    mean = checked_at_capacity(kept[0].policy, round(sum(slots) / len(slots)))
    return Served(tuple(evictions), mean, (min(slots), max(slots)))


def _placeholder(
    facts: ModelFacts, calibration: Calibration | None, kind: str, rank: int
) -> Sidekick:
    """A sidekick of the shape and the means of the one that is to be trained."""
    heads = (facts.q_heads, facts.kv_heads, facts.head_dim)
    drawn = Sidekick.random(facts.layers, *heads, rank, 1, kind, 0)
    if calibration is None or not KINDS[kind].centred or facts.softcap:
        return drawn
    layers = []
    for i, maps in enumerate(drawn):
        space = calibration.space(i)
        layers.append(maps if space is None else {**maps, KEY_MEAN: space.key_mean})
    return Sidekick(layers, kind)


def all_served(
    model: Any,
    facts: ModelFacts,
    given: Sequence[Policy | LessConfig],
    calibration: Calibration | None,
    kind: str,
    rank: int,
) -> list[Served]:
    """``served`` of several, that one sidekick is trained for.

    Raises:
        ValueError: They differ in rows, or a calibration is given that none of them uses.
    """
    if calibration is not None and not any(isinstance(x, LessConfig) for x in given):
        raise ValueError("train: calibration belongs to budgets of a LessConfig, got policies")
    found = [served(model, facts, x, calibration, kind, rank) for x in given]
    rows = {
        None if e.layout is None else (e.layout.dtype, e.layout.hot_dtype)
        for one in found
        for e in one.layers
        if e is not None
    }
    if len(rows) > 1:
        raise ValueError(f"train: all caches must have the same rows, got {sorted(map(str, rows))}")
    return found
