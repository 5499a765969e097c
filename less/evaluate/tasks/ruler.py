"""Synthetic tasks after RULER (Hsieh et al., arXiv:2404.06654), and the passkey.

Needles are hidden in prose, chains of variables and passkeys in repeated sentences, frequent words
among rarer ones. Contexts have exactly the tokens that are asked for. Examples follow from their
number alone.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence

from less.evaluate.tasks.asking import Asking, Question, assemble
from less.evaluate.tasks.base import Block, Given
from less.evaluate.tasks.data import prose_chunks
from less.fit.text import tokens_of

_NOISE = (
    "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
)
_PLACES = ("Lisbon", "Toronto", "Cairo", "Oslo", "Lima", "Kyoto", "Dublin", "Prague", "Nairobi")
_LISTED = """
apple bridge candle desert engine forest garden hammer island jacket kitchen ladder market needle
orange pencil queen river saddle table umbrella valley window yard zebra anchor basket camera dragon
eagle feather guitar harbor iron jewel kettle lemon mirror notebook ocean painter quilt rabbit
shadow tunnel uncle violin wagon arrow button castle dinner elbow finger glove helmet insect judge
knife letter mountain nurse oven pillow rocket silver thunder uniform village whistle bottle circle
doctor evening flower
"""
NOUNS = _LISTED.split()
_COMMON, _CODED, _CHAIN, _KEYS = 10, 3, 4, 4


def _rng(name: str, i: int) -> random.Random:
    return random.Random(f"{name} {i}")


def _digits(rng: random.Random, count: int) -> str:
    return str(rng.randrange(10 ** (count - 1), 10**count))


def _noise(given: Given, length: int) -> list[int]:
    once = tokens_of(given.tokenizer, _NOISE)
    return once * (length // len(once) + 1)


def _prose(given: Given, length: int, i: int) -> Sequence[int]:
    rows = prose_chunks(given, None, length)
    ids: list[int] = rows[i % len(rows)].tolist()
    return ids


def _needles(name: str, keys: int, given: Given, length: int, i: int) -> Block:
    rng = _rng(name, i)
    places = rng.sample(_PLACES, keys)
    numbers = [_digits(rng, 7) for _ in places]
    sentences = [
        f" One of the special magic numbers for {place} is: {number}."
        for place, number in zip(places, numbers, strict=True)
    ]
    asked = rng.randrange(keys)
    depths = [rng.random() for _ in places]
    question = Question(
        "Some special magic numbers are hidden within the following text. Memorize them.\n\n",
        list(zip(depths, sentences, strict=True)),
        f"\n\nThe special magic number for {places[asked]} mentioned in the text is:",
        [(f" {numbers[asked]}", True)],
    )
    return assemble(given, length, question, _prose(given, length, i))


def _needle(given: Given, length: int, i: int) -> Block:
    return _needles("needle", 1, given, length, i)


def _multikey(given: Given, length: int, i: int) -> Block:
    return _needles("multikey", _KEYS, given, length, i)


def _passkey(given: Given, length: int, i: int) -> Block:
    rng = _rng("passkey", i)
    key = _digits(rng, 5)
    question = Question(
        "There is important information hidden in a lot of irrelevant text. Memorize it.\n\n",
        [(rng.random(), f" The pass key is {key}. Remember it. {key} is the pass key. ")],
        "\n\nWhat is the pass key? The pass key is",
        [(f" {key}", True)],
    )
    return assemble(given, length, question, _noise(given, length))


def _variables(given: Given, length: int, i: int) -> Block:
    rng = _rng("variables", i)
    names = ["".join(rng.choices("ABCDEFGHJKLMNPQRSTUVWXYZ", k=3)) for _ in range(_CHAIN + 1)]
    value = _digits(rng, 5)
    assigned = [f" VAR {names[0]} = {value}."]
    assigned += [f" VAR {b} = VAR {a}." for a, b in itertools.pairwise(names)]
    depths = sorted(rng.random() for _ in names)
    answers = [part for name in names for part in ((f" {name}", True), (",", False))][:-1]
    question = Question(
        "Memorize and track the chain of variable assignments hidden in the following text.\n\n",
        list(zip(depths, assigned, strict=True)),
        f"\n\nThe {len(names)} variables that are assigned the value {value} are, in the order of "
        "the text:",
        answers,
    )
    return assemble(given, length, question, _noise(given, length))


def _words(name: str, given: Given, length: int, i: int) -> Block:
    """Words in random order: some are often there, the others seldom."""
    rng = _rng(name, i)
    coded = name == "frequent-words"
    if coded:
        words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=5)) for _ in range(60)]
        share = [1.0 / (rank + 1) ** 2 for rank in range(len(words))]  # a zeta distribution
        drawn = rng.choices(words, share, k=length)
        drawn = [*words[:_CODED], *drawn]  # so that the most frequent are there
        top = words[:_CODED]
        what, order = "coded words", "the most frequent first"
    else:
        words = rng.sample(NOUNS, len(NOUNS))
        top = sorted(words[:_COMMON])
        share = [10.0 if word in top else 1.0 for word in words]
        drawn = [*top, *rng.choices(words, share, k=length)]
        what, order = "words", "in alphabetical order"
    filler = [token for word in drawn for token in tokens_of(given.tokenizer, f" {word}")]
    answers = []
    for number, word in enumerate(top, 1):
        answers += [(f" {number}.", False), (f" {word}", True)]
    question = Question(
        f"The following is a list of {what}. Memorize those that appear most often.\n\n",
        [],
        f"\n\nThe {len(top)} {what} that appear most often in the list, {order}, are:",
        answers,
    )
    return assemble(given, length, question, filler)


def _common(given: Given, length: int, i: int) -> Block:
    return _words("common-words", given, length, i)


def _frequent(given: Given, length: int, i: int) -> Block:
    return _words("frequent-words", given, length, i)


TASKS = [
    Asking("needle", "A number in prose, asked for by its place (RULER's single needle).", _needle),
    Asking(
        "multikey",
        "Four such numbers of four places, of which one is asked for (RULER's multi-key needle).",
        _multikey,
    ),
    Asking(
        "variables",
        "A chain of five variables that are assigned one value (RULER's variable tracking).",
        _variables,
    ),
    Asking(
        "common-words",
        "Ten words that stand ten times as often in a list as others (RULER's common words).",
        _common,
        35,
    ),
    Asking(
        "frequent-words",
        "The three most frequent made-up words of a zeta distribution (RULER's frequent words).",
        _frequent,
        35,
    ),
    Asking("passkey", "A number of five digits in repeated sentences.", _passkey),
]
