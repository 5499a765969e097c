"""A conversation on one bounded cache: each turn feeds what is new, however long the talk gets."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from less.cache import LessKVCache
from less.hf import attach

Progress = Callable[[int, int], None]  # (tokens read, of)


class Interrupted(Exception):  # noqa: N818
    """The prompt was interrupted while it was read; the conversation is as before it."""


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen: ``temperature`` 0 takes the likeliest, else ``top_p`` of the mass."""

    temperature: float = 0.0
    top_p: float = 0.95
    max_new_tokens: int = 256

    def __post_init__(self) -> None:
        """Refuse what cannot be sampled."""
        if not self.temperature >= 0:
            raise ValueError(f"Sampling: temperature must be 0 or more, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"Sampling: top_p must be in (0, 1], got {self.top_p}")
        if self.max_new_tokens < 1:
            raise ValueError(
                f"Sampling: max_new_tokens must be 1 or more, got {self.max_new_tokens}"
            )

    def choose(self, logits: Tensor) -> int:
        """The next token, of logits [vocabulary]."""
        if self.temperature == 0:
            return int(logits.argmax())
        mass, order = (logits.float() / self.temperature).softmax(0).sort(descending=True)
        mass[mass.cumsum(0) - mass >= self.top_p] = 0  # the first stays, whatever top_p is
        return int(order[mass.multinomial(1)])


def check_template(tokenizer: Any, system: str | None = None) -> None:
    """Refuse a tokenizer without a chat template, or one that cannot render a first message.

    Raises:
        ValueError: The message says what the template says.
    """
    if not tokenizer.chat_template:
        raise ValueError("Chat: the tokenizer has no chat template; an instruct model has one")
    messages = [] if system is None else [{"role": "system", "content": system}]
    messages.append({"role": "user", "content": "text"})
    try:
        tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # of jinja2, by whatever the template does
        raise ValueError(f"Chat: the tokenizer's chat template fails: {error}") from error


class Chat:
    """Messages in the form of OpenAI's API, and the cache that has read them.

    The past is never tokenised anew: of each turn's rendered text only what is added to the text
    before is fed, behind the very tokens that the model wrote. Where a template rewrites earlier
    turns (drops a model's reasoning, say) that cannot be, and the cache reads the whole text again.

    Args:
        model: A supported causal model of transformers.
        tokenizer: Its tokenizer, with a chat template.
        cache: A fresh cache of batch 1.
        system: First message; None is the template's own.
        prefill: Tokens per call while a prompt is read.
        interrupted: Asked between two steps; True stops there.

    Raises:
        ValueError: No chat template, a batch, or a cache in use.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        cache: LessKVCache,
        system: str | None = None,
        prefill: int = 512,
        interrupted: Callable[[], bool] = lambda: False,
    ) -> None:
        check_template(tokenizer, system)
        if cache.batch != 1 or cache.columns:
            raise ValueError(
                f"Chat: cache must be fresh, with batch 1, got batch {cache.batch} and "
                f"{cache.columns} tokens seen"
            )
        if prefill < 1:
            raise ValueError(f"Chat: prefill must be 1 or more, got {prefill}")
        self.model, self.tokenizer, self.cache = model, tokenizer, cache
        self.prefill, self.interrupted = prefill, interrupted
        self._start = [] if system is None else [{"role": "system", "content": system}]
        self.messages: list[dict[str, str]] = list(self._start)
        self.tokens_per_second = 0.0
        self._text = ""  # the text that the cache has read, but for the tokens ...
        self._unread: list[int] = []  # ... that it has not: the last one written, at most
        ids = getattr(model.generation_config, "eos_token_id", None)
        self._ends = {tokenizer.eos_token_id, *(ids if isinstance(ids, list) else [ids])}

    def reset(self) -> None:
        """Forget the conversation; the system message stays."""
        self.cache.reset()
        self.messages = list(self._start)
        self._text, self._unread = "", []

    def stream(
        self, message: str, sampling: Sampling | None = None, progress: Progress | None = None
    ) -> Iterator[str]:
        """Answer a message, piece by piece; afterwards both are in ``messages``.

        Args:
            message: What the user says.
            sampling: How to write; greedy by default.
            progress: Called after each chunk of a prompt that takes several.

        Raises:
            Interrupted: While the prompt was read; everything is as before.
            ValueError: The text is longer than the model's context; everything is as before.
        """
        sampling = sampling or Sampling()
        before = (self.cache.state_dict(), list(self.messages), self._text, list(self._unread))
        try:
            self.messages.append({"role": "user", "content": message})
            prompt: str = self.tokenizer.apply_chat_template(
                self.messages, tokenize=False, add_generation_prompt=True
            )
            with attach(self.model, self.cache):
                logits = self._read(self._new_tokens(prompt), sampling, progress)
                yield from self._write(prompt, logits, sampling)
        except GeneratorExit:  # the caller has heard enough: what was written stays
            raise
        except BaseException:
            self.cache.load_state_dict(before[0])
            _, self.messages, self._text, self._unread = before
            raise

    def _new_tokens(self, prompt: str) -> list[int]:
        """Tokens of the prompt that the cache has not read; starts over where it must."""
        if self._text and prompt.startswith(self._text):
            added = self._encode(prompt[len(self._text) :])
            return self._unread + added
        self.cache.reset()
        return self._encode(prompt)

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def _read(self, ids: list[int], sampling: Sampling, progress: Progress | None) -> Tensor:
        """Feed the prompt; logits [vocabulary] of what comes next."""
        longest = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        end = self.cache.columns + len(ids) + sampling.max_new_tokens
        if longest and end > longest:
            raise ValueError(
                f"prompt and answer may come to {end:,} tokens, beyond the model's context of "
                f"{longest:,}; /reset starts anew"
            )
        logits = None
        for start in range(0, len(ids), self.prefill):
            if self.interrupted():
                raise Interrupted
            logits = self._step(ids[start : start + self.prefill])
            if progress and len(ids) > self.prefill:
                progress(min(start + self.prefill, len(ids)), len(ids))
        assert logits is not None
        return logits

    def _step(self, ids: list[int]) -> Tensor:
        at = torch.tensor([ids], device=self.model.device)
        with torch.inference_mode():
            out = self.model(at, past_key_values=self.cache, logits_to_keep=1)
        logits: Tensor = out.logits[0, -1]
        return logits

    def _write(self, prompt: str, logits: Tensor, sampling: Sampling) -> Iterator[str]:
        """Decode until the model ends, the limit or an interruption; note the answer meanwhile."""
        ids: list[int] = []
        shown = ""
        start = time.perf_counter()
        answer = {"role": "assistant", "content": ""}
        self.messages.append(answer)
        self._text, self._unread = prompt, []
        while True:
            token = sampling.choose(logits)
            if token in self._ends:
                return
            ids.append(token)
            self.tokens_per_second = len(ids) / (time.perf_counter() - start)
            text = self.tokenizer.decode(ids, skip_special_tokens=True)
            piece = text[len(shown) :] if not text.endswith("\ufffd") else ""  # half a letter
            shown += piece
            answer["content"] = shown
            self._text, self._unread = prompt + shown, [token]
            if piece:
                yield piece
            if len(ids) == sampling.max_new_tokens or self.interrupted():
                return
            logits = self._step([token])
            self._unread = []
