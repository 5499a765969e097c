"""Nats that a bounded cache would lose, by simulation: ``python -m bench.simulate``.

Each row of the table is one cache; its settings are the product of the options that take several
values. Attention is replayed token by token on whole texts, so a cache costs seconds, and formats
that no kernel has can be tried. ``tests/test_simulate.py`` holds it to the real cache.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench.simulate import quantizers
from bench.simulate.model import FIRST, bounded, calibrate, narrow, nats
from bench.simulate.native import Cache, Noise
from bench.simulate.space import Moments, Space, moments
from less.evaluate import assets
from less.evaluate.perplexity import FROM, Nats, copy_probes, recovered
from less.fit.text import opening

METADATA = 6  # bytes of a slot beside its rows and their scales
PROMPT = 256  # tokens that means are estimated from without calibration
SPACES = ("calibrated", "means", "hadamard", "prompt", "prompt-means", "none")


def rows_bytes(rows: str, D: int, group: int) -> int:
    """Bytes of a slot: codes, two-byte scales, metadata."""
    scales = 2 * (D // group if group else 1)
    return sum(D * int(b) // 8 + (0 if b == "16" else scales) for b in rows[1:].split("v")) + METADATA


def slots_of(tokens: int, rows: str, D: int, sinks: int, hot: int, group: int) -> int:
    """Slots, hot ones included, in the bytes of `tokens` 16-bit tokens of today's pages."""
    hot_bytes = rows_bytes("k8v8", D, 0)
    room = tokens * (4 * D + 12) - (sinks + hot) * hot_bytes
    return sinks + hot + room // rows_bytes(rows, D, group)


def spaces(kind: str, calibrated: dict[int, Moments]) -> Any:
    """The function by which a layer's rows find their space, or None."""
    if kind == "none":
        return None

    def space(module: nn.Module, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Space:
        if kind == "hadamard":
            return Space(k.shape[0], k.shape[2])
        if kind in ("calibrated", "means"):
            return Space(k.shape[0], k.shape[2], calibrated[layer], scales=kind == "calibrated")
        part = [x[None, :, FIRST:PROMPT] for x in (q, k, v)]
        measured = moments(*part, module.o_proj.weight)  # type: ignore[arg-type]
        return Space(k.shape[0], k.shape[2], measured, scales=kind == "prompt")

    return space


def line(name: str, slots: int | str, measured: Nats, full: Nats, h2o: Nats | None) -> str:
    """A row of the table."""
    loss = measured.per_chunk() - full.per_chunk()
    error = float(loss.std()) / math.sqrt(len(loss)) if len(loss) > 1 else math.nan
    won = recovered(full, h2o, measured) if h2o else None
    share = f"{100 * won.share:.1f} ± {100 * won.error:.1f}" if won else ""
    return f"| {name} | {slots} | {float(loss.mean()):.4f} ± {error:.4f} | {share} |"


def options() -> argparse.Namespace:
    """What the command line asks for."""
    parser = argparse.ArgumentParser(prog="python -m bench.simulate", description=__doc__)
    several: dict[str, Any] = {"nargs": "+"}
    parser.add_argument("--model", default="smollm2", help="smollm2, a folder, or a hub name")
    parser.add_argument("--text", type=Path, help="a file of text; default: Wikipedia's eval half")
    parser.add_argument("--chunks", type=int, default=8)
    parser.add_argument("--skip", type=int, default=0, help="chunks left out before the first")
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--probe", action="store_true", help="copy probes in place of text")
    parser.add_argument("--rows", default=["k4v4"], **several, help="bits: k4v4, k3v2; 16: fp16")
    parser.add_argument("--quantizer", default=["lloyd"], **several, choices=quantizers.NAMES)
    parser.add_argument("--bytes-of", type=int, default=[64], **several,
                        help="fp16 tokens whose bytes are spent; 0: nothing is evicted")  # fmt: skip
    parser.add_argument("--space", default=["calibrated"], **several, choices=SPACES)
    parser.add_argument("--hot", type=int, default=[16], **several)
    parser.add_argument("--sinks", type=int, default=4)
    parser.add_argument("--decay", type=float, default=[0.98], **several)
    parser.add_argument("--recent", type=float, default=0.25, help="part of the slots")
    parser.add_argument("--half-scores", action="store_true", help="scores in fp16")
    parser.add_argument("--exact", action="store_true", help="model's products in float32, not bf16")
    parser.add_argument("--json", type=Path, help="append a line for each row")
    return parser.parse_args()


def main() -> None:
    """Measure and print the table."""
    args = options()
    model, tokenizer = assets.load_model(args.model)
    if not args.exact:
        narrow(model)
    texts = [args.text.read_text("utf8")] if args.text else assets.wikipedia_articles("eval")
    chunks = assets.chunks(tokenizer, texts, args.length, args.skip + args.chunks)[args.skip :]
    if args.probe:
        chunks = copy_probes(chunks, len(opening(tokenizer)))
    start = args.length * 3 // 4 if args.probe else FROM
    calibrated: dict[int, Moments] = {}
    if {"calibrated", "means"} & set(args.space):
        train = assets.chunks(tokenizer, assets.wikipedia_articles("train"), args.length, 8)
        calibrated = calibrate(model, train)
    config = model.config.get_text_config()
    D = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads

    half = quantizers.HALF
    full = nats(model, chunks, None, start)
    print(f"full attention: perplexity {full.perplexity(start):.3f}, {args.chunks} chunks of {args.length}")
    baselines: dict[int, Nats] = {}
    print("| cache | slots | nats lost | recovered, % |\n|---|---:|---:|---:|")
    for tokens in sorted(set(args.bytes_of) - {0}):
        plain = Cache(half, half, tokens, half, sinks=0, hot=0, recent=tokens // 2, decay=1.0)
        baselines[tokens] = nats(model, chunks, bounded(plain, None), start)
        print(line(f"H2O, fp16, {tokens}", tokens, baselines[tokens], full, None), flush=True)
    for tokens, rows, space, hot, decay, name in itertools.product(
        args.bytes_of, args.rows, args.space, args.hot, args.decay, args.quantizer
    ):
        k, v = (quantizers.named(name, int(b), D) for b in rows[1:].split("v"))
        slots = slots_of(tokens, rows, D, args.sinks, hot, k.group) if tokens else args.length
        cache = Cache(
            k, v, slots - hot - args.sinks, sinks=args.sinks, hot=hot, decay=decay,
            recent=round(args.recent * slots), half_scores=args.half_scores,
        )  # fmt: skip
        if rows == "k16v16" and hot == 0:
            cache = replace(cache, hot_rows=half)
        noise = Noise(*torch.zeros(2, 2, dtype=torch.float64))
        began = time.perf_counter()
        measured = nats(model, chunks, bounded(cache, spaces(space, calibrated), noise), start)
        label = f"{rows} {name}, {space}, hot {hot}, decay {decay}" + (
            ", fp16 scores" if args.half_scores else "")
        label += f", bytes of {tokens}" if tokens else ", nothing evicted"
        print(line(label, slots, measured, full, baselines.get(tokens)), flush=True)
        if args.json:
            loss = measured.per_chunk(start) - full.per_chunk(start)
            record = {
                "model": str(args.model), "text": str(args.text), "length": args.length, "rows": rows,
                "quantizer": name, "space": space, "hot": hot, "decay": decay, "tokens": tokens,
                "slots": slots, "half": args.half_scores, "loss": loss.tolist(), "skip": args.skip,
                "noise": (noise.error / noise.power).tolist(), "seconds": time.perf_counter() - began,
                "perplexity": measured.perplexity(start), "probe": args.probe,
                "h2o": (baselines[tokens].per_chunk(start) - full.per_chunk(start)).tolist() if tokens else None,
            }  # fmt: skip
            with args.json.open("a") as file:
                file.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
