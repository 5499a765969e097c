"""What becomes of each token of a text in each head of a cache, step by step, and a page of it."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import torch
from torch import Tensor

from less.cache import LessKVCache
from less.evaluate.feeding import Progress

#: Where a token is; the last three by the cache's victim action.
PLACES = ("hot", "cold", "merged", "folded", "forgotten")
_GONE = {"merge": "merged", "fold": "folded", "forget": "forgotten"}


@dataclass(frozen=True)
class Lives:
    """A text's way through a cache that was fed token by token. T tokens, N heads.

    Attributes:
        tokens: The text, a piece for each token.
        heads: Layer and kv head, N pairs; layers that slide are not among them.
        slots: Of each head, [N].
        left: After how many tokens of the text a token was in no slot any more, int64 [N, T];
            0: it still is in one.
        counts: Of each head: (tokens seen, token, for how many tokens its slot stands from then).
        state_share: Part of the attention mass of each layer's queries that the low-rank state
            took at each token, [layers, T]; a layer has its first head's place in ``heads``.
        sinks: First tokens in finer rows; of packed formats.
        hot: Last tokens in finer rows; of packed formats.
        gone: What tokens without a slot are: ``"merged"``, ``"folded"`` or ``"forgotten"``.
    """

    tokens: Sequence[str]
    heads: Sequence[tuple[int, int]]
    slots: Sequence[int]
    left: Tensor
    counts: Sequence[Sequence[tuple[int, int, int]]]
    state_share: dict[int, list[float]]
    sinks: int
    hot: int
    gone: str

    def place(self, head: int, token: int, seen: int) -> str:
        """Where a token is in a head after so many tokens; one of ``PLACES``."""
        left = int(self.left[head, token])
        if 0 < left <= seen:
            return self.gone
        return "hot" if token < self.sinks or token >= seen - self.hot else "cold"


def lives(
    model: Any,
    ids: Tensor,
    pieces: Sequence[str],
    cache: LessKVCache,
    progress: Progress | None = None,
) -> Lives:
    """Feed a text to a cache token by token, and note after each what its slots hold.

    Args:
        model: A causal language model of transformers.
        ids: int64 [1, T].
        pieces: The text of each token.
        cache: Fresh, of one row.
        progress: Called with (tokens done, T).

    Raises:
        ValueError: The cache has other rows, or the pieces are not as many as tokens.
    """
    from less.hf import attach

    if cache.batch != 1 or ids.shape != (1, len(pieces)):
        raise ValueError(
            f"lives: ids must be [1, {len(pieces)}], as many as pieces, on a cache of one row; got "
            f"{list(ids.shape)} and {cache.batch} rows"
        )
    layers = [i for i, layout in enumerate(cache.layouts) if layout is not None]
    layouts = [layout for layout in cache.layouts if layout is not None]
    K, T = cache.kv_heads, len(pieces)
    left = torch.zeros(len(layers) * K, T, dtype=torch.int64)
    counts: list[list[tuple[int, int, int]]] = [[] for _ in range(len(left))]
    known = torch.ones(len(left), T, dtype=torch.int64)
    shares: dict[int, list[float]] = {i: [] for i in layers}
    taken = dict.fromkeys(layers, 0.0)
    with torch.inference_mode(), attach(model, cache):
        for seen in range(1, T + 1):
            model(ids[:, seen - 1 : seen].to(model.device), past_key_values=cache)
            for n, layer in enumerate(layers):
                here = slice(n * K, (n + 1) * K)
                held, count = _held(cache, layer, T)
                gone = ~held[:, :seen] & (left[here, :seen] == 0)
                left[here, :seen][gone] = seen
                for head, token in (held & (count != known[here])).nonzero().tolist():
                    number = int(count[head, token])
                    counts[n * K + head].append((seen, token, number))
                    known[n * K + head, token] = number
            mean = cache.stats()["memory_share"]
            for layer in layers:
                total = mean[layer] * seen
                shares[layer].append(max(0.0, total - taken[layer]))
                taken[layer] = total
            if progress:
                progress(seen, T)
    return Lives(
        tokens=list(pieces),
        heads=[(layer, head) for layer in layers for head in range(K)],
        slots=[n for layout in layouts for n in layout.capacities],
        left=left,
        counts=counts,
        state_share=shares,
        sinks=layouts[0].sinks or 0,
        hot=layouts[0].hot or 0,
        gone=_GONE[cache.victim],
    )


def _held(cache: LessKVCache, layer: int, T: int) -> tuple[Tensor, Tensor]:
    """Which tokens have a slot of each head, bool [K, T], and for how many it stands, int64."""
    position = cache.positions(layer)[0].cpu().long()
    weight = cache.weights(layer)[0].cpu().exp().round().long()
    there = position >= 0
    held = torch.zeros(len(position), T + 1, dtype=torch.bool)
    count = torch.ones(len(position), T + 1, dtype=torch.int64)
    at = position.masked_fill(~there, T)  # the last column takes what no slot holds
    held.scatter_(1, at, there)
    count.scatter_(1, at, weight)
    return held[:, :T], count[:, :T]


def as_text(lives: Lives, head: int | None = None) -> Any:
    """The text at its end for a terminal, coloured by where its tokens are.

    Args:
        lives: Of the text.
        head: Index into ``lives.heads``; None: by the share of heads that hold a token.
    """
    from rich.text import Text

    seen = len(lives.tokens)
    out = Text()
    styles = {"hot": "bold red", "cold": "blue", "merged": "green", "folded": "magenta"}
    if head is not None:
        for token, piece in enumerate(lives.tokens):
            out.append(piece, styles.get(lives.place(head, token, seen), "dim"))
        out.append("\n")
        for place in (*(("hot",) if lives.hot else ()), "cold", lives.gone):
            out.append(f"■ {place} ", styles.get(place, "dim"))
        return out
    share = (lives.left == 0).double().mean(0)
    for piece, held in zip(lives.tokens, share.tolist(), strict=True):
        out.append(piece, f"rgb({220 - int(200 * held)},{220 - int(130 * held)},220)")
    out.append("\n")
    for held in (0.0, 0.25, 0.5, 0.75, 1.0):
        colour = f"rgb({220 - int(200 * held)},{220 - int(130 * held)},220)"
        out.append(f"■ {100 * held:.0f} % ", colour)
    out.append("of the heads hold the token")
    return out


def page(lives: Lives, title: str, about: Sequence[str]) -> str:
    """One HTML file that opens without a server: the text, a slider over time, budgets as a map."""
    data = {
        "tokens": list(lives.tokens),
        "heads": list(lives.heads),
        "slots": list(lives.slots),
        "left": lives.left.tolist(),
        "counts": [list(of) for of in lives.counts],
        "share": [[layer, [round(x, 4) for x in of]] for layer, of in lives.state_share.items()],
        "sinks": lives.sinks,
        "hot": lives.hot,
        "gone": lives.gone,
    }
    # "</" would end the script, wherever it stands.
    packed = json.dumps(data, separators=(",", ":")).replace("</", "<\\/")
    lines = "".join(f"<p>{html.escape(line)}</p>" for line in about)
    whole = files("less.evaluate").joinpath("view.html").read_text(encoding="utf-8")
    return (
        whole.replace("@TITLE@", html.escape(title))
        .replace("@ABOUT@", lines)
        .replace("@DATA@", packed)
    )
