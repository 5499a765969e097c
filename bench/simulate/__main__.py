"""Nats that a bounded cache would lose, by simulation: ``python -m bench.simulate``.

Each row of the table is one cache; its settings are the product of the options that take several
values. Attention is replayed token by token on whole texts, so a cache costs seconds, and formats
that no kernel has can be tried. ``tests/test_simulate.py`` holds the simulator to the real cache.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from bench.simulate.measure import Measurement, Setting
from bench.simulate.model import narrow
from bench.simulate.native import VICTIMS
from bench.simulate.space import SPACES
from bench.simulate.state import features_of, state_bytes
from less import Sidekick
from less.evaluate import assets
from less.evaluate.perplexity import FROM, copy_probes
from less.files import read_texts
from less.fit.calibrate import REPEATED
from less.fit.text import opening, repeat_passage

CALIBRATION = 8  # chunks of training text


def settings(args: argparse.Namespace, state: int) -> Iterator[Setting]:
    """The product of what was asked for; `state`: bytes that folding takes of a head."""
    fixed = {"sinks": args.sinks, "metadata": args.metadata}
    several = ("rows", "quantizer", "bytes_of", "space", "victim", "budgets", "hot", "decay")
    several += ("recent", "repeated")
    for values in itertools.product(*(getattr(args, name) for name in several)):
        varied = dict(zip(several, values, strict=True))
        varied["budgets"] = varied["budgets"] == "curves"
        yield Setting(**varied, **fixed, state=state if varied["victim"] == "fold" else 0)


def options(words: Sequence[str] | None) -> argparse.Namespace:
    """What the command line asks for."""
    parser = argparse.ArgumentParser(prog="python -m bench.simulate", description=__doc__)
    add, several = parser.add_argument, {"nargs": "+"}
    add("--model", default="smollm2", help="smollm2, a folder, or a hub name")
    add("--text", type=Path, help="a file or folder; default: Wikipedia's eval half")
    add("--training", type=Path, help="the text of calibration; default: Wikipedia's train half")
    add("--chunks", type=int, default=8)
    add("--skip", type=int, default=0, help="chunks left out before the first")
    add("--length", type=int, default=1024)
    add("--probe", action="store_true", help="copy probes made of the text, scored at the copy")
    add("--rows", default=["k4v4"], **several, help="bits of keys and values: k4v4, k3v2, k16v16")
    add("--quantizer", default=["max"], **several, help="see quantizers.named")
    add("--bytes-of", type=int, default=[64], **several, help="fp16 tokens; 0: all is kept")
    add("--space", default=["calibrated"], **several, choices=SPACES)
    add("--victim", default=["forget"], **several, choices=(*VICTIMS, "fold"))
    add("--sidekick", type=Path, help="folder of centroid maps, for victim fold; calibrated space")
    add("--half-state", action="store_true", help="its H in fp16")
    add(
        "--budgets",
        default=["uniform"],
        **several,
        choices=("uniform", "curves"),
        help="slots of a head: all alike, or by error curves",
    )
    add(
        "--repeated",
        type=float,
        default=[REPEATED],
        **several,
        help="part of chunks that repeat a passage in curves",
    )
    add("--hot", type=int, default=[16], **several, help="last tokens in int8")
    add("--sinks", type=int, default=4, help="first tokens in int8")
    add("--decay", type=float, default=[0.98], **several)
    add("--recent", type=float, default=[0.25], **several, help="part of the slots, last tokens")
    add("--metadata", type=int, help="bytes of a slot's metadata; default: what the cache has")
    add("--exact", action="store_true", help="the model multiplies in float32, not bfloat16")
    add("--json", type=Path, help="a file that gets a line for each row")
    return parser.parse_args(words)


def texts_of(args: argparse.Namespace) -> list[list[str]]:
    """The texts to measure on, and those to calibrate on."""
    return [
        read_texts(path) if path else assets.wikipedia_articles(split)
        for path, split in ((args.text, "eval"), (args.training, "train"))
    ]


def subject(args: argparse.Namespace) -> Measurement:
    """The model and the text that were asked for."""
    model, tokenizer = assets.load_model(args.model)
    if not args.exact:
        narrow(model)
    texts, training = texts_of(args)
    chunks = assets.chunks(tokenizer, texts, args.length, args.skip + args.chunks)[args.skip :]
    start = FROM
    if args.probe:
        chunks = copy_probes(chunks, len(opening(tokenizer)))
        start = args.length - args.length // 4
    calibration = assets.chunks(tokenizer, training, args.length, CALIBRATION)
    repeats = repeat_passage(calibration, len(opening(tokenizer)))
    return Measurement(model, chunks, start, calibration, repeats)


def main(words: Sequence[str] | None = None) -> None:
    """Measure and print the table."""
    args = options(words)
    if "fold" in args.victim and (args.sidekick is None or args.space != ["calibrated"]):
        raise ValueError("--victim fold needs --sidekick and --space calibrated")
    sidekick = None if args.sidekick is None else Sidekick.from_pretrained(args.sidekick)
    on = subject(args)
    state, features = 0, None
    if sidekick is not None:
        state = state_bytes(sidekick, args.half_state)
        features = features_of(sidekick, on.calibrated())
    print("| cache | slots | perplexity | nats lost | recovered, % |\n|---|---:|---:|---:|---:|")
    print(on.row("full attention", args.length, on.full), flush=True)
    for tokens in sorted(set(args.bytes_of) - {0}):
        print(on.row("H2O, fp16", tokens, on.h2o(tokens)), flush=True)
    for setting in settings(args, state):
        row, record = on.measure(setting, sidekick=features)
        print(row, flush=True)
        if args.json:
            asked = {"model": args.model, "text": str(args.text), "length": args.length}
            asked |= {"skip": args.skip, "probe": args.probe}
            with args.json.open("a") as file:
                file.write(json.dumps(asked | record) + "\n")


if __name__ == "__main__":
    main()
