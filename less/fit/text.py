"""Text files and their tokens; a fixed pool of token chunks out of a stream of text, however long.

Reservoir sampling: every chunk of the stream is equally likely to be in the pool, and only the
pool is held. Of a file beyond `LONG` bytes, evenly spaced blocks are read instead of all of it.

A chunk opens as the tokenizer opens a text: with the beginning-of-sequence token (BOS) where the
model expects one. It is one of the chunk's tokens.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from less.files import read_text, text_files

LONG = 64 * 2**20
_BLOCK = 2**18


def read_stream(paths: Sequence[str | os.PathLike[str]]) -> Iterator[str]:
    """The texts of UTF-8 files, in pieces; of a folder, its .txt and .md files by name.

    Raises:
        OSError: As ``text_files`` and ``read_text``.
        ValueError: A file is not UTF-8.
    """
    for path in paths:
        for file in text_files(path):
            size = file.stat().st_size
            if size <= LONG:
                yield read_text(file)
                continue
            blocks = LONG // _BLOCK
            with file.open("rb") as stream:
                for i in range(blocks):
                    stream.seek(i * (size - _BLOCK) // (blocks - 1))
                    # A block starts and ends inside a line or even a character: drop both ends.
                    lines = stream.read(_BLOCK).split(b"\n")
                    yield b"\n".join(lines[1:-1] or lines).decode("utf-8", errors="ignore")


def opening(tokenizer: Any) -> list[int]:
    """The token ids that a tokenizer puts before a text: the BOS, or nothing.

    A model that was trained with a BOS needs it: without, Gemma-3-270M loses 0.6 nats a token.

    Raises:
        ValueError: The tokenizer changes the text's own ids where it adds special tokens.
    """
    text = "text"
    plain: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    opened: list[int] = tokenizer(text)["input_ids"]
    for start in range(len(opened) - len(plain) + 1):
        if opened[start : start + len(plain)] == plain:
            return opened[:start]
    raise ValueError(
        f"text: the tokenizer makes {opened} of {text!r} with special tokens and {plain} without: "
        "what it puts before a text cannot be told"
    )


def tokens_of(tokenizer: Any, text: str) -> list[int]:
    """The token ids of a text, without what the tokenizer puts before and behind it."""
    # `verbose=False`: longer than the model's context is fine here, it is cut later.
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def room_in(length: int, opened: Sequence[int]) -> int:
    """Tokens of text in a chunk of `length` tokens that opens with `opened`.

    Raises:
        ValueError: There is room for none.
    """
    if length <= len(opened):
        raise ValueError(
            f"text: chunks must be longer than the {len(opened)} tokens that the tokenizer puts "
            f"before a text, got {length}"
        )
    return length - len(opened)


class Pool(NamedTuple):
    """Chunks of text.

    Attributes:
        ids: Token ids, int64 [N, T].
        record: Tokens seen and taken, sha256 of the ids.
    """

    ids: Tensor
    record: dict[str, Any]


def sample_chunks(
    tokenizer: Any, texts: Iterable[str], length: int, count: int, seed: int = 0
) -> Pool:
    """Sample `count` chunks of `length` tokens, uniformly over the texts.

    A text is cut into chunks from its start; the rests of all texts are joined and cut as well.
    Every chunk opens with the tokenizer's BOS, where it has one (``opening``).

    Args:
        tokenizer: A transformers tokenizer.
        texts: The texts, in order; consumed once, never held together.
        length: Tokens of a chunk T.
        count: Chunks N.
        seed: Of the sampling.

    Raises:
        ValueError: the texts are too short; the message says by how much.
    """
    opened = opening(tokenizer)
    room = room_in(length, opened)
    generator = torch.Generator().manual_seed(seed)
    pool: list[list[int]] = []
    rest: list[int] = []
    seen = tokens = 0
    for text in texts:
        ids = tokens_of(tokenizer, text)
        tokens += len(ids)
        whole = len(ids) // room * room
        rest += ids[whole:]
        pieces = [opened + ids[i : i + room] for i in range(0, whole, room)]
        while len(rest) >= room:
            pieces.append(opened + rest[:room])
            rest = rest[room:]
        for piece in pieces:
            seen += 1
            if len(pool) < count:
                pool.append(piece)
                continue
            place = int(torch.randint(seen, (1,), generator=generator))
            if place < count:
                pool[place] = piece
    if len(pool) < count:
        raise ValueError(
            f"text: {count} chunks of {length} tokens wanted, but the text has {tokens} tokens "
            f"({len(pool)} chunks): give more text, or ask for fewer or shorter chunks"
        )
    ids_ = torch.tensor(pool, dtype=torch.int64)
    ids_ = ids_[torch.randperm(count, generator=generator)]
    return Pool(ids_, {"tokens_seen": tokens, **identity(ids_)})


def repeat_passage(chunks: Tensor, opened: int = 0) -> Tensor:
    """Chunks whose last quarter is their first quarter again.

    With 1,024 tokens: 256 tokens, 512 others, the same 256 again. A model that sees the first copy
    predicts the second almost surely.

    Args:
        chunks: Token ids, int64 [N, T].
        opened: Tokens that open a chunk and are not text (BOS): they are not repeated.

    Returns:
        int64 [N, T]; only the first three quarters of the chunks are used.

    Raises:
        ValueError: A chunk has no room for both copies.
    """
    length = chunks.shape[1]
    quarter = length // 4
    if quarter == 0 or opened > length - 2 * quarter:
        raise ValueError(
            f"repeat_passage: chunks must have at least 4 tokens and room for two copies behind "
            f"the {opened} that open them, got {length}"
        )
    return torch.cat([chunks[:, : length - quarter], chunks[:, opened : opened + quarter]], 1)


def identity(ids: Tensor) -> dict[str, Any]:
    """What identifies a pool of chunks: its size and a digest of the ids."""
    digest = hashlib.sha256(ids.cpu().contiguous().numpy().tobytes()).hexdigest()
    return {"chunks": ids.shape[0], "chunk_tokens": ids.shape[1], "sha256": digest}
