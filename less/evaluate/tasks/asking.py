"""A long context, a question, and answers whose tokens are scored: what tasks of recall share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from less.cache import LessKVCache
from less.evaluate.feeding import Progress
from less.evaluate.tasks.base import (
    Block,
    Forced,
    Given,
    Metric,
    Scores,
    Task,
    UnavailableError,
    forced,
    mean_nats,
)
from less.fit.text import opening, tokens_of

METRICS = (
    Metric("nats", "nats of an answer token", digits=3),  # of small models the finer figure
    Metric("recall", "answers, %", lower=False, digits=0, scale="percent"),
)


@dataclass(frozen=True)
class Question:
    """An example.

    Attributes:
        head: What stands before the filler.
        inserted: Where, as a part of the filler in [0, 1], and what is put there.
        ask: What stands behind it, up to the first answer.
        answers: The answers, in order; a text that is glue between two comes with False.
    """

    head: str
    inserted: Sequence[tuple[float, str]]
    ask: str
    answers: Sequence[tuple[str, bool]]


def assemble(given: Given, length: int, question: Question, filler: Sequence[int]) -> Block:
    """An example of exactly so many tokens, filled up with ``filler``.

    The context, up to ``ask``, may be fed in pieces; question and answers come token by token.

    Raises:
        UnavailableError: The length holds no filler, or the filler is too short.
    """
    tokens = given.tokenizer
    opened = opening(tokens) + tokens_of(tokens, question.head)
    needles = [(depth, tokens_of(tokens, text)) for depth, text in question.inserted]
    ask = tokens_of(tokens, question.ask)
    answers = [(tokens_of(tokens, text), scored) for text, scored in question.answers]
    taken = sum(len(ids) for _, ids in needles) + sum(len(ids) for ids, _ in answers)
    room = length - len(opened) - len(ask) - taken
    if room < 1 or room > len(filler):
        raise UnavailableError(
            f"an example of {length} tokens has room for {room} tokens of filler, of which there "
            f"must be 1 to {len(filler)}"
        )
    body: list[int] = []
    at = 0
    for depth, ids in sorted(needles, key=lambda needle: needle[0]):
        stop = round(depth * room)
        body += [*filler[at:stop], *ids]
        at = stop
    context = [*opened, *body, *filler[at:room]]
    ids, asked, number = [*context, *ask], [0] * (len(context) + len(ask)), 0
    for answer, scored in answers:
        number += scored
        ids += answer
        asked += [number if scored else 0] * len(answer)
    content = {"ids": torch.tensor([ids]), "asked": torch.tensor([asked]), "context": len(context)}
    return Block(length, length, content)


def _joined(blocks: Sequence[Block]) -> Block:
    ids, asked = (torch.cat([block.content[x] for block in blocks]) for x in ("ids", "asked"))
    context = min(block.content["context"] for block in blocks)
    content = {"ids": ids, "asked": asked, "context": context}
    return Block(
        blocks[0].length, blocks[0].tokens, content, len(blocks), blocks[0].tokens - context
    )


def answered(block: Block, scored: Forced) -> list[float]:
    """The part of each row's answers that greedy decoding writes, given those before."""
    out = []
    for asked, greedy in zip(block.content["asked"], scored.greedy, strict=True):
        numbers = range(1, int(asked.max()) + 1)
        hits = [bool(greedy[asked == number].all()) for number in numbers]
        out.append(sum(hits) / len(hits))
    return out


class Asking(Task):
    """A task of questions.

    Args:
        name: As a user names it.
        about: One sentence.
        make: Builds example i of a length.
        worth: As of ``Task``.
    """

    metrics = METRICS

    def __init__(
        self, name: str, about: str, make: Callable[[Given, int, int], Block], worth: int = 25
    ) -> None:
        self.name, self.worth, self._make = name, worth, make
        self.about = (
            f"{about} The context comes in pieces of 128 tokens, question and answer token by "
            "token. Answers: the share that greedy decoding writes, each after the right ones "
            "before it."
        )

    def blocks(self, given: Given, length: int) -> list[Block]:
        """Some examples each; what all of them have as context may come in pieces."""
        each = [self._make(given, length, i) for i in range(given.count)]
        return [
            _joined(each[i : i + given.together]) for i in range(0, given.count, given.together)
        ]

    def score(
        self,
        model: Any,
        block: Block,
        caches: Sequence[LessKVCache | None],
        progress: Progress | None = None,
    ) -> list[Scores]:
        """The share of answers that are right, and nats of their tokens."""
        return [
            {"recall": answered(block, one), "nats": mean_nats(one)}
            for one in forced(model, block, caches, progress)
        ]
