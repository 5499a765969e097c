"""What a task is: blocks of work, a score for every cache on a block, and what the scores mean."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from less.cache import LessKVCache
from less.evaluate.feeding import Progress, cost, feed_caches, feed_full

#: The scores of one cache on one block: metric -> a value per example.
Scores = dict[str, list[float]]


class UnavailableError(RuntimeError):
    """A task cannot run here; the message is one sentence that says why."""


@dataclass(frozen=True)
class Metric:
    """A figure of a task.

    Attributes:
        name: As in ``Scores``.
        title: Heading of its column.
        lower: Whether less of it is better.
        digits: Behind the point.
        scale: ``"plain"``; ``"percent"``: a share; ``"exp"``: nats, shown as perplexity.
        recovers: Whether a share of H2O's loss that is won back has a meaning.
    """

    name: str
    title: str
    lower: bool = True
    digits: int = 2
    scale: str = "plain"
    recovers: bool = True


@dataclass(frozen=True)
class Given:
    """What tasks are made from.

    Attributes:
        tokenizer: The model's.
        lengths: Tokens of an example, each measured.
        count: Examples of a task at each length, at most.
        data: Name of a text or data set -> file or folder.
        steps: Tokens of long generations.
        batches: Batch sizes of the speed.
        together: Examples of one length that are measured at once.
    """

    tokenizer: Any
    lengths: Sequence[int] = (1024,)
    count: int = 8
    data: Mapping[str, Path] = field(default_factory=dict)
    steps: int = 256
    batches: Sequence[int] = (1, 4)
    together: int = 4


@dataclass(frozen=True)
class Block:
    """A piece of a task that is measured at once.

    Attributes:
        length: Which of ``Given.lengths`` it belongs to.
        tokens: Of one row, with all that is generated: budgets are shares of them.
        content: What the task's ``score`` reads.
        rows: Batch rows of a cache.
        steps: Tokens that come one by one; others come in pieces, which take less time.
    """

    length: int
    tokens: int
    content: Mapping[str, Any]
    rows: int = 1
    steps: int = 0

    @property
    def digest(self) -> str:
        """sha256 of the content."""
        found = hashlib.sha256()
        for name, value in sorted(self.content.items()):
            if isinstance(value, Tensor):
                value = value.tolist()
            found.update(json.dumps([name, value]).encode())
        return found.hexdigest()


class Task(ABC):
    """Something that a cache can do well or badly.

    Attributes:
        name: As a user names it.
        about: One sentence for the report.
        metrics: The first is the one that plots show.
        version: Raised when scores change: older results no longer count.
        worth: Place in the order of measuring, the first first.
        timed: Whether scores depend on the machine.
    """

    name: str
    about: str
    metrics: Sequence[Metric]
    version: int = 1
    worth: int = 50
    timed: bool = False

    @abstractmethod
    def blocks(self, given: Given, length: int) -> list[Block]:
        """The task at a length, in blocks, at most ``given.count``.

        Raises:
            UnavailableError: The message says what is missing.
        """

    @abstractmethod
    def score(
        self,
        model: Any,
        block: Block,
        caches: Sequence[LessKVCache | None],
        progress: Progress | None = None,
    ) -> list[Scores]:
        """The scores of each cache on a block; None is the full cache.

        Args:
            model: A causal language model of transformers.
            block: One of ``blocks``.
            caches: Fresh, of ``block.rows`` rows.
            progress: Called with (done, of).
        """


@dataclass(frozen=True)
class Forced:
    """What a model said to tokens that it was fed.

    Attributes:
        nats: What each asked token cost, float64 [rows, length]; NaN where nothing is asked.
        greedy: Whether greedy decoding would have written the token, bool [rows, length].
    """

    nats: Tensor
    greedy: Tensor


def forced(
    model: Any,
    block: Block,
    caches: Sequence[LessKVCache | None],
    progress: Progress | None = None,
) -> list[Forced]:
    """Feed a block's ``ids`` [rows, length] to every cache, and score what is ``asked``.

    ``asked``, int64 [rows, length], is 0 where a token is not scored. The ``context`` first tokens
    may come in pieces of 128; from there on it is one token per step.
    """
    ids, asked = block.content["ids"], block.content["asked"]
    rows = len(ids)
    bounded = [cache for cache in caches if cache is not None]

    def collect(copies: int, feed: Callable[[Any], None]) -> list[Forced]:
        all_ids, all_asked = ids.repeat(copies, 1), asked.repeat(copies, 1)
        nats = torch.full(all_ids.shape, float("nan"), dtype=torch.float64)
        greedy = torch.zeros(all_ids.shape, dtype=torch.bool)

        def visit(first: int, start: int, logits: Tensor) -> None:
            here = slice(first, first + len(logits))
            there = slice(start + 1, start + 1 + logits.shape[1])
            wanted = all_asked[here, there] > 0
            if not bool(wanted.any()):
                return
            targets = all_ids[here, there]
            found = cost(logits, targets.to(logits.device))
            nats[here, there] = found.masked_fill(~wanted, float("nan"))
            greedy[here, there] = (logits.argmax(-1).cpu() == targets) & wanted

        feed(visit)
        return [
            Forced(nats[i * rows : (i + 1) * rows], greedy[i * rows : (i + 1) * rows])
            for i in range(copies)
        ]

    full: list[Forced] = []
    if len(bounded) < len(caches):
        full = collect(1, lambda visit: feed_full("forced", model, ids, visit))
    found: list[Forced] = []
    if bounded:
        context = int(block.content["context"])
        found = collect(
            len(bounded),
            lambda visit: feed_caches(
                "forced", model, ids, bounded, visit, context=context, progress=progress
            ),
        )
    rest = iter(found)
    return [full[0] if cache is None else next(rest) for cache in caches]


def said(tokenizer: Any, messages: Sequence[Mapping[str, str]]) -> str:
    """A chat as its template has it, up to the answer and without the BOS, which chunks open with.

    Raises:
        UnavailableError: There is no template.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise UnavailableError("the model has no chat template; an instruct model has one")
    text: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    bos = getattr(tokenizer, "bos_token", None)
    return text.removeprefix(bos) if bos else text


def mean_nats(scored: Forced) -> list[float]:
    """Mean nats of the asked tokens of each row."""
    return [float(row[~row.isnan()].mean()) for row in scored.nats]


def share_greedy(scored: Forced) -> list[float]:
    """The part of each row's asked tokens that greedy decoding would have written."""
    asked = ~scored.nats.isnan()
    return [float(hit[at].double().mean()) for hit, at in zip(scored.greedy, asked, strict=True)]
