"""``less-kv evaluate``: the full measurement, several budgets over more text."""

from __future__ import annotations

import argparse
import time
from typing import TYPE_CHECKING, Any

from less.cli import checks, measuring, rows
from less.files import write_whole

if TYPE_CHECKING:
    from rich.console import Console

    from less.evaluate.compare import Result

_NAME = "less-evaluate"


def add_parser(subparsers: Any) -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser(
        "evaluate",
        help="the full measurement: several budgets, more text",
        description="Perplexity, copy probe, bytes and speed of every method at several budgets, "
        "token by token through the real caches. About twenty minutes on two cores.",
    )
    measuring.add_common(parser, out=_NAME, chunks=8, of_rows=rows.several)
    parser.add_argument(
        "--budgets", type=_budgets, default=[32, 64, 128], metavar="C,C,…",
        help="tokens kept per head (default: 32,64,128)",
    )  # fmt: skip
    parser.add_argument("--probes", type=int, default=4, metavar="N", help="default: %(default)s")
    parser.add_argument(
        "--contexts", type=_budgets, default=[4096], metavar="N,N,…",
        help="lengths of text at which speed is measured besides (default: 4096)",
    )  # fmt: skip
    parser.add_argument(
        "--no-speed", action="store_true", help="leave out the speed (on a busy machine)"
    )


def _budgets(text: str) -> list[int]:
    return sorted({measuring.positive(part) for part in text.split(",")})


def run(args: argparse.Namespace) -> int:
    """Run the measurement."""
    checks.check_packages("less-kv evaluate")
    begin = time.monotonic()
    console = measuring.console_for()
    if args.length <= max(args.budgets):
        raise ValueError(
            f"--length {args.length} must exceed the largest budget {max(args.budgets)}"
        )
    if not 0 <= args.probes <= args.chunks:
        raise ValueError(f"--probes must be in 0 .. {args.chunks}, the chunks, got {args.probes}")
    subject = measuring.prepare(args, console, () if args.no_speed else args.contexts)
    chunks = measuring.cut(subject, args.length, args.chunks)
    methods_at = {budget: measuring.methods_for(subject, budget) for budget in args.budgets}
    args.out.mkdir(parents=True, exist_ok=True)
    subject.load()
    from less.evaluate import report
    from less.evaluate.compare import compare, measure_full, with_speeds
    from less.evaluate.machine import in_words, machine
    from less.evaluate.progress import progress

    facts = {
        "command": "less-kv evaluate",
        "model": subject.name,
        "model_dtype": args.model_dtype,
        "opened": subject.opened,
        "text": subject.source,
        "budgets": args.budgets,
        "rows": args.rows or [],
        **machine(),
    }
    with progress(console, "full cache, chunks") as step:
        full = measure_full(subject.model, chunks, args.probes, step, len(subject.opened))
    everything: list[Result] = []
    sections: list[str] = []
    for budget in args.budgets:
        methods = methods_at[budget]
        with progress(console, f"{budget} tokens per head, tokens") as step:
            results = compare(
                subject.model, chunks, methods, full, budget, subject.dtype,
                start=args.length // 4, progress=step,
            )  # fmt: skip
        if not args.no_speed:
            with progress(console, f"{budget} tokens per head, speed") as step:
                results = with_speeds(
                    subject.model, chunks[:1], methods, results, subject.dtype, step
                )
        console.print(report.table(results, f"{budget} tokens kept per head", console.width))
        everything += results
        sections.append(f"### {budget} tokens kept per head\n\n{report.markdown(results)}")
        # After every budget, so that a killed run leaves what it had.
        lines = report.json_lines(everything, facts)
        write_whole(args.out / "results.jsonl", lines)
    for line in report.legend(everything):
        console.print(line, style="dim", markup=False)
    report.plot(everything, args.out / "plot.png")
    command = (
        f"less-kv evaluate --chunks {args.chunks} --length {args.length} "
        f"--budgets {','.join(map(str, args.budgets))}"
    )
    if args.rows:
        command += f" --rows {','.join(args.rows)}"
    caption = f"{subject.in_words}; {subject.source}; {in_words(facts)}. Command: `{command}`."
    if not args.no_speed:
        sections.append(_long_contexts(subject, args, console))
    legend = "\n".join(f"- {line}" for line in report.legend(everything))
    text = "\n".join([caption, "", *sections, legend]) + "\n"
    measuring.write_report(args, "less-kv evaluate", text)
    console.print(f"written: {args.out}/report.md, plot.png, results.jsonl")
    console.print(f"finished in {time.monotonic() - begin:.0f} s")
    return 0


def _long_contexts(subject: measuring.Subject, args: argparse.Namespace, console: Console) -> str:
    """Markdown: decoding speed and bytes with long texts in the cache, at the middle budget."""
    from less.evaluate.progress import progress
    from less.evaluate.report import size
    from less.evaluate.speed import speed

    budget = args.budgets[len(args.budgets) // 2]
    methods = measuring.methods_for(subject, budget)
    methods = [
        m for m in methods if m.name in ("full cache", "H2O", "LESS") or m.storage is not None
    ]
    lines = []
    for context in args.contexts:
        text = measuring.cut(subject, context, 1)
        caches = [m.cache(subject.model, subject.dtype) for m in methods]
        with progress(console, f"speed after {context:,} tokens, turns") as step:
            speeds = speed(subject.model, text, caches, chunk=512, progress=step)
        # Layers that slide hold the same with every method, and are not counted.
        memory = [c.memory() for c in caches if c is not None]
        full = memory[0]["full"] - memory[0]["native"]  # of H2O, in the table's dtype
        for method, cache, measured in zip(methods, caches, speeds, strict=True):
            held = full if cache is None else cache.memory()["slots"] + cache.memory()["state"]
            lines.append(
                f"| {context:,} | {method.name} | {size(held)} | "
                f"{measured.tokens_per_second:.1f} | {measured.prompt_seconds:.1f} |"
            )
    head = "| tokens seen | method | slots + state | tok/s | prompt, s |\n|---:|---|---:|---:|---:|"
    table = "\n".join([head, *lines])
    console.print(table, markup=False)
    return (
        f"### Speed with more text, {budget} tokens kept per head, batch 1\n\n{table}\n\n"
        "The prompt is taken in 512 tokens at a time. The full cache's bytes are counted in "
        "16 bits at least; it runs in the model's dtype.\n"
    )
