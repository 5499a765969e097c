"""What a bounded memory loses at equal bytes, through the real cache: ``python -m bench.memory``.

For the bytes of some numbers of float16 tokens: plain H2O; packed rows that forget; rows that
merge; with a calibration, rows that merge in heads of capacities of their own; and with a sidekick,
its state beside such rows. Bytes are those of one sequence: pages with slots, scores and state, and
what its layers share, which is means, scales and maps. No method takes more than plain H2O.

Lost is what the model loses to full attention, in nats per token from a quarter of the length on;
recovered the part of plain H2O's loss that is won back; copy the perplexity of the second copy of a
passage. Errors are standard errors over chunks, paired.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from bench.rows import mean_of
from less import H2O, LessConfig, LessKVCache
from less.budget import page_bytes
from less.dtypes import MERGING_ROWS
from less.evaluate.assets import chunks, load_model, wikipedia_articles
from less.evaluate.perplexity import (
    copy_perplexity,
    copy_probes,
    full_attention,
    recovered,
    through_caches,
)
from less.files import read_texts
from less.fit.text import opening
from less.hf.models import describe
from less.policies.default import merging_policy

RULE = merging_policy(4)


def methods(args: argparse.Namespace) -> dict[str, LessConfig]:
    """The rows of the table, whose budgets are set later; plain H2O is the first."""
    found = {"H2O, float16": LessConfig(bytes=1, rows="float16", policy=H2O(heavy=1, recent=1))}
    calibration = args.calibration
    calibrated = {"calibration": calibration, "shape": "calibrated"} if calibration else {}
    for rows in args.rows:
        found[f"forget, {rows}"] = LessConfig(bytes=1, rows=rows, policy=RULE, victim="forget")
        merge = found[f"merge, {rows}"] = LessConfig(bytes=1, rows=rows, victim="merge")
        if calibration:
            found[f"merge, {rows}, calibrated heads"] = replace(merge, **calibrated)
        if args.sidekick:
            found[f"fold, {rows}" + ", calibrated heads" * bool(calibration)] = LessConfig(
                bytes=1, rows=rows, sidekick=args.sidekick, **calibrated
            )
    plain, *others = found
    kept = [n for n in others if args.only is None or any(text in n for text in args.only)]
    return {name: found[name] for name in (plain, *kept)}


def within(config: LessConfig, model: Any, batch: int, room: int) -> LessKVCache:
    """The cache of a method that takes so many bytes for a sequence, shared ones included."""
    shared = replace(config, bytes=batch * room).cache(model, batch).memory()["maps"]
    return replace(config, bytes=batch * (room - shared)).cache(model, batch)


def bytes_of(cache: LessKVCache) -> int:
    """Bytes of one sequence: its pages, and all that sequences share."""
    held = cache.memory()
    return (held["slots"] + held["state"]) // cache.batch + held["maps"]


def slots_of(cache: LessKVCache) -> float:
    """Mean slots of a head."""
    numbers = [S for layout in cache.layouts if layout is not None for S in layout.capacities]
    return sum(numbers) / len(numbers)


def options(words: Sequence[str] | None) -> argparse.Namespace:
    """What the command line asks for."""
    parser = argparse.ArgumentParser(prog="python -m bench.memory", description=__doc__)
    add = parser.add_argument
    add("--calibration", help="folder of less-kv calibrate, with curves")
    add("--sidekick", help="folder of maps whose state is measured too")
    add("--tokens", type=int, nargs="+", default=[32, 64, 128], help="float16 tokens")
    add("--rows", nargs="+", default=[MERGING_ROWS], help="packed formats")
    add("--model", default="smollm2", help="smollm2, a folder, or a hub name")
    add("--text", type=Path, help="a file or folder; default: Wikipedia's eval half")
    add("--chunks", type=int, default=8)
    add("--length", type=int, default=1024)
    add("--only", nargs="+", metavar="TEXT", help="caches beside H2O whose names have one of these")
    add("--copy", type=int, default=0, help="how many copy probes")
    add("--model-dtype", default="bfloat16")
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> None:
    """Measure and print the table."""
    args = options(words)
    model, tokenizer = load_model(args.model, dtype=getattr(torch, args.model_dtype))
    texts = read_texts(args.text) if args.text else wikipedia_articles("eval")
    ids = chunks(tokenizer, texts, args.length, max(args.chunks, args.copy))
    probes = copy_probes(ids[: args.copy], len(opening(tokenizer))) if args.copy else None
    ids, start = ids[: args.chunks], args.length // 4
    facts = describe(model, "bench.memory")
    shape, layers = (facts.kv_heads, facts.head_dim), facts.layers - len(facts.windows)

    full = full_attention(model, ids)
    copied = "" if probes is None else f"{copy_perplexity(full_attention(model, probes)):.2f}"
    print("| tokens | cache | slots | bytes | nats lost | recovered, % | copy |")
    print("|---:|---|---:|---:|---:|---:|---:|")
    print(f"| | full attention, perplexity {full.perplexity(start):.3f} | | | | | {copied} |")
    for tokens in args.tokens:
        room = layers * page_bytes(*shape, torch.float16, tokens)

        def caches(batch: int, room: int = room) -> list[LessKVCache]:
            return [within(config, model, batch, room) for config in methods(args).values()]

        held = caches(len(ids))
        found = through_caches(model, ids, held)
        again = [] if probes is None else through_caches(model, probes, caches(len(probes)))
        for i, (name, cache, nats) in enumerate(zip(methods(args), held, found, strict=True)):
            won = recovered(full, found[0], nats, start)
            lost = nats.per_chunk(start) - full.per_chunk(start)
            copied = f"{copy_perplexity(again[i]):.2f}" if again else ""
            print(
                f"| {tokens} | {name} | {slots_of(cache):.0f} | {bytes_of(cache):,} "
                f"| {mean_of(lost)} | {100 * won.share:.1f} ± {100 * won.error:.1f} | {copied} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
