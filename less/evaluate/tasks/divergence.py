"""Long generation: how soon a bounded cache writes something else than the full cache does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from less.cache import LessKVCache
from less.evaluate.feeding import Progress, feed_caches, greedy
from less.evaluate.tasks.base import Block, Given, Metric, Scores, Task
from less.evaluate.tasks.data import prose_chunks


class Divergence(Task):
    """The full cache's own greedy text, and what a bounded cache says to it token by token.

    Until its first difference a bounded cache that decodes freely has been fed the same tokens, so
    the first token that it would not have written is where its own greedy text departs.
    """

    name = "divergence"
    worth = 40
    metrics = (
        Metric("kl", "KL, nats", digits=4, recovers=False),
        Metric("same", "tokens alike", lower=False, digits=0, recovers=False),
    )

    def __init__(self, steps: int) -> None:
        """Of so many generated tokens."""
        self.steps = steps
        self.about = (
            f"{steps} tokens that the full cache writes greedily after a text of the length, fed "
            "to each cache: KL from the full cache's distribution per step, and tokens until "
            "greedy decoding departs from its text."
        )

    def blocks(self, given: Given, length: int) -> list[Block]:
        """Some prompts each; the text behind them is the model's."""
        ids = prose_chunks(given, None, length)
        steps = self.steps
        return [
            Block(length, length + steps, {"ids": rows, "steps": steps}, len(rows), 2 * steps)
            for rows in ids.split(given.together)
        ]

    def score(
        self,
        model: Any,
        block: Block,
        caches: Sequence[LessKVCache | None],
        progress: Progress | None = None,
    ) -> list[Scores]:
        """Mean KL per step, and tokens until the first difference."""
        prompt, steps = block.content["ids"], block.content["steps"]
        said: list[Tensor] = []  # of each step, [rows, vocabulary]
        text = torch.tensor(
            greedy(
                self.name, model, prompt, None, steps,
                visit=lambda first, start, logits: said.append(logits[:, 0].float().cpu()),
            )
        )  # fmt: skip
        bounded = [cache for cache in caches if cache is not None]
        rows, length = prompt.shape
        kl = torch.zeros(len(bounded) * rows, steps, dtype=torch.float64)
        same = torch.zeros(len(bounded) * rows, steps, dtype=torch.bool)

        def visit(first: int, start: int, logits: Tensor) -> None:
            of = torch.arange(first, first + len(logits)) % rows
            for t in range(logits.shape[1]):
                at = start + t - length + 1  # of the generated token that these logits predict
                if not 0 <= at < steps:
                    continue
                ours = logits[:, t].float().cpu().log_softmax(-1)
                theirs = said[at].log_softmax(-1)[of]
                here = slice(first, first + len(logits))
                kl[here, at] = (theirs.exp() * (theirs - ours)).sum(-1).double()
                same[here, at] = ours.argmax(-1) == text[of, at]

        if bounded:
            whole = torch.cat([prompt, text], 1)
            feed_caches(self.name, model, whole, bounded, visit, length, progress=progress)
        alike = same.long().cumprod(1).sum(1)
        found = iter(
            {"kl": a.tolist(), "same": [float(x) for x in b]}
            for a, b in zip(kl.mean(1).split(rows), alike.split(rows), strict=True)
        )
        full = {"kl": [0.0] * rows, "same": [float(steps)] * rows}
        return [full if cache is None else next(found) for cache in caches]


def tasks(given: Given) -> list[Task]:
    """The one task, of the steps that are given."""
    return [Divergence(given.steps)]
