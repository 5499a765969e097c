"""Nats that a bounded cache would lose, by simulation: ``python -m bench.simulate``.

Each row of the table is one cache; its settings are the product of the options that take several
values. Attention is replayed token by token on whole texts, so a cache costs seconds, and formats
that no kernel has can be tried. ``tests/test_simulate.py`` holds the simulator to the real cache.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.simulate import quantizers
from bench.simulate.model import bounded, calibrate, narrow, nats
from bench.simulate.native import Cache, Noise
from bench.simulate.space import SPACES, Moments, space_by_name
from less.evaluate import assets
from less.evaluate.perplexity import FROM, Nats, copy_probes, recovered
from less.files import read_texts
from less.fit.text import opening

METADATA = 6  # bytes of a slot beside its rows and their scales
CALIBRATION = 8  # chunks of training text


@dataclass(frozen=True)
class Setting:
    """A row of the table.

    Attributes:
        rows: Bits of keys and values, as in ``k4v3``; 16 is fp16, 8 is int8.
        quantizer: One of ``quantizers.NAMES``.
        bytes_of: 16-bit tokens of today's pages whose bytes are spent; 0: nothing is evicted.
        space: One of ``SPACES``.
        hot: Last tokens in int8.
        sinks: First tokens in int8.
        decay: What a score keeps per token.
        recent: Part of the slots that hold the last tokens.
        half_scores: Scores are held in fp16.
    """

    rows: str
    quantizer: str
    bytes_of: int
    space: str
    hot: int
    sinks: int
    decay: float
    recent: float
    half_scores: bool

    def cache(self, D: int, length: int) -> Cache:
        """The cache to simulate, of rows of D numbers and texts of `length` tokens."""
        k, v = (quantizers.named(self.quantizer, bits, D) for bits in bits_of(self.rows))
        slots = self.slots(D, length)
        if slots <= self.sinks + self.hot:
            raise ValueError(
                f"--bytes-of must leave cold slots beside {self.sinks + self.hot} hot ones, "
                f"got {self.bytes_of}: {slots} slots"
            )
        return Cache(
            k, v, slots - self.sinks - self.hot, sinks=self.sinks, hot=self.hot,
            recent=round(self.recent * slots), decay=self.decay, half_scores=self.half_scores,
        )  # fmt: skip

    def slots(self, D: int, length: int) -> int:
        """Slots of a kv head, hot ones included."""
        if not self.bytes_of:
            return length
        group = quantizers.named(self.quantizer, 4, D).group
        hot = self.sinks + self.hot
        room = self.bytes_of * (4 * D + 12) - hot * slot_bytes("k8v8", D, 0)
        return hot + room // slot_bytes(self.rows, D, group)

    def __str__(self) -> str:
        scores = ", fp16 scores" if self.half_scores else ""
        spent = f"bytes of {self.bytes_of}" if self.bytes_of else "nothing evicted"
        return (
            f"{self.rows} {self.quantizer}, {self.space}, hot {self.hot}, "
            f"decay {self.decay}{scores}, {spent}"
        )


def bits_of(rows: str) -> list[int]:
    """Bits of keys and of values."""
    return [int(bits) for bits in rows[1:].split("v")]


def slot_bytes(rows: str, D: int, group: int) -> int:
    """Bytes of a slot: codes, scales of two bytes, metadata."""
    scales = 2 * (D // group if group else 1)
    return METADATA + sum(D * b // 8 + (scales if b < 16 else 0) for b in bits_of(rows))


def settings(args: argparse.Namespace) -> Iterator[Setting]:
    """The product of what was asked for."""
    for rows, quantizer, spent, space, hot, decay in itertools.product(
        args.rows, args.quantizer, args.bytes_of, args.space, args.hot, args.decay
    ):
        yield Setting(
            rows, quantizer, spent, space, hot, args.sinks, decay, args.recent, args.half_scores
        )


def row(name: str, slots: int, measured: Nats, full: Nats, h2o: Nats | None, start: int) -> str:
    """A row of the table; standard errors are paired over chunks."""
    loss = measured.per_chunk(start) - full.per_chunk(start)
    error = float(loss.std()) / math.sqrt(len(loss)) if len(loss) > 1 else math.nan
    share = ""
    if h2o is not None:
        won = recovered(full, h2o, measured, start)
        share = f"{100 * won.share:.1f} ± {100 * won.error:.1f}"
    return f"| {name} | {slots} | {float(loss.mean()):.4f} ± {error:.4f} | {share} |"


def options() -> argparse.Namespace:
    """What the command line asks for."""
    parser = argparse.ArgumentParser(prog="python -m bench.simulate", description=__doc__)
    add, several = parser.add_argument, {"nargs": "+"}
    add("--model", default="smollm2", help="smollm2, a folder, or a hub name")
    add("--text", type=Path, help="a file or folder of text; default: Wikipedia's eval half")
    add("--chunks", type=int, default=8)
    add("--skip", type=int, default=0, help="chunks left out before the first")
    add("--length", type=int, default=1024)
    add("--probe", action="store_true", help="copy probes made of the text, scored at the copy")
    add("--rows", default=["k4v4"], **several, help="bits of keys and values: k4v4, k3v2, k16v16")
    add("--quantizer", default=["lloyd"], **several, choices=quantizers.NAMES)
    add("--bytes-of", type=int, default=[64], **several, help="fp16 tokens; 0: all is kept")
    add("--space", default=["calibrated"], **several, choices=SPACES)
    add("--hot", type=int, default=[16], **several, help="last tokens in int8")
    add("--sinks", type=int, default=4, help="first tokens in int8")
    add("--decay", type=float, default=[0.98], **several)
    add("--recent", type=float, default=0.25, help="part of the slots that hold the last tokens")
    add("--half-scores", action="store_true", help="scores in fp16")
    add("--exact", action="store_true", help="the model multiplies in float32, not bfloat16")
    add("--json", type=Path, help="a file that gets a line for each row")
    return parser.parse_args()


def main() -> None:
    """Measure and print the table."""
    args = options()
    model, tokenizer = assets.load_model(args.model)
    if not args.exact:
        narrow(model)
    texts = read_texts(args.text) if args.text else assets.wikipedia_articles("eval")
    chunks = assets.chunks(tokenizer, texts, args.length, args.skip + args.chunks)[args.skip :]
    start = FROM
    if args.probe:
        chunks = copy_probes(chunks, len(opening(tokenizer)))
        start = args.length - args.length // 4
    calibrated: dict[int, Moments] = {}
    if {"calibrated", "means"} & set(args.space):
        train = assets.wikipedia_articles("train")
        calibrated = calibrate(model, assets.chunks(tokenizer, train, args.length, CALIBRATION))
    config = model.config.get_text_config()
    D = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads

    full = nats(model, chunks, None, start)
    print(f"full attention: {full.perplexity(start):.3f}; {len(chunks)} chunks of {args.length}")
    print("| cache | slots | nats lost | recovered, % |\n|---|---:|---:|---:|", flush=True)
    h2o: dict[int, Nats] = {}
    half = quantizers.HALF
    for tokens in sorted(set(args.bytes_of) - {0}):
        plain = Cache(half, half, tokens, half, sinks=0, hot=0, recent=tokens // 2, decay=1.0)
        h2o[tokens] = nats(model, chunks, bounded(plain, None), start)
        print(row(f"H2O, fp16, {tokens}", tokens, h2o[tokens], full, None, start), flush=True)
    for setting in settings(args):
        began = time.perf_counter()
        noise = Noise(*torch.zeros(2, 2, dtype=torch.float64))
        space = space_by_name(setting.space, calibrated)
        cache, slots = setting.cache(D, args.length), setting.slots(D, args.length)
        measured = nats(model, chunks, bounded(cache, space, noise), start)
        baseline = h2o.get(setting.bytes_of)
        print(row(str(setting), slots, measured, full, baseline, start), flush=True)
        if args.json:
            record = {
                "model": args.model, "text": str(args.text), "length": args.length,
                "skip": args.skip, "probe": args.probe, **dataclasses.asdict(setting),
                "slots": slots, "perplexity": measured.perplexity(start),
                "loss": _loss(measured, full, start), "h2o": _loss(baseline, full, start),
                "noise": (noise.error / noise.power).tolist(),
                "seconds": time.perf_counter() - began,
            }  # fmt: skip
            with args.json.open("a") as file:
                file.write(json.dumps(record) + "\n")


def _loss(measured: Nats | None, full: Nats, start: int) -> Any:
    if measured is None:
        return None
    loss: Tensor = measured.per_chunk(start) - full.per_chunk(start)
    return loss.tolist()


if __name__ == "__main__":
    main()
