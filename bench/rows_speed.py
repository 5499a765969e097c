"""A decode step on rows of several formats, in turns: ``python -m bench.rows_speed``.

One thread, layers enough that every step reads its slots from memory; minima over rounds in one
process. The last row of a shape has k4v4 slots for the bytes of the float16 ones.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass

import torch

from less import H2O
from less.budget import least_tokens, most_within, page_bytes
from less.cache.paged import PagedLayer
from less.layer import Call, Paged, PageLayout, allocate

#: Name -> query heads, kv heads, head dim.
SHAPES = {"7B": (32, 32, 128), "8B": (32, 8, 128)}
ROWS = (torch.float16, torch.int8, "k4v4", "k3v3", "k2v2")
_BYTES = 400e6  # of float16 slots, in all layers: beyond every cache


@dataclass(frozen=True)
class Run:
    """Layers of one format, full of random tokens."""

    name: str
    layer: PagedLayer
    pools: list[torch.Tensor]
    call: Call

    def step(self) -> float:
        """Microseconds of one layer's step."""
        begin = time.perf_counter()
        for pool in self.pools:
            self.layer.run(self.call, Paged(pool))
        return (time.perf_counter() - begin) / len(self.pools) * 1e6


def run_of(shape: tuple[int, int, int], rows: torch.dtype | str, slots: int, layers: int) -> Run:
    """Build and fill."""
    Q, K, D = shape
    layout = PageLayout(K, D, slots, rows)
    layer = PagedLayer(H2O(heavy=slots // 2, recent=slots - slots // 2, decay=0.98), layout, Q)
    pools = allocate([layout] * layers, 1)
    q, k, v = (torch.randn(1, heads, slots, D, dtype=torch.float16) for heads in (Q, K, K))
    for t in range(slots):
        layer.attend(pools[0], *(x[:, :, t : t + 1] for x in (q, k, v)))
    for pool in pools[1:]:
        pool.copy_(pools[0])
    q, k, v = (x[:, :, :1].contiguous() for x in (q, k, v))
    name = f"{rows} S={slots}".removeprefix("torch.")
    return Run(name, layer, pools, Call(q, k, v, None, torch.empty_like(q)))


def tokens_in(K: int, D: int, room: int) -> int:
    """Slots of k4v4 that a page of so many bytes has."""
    least = least_tokens("k4v4")
    return most_within(room, lambda slots: page_bytes(K, D, "k4v4", max(slots, least)))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m bench.rows_speed", description=__doc__)
    parser.add_argument("--slots", type=int, default=205)
    parser.add_argument("--rounds", type=int, default=12)
    args = parser.parse_args()
    torch.set_num_threads(1)
    for name, shape in SHAPES.items():
        _, K, D = shape
        room = page_bytes(K, D, torch.float16, args.slots)
        layers = max(8, int(_BYTES // room))
        more = tokens_in(K, D, room)
        runs = [run_of(shape, rows, args.slots, layers) for rows in ROWS]
        runs.append(run_of(shape, "k4v4", more, layers))
        rounds = [[run.step() for run in runs] for _ in range(args.rounds)]
        best = [min(times) for times in zip(*rounds, strict=True)]
        for run, microseconds in zip(runs, best, strict=True):
            print(
                f"{name} {run.name}: {microseconds:.1f} us a layer, "
                f"{best[0] / microseconds:.2f} x as fast as float16"
            )


if __name__ == "__main__":
    main()
