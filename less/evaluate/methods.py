"""What is compared: eviction and LESS at one budget, and what its bytes buy otherwise.

A *method* is a policy and, perhaps, a sidekick and a format of rows. "Equal bytes" gives eviction,
beside its budget, the tokens that the low-rank state's bytes would have bought, rounded up in
eviction's favour. A method that names a format keeps as many tokens in it as the bytes of the
budget's tokens buy, rounded down.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from less.budget import least_tokens, most_within, page_bytes
from less.cache import LessKVCache
from less.calibration import Calibration
from less.config import LessConfig, default_policy
from less.dtypes import MERGING_ROWS, format_name, row_format
from less.hf.models import ModelFacts
from less.policies import H2O, Policy, SinkRecent
from less.policies.base import checked_at_capacity
from less.policies.default import merging_policy
from less.sidekick import Sidekick

SINKS = 4  # a window without the first tokens measures the lost sink, not lost context


@dataclass(frozen=True)
class Storage:
    """How the slots of a method are stored.

    Attributes:
        dtype: Of their rows, or a packed format.
        sinks: As in ``LessKVCache``, of packed formats.
        hot: Likewise.
        hot_dtype: Likewise.
        calibration: Of the model's channels.
        victim: What becomes of evicted tokens, as in ``LessKVCache``.
    """

    dtype: torch.dtype | str
    sinks: int | None = None
    hot: int | None = None
    hot_dtype: torch.dtype = torch.int8
    calibration: Calibration | None = None
    victim: str | None = None

    @property
    def name(self) -> str:
        """Of the format: ``k4v4``; or ``k4v4, merging``."""
        return format_name(self.dtype) + (", merging" if self.victim == "merge" else "")

    @property
    def least(self) -> int:
        """The fewest tokens of a head."""
        return least_tokens(self.dtype, self.sinks, self.hot)

    def page_bytes(self, kv_heads: int, head_dim: int, tokens: int, rank: int = 0) -> int:
        """``less.budget.page_bytes`` of slots stored so."""
        hot = (self.sinks, self.hot, self.hot_dtype)
        weights = self.victim == "merge" or None
        return page_bytes(kv_heads, head_dim, self.dtype, tokens, rank, *hot, weights)

    def settings(self) -> dict[str, Any]:
        """What ``less.hf.cache_for`` takes of it."""
        return dict(vars(self))

    def described(self) -> dict[str, Any]:
        """JSON-ready values: format, hot rows, victim, and a digest of the calibration."""
        packed = row_format("Storage", self.dtype).packed
        layout = {n: getattr(self, n) for n in ("sinks", "hot") if packed}
        hot = {**layout, "hot_dtype": format_name(self.hot_dtype)} if packed else {}
        digest = None if self.calibration is None else self.calibration.digest
        said = {} if self.victim is None else {"victim": self.victim}
        return {"dtype": format_name(self.dtype), **hot, **said, "calibration": digest}


@dataclass(frozen=True)
class Method:
    """One row of the table.

    Attributes:
        name: As it is printed.
        policy: Who stays in the slots; None is the full cache.
        sidekick: Feature maps, None for eviction alone.
        extra: Tokens beyond the budget, bought with the bytes named in ``name``.
        storage: How its slots are stored; None: in the dtype of the table.
        config: What builds its cache, with the bytes of one row; None: the fields above do.
    """

    name: str
    policy: Policy | None
    sidekick: Sidekick | None = None
    extra: int = 0
    storage: Storage | None = None
    config: LessConfig | None = None

    def stored(self, dtype: torch.dtype) -> Storage:
        """How its slots are stored in a table of a dtype."""
        return Storage(dtype) if self.storage is None else self.storage

    def cache(self, model: Any, dtype: torch.dtype, batch: int = 1) -> LessKVCache | None:
        """Its cache for a model; None for the full cache.

        Args:
            model: As in ``less.hf.cache_for``.
            dtype: Of the table's slots.
            batch: Rows.
        """
        from less.hf import cache_for

        if self.policy is None:
            return None
        if self.config is not None:
            assert isinstance(self.config.bytes, int)
            whole = replace(self.config, bytes=batch * self.config.bytes)
            return whole.cache(model, batch, calibration=self.stored(dtype).calibration)
        settings = self.stored(dtype).settings()
        return cache_for(model, self.policy, self.sidekick, batch=batch, **settings)


#: What loses least at given bytes without training: the default of a budget in bytes.
MERGING = Storage(MERGING_ROWS, victim="merge")
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


def in_formats(
    budget: int,
    formats: Sequence[Storage],
    policy: Policy,
    heads: tuple[int, int],
    dtype: torch.dtype,
    sidekick: Sidekick | None = None,
) -> list[Method]:
    """A policy in several formats, each with the tokens that the budget's bytes buy in it.

    Bytes are those of a layer's whole page, without the low-rank state, which comes on top with
    every format. Never more than those of the budget's tokens.

    Args:
        budget: Tokens per head of the table, C.
        formats: How the slots of each method are stored.
        policy: The rule, at any capacity.
        heads: Kv heads K and head dim D of a layer.
        dtype: Of the table's slots.
        sidekick: In whose memory the evicted go; None: they are forgotten.

    Raises:
        ValueError: The bytes are too few for a format's hot rows; the message names it.
    """
    have = page_bytes(*heads, dtype, budget)
    methods = []
    for storage in formats:

        def cost(tokens: int, at: Storage = storage) -> int:
            return at.page_bytes(*heads, max(tokens, at.least))

        tokens = most_within(have, cost)
        if tokens < storage.least:
            raise ValueError(
                f"a budget of {budget} tokens in {format_name(dtype)}, {have:,} bytes of a layer, "
                f"is too small for {storage.name}: {storage.least} tokens, the fewest that it "
                f"keeps, take {cost(storage.least):,}"
            )
        rule = "LESS" if sidekick is not None else rule_name(policy)
        scaled = checked_at_capacity(policy, tokens)
        name = f"{rule}, {storage.name}"
        methods.append(Method(name, scaled, sidekick, tokens - budget, storage))
    return methods


def merging(budget: int, heads: tuple[int, int], dtype: torch.dtype) -> list[Method]:
    """``MERGING`` at the bytes of a budget; no method where those do not hold its hot rows.

    Args:
        budget: Tokens per head of the table, C.
        heads: Kv heads K and head dim D of a layer.
        dtype: Of the table's slots.
    """
    least = MERGING.page_bytes(*heads, max(MERGING.least, 4)) if heads[1] % 8 == 0 else math.inf
    if page_bytes(*heads, dtype, budget) < least:
        return []
    return in_formats(budget, [MERGING], merging_policy(budget), heads, dtype)


def calibrated(
    merged: Sequence[Method],
    facts: ModelFacts,
    calibration: Calibration,
    budget: int,
    dtype: torch.dtype,
) -> list[Method]:
    """``merging``'s methods once more in a calibration's space, their slots dealt to the heads.

    Args:
        merged: What ``merging`` gave at the budget.
        facts: Of the model.
        calibration: Of the model, with curves.
        budget: Tokens per head of the table, C.
        dtype: Of the table's slots.
    """
    page = page_bytes(facts.kv_heads, facts.head_dim, dtype, budget)
    windows = facts.kv_heads * facts.window_bytes
    room = (facts.layers - len(facts.windows)) * page + windows
    config = LessConfig(bytes=room, rows=MERGING_ROWS, victim="merge", shape="calibrated")
    return [
        replace(
            method,
            name=f"{method.name}, calibrated",
            storage=replace(MERGING, calibration=calibration),
            config=config,
        )
        for method in merged
    ]


def rule_name(policy: Policy) -> str:
    """Short name of an eviction rule, for the table."""
    if isinstance(policy, SinkRecent):
        return "sinks + recent"
    if isinstance(policy, H2O):
        decayed = "decayed " if policy.decay != 1.0 else ""
        return decayed + "H2O" + (" per age" if policy.per_age else "")
    return type(policy).__name__
