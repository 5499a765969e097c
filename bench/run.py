"""Time the cases of ``bench.cases``: one header, aligned rows, a JSON line per row in out/.

Nothing is timed that is not correct: a case first proves itself against the reference. Rates are
of the bytes that the case's formula gives, beside what this machine's memory can copy; a case is
run over and over, so a small one is served by the processor's caches and may go faster than that.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from bench.cases import CASES, SHAPES, SMALL, TOLERANCE, Case
from less import _C
from less.evaluate.machine import machine

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def seconds_per_run(run: Callable[[], object], budget: float) -> list[float]:
    """Times of single runs, as many as fit the budget, at least five, after a warm-up."""
    run()
    times: list[float] = []
    end = time.perf_counter() + budget
    while len(times) < 5 or time.perf_counter() < end:
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return times


def copy_rate(budget: float) -> float:
    """Bytes a second that torch reads and writes when it copies 256 MiB."""
    source = torch.ones(1 << 26)
    target = torch.empty_like(source)
    best = min(seconds_per_run(lambda: target.copy_(source), budget))
    return 2 * source.numel() * 4 / best


def measure(case: Case, tolerance: float, budget: float) -> dict[str, float | str]:
    """Prove the case right, then time it.

    Raises:
        ValueError: The result is further from the reference than the tolerance.
    """
    error = case.error()
    if not error <= tolerance:
        raise ValueError(f"not timed: off by {error:.2g}, wanted at most {tolerance:.2g}")
    times = seconds_per_run(case.run, budget)
    median = statistics.median(times)
    return {
        "error": error,
        "runs": len(times),
        "milliseconds": median * 1e3,
        "best_milliseconds": min(times) * 1e3,
        "bytes": case.bytes,
        "formula": case.formula,
        "gigabytes_per_second": case.bytes / median / 1e9,
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns 1 where a case was not correct."""
    parser = argparse.ArgumentParser(prog="bench", description=__doc__)
    parser.add_argument("--only", choices=CASES, nargs="+", default=list(CASES), metavar="CASE")
    parser.add_argument("--dtype", choices=DTYPES, nargs="+", default=list(DTYPES))
    parser.add_argument("--seconds", type=float, default=0.3, help="per row")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--small", action="store_true", help="one tiny shape: is all correct?")
    parser.add_argument("--json", type=Path, default=Path("out/bench.jsonl"))
    args = parser.parse_args(argv)

    torch.set_num_threads(args.threads)
    rate = copy_rate(args.seconds)
    facts = {**machine(), "simd": _C.build_facts()["simd"], "copy_gb_s": round(rate / 1e9, 1)}
    print("# " + ", ".join(f"{name} {value}" for name, value in facts.items()))
    print(
        f"{'case':16}{'shape':16}{'dtype':10}{'ms':>9}{'best':>9}{'MB':>9}{'GB/s':>8}{'error':>10}"
    )

    args.json.parent.mkdir(parents=True, exist_ok=True)
    wrong = 0
    with args.json.open("w") as lines:
        for shape in (SMALL,) if args.small else SHAPES:
            for name in args.only:
                for dtype_name in args.dtype:
                    dtype = DTYPES[dtype_name]
                    row = f"{name:16}{shape.name:16}{dtype_name:10}"
                    try:
                        got = measure(CASES[name](shape, dtype), TOLERANCE[dtype], args.seconds)
                    except ValueError as error:
                        wrong += 1
                        print(f"{row} WRONG: {error}")
                        continue
                    print(
                        f"{row}{got['milliseconds']:9.4f}{got['best_milliseconds']:9.4f}"
                        f"{got['bytes'] / 1e6:9.3f}{got['gigabytes_per_second']:8.2f}"
                        f"{got['error']:10.1e}",
                        flush=True,
                    )
                    record = {"case": name, "shape": shape.name, "dtype": dtype_name}
                    lines.write(json.dumps(record | got | {"machine": facts}) + "\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
