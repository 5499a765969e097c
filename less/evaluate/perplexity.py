"""Teacher-forced negative log-likelihood, through the real cache, one token at a time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from less.cache import LessKVCache
from less.evaluate.feeding import Progress, check_texts, cost, feed_caches
from less.fit.text import repeat_passage

FROM = 256  # positions before this one are left out of the main figure: little is evicted there


@dataclass(frozen=True)
class Nats:
    """Negative log-likelihoods of the tokens of some chunks, in nats.

    Attributes:
        values: float64 [chunks, length]; ``values[i, t]`` is what token t of chunk i cost, given
            the tokens before it. NaN at t = 0, which nothing predicts.
    """

    values: Tensor

    def per_chunk(self, start: int = FROM, stop: int | None = None) -> Tensor:
        """Mean nats per token of each chunk at positions start <= t < stop, float64 [chunks]."""
        values = self.values[:, max(start, 1) : stop]
        if values.shape[1] == 0:
            raise ValueError(
                f"Nats: no position from {start} to {stop} in chunks of {self.values.shape[1]}"
            )
        return values.mean(1)

    def mean(self, start: int = FROM, stop: int | None = None) -> float:
        """Mean nats per token over all chunks."""
        return float(self.per_chunk(start, stop).mean())

    def perplexity(self, start: int = FROM, stop: int | None = None) -> float:
        """exp(mean nats)."""
        return math.exp(self.mean(start, stop))

    def rows(self, first: int, stop: int | None = None) -> Nats:
        """Only the chunks first <= i < stop."""
        return Nats(self.values[first:stop])


def full_attention(
    model: Any, chunks: Tensor, batch: int = 1, progress: Progress | None = None
) -> Nats:
    """Nats under full attention: one forward pass per `batch` chunks.

    Args:
        model: A causal language model of transformers.
        chunks: Token ids, int64 [chunks, length].
        batch: Chunks per pass; logits take 4 x batch x length x vocabulary bytes.
        progress: Called with (chunks done, chunks).
    """
    check_texts("full_attention", chunks)
    nats = _empty(chunks)
    with torch.inference_mode():
        for first in range(0, len(chunks), batch):
            rows = chunks[first : first + batch].to(model.device)
            logits = model(rows, use_cache=False).logits
            nats[first : first + batch, 1:] = cost(logits[:, :-1], rows[:, 1:])
            if progress:
                progress(min(first + batch, len(chunks)), len(chunks))
    return Nats(nats)


def through_caches(
    model: Any,
    chunks: Tensor,
    caches: Sequence[LessKVCache],
    progress: Progress | None = None,
) -> list[Nats]:
    """Nats through bounded caches, token by token, all caches in one pass over the model.

    Every cache sees every chunk. The batch of a model step is caches x chunks rows, so the model's
    weights are read once per token for all of them; each cache attends to its own rows alone.
    A mixed model, whose sliding layers keep tokens of their own in each cache, runs once per cache
    instead. The first tokens, as many as every cache can take so (``at_once``), are fed at once:
    nothing is evicted or encoded there, and their scores are those of single steps. From there on
    it is one token per step.

    Args:
        model: A causal language model of transformers that ``less.hf.attach`` takes.
        chunks: Token ids without padding, int64 [chunks, length].
        caches: Fresh or reset, each with batch = chunks.
        progress: Called with (tokens done, length).

    Returns:
        One ``Nats`` per cache, in order.

    Raises:
        ValueError: no cache, wrong batch, a cache in use, chunks of fewer than two tokens.
    """
    count = len(chunks)
    rows = chunks.repeat(len(caches), 1)
    nats = _empty(rows)

    def visit(first: int, start: int, logits: Tensor) -> None:
        here = slice(first, first + len(logits))
        stop = start + 1 + logits.shape[1]
        targets = rows[here, start + 1 : stop].to(logits.device)
        nats[here, start + 1 : stop] = cost(logits, targets)

    feed_caches("through_caches", model, chunks, caches, visit, progress=progress)
    return [Nats(nats[i * count : (i + 1) * count]) for i in range(len(caches))]


def perplexity(
    model: Any, chunks: Tensor, cache: LessKVCache | None = None, start: int = FROM
) -> float:
    """Perplexity of chunks at positions `start` on; through `cache`, or full attention for None."""
    if cache is None:
        return full_attention(model, chunks).perplexity(start)
    return through_caches(model, chunks, [cache])[0].perplexity(start)


def copy_probes(chunks: Tensor, opened: int = 0) -> Tensor:
    """Chunks that repeat a passage: the sharpest test of what a cache remembers.

    Args:
        chunks: int64 [chunks, length].
        opened: Tokens that open a chunk and are not text (BOS): they are not copied.

    Returns:
        int64 [chunks, length], as ``less.fit.text.repeat_passage`` makes them.
    """
    check_texts("copy_probes", chunks)
    return repeat_passage(chunks, opened)


def copy_perplexity(probes: Nats) -> float:
    """Perplexity of the second copy in ``copy_probes``."""
    length = probes.values.shape[1]
    return probes.perplexity(length - length // 4)


@dataclass(frozen=True)
class Recovered:
    """Share of a baseline's loss that a method wins back, with its standard error."""

    share: float
    error: float


def recovered(full: Nats, baseline: Nats, method: Nats, start: int = FROM) -> Recovered:
    """(baseline - method) / (baseline - full) in mean nats at positions `start` on.

    1 is full attention, 0 the baseline, below 0 worse than it. The error is the jackknife's over
    chunks, which knows that all three were measured on the same ones; NaN for a single chunk.
    """
    gap = baseline.per_chunk(start) - full.per_chunk(start)
    won = baseline.per_chunk(start) - method.per_chunk(start)
    n = len(gap)
    share = float(won.sum() / gap.sum())
    if n < 2:
        return Recovered(share, math.nan)
    left_out = (won.sum() - won) / (gap.sum() - gap)
    spread = (left_out - left_out.mean()).square().sum()
    return Recovered(share, math.sqrt(float(spread) * (n - 1) / n))


def _empty(chunks: Tensor) -> Tensor:
    return torch.full(chunks.shape, math.nan, dtype=torch.float64)
