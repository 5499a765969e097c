"""Recall over several turns of a chat."""

from __future__ import annotations

import random

from less.evaluate.tasks.asking import Asking, Question, assemble
from less.evaluate.tasks.base import Block, Given, UnavailableError, said
from less.evaluate.tasks.data import prose_chunks
from less.evaluate.tasks.ruler import NOUNS

_THINGS = ("dog", "boat", "favourite fruit", "home town", "password", "first school")
_FACTS = 3


def _turns(given: Given, length: int, i: int) -> Block:
    """Facts in the first turns, a long text to read in the next, then a question."""
    rng = random.Random(f"turns {i}")
    things = rng.sample(_THINGS, _FACTS)
    words = rng.sample(NOUNS, _FACTS)
    asked = rng.randrange(_FACTS)
    told: list[dict[str, str]] = []
    for thing, word in zip(things, words, strict=True):
        told += [
            {"role": "user", "content": f"The word for my {thing} is {word}. Remember it."},
            {"role": "assistant", "content": f"I will remember the word for your {thing}."},
        ]
    mark = "@@"
    last = [
        {"role": "user", "content": f"Read this text: {mark}"},
        {"role": "assistant", "content": "I have read it."},
        {"role": "user", "content": f"What is the word for my {things[asked]}?"},
    ]
    before, found, behind = said(given.tokenizer, [*told, *last]).partition(mark)
    if not found:
        raise UnavailableError("the model's chat template does not hold the user's words")
    question = Question(
        before,
        [],
        f"{behind}The word for your {things[asked]} is",
        [(f" {words[asked]}", True)],
    )
    rows = prose_chunks(given, None, length)
    return assemble(given, length, question, rows[i % len(rows)].tolist())


TASKS = [
    Asking(
        "turns",
        "Three facts in the first turns of a chat, a long text in the next, then a question about "
        "one of them.",
        _turns,
    )
]
