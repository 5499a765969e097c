"""Time and memory against batch and length."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from less.cache import LessKVCache
from less.evaluate.feeding import Progress
from less.evaluate.machine import available_bytes, machine
from less.evaluate.report import size
from less.evaluate.speed import Speed, speed
from less.evaluate.tasks.base import Block, Given, Metric, Scores, Task, UnavailableError
from less.hf.models import describe

_PIECE = 512
_STEPS = 25  # of a cache: three turns of eight, and one before them


class Decoding(Task):
    """Decoding speed and time to the first token, methods taking turns."""

    worth = 45
    timed = True
    metrics = (
        Metric("tokens_per_second", "tok/s", False, 1, recovers=False),
        Metric("prompt_seconds", "first token, s", digits=2, recovers=False),
        Metric("peak_mib", "peak, MiB", digits=1, recovers=False),
    )

    def __init__(self, batch: int) -> None:
        """At a batch size."""
        self.batch = batch
        self.name = f"speed:batch-{batch}"
        self.about = (
            f"Decoding at batch {batch} after a prompt of the length that is taken in 512 tokens "
            "at a time: tokens per second of all rows, median of three turns of eight steps in "
            "which methods take turns; seconds until the first token. peak: the cache, and the "
            "most memory that the prompt took besides."
        )

    def blocks(self, given: Given, length: int) -> list[Block]:
        """One; the tokens are random, since time does not depend on them."""
        size = len(given.tokenizer)
        facts = {k: v for k, v in machine().items() if k not in ("commit", "less")}
        content = {"vocabulary": size, "length": length, "machine": facts}
        return [Block(length, length, content, self.batch, _STEPS)]

    def score(
        self,
        model: Any,
        block: Block,
        caches: Sequence[LessKVCache | None],
        progress: Progress | None = None,
    ) -> list[Scores]:
        """Tokens per second of all rows, seconds and peak memory of the prompt."""
        _check_room(model, block)
        generator = torch.Generator().manual_seed(0)
        prompt = torch.randint(
            block.content["vocabulary"], (block.rows, block.content["length"]), generator=generator
        )
        found = speed(model, prompt, caches, chunk=_PIECE, progress=progress)
        return [
            {
                "tokens_per_second": [one.tokens_per_second],
                "prompt_seconds": [one.prompt_seconds],
                "peak_mib": [_peak_mib(one, cache)],
            }
            for one, cache in zip(found, caches, strict=True)
        ]


def _peak_mib(one: Speed, cache: LessKVCache | None) -> float:
    """The cache, whose memory a bounded one has from the start, and what the prompt took."""
    held = 0 if cache is None else cache.memory()["total"]
    return (held + (one.prompt_bytes or 0)) / 2**20


def _check_room(model: Any, block: Block) -> None:
    """Refuse what would end the process for want of memory.

    Raises:
        UnavailableError: A full cache does not fit into what the machine has left.
    """
    have = available_bytes() if model.device.type == "cpu" else None
    facts = describe(model, "speed")
    numbers = 2 * facts.layers * facts.kv_heads * facts.head_dim * block.rows * block.tokens
    needs = 2 * numbers * facts.dtype.itemsize  # growing, old and new lie side by side
    if have is not None and needs > have:
        raise UnavailableError(
            f"a full cache of {block.rows} rows and {block.tokens:,} tokens takes {size(needs)} as "
            f"it grows, the machine has {size(have)} left"
        )


def tasks(given: Given) -> list[Task]:
    """One for each batch size."""
    return [Decoding(batch) for batch in given.batches]
