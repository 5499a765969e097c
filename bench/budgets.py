"""Perplexity of one budget dealt out to the layers in several shapes: ``python -m bench.budgets``.

Every shape holds the same bytes; what differs is where. Token by token through the real caches, all
of them in one pass of the model, so they see the same text in the same rounding.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import replace
from typing import Any

import torch
from rich.console import Console

from less import LessConfig, Sidekick
from less.evaluate import assets
from less.evaluate.perplexity import FROM, full_attention, recovered, through_caches
from less.evaluate.progress import progress
from less.sidekick import shipped

SIDEKICK = "smollm2-135m-instruct"


def shapes(layers: int) -> dict[str, dict[str, Any]]:
    """Name -> settings of ``LessConfig``."""
    first, last = layers // 2, layers // 2 + layers // 3 - 1
    doubled = [2.0 if first <= i <= last else 1.0 for i in range(layers)]
    return {
        "uniform": {},
        "pyramid, beta 2": {"shape": "pyramid", "beta": 2},
        "pyramid, beta 20": {"shape": "pyramid", "beta": 20},
        "rising, 0.5 to 1.5": {"shape": [0.5 + i / (layers - 1) for i in range(layers)]},
        f"layers {first}-{last} doubled": {"shape": doubled},
    }


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(prog="python -m bench.budgets", description=__doc__)
    parser.add_argument("--tokens", type=int, default=64, help="per head, the mean over layers")
    parser.add_argument("--chunks", type=int, default=4)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--eviction", action="store_true", help="without the sidekick")
    args = parser.parse_args()
    console = Console(highlight=False)
    model, tokenizer = assets.load_model()
    sidekick = Sidekick.from_pretrained(shipped(SIDEKICK))
    texts = assets.wikipedia_articles("eval")
    chunks = assets.chunks(tokenizer, texts, args.length, args.chunks)

    caches = {}
    for name, settings in shapes(model.config.num_hidden_layers).items():
        config = LessConfig(tokens=args.tokens, dtype="float16", **settings)
        if args.eviction:  # the sidekick's policy, without its state
            config = replace(config, policy=config.policy_at(args.tokens, sidekick))
        caches[name] = config.cache(
            model, batch=args.chunks, sidekick=None if args.eviction else sidekick
        )
    slots = {cache.memory()["slots"] for cache in caches.values()}
    if len(slots) != 1:
        raise RuntimeError(f"the shapes hold different bytes: {slots}")

    with progress(console, "full cache, chunks") as step:
        full = full_attention(model, chunks, progress=step)
    with torch.inference_mode(), progress(console, "bounded caches, tokens") as step:
        nats = through_caches(model, chunks, list(caches.values()), step)
    console.print("| shape | most | least | perplexity | nats lost | of uniform's loss saved |")
    console.print("|---|---:|---:|---:|---:|---:|")
    for (name, cache), measured in zip(caches.items(), nats, strict=True):
        kept = [p.capacity for p in cache.policies if p is not None]
        loss = measured.per_chunk() - full.per_chunk()
        error = float(loss.std()) / math.sqrt(len(loss)) if len(loss) > 1 else math.nan
        won = recovered(full, nats[0], measured)
        saved = "" if measured is nats[0] else f"{won.share:.0%} ± {won.error:.0%}"
        console.print(
            f"| {name} | {max(kept)} | {min(kept)} | {measured.perplexity():.2f} | "
            f"{float(loss.mean()):.3f} ± {error:.3f} | {saved} |"
        )
    console.print(
        f"full cache: {full.perplexity():.2f}; positions {FROM} on of {args.chunks} chunks of "
        f"{args.length} tokens, {args.tokens} tokens per head",
        soft_wrap=True,
    )


if __name__ == "__main__":
    main()
