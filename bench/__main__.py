"""``make bench``: a layer's decode step against what it replaces, and the bars it is held to.

One header, aligned rows, a JSON line per row. A part whose library is not installed is left out and
named at the end. --quick times what the bars need; the default is
every model, C, batch, thread count and dtype, and takes the better part of an hour. Rows are added
to the file of JSON lines, so that a long run can be cut into pieces; --report alone prints the
bars of what the file holds.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from bench import bars, compare, native
from bench.interleave import ReadRate
from less import _C
from less.evaluate.machine import machine
from less.evaluate.report import update_section

PARTS = ("compare", "kernels", "overhead", "model")
FULL = (4096, 32768)
KERNELS = r"^(attention_alone|head_at_a_time|online_attention)/llama-3-8b/C205/float16$"


def quick_groups() -> Iterator[compare.Group]:
    """What the bars need."""
    for dtype in compare.DTYPES:
        yield from compare.groups(["llama-2-7b"], [205], [1], [1], [dtype])
    yield from compare.groups(["llama-3-8b"], [205], [1], [1], ["float16"])
    yield from compare.groups(["llama-2-7b"], [820], [1], [1, 2], ["float16"])


def compared(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Records of all groups, each printed when it is done."""
    library = native.build("less_bench_read")
    full = FULL[:1] if args.quick else tuple(args.full)
    chosen = (
        quick_groups()
        if args.quick
        else compare.groups(args.models, args.kept, args.batch, args.threads, args.dtypes)
    )
    rates: dict[int, ReadRate] = {}
    for group in chosen:
        rate = rates.setdefault(group.threads, ReadRate(library, group.threads))
        s = group.shape
        # The reference and transformers' cache at the smallest size alone: they are slow.
        plain = s.S == 205 and s.B == 1 and group.threads == 1 and group.slots == group.model
        head = f"{s.name}, C={s.S}, batch {s.B}, {group.threads} thread(s), {group.dtype}"
        print(f"\n{head}\n{'':30}{'µs':>12}{'median':>12}{'GB/s':>8}{'of read':>9}{'x step':>9}")
        try:
            records = compare.measure(group, rate, args.seconds, full, plain)
        except compare.NotCorrectError as error:
            print(f"WRONG, not timed: {error}")
            args.wrong += 1
            continue
        for x in records:
            speed = x["bytes"] / x["best"]
            moved = f"{speed / 1e9:8.1f}{speed / x['read']:9.0%}" if x["bytes"] else " " * 17
            print(
                f"{x['contender']:30}{x['best'] * 1e6:12.1f}{x['median'] * 1e6:12.1f}{moved}"
                f"{x['best'] / records[0]['best']:9.2f}",
                flush=True,
            )
            yield x


def kernels() -> Iterator[dict[str, Any]]:
    """One query head at a time against a group at once, by the torch-free program."""
    program = native.build("less_kernels")
    with tempfile.NamedTemporaryFile(suffix=".json") as out:
        words = [f"--benchmark_filter={KERNELS}", f"--benchmark_out={out.name}"]
        done = subprocess.run([program, *words], capture_output=True, text=True, check=True)
        print("\n" + done.stdout.strip())
        runs = json.loads(Path(out.name).read_text())["benchmarks"]
    best: dict[str, float] = {}
    for run in runs:
        name = run["run_name"].partition("/")[0]
        if run["run_type"] == "iteration":
            best[name] = min(best.get(name, float("inf")), run["real_time"] * 1e-6)
    for name, seconds in best.items():
        yield {"part": "kernels", "contender": name, "best": seconds}


def measured(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Records of the parts asked for."""
    if "overhead" in args.parts:
        torch.set_num_threads(1)
        x = compare.overhead()
        print(f"empty problem: {x['best'] * 1e6:.1f} µs, {x['allocations']} allocations")
        yield x
    if "kernels" in args.parts:
        try:
            yield from kernels()
        except native.MissingError as error:
            args.left_out.append(f"kernels ({error})")
    if "compare" in args.parts:
        yield from compared(args)
    if "model" in args.parts:
        from bench import model

        torch.set_num_threads(max(args.threads))
        for x in model.measure():
            print(
                f"SmolLM2, {x['contender']:6}{x['best'] * 1e3:8.2f} ms a token, "
                f"{x['attention']:.0%} attention and cache, {x['threads']} thread(s)"
            )
            yield x


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, report; returns 1 where a contender was not correct."""
    parser = argparse.ArgumentParser(prog="bench", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="what the bars need, no more")
    parser.add_argument("--parts", choices=PARTS, nargs="*", default=list(PARTS))
    parser.add_argument(
        "--models", choices=compare.MODELS, nargs="+", default=list(compare.MODELS), metavar="MODEL"
    )
    parser.add_argument("--kept", type=int, nargs="+", default=[205, 410, 820])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument(
        "--dtypes", choices=compare.DTYPES, nargs="+", default=list(compare.DTYPES), metavar="DTYPE"
    )
    parser.add_argument("--full", type=int, nargs="+", default=list(FULL), help="full caches")
    parser.add_argument("--seconds", type=float, default=3.0, help="per group, at least 5 turns")
    parser.add_argument("--json", type=Path, default=Path("out/compare.jsonl"))
    parser.add_argument("--fresh", action="store_true", help="forget what the file holds")
    parser.add_argument("--report", action="store_true", help="measure nothing")
    parser.add_argument("--update", type=Path, metavar="FILE", help="e.g. docs/results.md")
    args = parser.parse_args(argv)
    args.wrong, args.left_out = 0, []

    waiting = os.environ.get("OMP_WAIT_POLICY", "spinning")
    facts = {**machine(), "simd": _C.build_facts()["simd"], "waiting": waiting}
    print("# " + ", ".join(f"{name} {value}" for name, value in facts.items()))
    args.json.parent.mkdir(parents=True, exist_ok=True)
    if args.fresh:
        args.json.unlink(missing_ok=True)
    if not args.report:
        with args.json.open("a") as lines:
            for record in measured(args):
                lines.write(json.dumps(record | {"machine": facts}) + "\n")
                lines.flush()
    records = [json.loads(line) for line in args.json.read_text().splitlines()]
    rows = bars.bars(records)
    print("\n" + bars.bars_table(rows))
    for part in args.left_out:
        print(f"LEFT OUT: {part}")
    if args.update:
        update_section(args.update, "speed", bars.report(records, facts, "make bench"))
    return 1 if args.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
