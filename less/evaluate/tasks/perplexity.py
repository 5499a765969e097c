"""Perplexity of texts, and of the second copy of a passage."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from less.cache import LessKVCache
from less.evaluate.feeding import Progress
from less.evaluate.perplexity import copy_probes
from less.evaluate.tasks.base import (
    Block,
    Given,
    Metric,
    Scores,
    Task,
    UnavailableError,
    forced,
    mean_nats,
    share_greedy,
)
from less.evaluate.tasks.data import TEXTS, own_texts, prose_chunks
from less.fit.text import opening

_NATS = Metric("nats", "perplexity", scale="exp")


class Perplexity(Task):
    """Teacher-forced perplexity of a text, token by token through the real cache."""

    metrics = (_NATS,)

    def __init__(self, text: str, worth: int) -> None:
        """Of the text of that name."""
        self.text, self.worth = text, worth
        self.name = f"perplexity:{text}"
        self.about = (
            f"Perplexity of {text} from a quarter of the length on, teacher-forced one token at a "
            "time through the real cache."
        )

    def blocks(self, given: Given, length: int) -> list[Block]:
        """Some chunks each."""
        return _blocks(given, prose_chunks(given, self.text, length), max(1, length // 4))

    def score(
        self,
        model: Any,
        block: Block,
        caches: Sequence[LessKVCache | None],
        progress: Progress | None = None,
    ) -> list[Scores]:
        """Mean nats of each chunk."""
        return [{"nats": mean_nats(one)} for one in forced(model, block, caches, progress)]


class Copy(Task):
    """What a cache remembers word by word."""

    name = "copy"
    worth = 20
    about = (
        "A passage of a quarter of the length, twice as many other tokens, the same passage again: "
        "perplexity of the second copy, and the share of its tokens that greedy decoding writes."
    )
    metrics = (_NATS, Metric("recall", "recalled, %", False, 0, "percent"))

    def blocks(self, given: Given, length: int) -> list[Block]:
        """Some probes each."""
        ids = prose_chunks(given, None, length)
        try:
            probes = copy_probes(ids, len(opening(given.tokenizer)))
        except ValueError as error:
            raise UnavailableError(str(error)) from error
        return _blocks(given, probes, length - length // 4)

    def score(
        self,
        model: Any,
        block: Block,
        caches: Sequence[LessKVCache | None],
        progress: Progress | None = None,
    ) -> list[Scores]:
        """Mean nats of the second copy, and how much of it is recalled."""
        return [
            {"nats": mean_nats(one), "recall": share_greedy(one)}
            for one in forced(model, block, caches, progress)
        ]


def _blocks(given: Given, ids: Tensor, start: int) -> list[Block]:
    length = ids.shape[1]
    blocks = []
    for rows in ids.split(given.together):
        asked = torch.zeros_like(rows)
        asked[:, start:] = 1
        content = {"ids": rows, "asked": asked, "context": 0}
        blocks.append(Block(length, length, content, len(rows), steps=length))
    return blocks


def tasks(given: Given) -> list[Task]:
    """Perplexity of every text that is known or given, and the copy probe."""
    names = list(dict.fromkeys((*own_texts(given.data), *TEXTS)))
    return [Copy(), *(Perplexity(name, 10 if name not in TEXTS[1:] else 30) for name in names)]
