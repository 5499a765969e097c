"""A model's own continuation of a text under any cache, streamed as it comes."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from less.cache import LessKVCache


@dataclass(frozen=True)
class Continuation:
    """What a model wrote.

    Attributes:
        text: The continuation.
        ids: Its tokens.
        cache_bytes: Held by the cache at the end: slots and state, without the maps.
        seconds: Prompt and decoding together.
    """

    text: str
    ids: list[int]
    cache_bytes: int
    seconds: float


def continue_text(
    model: Any,
    tokenizer: Any,
    prompt: Tensor,
    tokens: int,
    cache: LessKVCache | None,
    emit: Callable[[str], None],
) -> Continuation:
    """Let the model go on, greedily, with ``generate``.

    Args:
        model: A causal language model of transformers.
        tokenizer: Its tokenizer.
        prompt: int64 [1, tokens].
        tokens: New tokens, at most.
        cache: A fresh cache; None is transformers' own full one.
        emit: Called with every piece of text as it is there.
    """
    from transformers import DynamicCache, TextStreamer

    from less.hf import attach

    pieces: list[str] = []

    class Streamer(TextStreamer):  # type: ignore[misc]
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            pieces.append(text)
            emit(text)

    settings: dict[str, Any] = {
        "max_new_tokens": tokens,
        "do_sample": False,
        "attention_mask": torch.ones_like(prompt),
        "pad_token_id": tokenizer.pad_token_id
        if tokenizer.pad_token_id is not None
        else tokenizer.eos_token_id,
        "streamer": Streamer(tokenizer, skip_prompt=True),
    }
    start = time.perf_counter()
    if cache is None:
        full = DynamicCache()
        ids = model.generate(prompt, past_key_values=full, **settings)
        held = sum(layer.keys.nbytes + layer.values.nbytes for layer in full.layers)
    else:
        with attach(model, cache):
            ids = model.generate(prompt, past_key_values=cache, **settings)
        memory = cache.memory()
        held = memory["slots"] + memory["state"]
    seconds = time.perf_counter() - start
    return Continuation("".join(pieces), ids[0, prompt.shape[1] :].tolist(), held, seconds)
