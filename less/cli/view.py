"""``less-kv view``: where a cache has each token of a text, in the terminal or on a page."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from less.cli import checks, measuring, threads
from less.files import write_whole


def add_parser(subparsers: Any) -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser(
        "view",
        help="a text, each token coloured by where the cache has it, over time",
        description="Feed a text to a bounded cache token by token, and show where each token is "
        "in each head: hot, cold, merged, folded or forgotten. With --out one page with a slider "
        "over time, else the end of the text in the terminal.",
    )
    add = parser.add_argument
    measuring.add_model_name(parser)
    add("--text", metavar="FILE", help="a text file (default: a Wikipedia article)")
    add(
        "--tokens",
        type=measuring.positive,
        default=256,
        metavar="N",
        help="of the text (default: %(default)s)",
    )
    add(
        "--method",
        default="best",
        metavar="NAME",
        help="of less-kv report --list, or NAME=CONFIG as there (default: best)",
    )
    add(
        "--budget",
        default="64",
        metavar="C",
        help="bytes of so many 16-bit tokens per head, or a share of the text's: 64 or 5%% "
        "(default: 64)",
    )
    add(
        "--sidekick",
        metavar="PATH",
        help="of the method less (default: the shipped one that fits the model)",
    )
    add("--calibration", metavar="FOLDER", help="of less-kv calibrate, for the method best")
    add(
        "--head",
        type=_head,
        metavar="LAYER.HEAD",
        help="in the terminal: of this layer and kv head (default: the share of all heads)",
    )
    add("--out", type=Path, metavar="FILE", help="write a page, view.html say")
    measuring.add_model_dtype(parser)
    add("--threads", type=measuring.positive, help=threads.DEFAULT)  # fmt: skip


def _head(text: str) -> tuple[int, int]:
    layer, _, head = text.partition(".")
    return int(layer), int(head)


def run(args: argparse.Namespace) -> int:
    """Show the text."""
    checks.check_packages("less-kv view", {"transformers": "transformers", "rich": "rich"}, "demo")
    if args.out is not None:
        checks.check_file("--out", args.out)
    if args.calibration is not None:
        checks.check_calibration(args.calibration)
    from less import files
    from less.evaluate import sources

    sources.check_model_name(args.model)
    if args.text is None:
        sources.check_wikipedia()
    texts = files.read_texts(args.text) if args.text is not None else None
    import torch

    from less.cli import rows
    from less.evaluate import assets, heat_map, lives
    from less.evaluate.named import Budget, methods_for, own_method
    from less.evaluate.progress import progress
    from less.evaluate.report import size
    from less.hf.models import describe

    budget = Budget(args.budget)
    console = measuring.console_for()
    threads.set_threads(args, console)
    found = assets.find_model(args.model)
    measuring.check_length("--tokens", args.tokens, found.config)
    own = dict([own_method(args.method)]) if "=" in args.method else {}
    name = next(iter(own), args.method)
    methods, without = methods_for(
        [name],
        *measuring.sidekicks_for(args.sidekick, found.config),
        rows.read_calibration(args.calibration, found.config),
        own,
    )
    if not methods or methods[0].config is None:
        raise ValueError(
            f"--method {name}: {without.get(name, 'it keeps every token, there is nothing to see')}"
        )
    texts = texts if texts is not None else assets.wikipedia_articles("eval")[:1]
    ids = assets.chunks(found.tokenizer, texts, args.tokens, 1)
    model = found.load(getattr(torch, args.model_dtype))
    cache = methods[0].cache(model, 1, budget.room(describe(model, "view"), args.tokens))
    assert cache is not None  # only the full cache has none
    pieces = [found.tokenizer.decode([token]) for token in ids[0].tolist()]
    with progress(console, f"{name}, tokens") as step:
        seen = lives.lives(model, ids, pieces, cache, step)
    if args.head is not None and args.head not in seen.heads:
        raise ValueError(f"--head must be LAYER.HEAD of the cache's, got {args.head}")
    held = cache.memory()
    about = [
        f"{Path(args.model).name}, {args.tokens:,} tokens, method {name}: "
        f"{size(held['slots'] + held['state'])} of slots and state, the bytes of "
        f"{budget.tokens(args.tokens)} 16-bit tokens per head. {cache.policy_text()}.",
    ]
    if args.out is not None:
        page = lives.page(seen, f"Where {name} has each token", about)
        write_whole(args.out, page)
        console.print(f"written: {args.out}")
        return 0
    head = None if args.head is None else seen.heads.index(args.head)
    console.print(lives.as_text(seen, head))
    console.print(about[0], style="dim", markup=False)
    slots = [None if at is None else tuple(at.capacities) for at in cache.layouts]
    console.print(f"slots of each kv head:\n{heat_map.text(slots)}", markup=False)
    return 0
