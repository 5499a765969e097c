"""``less-kv calibrate``: measure a model's channels, and what its heads' slots are worth."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from less.cli import checks, corpus, measuring, threads

_SAMPLE = 256  # slots of a head, the mean, of the map that is shown
_PICTURES = (".png", ".svg")


def add_parser(subparsers: Any) -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser(
        "calibrate",
        help="measure a model's channels and heads, for rows of few bits and budgets per head",
        description="Measure, over a few thousand tokens: the means and scales of keys and values, "
        "with which rows of few bits lose less; and what the slots of every kv head are worth, in "
        "text and where a passage comes again, by which a budget is dealt out to them. Four "
        "minutes for SmolLM2-135M on two cores.",
    )
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder of the calibration; a sidekick's will do")
    measuring.add_model_name(parser)
    add("--name", help="the model's name in the record (default: its folder's)")
    corpus.add_text(parser)
    add("--chunks", type=measuring.positive, default=8, help="of text (default: %(default)s)")
    add(
        "--length", type=measuring.positive, default=1024,
        help="tokens per chunk (default: %(default)s)",
    )  # fmt: skip
    add(
        "--no-budgets", action="store_true", help="leave out what slots are worth: most of the time"
    )
    add(
        "--plot", type=Path, metavar="FILE",
        help="a .png or .svg: which heads get a budget; needs matplotlib",
    )  # fmt: skip
    add("--seed", type=int, default=0, help="default: %(default)s")
    measuring.add_model_dtype(parser)
    add("--device", default="cpu", help="default: %(default)s")
    add("--threads", type=measuring.positive, help=threads.DEFAULT)


def run(args: argparse.Namespace) -> int:
    """Measure and save."""
    from less.evaluate import sources

    begin = time.monotonic()
    checks.check_folder("--out", args.out)
    if args.plot is not None:
        _check_plot(args)
    sources.check_model_name(args.model)
    corpus.check_texts(args.text)
    import torch

    from less.evaluate import assets, heat_map
    from less.evaluate.progress import progress
    from less.fit import calibrate, sample_chunks
    from less.fit.text import opening, repeat_passage
    from less.hf.models import describe

    device = corpus.named_device(args.device)
    texts, source = corpus.read_named_texts(args.text)
    console = measuring.console_for()
    threads.set_threads(args, console)
    found = assets.find_model(args.model)
    describe(found.skeleton(), f"--model {args.model}")
    measuring.check_length("--length", args.length, found.config)
    pool = sample_chunks(found.tokenizer, texts, args.length, args.chunks, args.seed)
    model = found.load(getattr(torch, args.model_dtype)).to(device)
    repeats = None
    if not args.no_budgets:
        repeats = repeat_passage(pool.ids, len(opening(found.tokenizer)))
    name = args.name or ("SmolLM2-135M-Instruct" if args.model == sources.SMOLLM2 else None)
    with progress(console, "layers") as step:
        calibration = calibrate(
            model,
            pool.ids,
            repeats=repeats,
            budgets=not args.no_budgets,
            source=source,
            name=name,
            show=step,
        )
    calibration.save_pretrained(args.out)
    if not args.no_budgets:
        slots = heat_map.dealt_slots(calibration, _SAMPLE)
        title = f"slots of heads at a mean of {_SAMPLE}"
        console.print(f"{title}, a line for each layer:\n{heat_map.text(slots)}", soft_wrap=True)
        if args.plot is not None:
            heat_map.plot(slots, args.plot, title)
    console.print(
        f"{args.out}: {calibration!r}, {pool.ids.numel():,} tokens, "
        f"{time.monotonic() - begin:.0f} s"
    )
    return 0


def _check_plot(args: argparse.Namespace) -> None:
    if args.no_budgets:
        raise ValueError(f"--plot {args.plot}: it shows budgets, which --no-budgets leaves out")
    if args.plot.suffix not in _PICTURES:
        raise ValueError(f"--plot {args.plot} must end in {' or '.join(_PICTURES)}")
    checks.check_file("--plot", args.plot)
    checks.check_packages("less-kv calibrate --plot", {"matplotlib": "matplotlib"})
