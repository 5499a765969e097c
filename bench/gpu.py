"""A decode step on a GPU against attention over a full cache, and the report of ``bench/gpu.sh``.

``compare`` captures each contender once per layer into a CUDA graph, over so many layers that L2
holds no part of the next, reads other memory through L2 before every replay, outside the timing,
and takes the fastest. Nothing is timed that does not agree with ``less.reference``, or attention in
float32; what cannot run is named, and the rest goes on. ``report`` makes the tables of
docs/results.md of those rows and of ``less_gpu``'s (bench/cuda).
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.cases import TOLERANCE, Shape, difference
from less import H2O, LessKVCache, Sidekick
from less.evaluate.machine import machine
from less.evaluate.report import update_section

Record = dict[str, Any]

SHAPES = (
    Shape("llama-2-7b", Q=32, K=32, D=128, S=205, R=8, E=64),
    Shape("llama-3-8b", Q=32, K=8, D=128, S=205, R=8, E=64),
)
TINY = (Shape("tiny", Q=4, K=2, D=16, S=10, R=4, E=8),)
BATCHES = (1, 8, 64)
FULL = (4096, 32768)
BEYOND_CACHES = 4  # times L2: all layers of a graph together, at least
REPLAYS = 30
MOST_OF_MEMORY = 0.6  # of a GPU's, that all layers of a contender may take; else it is left out


class NotCorrectError(ValueError):
    """A contender disagrees with the reference, and is not timed."""


@dataclass(frozen=True)
class Contender:
    """What is timed: ``step(layer)`` launches one layer's attention."""

    name: str
    bytes: int  # that one layer must read and write
    make: Callable[[int], Callable[[int], Tensor]]  # layers -> step


def sidekick(s: Shape, layers: int) -> Sidekick:
    """Random maps of kind ``exp``, float16, other ones in every layer."""
    made = []
    for seed in range(layers):
        g = torch.Generator().manual_seed(seed)

        def normal(*shape: int, g: torch.Generator = g) -> Tensor:
            return torch.randn(*shape, generator=g)

        made.append(
            {
                "q_w1": normal(s.Q, s.D, s.E) / s.D**0.5,
                "q_w2": normal(s.Q, s.E, s.R) / s.E**0.5,
                "q_bias": normal(s.Q, s.R),
                "k_w1": normal(s.K, s.D, s.E) / s.D**0.5,
                "k_w2": normal(s.K, s.E, s.R) / s.E**0.5,
                "k_bias": normal(s.K, s.R),
            }
        )
    return Sidekick(made, kind="exp", dtype=torch.float16)


class Bench:
    """The contenders of one shape and batch on one device.

    Args:
        s: The shape.
        device: A GPU, or for a dry run the CPU.
        dtype: Of the model; the slots' too.
    """

    def __init__(self, s: Shape, device: torch.device, dtype: torch.dtype) -> None:
        """See the class."""
        self.s, self.device, self.dtype = s, device, dtype
        self.policy = H2O(heavy=s.S - s.S // 2, recent=s.S // 2, decay=0.98)

    def draw(self, *shape: int, seed: int) -> Tensor:
        """Normal values on the device."""
        g = torch.Generator(self.device).manual_seed(seed)
        return torch.randn(*shape, generator=g, device=self.device, dtype=self.dtype)

    def qkv(self, T: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of T tokens."""
        s = self.s
        q = self.draw(s.B, s.Q, T, s.D, seed=seed)
        k, v = (self.draw(s.B, s.K, T, s.D, seed=seed + i) for i in (1, 2))
        return q, k, v

    def cache(self, layers: int, maps: bool, slots: torch.dtype, backend: str) -> LessKVCache:
        """A cache of ours."""
        s = self.s
        return LessKVCache(
            layers=layers, q_heads=s.Q, kv_heads=s.K, head_dim=s.D, batch=s.B, policy=self.policy,
            sidekick=sidekick(s, layers) if maps else None, dtype=slots, device=self.device,
            backend=backend,
        )  # fmt: skip

    def ours(self, name: str, maps: bool, slots: torch.dtype) -> Contender:
        """``LessKVCache.attend``, proved on a cache of one layer."""
        s = self.s
        eight = slots.itemsize == 1
        per_slot = 2 * s.D * slots.itemsize + 16 + (8 if eight else 0)
        state = 8 * s.R * (s.D + 1) if maps else 0
        weights = (s.Q + s.K) * (2 * s.E * (s.D + s.R) + 4 * s.R) if maps else 0

        def make(layers: int) -> Callable[[int], Tensor]:
            self.prove(maps, slots)
            cache = self.cache(layers, maps, slots, "native")
            q, k, v = self.qkv(1, seed=1)
            out = torch.empty_like(q)
            for layer in range(layers):
                cache.attend(layer, *self.qkv(s.S + 1, seed=10 * layer))
            return lambda layer: cache.attend(layer, q, k, v, out=out)

        return Contender(name, s.B * s.K * (s.S * per_slot + state) + weights, make)

    def prove(self, maps: bool, slots: torch.dtype) -> None:
        """Compare a prompt and a few steps with the reference, on the same device.

        Raises:
            NotCorrectError: They differ.
        """
        native, plain = (self.cache(1, maps, slots, name) for name in ("native", "reference"))
        for T in (self.s.S + 3, 1, 1, 1):
            qkv = self.qkv(T, seed=7 * T)
            off = difference(native.attend(0, *qkv), plain.attend(0, *qkv).double())
            if not off <= TOLERANCE[self.dtype]:
                raise NotCorrectError(f"off by {off:.2g}, wanted at most {TOLERANCE[self.dtype]}")

    def full(self, other: Other, N: int) -> Contender:
        """Attention over all of N tokens."""
        s = self.s

        def make(layers: int) -> Callable[[int], Tensor]:
            attention = other.load()
            q = self.draw(s.B, s.Q, 1, s.D, seed=1)
            k, v = (
                [self.draw(s.B, s.K, N, s.D, seed=10 * i + j) for i in range(layers)]
                for j in (2, 3)
            )
            # One row is enough, and float32 takes twice the memory.
            want = torch.nn.functional.scaled_dot_product_attention(
                *(x[:1].float() for x in (q, k[0], v[0])), enable_gqa=True
            )
            if other.rows:
                q = q.transpose(1, 2).contiguous()
                for some in (k, v):
                    some[:] = [x.transpose(1, 2).contiguous() for x in some]
            got = attention(q, k[0], v[0]).reshape(s.B, *want.shape[1:])[:1]
            off = difference(got, want.double())
            if not off <= TOLERANCE[self.dtype]:
                raise NotCorrectError(f"off by {off:.2g}, wanted at most {TOLERANCE[self.dtype]}")
            return lambda layer: attention(q, k[layer], v[layer])

        moved = 2 * s.B * s.K * N * s.D * self.dtype.itemsize
        return Contender(f"{other.name} {N}", moved, make)

    def contenders(self, full: Sequence[int]) -> Iterator[Contender]:
        """Ours first."""
        yield self.ours("less", True, self.dtype)
        yield self.ours("less, eviction alone", False, self.dtype)
        if self.device.type == "cuda":
            yield self.ours("less, fp8 slots", True, torch.float8_e4m3fn)
        for N in full:
            for other in others(self.s):
                yield self.full(other, N)


Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Other:
    """Attention over a full cache, of someone else."""

    name: str
    load: Callable[[], Attention]
    rows: bool = False  # k and v are [B, N, K, D], else [B, K, N, D]; so q and out


def others(s: Shape) -> Iterator[Other]:
    """Torch's, and those of what else is installed."""

    def sdpa() -> Attention:
        attention = torch.nn.functional.scaled_dot_product_attention
        return lambda q, k, v: attention(q, k, v, enable_gqa=True)

    def flash() -> Attention:
        attention = importlib.import_module("flash_attn").flash_attn_with_kvcache
        return lambda q, k, v: attention(q, k, v)

    def infer() -> Attention:
        attention = importlib.import_module("flashinfer").single_decode_with_kv_cache
        return lambda q, k, v: attention(q[0, 0], k[0], v[0])

    yield Other("sdpa", sdpa)
    if importlib.util.find_spec("flash_attn") is not None:
        yield Other("flash-attn", flash, rows=True)
    if importlib.util.find_spec("flashinfer") is not None and s.B == 1:
        yield Other("flashinfer", infer, rows=True)


def graph_seconds(step: Callable[[int], Tensor], layers: int, device: torch.device) -> list[float]:
    """Seconds a layer of every replay, L2 overwritten before each."""
    if device.type != "cuda":
        start = time.perf_counter()
        for layer in range(layers):
            step(layer)
        return [(time.perf_counter() - start) / layers]
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for layer in range(layers):
            step(layer)
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for layer in range(layers):
            step(layer)
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    flush = torch.zeros(2 * cache // 4, dtype=torch.int32, device=device)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    times = []
    for _ in range(REPLAYS):
        flush.sum()  # reads: what a fill leaves in L2 is written back on the time of the next
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e-3 / layers)
    return times


def compare(args: argparse.Namespace) -> Iterator[Record]:
    """Records of every shape, batch and contender, printed as they come."""
    yield {"part": "machine", **machine()}
    device = torch.device("cpu" if args.dry_run else "cuda")
    dtype = torch.float32 if args.dry_run else torch.float16
    cache, memory = 0, 1 << 40
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        cache, memory = properties.L2_cache_size, properties.total_memory
    for s in TINY if args.dry_run else SHAPES:
        for B in BATCHES[:1] if args.dry_run else BATCHES:
            bench = Bench(Shape(**(vars(s) | {"B": B})), device, dtype)
            print(f"\n{s.name}, C={s.S}, batch {B}\n{'':24}{'µs':>10}{'median':>10}{'GB/s':>8}")
            for c in bench.contenders((32,) if args.dry_run else FULL):
                layers = max(2, -(-BEYOND_CACHES * cache // c.bytes))
                if layers * c.bytes > MOST_OF_MEMORY * memory:
                    print(f"{c.name:24} left out: {layers * c.bytes >> 30} GiB")
                    continue
                try:
                    times = sorted(graph_seconds(c.make(layers), layers, device))
                except Exception as error:
                    args.failed.append(f"{s.name}, batch {B}, {c.name}")
                    what = "WRONG" if isinstance(error, NotCorrectError) else "FAILED"
                    print(f"{c.name:24} {what}, not timed: {error}")
                    continue
                best, median = times[0], times[len(times) // 2]
                print(
                    f"{c.name:24}{best * 1e6:10.1f}{median * 1e6:10.1f}{c.bytes / best / 1e9:8.0f}",
                    flush=True,
                )
                yield {
                    "part": "compare", "shape": s.name, "C": s.S, "B": B, "contender": c.name,
                    "layers": layers, "best": best, "median": median, "bytes": c.bytes,
                }  # fmt: skip


def kernels_table(records: Iterable[Record]) -> str:
    """``less_gpu``'s rows in Markdown."""
    lines = [
        "| op | shape | batch | C | T | slots | launches | µs | median | MB | GB/s | of copy "
        "| TFLOP/s |",
        "|---|---|---:|---:|---:|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for x in records:
        if x["part"] == "kernels":
            lines.append(
                f"| {x['op']} | {x['shape']} | {x['B']} | {x['C']} | {x['T']} | {x['slots']} "
                f"| {x['launches']:.3g} | {x['best'] * 1e6:.1f} | {x['median'] * 1e6:.1f} "
                f"| {x['bytes'] / 1e6:.2f} | {x['bytes'] / x['best'] / 1e9:.0f} "
                f"| {x['share']:.0%} "
                f"| {format(x['flops'] / x['best'] / 1e12, '.0f') if x['flops'] else ''} |"
            )
    return "\n".join(lines)


def compare_table(records: Iterable[Record]) -> str:
    """Microseconds a layer of every contender in Markdown, and how much slower than ours."""
    rows: dict[tuple[str, int, int], dict[str, Record]] = {}
    for x in records:
        if x["part"] == "compare":
            rows.setdefault((x["shape"], x["C"], x["B"]), {})[x["contender"]] = x
    names = list(dict.fromkeys(name for row in rows.values() for name in row))
    lines = [
        "| shape | C | batch | " + " | ".join(names) + " |",
        "|---|---:|---:|" + "---:|" * len(names),
    ]
    for key, row in rows.items():
        ours = row.get("less")
        cells = []
        for name in names:
            x = row.get(name)
            if x is None:
                cells.append("")
            elif ours is None or x is ours:
                cells.append(f"{x['best'] * 1e6:.1f}")
            else:
                cells.append(f"{x['best'] * 1e6:.1f} ({x['best'] / ours['best']:.3g}x)")
        lines.append("| " + " | ".join([*map(str, key), *cells]) + " |")
    return "\n".join(lines)


def report(records: Sequence[Record], here: Record) -> str:
    """Both tables, with where they were measured, for docs/results.md.

    Args:
        records: Of all parts.
        here: Facts of this machine, for where the rows have none of theirs.
    """
    device: Record = next((x for x in records if x["part"] == "device"), {})
    facts: Record = next((x for x in records if x["part"] == "machine"), here)
    soaks = [x for x in records if x["part"] == "soak"]
    gpu = device.get("gpu", "no GPU")
    where = (
        f"{gpu}, compute capability {device.get('capability', '?')}, which copies "
        f"{device.get('copy', 0.0) / 1e9:.0f} GB/s (read and written); torch {facts['torch']}, "
        f"less {facts['less']} ({facts['commit'] or 'no checkout'}). Command: `bench/gpu.sh`."
    )
    endurance = "".join(
        f" One graph of decode steps was replayed {x['replays']:,} times in {x['seconds']:.0f} s."
        for x in soaks
    )
    return f"""\
{where}{endurance}

The fastest of {REPLAYS} graph replays, per layer, L2 emptied before each; MB, GB/s and TFLOP/s by
the formulas of bench/cuda/gpu.cpp.

{kernels_table(records)}

`LessKVCache.attend` with C tokens kept against attention over a full cache of N, float16,
microseconds a layer; in brackets against `less`.

{compare_table(records)}"""


def main(argv: Sequence[str] | None = None) -> int:
    """Measure or report; returns 1 where a contender failed or was not correct."""
    parser = argparse.ArgumentParser(prog="bench.gpu", description=__doc__)
    parser.add_argument("what", choices=["compare", "report"])
    parser.add_argument("--json", type=Path, default=Path("out/gpu.jsonl"), help="rows are added")
    parser.add_argument("--update", type=Path, metavar="FILE", help="e.g. docs/results.md")
    parser.add_argument("--dry-run", action="store_true", help="tiny, on the CPU: does it run?")
    args = parser.parse_args(argv)
    args.failed = []
    if args.what == "compare":
        args.json.parent.mkdir(parents=True, exist_ok=True)
        with args.json.open("a") as lines:
            for record in compare(args):
                lines.write(json.dumps(record) + "\n")
                lines.flush()
        if args.failed:
            print("\nbench.gpu: failed:", *args.failed, sep="\n  ", file=sys.stderr)
        return 1 if args.failed else 0
    text = report([json.loads(line) for line in args.json.read_text().splitlines()], machine())
    print(text)
    if args.update:
        update_section(args.update, "gpu", text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
