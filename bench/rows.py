"""Nats that rows of few bits cost, through the real cache: ``python -m bench.rows WHAT``.

``full``: nothing evicted. ``bytes``: at the bytes of ``--budget`` float16 tokens, decayed H2O that
forgets; recovered is the part of plain H2O's loss at float16 that is won back. ``copy``: perplexity
of the second copy of a passage, at the bytes of ``--budget`` float16 tokens.

SmolLM2 on unseen Wikipedia, token by token, all methods in one pass; docs/dtypes.md has the tables.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from less import H2O, LessKVCache
from less.budget import least_tokens, most_within, page_bytes
from less.calibration import Calibration
from less.evaluate.assets import chunks, load_model, wikipedia_articles
from less.evaluate.perplexity import (
    FROM,
    copy_perplexity,
    copy_probes,
    full_attention,
    recovered,
    through_caches,
)
from less.hf import cache_for
from less.hf.models import describe


@dataclass(frozen=True)
class Setting:
    """One cache.

    Attributes:
        rows: Dtype or format of its slots.
        calibrated: Whether it has means and scales.
        decay: What a score keeps per token.
        recent: The part of its slots that keeps the last tokens.
    """

    rows: torch.dtype | str
    calibrated: bool = False
    decay: float = 0.98
    recent: float = 0.25

    def __str__(self) -> str:
        """As the table has it."""
        words = ["H2O", str(self.rows).removeprefix("torch.")]
        words += ["calibrated"] if self.calibrated else []
        return " ".join(words) + ("" if self.decay == 1 else f", decay {self.decay}")

    def cache(self, model: Any, batch: int, tokens: int, calibration: Calibration) -> LessKVCache:
        """A cache of so many slots."""
        recent = int(tokens * self.recent)
        return cache_for(
            model,
            H2O(heavy=tokens - recent, recent=recent, decay=self.decay),
            batch=batch,
            dtype=self.rows,
            calibration=calibration if self.calibrated else None,
        )


PLAIN = Setting(torch.float16, decay=1.0, recent=0.5)
SETTINGS = {
    "full": [
        Setting("k8v4", True), Setting("k4v4", True), Setting("k4v4"), Setting("k3v3", True)
    ],
    "bytes": [PLAIN, Setting("k4v4", True), Setting("k4v4"), Setting("k3v3", True)],
    "copy": [
        Setting(torch.float16, recent=0.5), Setting("k4v4", True), Setting("k4v4", decay=1.0),
        Setting("k3v3", True, 1.0), Setting("k3v2", True, 1.0), Setting("k2v2", True, 1.0),
    ],
}  # fmt: skip


def tokens_in(model: Any, rows: torch.dtype | str, budget: int) -> int:
    """Slots of a head that the page of ``budget`` float16 tokens has room for."""
    facts = describe(model, "bench.rows")
    shape = facts.kv_heads, facts.head_dim
    room = page_bytes(*shape, torch.float16, budget)
    least = least_tokens(rows)
    return most_within(room, lambda tokens: page_bytes(*shape, rows, max(tokens, least)))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m bench.rows", description=__doc__)
    parser.add_argument("what", choices=SETTINGS)
    parser.add_argument("--calibration", required=True, help="folder of less-kv calibrate")
    parser.add_argument("--budget", type=int, default=64)
    parser.add_argument("--chunks", type=int, default=8)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--model-dtype", default="bfloat16")
    args = parser.parse_args()
    model, tokenizer = load_model(dtype=getattr(torch, args.model_dtype))
    calibration = Calibration.from_pretrained(args.calibration)
    ids = chunks(tokenizer, wikipedia_articles("eval"), args.length, args.chunks)
    settings = SETTINGS[args.what]
    caches = [
        setting.cache(
            model,
            args.chunks,
            args.length if args.what == "full" else tokens_in(model, setting.rows, args.budget),
            calibration,
        )
        for setting in settings
    ]
    if args.what == "copy":
        ids = copy_probes(ids)
    full = full_attention(model, ids)
    found = through_caches(model, ids, caches)
    print(f"full attention: perplexity {_perplexity(args.what, full):.3f}")
    for setting, cache, nats in zip(settings, caches, found, strict=True):
        head = f"{setting}: {cache.policy.capacity} slots, {cache.memory()['slots']:,} bytes"
        if args.what == "copy":
            print(f"{head}, perplexity {copy_perplexity(nats):.2f}")
            continue
        lost = nats.per_chunk(FROM) - full.per_chunk(FROM)
        print(f"{head}, lost {mean_of(lost)} nats", end="")
        if args.what == "bytes":
            won = recovered(full, found[0], nats)
            print(f", recovered {100 * won.share:.1f} ± {100 * won.error:.1f} %", end="")
        print()


def _perplexity(what: str, nats: Any) -> float:
    return copy_perplexity(nats) if what == "copy" else nats.perplexity()


def mean_of(x: Tensor) -> str:
    """A mean over chunks and its standard error."""
    return f"{x.mean():.4f} ± {x.std() / len(x) ** 0.5:.4f}"


if __name__ == "__main__":
    main()
