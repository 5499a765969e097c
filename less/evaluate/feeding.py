"""Known texts fed to a model, through bounded caches or under full attention, and its logits.

All bounded caches run in one pass over the model: rows = caches x texts, each block of rows on its
own cache (``less.evaluate.side_by_side``).
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from less.cache import LessKVCache
from less.evaluate.side_by_side import SideBySide

PIECE = 128  # tokens of a context that is fed in pieces
_TOKENS_AT_ONCE = 1024  # rows x tokens of a step before anything is evicted: bounds the logits

Progress = Callable[[int, int], None]  # (done, of)
#: Called with the first row, the position of the first token, and logits [rows, T, vocabulary].
Visit = Callable[[int, int, Tensor], None]


def feed_caches(
    op: str,
    model: Any,
    texts: Tensor,
    caches: Sequence[LessKVCache],
    visit: Visit,
    context: int = 0,
    piece: int = PIECE,
    progress: Progress | None = None,
) -> None:
    """Feed texts to every cache, and hand out the logits of all tokens but the last.

    The first tokens, as many as every cache can take so (``at_once``), are fed at once: nothing is
    evicted or encoded there. The rest of a context comes in pieces, of which the logits of the last
    token alone are handed out; from there on it is one token per step. A mixed model, whose sliding
    layers keep tokens of their own in each cache, runs once per cache instead.

    Args:
        op: For messages.
        model: A causal language model of transformers that ``less.hf.attach`` takes.
        texts: Token ids without padding, int64 [texts, length].
        caches: Fresh or reset, each with batch = texts. Row ``i * texts + j`` is text j on cache i.
        visit: Takes the logits, in order of positions.
        context: Tokens that may come in pieces.
        piece: Tokens of a piece.
        progress: Called with (tokens done, length).

    Raises:
        ValueError: no cache, wrong batch, a cache in use, texts of fewer than two tokens.
    """
    from less.hf import attach

    check_texts(op, texts)
    if not caches:
        raise ValueError(f"{op}: caches must hold at least one cache, got none")
    for i, cache in enumerate(caches):
        if cache.batch != len(texts):
            raise ValueError(
                f"{op}: caches[{i}] must have batch {len(texts)}, one row per chunk, "
                f"got {cache.batch}"
            )
        if bool((cache.seen != 0).any()):
            raise ValueError(f"{op}: caches[{i}] has seen tokens, reset() it first")
    if len(caches) > 1 and caches[0].native:
        for i, cache in enumerate(caches):

            def shifted(first: int, start: int, logits: Tensor, row: int = i * len(texts)) -> None:
                visit(row + first, start, logits)

            feed_caches(op, model, texts, [cache], shifted, context, piece, progress)
        return
    length = texts.shape[1]
    together = caches[0] if len(caches) == 1 else SideBySide(caches)
    rows = texts.to(model.device).repeat(len(caches), 1)
    unevicted = min(length - 1, together.at_once)
    step = max(1, _TOKENS_AT_ONCE // len(rows))
    pieces = range(unevicted, min(context, length - 1), piece)
    single = max(unevicted, min(context, length - 1))
    cuts = [*range(0, unevicted, step), *pieces, *range(single, length)]
    with torch.inference_mode(), attach(model, together):
        for start, stop in itertools.pairwise(cuts):
            last_alone = start in pieces
            settings = {"logits_to_keep": 1} if last_alone else {}
            fed = model(rows[:, start:stop], past_key_values=together, **settings).logits
            visit(0, stop - 1 if last_alone else start, fed)
            if progress:
                progress(stop + 1, length)


def feed_full(
    op: str, model: Any, texts: Tensor, visit: Visit, progress: Progress | None = None
) -> None:
    """Feed texts one by one under the model's own attention, on a full cache.

    Args:
        op: For messages.
        model: A causal language model of transformers.
        texts: int64 [texts, length].
        visit: As in ``feed_caches``; row i is text i.
        progress: Called with (texts done, texts).
    """
    from transformers import DynamicCache

    check_texts(op, texts)
    rows, length = texts.to(model.device), texts.shape[1]
    with torch.inference_mode():
        for i in range(len(rows)):
            cache = DynamicCache(config=model.config)
            for start in range(0, length - 1, _TOKENS_AT_ONCE):
                stop = min(start + _TOKENS_AT_ONCE, length - 1)
                visit(i, start, model(rows[i : i + 1, start:stop], past_key_values=cache).logits)
            if progress:
                progress(i + 1, len(rows))


def cost(logits: Tensor, targets: Tensor) -> Tensor:
    """Nats of targets [rows, T] under logits [rows, T, vocabulary], float64 on the CPU."""
    flat = logits.reshape(-1, logits.shape[-1]).float()
    nats = torch.nn.functional.cross_entropy(flat, targets.reshape(-1), reduction="none")
    return nats.view(targets.shape).double().cpu()


def check_texts(op: str, texts: Tensor) -> None:
    """Refuse what is no batch of token ids.

    Raises:
        ValueError: naming the operation.
    """
    if texts.dim() != 2 or texts.shape[0] < 1 or texts.shape[1] < 2:
        raise ValueError(
            f"{op}: chunks must be token ids [chunks, length >= 2], got {list(texts.shape)}"
        )


def greedy(
    op: str,
    model: Any,
    prompt: Tensor,
    cache: LessKVCache | None,
    tokens: int,
    end: Collection[int] = (),
    visit: Visit | None = None,
    progress: Progress | None = None,
) -> list[list[int]]:
    """What greedy decoding writes after a prompt that is taken in at once, by each row.

    Args:
        op: For messages.
        model: A causal language model of transformers.
        prompt: int64 [rows, length], without padding.
        cache: Fresh, of those rows; ``SideBySide`` too. None is transformers' own full cache.
        tokens: To write, at most.
        end: Tokens that end a row's text; they are not part of it.
        visit: Is handed the logits of every step but the prompt's first tokens.
        progress: Called with (tokens done, tokens).
    """
    from transformers import DynamicCache

    from less.hf import attach

    check_texts(op, prompt)
    held: Any = DynamicCache(config=model.config) if cache is None else cache
    context: Any = contextlib.nullcontext() if cache is None else attach(model, cache)
    step, written = prompt.to(model.device), []
    done = torch.zeros(len(prompt), dtype=torch.bool)
    with torch.inference_mode(), context:
        for i in range(tokens):
            logits = model(step, past_key_values=held, logits_to_keep=1).logits
            if visit is not None:
                visit(0, prompt.shape[1] - 1 + i, logits)
            step = logits[:, -1:].argmax(-1)
            written.append(step[:, 0].tolist())
            done |= torch.tensor([token in end for token in written[-1]])
            if progress:
                progress(i + 1, tokens)
            if bool(done.all()):
                break
    rows = [list(row) for row in zip(*written, strict=True)]
    return [list(itertools.takewhile(lambda token: token not in end, row)) for row in rows]
