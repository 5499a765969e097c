"""A fixed pool of token chunks out of a stream of text, however long.

Reservoir sampling: every chunk of the stream is equally likely to be in the pool, and only the
pool is held. Of a file beyond `LONG` bytes, evenly spaced blocks are read instead of all of it.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

LONG = 64 * 2**20
_BLOCK = 2**18


def read_stream(paths: Sequence[str | os.PathLike[str]]) -> Iterator[str]:
    """The texts of UTF-8 files, in pieces; of a folder, its .txt and .md files by name.

    Raises:
        FileNotFoundError: a path does not exist, or a folder has no such file.
        ValueError: a file is not UTF-8.
    """
    for path in map(Path, paths):
        files = [path]
        if path.is_dir():
            files = sorted(p for p in path.rglob("*") if p.suffix in (".txt", ".md"))
        if not files or not path.exists():
            raise FileNotFoundError(f"text: {path}: no such file, or a folder without .txt or .md")
        for file in files:
            size = file.stat().st_size
            if size <= LONG:
                try:
                    yield file.read_text(encoding="utf-8")
                except UnicodeDecodeError as error:
                    raise ValueError(f"text: {file} is not UTF-8: {error}") from None
                continue
            blocks = LONG // _BLOCK
            with file.open("rb") as stream:
                for i in range(blocks):
                    stream.seek(i * (size - _BLOCK) // (blocks - 1))
                    # A block starts and ends inside a line or even a character: drop both ends.
                    lines = stream.read(_BLOCK).split(b"\n")
                    yield b"\n".join(lines[1:-1] or lines).decode("utf-8", errors="ignore")


def sample_chunks(
    tokenizer: Any, texts: Iterable[str], length: int, count: int, seed: int = 0
) -> tuple[Tensor, dict[str, Any]]:
    """Sample `count` chunks of `length` tokens, uniformly over the texts.

    A text is cut into chunks from its start; the rests of all texts are joined and cut as well.

    Args:
        tokenizer: A transformers tokenizer.
        texts: The texts, in order; consumed once, never held together.
        length: Tokens of a chunk T.
        count: Chunks N.
        seed: Of the sampling.

    Returns:
        Token ids, int64 [N, T], and the record: tokens seen and taken, sha256 of the ids.

    Raises:
        ValueError: the texts are too short; the message says by how much.
    """
    generator = torch.Generator().manual_seed(seed)
    pool: list[list[int]] = []
    rest: list[int] = []
    seen = tokens = 0
    for text in texts:
        ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        tokens += len(ids)
        whole = len(ids) // length * length
        rest += ids[whole:]
        pieces = [ids[i : i + length] for i in range(0, whole, length)]
        while len(rest) >= length:
            pieces.append(rest[:length])
            rest = rest[length:]
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
    return ids_, {"tokens_seen": tokens, **identity(ids_)}


def identity(ids: Tensor) -> dict[str, Any]:
    """What identifies a pool of chunks: its size and a digest of the ids."""
    digest = hashlib.sha256(ids.cpu().contiguous().numpy().tobytes()).hexdigest()
    return {"chunks": ids.shape[0], "chunk_tokens": ids.shape[1], "sha256": digest}
