"""Time and memory against batch and length."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from less.cache import LessKVCache
from less.evaluate.feeding import Progress
from less.evaluate.machine import machine
from less.evaluate.speed import speed
from less.evaluate.tasks.base import Block, Given, Metric, Scores, Task

_PIECE = 512


class Speed(Task):
    """Decoding speed and time to the first token, methods taking turns."""

    worth = 45
    timed = True
    metrics = (
        Metric("tokens_per_second", "tok/s", False, 1, recovers=False),
        Metric("prompt_seconds", "prompt, s", digits=2, recovers=False),
    )

    def __init__(self, batch: int) -> None:
        """At a batch size."""
        self.batch = batch
        self.name = f"speed:batch-{batch}"
        self.about = (
            f"Decoding at batch {batch} after a prompt of the length that is taken in 512 tokens "
            "at a time: tokens per second of all rows, median of three turns of eight steps in "
            "which methods take turns; seconds of the prompt."
        )

    def blocks(self, given: Given, length: int) -> list[Block]:
        """One; the tokens are random, since time does not depend on them."""
        size = len(given.tokenizer)
        facts = {k: v for k, v in machine().items() if k not in ("commit", "less")}
        content = {"vocabulary": size, "length": length, "machine": facts}
        return [Block(length, length, content, self.batch)]

    def score(
        self,
        model: Any,
        block: Block,
        caches: Sequence[LessKVCache | None],
        progress: Progress | None = None,
    ) -> list[Scores]:
        """Tokens per second of all rows, and seconds of the prompt."""
        size = (block.rows, block.content["length"])
        generator = torch.Generator().manual_seed(0)
        prompt = torch.randint(block.content["vocabulary"], size, generator=generator)
        return [
            {"tokens_per_second": [one.tokens_per_second], "prompt_seconds": [one.prompt_seconds]}
            for one in speed(model, prompt, caches, chunk=_PIECE, progress=progress)
        ]


def tasks(given: Given) -> list[Task]:
    """One for each batch size."""
    return [Speed(batch) for batch in given.batches]
