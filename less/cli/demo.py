"""``less-kv demo``: a real model under a full cache, under eviction, and under LESS."""

from __future__ import annotations

import argparse
import sys
import time
from typing import TYPE_CHECKING, Any

from less.cli import checks, measuring
from less.files import write_whole

if TYPE_CHECKING:
    from pathlib import Path

    from rich.console import Console
    from torch import Tensor

    from less.evaluate.compare import Result
    from less.evaluate.generate import Continuation
    from less.evaluate.methods import Method

_NAME = "less-demo"


def add_parser(subparsers: Any) -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser(
        "demo",
        help="a real model under a bounded cache: text, one table, one plot",
        description="Let a model continue a long text, and measure it, under a full cache, under "
        "eviction alone and under LESS. About six minutes on two cores.",
    )
    measuring.add_common(parser, out=_NAME, chunks=4)
    parser.add_argument(
        "--budget", type=measuring.positive, default=64, metavar="C",
        help="tokens kept per head (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--new-tokens", type=measuring.positive, default=64, metavar="N",
        help="tokens that the model writes under each cache (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--probes", type=int, default=1, metavar="N",
        help="copy probes, at most as many as chunks (default: %(default)s)",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Run the demo."""
    checks.check_packages("less-kv demo")
    start = time.monotonic()
    console = measuring.console_for()
    if not 0 <= args.probes <= args.chunks:
        raise ValueError(f"--probes must be in 0 .. {args.chunks}, the chunks, got {args.probes}")
    if args.length <= args.budget:
        raise ValueError(
            f"--length {args.length} must exceed --budget {args.budget}: nothing would be evicted"
        )

    console.rule(f"1/3  model and text, {args.budget} tokens kept per head", align="left")
    subject = measuring.prepare(args, console)
    chunks = measuring.cut(subject, args.length, args.chunks)
    methods = measuring.methods_for(subject, args.budget)
    args.out.mkdir(parents=True, exist_ok=True)
    subject.load()

    console.rule(f"2/3  the model continues {args.length:,} tokens of text", align="left")
    written = _continue(subject, chunks[:1], methods, args.new_tokens, console)

    console.rule("3/3  the same methods, measured", align="left")
    results = _measure(subject, chunks, methods, args, console)
    _report(subject, results, written, args, console)
    console.print(f"finished in {time.monotonic() - start:.0f} s")
    return 0


def _continue(
    subject: measuring.Subject,
    prompt: Tensor,
    methods: list[Method],
    tokens: int,
    console: Console,
) -> list[tuple[Method, Continuation]]:
    """The full cache, plain H2O and LESS write on, one after the other."""
    from less.evaluate.generate import continue_text
    from less.evaluate.methods import BASELINE, FULL
    from less.evaluate.report import size

    shown = [m for m in methods if m.name in (FULL.name, BASELINE)]
    shown += [m for m in methods if m.sidekick is not None][-1:]
    shown += [m for m in methods if m.stored(subject.dtype).victim == "merge"][-1:]
    end = subject.tokenizer.decode(prompt[0, -60:].tolist())
    console.print(f"  … {' '.join(end.split())}\n", style="dim", markup=False)
    written = []
    for method in shown:
        cache = method.cache(subject.model, subject.dtype)
        console.print(f"[bold]{method.name}[/] ▸ ", end="")
        answer = continue_text(
            subject.model, subject.tokenizer, prompt, tokens, cache, _write_through
        )
        print(flush=True)
        kept = f"every token, {str(subject.model.dtype).removeprefix('torch.')}"
        if method.policy is not None:
            kept = f"{method.policy.capacity} slots per head, {method.stored(subject.dtype).name}"
        written.append((method, answer))
        more = len(shown) - len(written)
        left = f"; {more} more, about {more * answer.seconds:.0f} s left" if more else ""
        console.print(
            f"  {size(answer.cache_bytes)} of cache ({kept}), {answer.seconds:.0f} s{left}\n",
            style="dim",
        )
    return written


def _write_through(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _measure(
    subject: measuring.Subject,
    chunks: Tensor,
    methods: list[Method],
    args: argparse.Namespace,
    console: Console,
) -> list[Result]:
    from less.evaluate.compare import compare, measure_full, with_speeds
    from less.evaluate.progress import progress

    model = subject.model
    start = args.length // 4
    with progress(console, "full cache, chunks") as step:
        full = measure_full(model, chunks, args.probes, step, len(subject.opened))
    with progress(console, "bounded caches, tokens") as step:
        results = compare(
            model, chunks, methods, full, args.budget, subject.dtype, start=start, progress=step
        )
    with progress(console, "speed, turns") as step:
        return with_speeds(model, chunks[:1], methods, results, subject.dtype, step)


def _report(
    subject: measuring.Subject,
    results: list[Result],
    written: list[tuple[Method, Continuation]],
    args: argparse.Namespace,
    console: Console,
) -> None:
    from less.evaluate import report
    from less.evaluate.machine import in_words, machine, resident_bytes

    console.print()
    console.print(report.table(results, width=console.width))
    for line in report.legend(results):
        console.print(line, style="dim", markup=False)
    resident = resident_bytes()
    facts = {
        "command": "less-kv demo",
        "model": subject.name,
        "model_dtype": args.model_dtype,
        "opened": subject.opened,
        "text": subject.source,
        "budget": args.budget,
        "resident_bytes": resident,
        **machine(),
    }
    plot: Path = args.out / "plot.png"
    report.plot(results, plot)
    write_whole(args.out / "results.jsonl", report.json_lines(results, facts))
    caption = f"{subject.in_words}, {args.budget} tokens kept per head; {in_words(facts)}."
    body = [report.markdown(results), caption, "", *report.legend(results)]
    text = "\n".join(body) + "\n"
    pieces = ["\n## Continuations\n"]
    for method, answer in written:
        pieces.append(f"**{method.name}** ({report.size(answer.cache_bytes)} of cache)\n")
        pieces.append("> " + answer.text.strip().replace("\n", "\n> ") + "\n")
    measuring.write_report(args, "less-kv demo", text, "\n".join(pieces))
    if resident is not None:
        console.print(f"process memory {report.size(resident)}, most of it the model", style="dim")
    console.print(f"written: {args.out}/report.md, plot.png, results.jsonl")
