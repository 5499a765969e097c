"""One measurement of several methods on one model: perplexity, copying, bytes, speed."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from less.cache import LessKVCache
from less.dtypes import format_name
from less.dtypes import name as name_of
from less.evaluate.feeding import Progress
from less.evaluate.methods import BASELINE, Method, rule_name
from less.evaluate.perplexity import (
    FROM,
    Nats,
    copy_perplexity,
    copy_probes,
    full_attention,
    recovered,
    through_caches,
)
from less.evaluate.speed import speed


@dataclass(frozen=True)
class Result:
    """One row of the table, JSON-ready. Bytes are of one row of a batch, after `length` tokens.

    Attributes:
        method: Name as printed.
        policy: Its policy with all settings, "" for the full cache.
        budget: Tokens per head that all methods of the table started from.
        kept: Tokens per head that this one keeps.
        length: Tokens per chunk.
        chunks: Chunks behind the perplexity.
        slots: Bytes of the slots; of k and v for the full cache.
        state: Bytes of H and z.
        maps: Bytes of the feature maps, and of the means and scales of channels, once for the
            whole batch.
        dtype: Of the slots, or their packed format; of k and v for the full cache.
        maps_dtype: Of the feature maps' matrices, "" where there are none.
        nats: Mean nats per token at positions `start` on.
        start: First position counted.
        perplexity: exp(nats).
        loss: Nats above full attention.
        loss_error: Standard error of `loss`, paired over chunks.
        recovered: Share of plain H2O's loss that is won back.
        recovered_error: Its standard error.
        nats_overall: Mean nats over all predicted positions.
        copy_perplexity: Perplexity of the second copy of the copy probe.
        probes: Copy probes behind it.
        memory_share: Mean part of the attention mass that the low-rank state took.
        tokens_per_second: Decoding speed at batch 1 with `length` tokens seen.
        prompt_seconds: To take in those tokens as a prompt.
        chunk_losses: `loss` of each chunk.
        storage: ``Storage.described``; empty for the full cache.
    """

    method: str
    policy: str
    budget: int
    kept: int
    length: int
    chunks: int
    slots: int
    state: int
    maps: int
    nats: float
    start: int
    perplexity: float
    loss: float
    loss_error: float
    recovered: float
    recovered_error: float
    nats_overall: float
    dtype: str = "float16"
    maps_dtype: str = ""
    copy_perplexity: float = math.nan
    probes: int = 0
    memory_share: float = 0.0
    tokens_per_second: float = math.nan
    prompt_seconds: float = math.nan
    chunk_losses: list[float] = dataclasses.field(default_factory=list)
    storage: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def held(self) -> int:
        """Bytes per row of the batch: slots and state, without the shared maps."""
        return self.slots + self.state


@dataclass(frozen=True)
class Full:
    """What full attention costs on the chunks and on their copy probes; shared by all budgets.

    Attributes:
        chunks: Of the chunks.
        probes: Of the probes, None without.
        opened: Tokens that open every chunk and are not text (BOS).
    """

    chunks: Nats
    probes: Nats | None
    opened: int = 0


def measure_full(
    model: Any, chunks: Tensor, probes: int, progress: Progress | None = None, opened: int = 0
) -> Full:
    """Full attention over the chunks and the copy probes made of the first `probes` of them.

    `opened` tokens open every chunk and are not text (BOS).
    """
    rows = with_probes(chunks, probes, opened)
    nats = full_attention(model, rows, progress=progress)
    count = len(chunks)
    return Full(nats.rows(0, count), nats.rows(count) if probes else None, opened)


def with_probes(chunks: Tensor, probes: int, opened: int = 0) -> Tensor:
    """The chunks, and below them copy probes made of the first `probes` of them.

    Args:
        chunks: int64 [chunks, length].
        probes: How many.
        opened: As in ``copy_probes``.

    Raises:
        ValueError: more probes than chunks.
    """
    if not 0 <= probes <= len(chunks):
        raise ValueError(f"probes must be in 0 .. {len(chunks)}, the chunks, got {probes}")
    return torch.cat([chunks, copy_probes(chunks[:probes], opened)]) if probes else chunks


def compare(
    model: Any,
    chunks: Tensor,
    methods: Sequence[Method],
    full: Full,
    budget: int,
    dtype: torch.dtype = torch.float16,
    start: int = FROM,
    progress: Progress | None = None,
) -> list[Result]:
    """Perplexity and bytes of every method, token by token through its real cache.

    Args:
        model: A causal language model of transformers.
        chunks: int64 [chunks, length].
        methods: With ``FULL`` among them, and the plain H2O that recovery is measured from.
        full: Of the same chunks, from ``measure_full``.
        budget: Recorded in the results.
        dtype: Of the slots of methods that name no format.
        start: First position counted.
        progress: Called with (tokens done, length).

    Returns:
        One ``Result`` per method, in order; without speeds.
    """
    probes = len(full.probes.values) if full.probes is not None else 0
    rows = with_probes(chunks, probes, full.opened)
    built = [(m, m.cache(model, dtype, len(rows))) for m in methods]
    bounded = [method for method, cache in built if cache is not None]
    caches: list[LessKVCache] = [cache for _, cache in built if cache is not None]
    nats = through_caches(model, rows, caches, progress)
    count, length = chunks.shape
    by_name = {method.name: n for method, n in zip(bounded, nats, strict=True)}
    if BASELINE not in by_name:
        raise ValueError(f"compare: methods must hold {BASELINE!r}, the baseline of recovery")
    baseline = by_name[BASELINE].rows(0, count)
    memory = {m.name: c.memory() for m, c in zip(bounded, caches, strict=True)}
    stats = {m.name: c.stats() for m, c in zip(bounded, caches, strict=True)}

    bounded_layers = caches[0].layers - len(caches[0].native)
    results = []
    for method in methods:
        if method.policy is None:
            mine, mine_probes = full.chunks, full.probes
            # Of the same dtype as the slots (16 bits for int8), and of all the length's tokens.
            # Layers that slide hold the same with every method, and are not counted.
            heads = bounded_layers * caches[0].kv_heads * caches[0].head_dim
            sizes = {
                "slots": 2 * heads * max(2, dtype.itemsize) * length * len(rows),
                "state": 0,
                "maps": 0,
            }
            share = 0.0
        else:
            mine, mine_probes = (
                by_name[method.name].rows(0, count),
                by_name[method.name].rows(count),
            )
            sizes = memory[method.name]
            shares = stats[method.name]["memory_share"]
            share = sum(shares) / bounded_layers
        loss = mine.per_chunk(start) - full.chunks.per_chunk(start)
        won = recovered(full.chunks, baseline, mine, start)
        results.append(
            Result(
                method=method.name,
                policy=repr(method.policy) if method.policy is not None else "",
                budget=budget,
                kept=method.policy.capacity if method.policy is not None else length,
                length=length,
                chunks=count,
                slots=sizes["slots"] // len(rows),
                state=sizes["state"] // len(rows),
                maps=sizes["maps"],
                nats=mine.mean(start),
                start=start,
                perplexity=mine.perplexity(start),
                loss=float(loss.mean()),
                loss_error=_standard_error(loss),
                recovered=won.share,
                recovered_error=won.error,
                nats_overall=mine.mean(1),
                dtype=format_name(method.stored(dtype).dtype),
                maps_dtype=name_of(method.sidekick.dtype) if method.sidekick is not None else "",
                copy_perplexity=copy_perplexity(mine_probes)
                if mine_probes and probes
                else math.nan,
                probes=probes,
                memory_share=share,
                chunk_losses=loss.tolist(),
                storage={} if method.policy is None else method.stored(dtype).described(),
            )
        )
    return results


def with_speeds(
    model: Any,
    prompt: Tensor,
    methods: Sequence[Method],
    results: Sequence[Result],
    dtype: torch.dtype = torch.float16,
    progress: Progress | None = None,
) -> list[Result]:
    """The same results with decoding speed, measured after `prompt` [1, tokens]."""
    caches = [method.cache(model, dtype, len(prompt)) for method in methods]
    speeds = speed(model, prompt, caches, progress=progress)
    return [
        dataclasses.replace(
            result, tokens_per_second=s.tokens_per_second, prompt_seconds=s.prompt_seconds
        )
        for result, s in zip(results, speeds, strict=True)
    ]


def describe(method: Method) -> str:
    """One line about a method, for a caption."""
    if method.policy is None:
        return "every token is kept"
    rule = rule_name(method.policy)
    kept = f"{method.policy.capacity} tokens per head by {rule}"
    return kept if method.sidekick is None else f"{kept} + low-rank memory"


def _standard_error(per_chunk: Tensor) -> float:
    if len(per_chunk) < 2:
        return math.nan
    return float(per_chunk.std()) / math.sqrt(len(per_chunk))
