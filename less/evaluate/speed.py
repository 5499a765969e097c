"""Tokens per second of decoding, with a prompt already in the cache."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from less.cache import LessKVCache
from less.evaluate.machine import Peak

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Speed:
    """Median speed of one cache.

    Attributes:
        prompt_seconds: To take in the prompt.
        tokens_per_second: Decoding, all rows of the batch together.
        prompt_bytes: The most memory that the prompt took beyond what was held before it; None
            where the system does not say.
    """

    prompt_seconds: float
    tokens_per_second: float
    prompt_bytes: int | None = None


def speed(
    model: Any,
    prompt: Tensor,
    caches: Sequence[LessKVCache | None],
    steps: int = 8,
    rounds: int = 3,
    chunk: int | None = None,
    progress: Progress | None = None,
) -> list[Speed]:
    """Measure decoding after `prompt`, the caches taking turns so that drift hits all alike.

    Args:
        model: A causal language model of transformers.
        prompt: int64 [batch, tokens].
        caches: Fresh caches of that batch; None is transformers' own ``DynamicCache`` under the
            model's own attention.
        steps: Decode steps per turn.
        rounds: Turns per cache; the median turn counts.
        chunk: Tokens of the prompt at a time; all at once by default. In chunks, a bounded cache
            takes in any prompt in linear time and constant memory.
        progress: Called with (turns done, turns).

    Returns:
        One ``Speed`` per cache, in order.
    """
    from transformers import DynamicCache

    held: list[Any] = [cache if cache is not None else DynamicCache() for cache in caches]
    prompt = prompt.to(model.device)
    prompt_seconds: list[float] = []
    peaks: list[int | None] = []
    turns: list[list[float]] = [[] for _ in held]
    done, total = 0, len(held) * (rounds + 1)
    with torch.inference_mode():
        for cache in held:
            with _attached(model, cache):
                peak, start = Peak(model.device), _now(model)
                for part in prompt.split(chunk or prompt.shape[1], 1):
                    model(part, past_key_values=cache, logits_to_keep=1)
                prompt_seconds.append(_now(model) - start)
                peaks.append(peak.bytes())
                model(prompt[:, :1], past_key_values=cache)  # the first step allocates
            done += 1
            if progress:
                progress(done, total)
        for _ in range(rounds):
            for cache, seconds in zip(held, turns, strict=True):
                with _attached(model, cache):
                    start = _now(model)
                    for t in range(steps):
                        model(prompt[:, t : t + 1], past_key_values=cache)
                    seconds.append(_now(model) - start)
                done += 1
                if progress:
                    progress(done, total)
    rows = len(prompt)
    return [
        Speed(first, rows * steps / statistics.median(seconds), peak)
        for first, seconds, peak in zip(prompt_seconds, turns, peaks, strict=True)
    ]


def _now(model: Any) -> float:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return time.perf_counter()


def _attached(model: Any, cache: Any) -> contextlib.AbstractContextManager[Any]:
    if not isinstance(cache, LessKVCache):
        return contextlib.nullcontext()
    from less.hf import attach

    context: contextlib.AbstractContextManager[Any] = attach(model, cache)
    return context
