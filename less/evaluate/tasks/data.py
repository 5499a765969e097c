"""Texts and summaries by the names that users know: out of packages, local files or the hub."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from torch import Tensor

from less import files
from less.evaluate.assets import chunks, wikipedia_articles
from less.evaluate.tasks.base import Given, UnavailableError

#: Texts that need no file of the user's: the stand-in, and the paper's two.
TEXTS = ("wikipedia", "wikitext", "pg19")
_HUB_SECONDS = 2
_BOOKS = 16  # of PG-19's test split, which has 100


@dataclass(frozen=True)
class Summaries:
    """Documents with summaries.

    Attributes:
        hub: Name on the hub; "" where it is not there.
        config: Its configuration.
        document: Field of the document; of a local file too.
        summary: Field of the summary.
        prompt: What the model is asked; ``{document}`` stands in it.
        tokens: Of a summary, at most.
    """

    hub: str
    config: str | None
    document: str
    summary: str
    prompt: str
    tokens: int


_ONE = "Summarize this article in one sentence.\n\n{document}"
_SOME = "Summarize this article in three sentences.\n\n{document}"
SUMMARIES = {
    "xsum-bigbench": Summaries("", None, "input", "target", _ONE, 48),
    "cnn_dailymail": Summaries("abisee/cnn_dailymail", "3.0.0", "article", "highlights", _SOME, 96),
    "xsum": Summaries("EdinburghNLP/xsum", None, "document", "summary", _ONE, 48),
    "multi_news": Summaries("alexfabbri/multi_news", None, "document", "summary", _SOME, 160),
}


def own_texts(data: Mapping[str, Path]) -> list[str]:
    """The names of a user's own texts."""
    return [name for name in data if name not in SUMMARIES]


def prose_chunks(given: Given, name: str | None, length: int) -> Tensor:
    """Chunks of a text, int64 [n, length] with n at most ``given.count``.

    Args:
        given: As tasks have it.
        name: Of the text; None: the user's first, else Wikipedia.
        length: Tokens of a chunk.

    Raises:
        UnavailableError: The text cannot be had, or is too short for one chunk.
    """
    name = name or next(iter(own_texts(given.data)), "wikipedia")
    found = texts(name, given.data.get(name))
    for count in range(given.count, 0, -1):
        try:
            return chunks(given.tokenizer, found, length, count)
        except ValueError as error:
            why = error
    raise UnavailableError(f"the text {name} is too short: {why}")


def texts(name: str, local: Path | None) -> list[str]:
    """The texts of a name.

    Args:
        name: One of ``TEXTS``, or a user's own.
        local: A file or folder in place of the package or the hub.

    Raises:
        UnavailableError: They cannot be had here.
    """
    return list(_texts(name, local))


@functools.lru_cache(maxsize=8)
def _texts(name: str, local: Path | None) -> tuple[str, ...]:
    try:
        if local is not None:
            return tuple(files.read_texts(local))
        if name == "wikipedia":
            return tuple(wikipedia_articles("eval"))
    except (OSError, ValueError, RuntimeError) as error:
        raise UnavailableError(str(error)) from error
    if name == "wikitext":
        rows = hub_rows("Salesforce/wikitext", "wikitext-2-raw-v1", "test", name)
        return ("".join(row["text"] for row in rows),)
    if name == "pg19":
        return tuple(
            row["text"] for row in islice(hub_rows("deepmind/pg19", None, "test", name), _BOOKS)
        )
    raise UnavailableError(f"the text {name} is in no package; give it as --data {name}=FILE")


def summaries(name: str, local: Path | None) -> Iterator[tuple[str, str]]:
    """Documents and their summaries, of a name in ``SUMMARIES``.

    Args:
        name: The name.
        local: A file of JSON lines, one object per document; or a JSON file with such objects in a
            list, or in a list named ``examples``.

    Raises:
        UnavailableError: They cannot be had here, or have other fields.
    """
    kind = SUMMARIES[name]
    if local is not None:
        rows = _local_rows(name, local)
    elif not kind.hub:
        raise UnavailableError(
            f"{name} is the file bigbench/benchmark_tasks/gem/xsum/task.json of PyPI's bigbench "
            f"1.0.0 (sdist); give it as --data {name}=FILE"
        )
    else:
        rows = hub_rows(kind.hub, kind.config, "test", name)
    for row in rows:
        if kind.document not in row or kind.summary not in row:
            raise UnavailableError(
                f"{name} must have the fields {kind.document} and {kind.summary}, got "
                f"{', '.join(sorted(row))}"
            )
        yield row[kind.document], row[kind.summary]


def _local_rows(name: str, path: Path) -> Iterator[dict[str, Any]]:
    try:
        text = files.read_text(path)
        try:
            whole = json.loads(text)
        except ValueError:
            whole = [json.loads(line) for line in text.splitlines() if line.strip()]
        rows = whole.get("examples", [whole]) if isinstance(whole, dict) else whole
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise ValueError("it must hold a list of objects, or one object a line")
    except (OSError, ValueError, RecursionError) as error:
        raise UnavailableError(f"--data {name}={path.name} cannot be read: {error}") from error
    return iter(rows)


def hub_rows(hub: str, config: str | None, split: str, name: str) -> Iterator[dict[str, Any]]:
    """The rows of a data set of the hub, streamed.

    Raises:
        UnavailableError: The hub does not give it; the message says what to give in its place.
    """

    def load() -> Iterator[dict[str, Any]]:
        from datasets import load_dataset

        return iter(load_dataset(hub, config, split=split, streaming=True))

    return _refused(load, hub, name)


def _refused(load: Callable[[], Iterator[Any]], hub: str, name: str) -> Iterator[Any]:
    try:
        from huggingface_hub import HfApi

        HfApi().dataset_info(hub, timeout=_HUB_SECONDS)  # its client would ask for a minute
        return load()
    except Exception as error:  # of datasets, the hub or its client, by version
        line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        said = line.partition(". ")[0].rstrip(".")
        raise UnavailableError(
            f"the hub does not give {hub} ({said}); give a local copy as --data {name}=FILE"
        ) from error
