"""A layer's decode step of many requests: one op, beside a call for each request.

Both read the same pages once, so the ratio is at least what reading them takes of the calls' time.
One thread is timed by its own seconds, which other work on the machine does not lengthen.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from statistics import median

import torch

from less import H2O, PagedLayer, PageLayout
from less.layer import PageRows

SHAPES = {"SmolLM2-135M": (9, 3, 64), "Llama-3-8B": (32, 8, 128)}


def run(args: argparse.Namespace) -> None:
    """Print a table, and a JSON line for each row; nothing is timed that differs."""
    torch.set_num_threads(args.threads)
    B, S = args.requests, args.slots
    print(f"{B} requests, {S} slots a head, {args.threads} threads, medians of {args.rounds}")
    columns = ("one op, µs", "each, µs", "ratio", "read, µs", "bound")
    print(f"{'':14}{'rows':>10}", *(f"{name:>11}" for name in columns))
    for name, (Q, K, D) in SHAPES.items():
        for rows in ("float32", "bfloat16", "k4v4"):
            dtype = rows if rows == "k4v4" else getattr(torch, rows)
            layer = PagedLayer(H2O(S // 2, S - S // 2), PageLayout(K, D, S, dtype), Q)
            ratio, together, each, read = measure(layer, B, args.rounds)
            line = {"part": "step", "shape": name, "rows": rows, "requests": B, "slots": S}
            line |= {"together_us": together, "each_us": each, "ratio": ratio}
            line |= {"read_us": read, "bytes": B * layer.layout.nbytes}
            figures = f"{together:>11.0f} {each:>11.0f} {ratio:>11.2f} {read:>11.0f}"
            print(f"{name:14}{rows:>10} {figures} {read / each:>11.2f}")
            print(json.dumps(line), flush=True)


def measure(layer: PagedLayer, B: int, rounds: int) -> tuple[float, float, float, float]:
    """Ratio of interleaved rounds; microseconds at once, one by one, and of reading the pages."""
    Q, K, D = layer.plan.spec.q_heads, layer.layout.kv_heads, layer.layout.head_dim
    S = layer.layout.slots
    pools = [layer.new_pool(B + 1) for _ in range(2)]
    dtype = torch.float32 if layer.layout.dtype == torch.float32 else torch.bfloat16
    fused = [torch.randn(B, Q + 2 * K, D).to(dtype) for _ in range(8)]
    pages = torch.arange(1, B + 1, dtype=torch.int32)
    rows = PageRows.of(torch.stack([pages, torch.zeros_like(pages)]))
    one = [PageRows.of(rows.packed[:, b : b + 1].contiguous()) for b in range(B)]
    for _ in range(S // 32 + 1):  # full slots
        q, k, v = torch.randn(B, Q + 2 * K, 32, D).to(dtype).split([Q, K, K], 1)
        for pool in pools:
            layer.attend(pool, q, k, v, pages=rows.used())
    out = torch.empty(2, B, Q, D, dtype=dtype)

    def at_once(i: int) -> None:
        q, k, v = (x.unsqueeze(2) for x in fused[i % 8].split([Q, K, K], 1))
        layer.attend(pools[0], q, k, v, pages=rows, out=out[0].unsqueeze(2))

    def one_by_one(i: int) -> None:
        q, k, v = (x.unsqueeze(2) for x in fused[i % 8].split([Q, K, K], 1))
        for b in range(B):
            own = slice(b, b + 1)
            layer.attend(
                pools[1], q[own], k[own], v[own], pages=one[b], out=out[1, own].unsqueeze(2)
            )

    bytes_read = torch.zeros(B * layer.layout.nbytes // 4)

    def read(i: int) -> None:
        bytes_read.sum()

    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter

    def timed(step: Callable[[int], None], i: int) -> float:
        begin = clock()
        step(i)
        return (clock() - begin) * 1e6

    times = [(timed(at_once, i), timed(one_by_one, i), timed(read, i)) for i in range(rounds)]
    if not torch.equal(out[0], out[1]) or not torch.equal(*pools):
        raise RuntimeError("bench.serving: a step at once differs from one by one")
    return median(a / b for a, b, _ in times), *(median(x) for x in zip(*times, strict=True))
