"""A layer that decodes for long: ``python -m bench.soak --shape smollm2 --tokens 100000``.

One row decodes random tokens, one a call, through a full cache. After each the program looks at
what must hold however long the text: every slot is taken, by another token each; everything is
finite; memory does not grow; a step takes as long at the end as at the beginning, and as long as
that of a new cache beside it, whatever else the machine does by then. The low-rank state is summed
beside it in float64, from the tokens that left; merged tokens must count all that were seen.
"""

from __future__ import annotations

import argparse
import array
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from less import H2O, LessKVCache, Sidekick
from less.evaluate.machine import in_words, machine, resident_bytes
from less.layer import Maps
from less.reference import psi

SHAPES = {"smollm2": (9, 3, 64, 32), "7b": (32, 32, 128, 128)}  # Q, K, D, heavy = recent
POOL = 4093  # different tokens, a prime: token n has the key of row n % POOL
RANK, HIDDEN = 8, 64
BLOCK = 512  # tokens that leave, whose features are taken at once
SECTION = 1000  # tokens between two looks at memory
TURN = 50  # steps of the old cache, then of a new one, in turns


class State:
    """The low-rank state in float64, from the tokens that left."""

    def __init__(self, sidekick: Sidekick, k: Tensor, v: Tensor) -> None:
        self.maps = Maps(sidekick.kind, {n: x.double() for n, x in sidekick[0].items()})
        self.k, self.v = k.double(), v.double()  # [K, POOL, D]
        K, _, D = k.shape
        self.H = torch.zeros(K, sidekick.rank, D, dtype=torch.float64)
        self.z = torch.zeros(K, sidekick.rank, dtype=torch.float64)
        self.left: list[Tensor] = []  # [K] positions each

    def add(self, left: Tensor) -> None:
        """A token of each head left, by position, int64 [K]."""
        self.left.append(left)
        if len(self.left) == BLOCK:
            self.sum()

    def sum(self) -> None:
        """Take in those that were noted."""
        if not self.left:
            return
        at = (torch.stack(self.left, 1) % POOL)[..., None].expand(-1, -1, self.k.shape[2])
        k, v = self.k.gather(1, at), self.v.gather(1, at)
        features = psi(k[None], self.maps)[0]  # [K, N, R]
        self.H += features.transpose(1, 2) @ v
        self.z += features.sum(1)
        self.left.clear()

    def drift(self, H: Tensor, z: Tensor) -> float:
        """The largest difference from a state, relative to the largest entry."""
        self.sum()
        return max(
            float((a[0].double() - b).abs().max() / b.abs().max())
            for a, b in ((H, self.H), (z, self.z))
        )


def soak(shape: str, victim: str, tokens: int, rows: str) -> dict[str, Any]:
    """Decode, and say what was found; a slot that is lost ends it."""
    Q, K, D, half = SHAPES[shape]
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(heads, POOL, D, generator=g) for heads in (Q, K, K))
    sidekick = None
    if victim == "fold":
        sidekick = Sidekick.random(1, Q, K, D, rank=RANK, hidden=HIDDEN, kind="exp", generator=1)
    dtype = getattr(torch, rows, rows)
    policy = H2O(half, half, decay=0.98)
    S = policy.capacity
    out = torch.empty(1, Q, 1, D)

    def new() -> LessKVCache:
        return LessKVCache(1, Q, K, D, 1, policy, sidekick, dtype, victim=victim)

    def timed(cache: LessKVCache, n: int) -> float:
        """Feed token n; the seconds of its step."""
        i = n % POOL
        token = [x[None, :, i : i + 1] for x in (q, k, v)]
        begun = time.perf_counter()
        cache.attend(0, *token, out=out)
        return time.perf_counter() - begun

    cache = new()
    state = State(sidekick, k, v) if sidekick is not None and dtype == torch.float32 else None
    seconds = array.array("d", bytes(8 * tokens))  # all at once: it is memory too
    memory: list[int] = []
    before = cache.positions(0)[0].long()
    lost = 0
    for n in range(tokens):
        seconds[n] = timed(cache, n)
        after = cache.positions(0)[0].long()
        changed = after != before
        if n >= S:
            if state is not None:
                state.add(before[changed])
            # A packed row that leaves the ring takes another's slot: more than one changes.
            lost += int((changed.sum(1) < 1).any()) + int((after < 0).any())
            lost += int((after.max(1).values != n).any())
        if n % SECTION == 0:
            memory.append(resident_bytes() or 0)
            if not out.isfinite().all():
                sys.exit(f"soak: output is not finite at token {n}")
        before = after
    ends = max(1, tokens // 100)
    first, last = (1e6 * statistics.median(x) for x in (seconds[S : S + ends], seconds[-ends:]))
    unique = all(int(row.unique().numel()) == S for row in before)
    found = {
        "shape": shape,
        "victim": victim,
        "rows": rows,
        "tokens": tokens,
        "lost": lost + int(not unique),
        # From the middle on: until then the allocator settles.
        "grown": memory[-1] - memory[len(memory) // 2],
        "drift": None,
        "first_us": round(first, 1),
        "last_us": round(last, 1),
        "ratio": round(last / first, 3),
    }
    if state is not None:
        found["drift"] = state.drift(*cache.state(0))
    if victim == "merge" and dtype == torch.float32:
        count = cache.weights(0)[0].double().exp().sum(-1)
        found["drift"] = float((count / tokens - 1).abs().max())
    found["beside_new"] = beside(cache, new(), tokens, S, timed, ends)
    return found


def beside(
    old: LessKVCache,
    new: LessKVCache,
    tokens: int,
    S: int,
    timed: Callable[[LessKVCache, int], float],
    steps: int,
) -> float:
    """A step of a cache of many tokens over one of a new, full cache, timed in turns."""
    for n in range(S):
        timed(new, n)
    turns = max(1, min(steps, 5000) // TURN)
    times: tuple[list[float], list[float]] = ([], [])
    for turn in range(turns):
        for cache, seen, of in ((old, tokens, times[0]), (new, S, times[1])):
            of += [timed(cache, seen + turn * TURN + n) for n in range(TURN)][1:]
    return round(statistics.median(times[0]) / statistics.median(times[1]), 3)


def main() -> None:
    """Soak and print a line for each victim action."""
    parser = argparse.ArgumentParser(prog="python -m bench.soak", description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="smollm2")
    parser.add_argument("--tokens", type=int, default=100_000)
    parser.add_argument("--victims", nargs="+", default=["fold", "merge", "forget"])
    parser.add_argument("--rows", default="float32", help="float32, float16, int8, k4v4, ...")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"One layer of {args.shape}, batch 1, rows {args.rows}; {in_words(machine())}.")
    print(
        f"{'victim':8}{'tokens':>10}{'lost':>6}{'grown':>12}{'drift':>10}{'first':>12}{'last':>12}"
        f"{'ratio':>8}{'to a new':>10}",
        flush=True,
    )
    for victim in args.victims:
        x = soak(args.shape, victim, args.tokens, args.rows)
        drift = "-" if x["drift"] is None else f"{x['drift']:.1e}"
        print(
            f"{victim:8}{x['tokens']:>10,}{x['lost']:>6}{x['grown'] / 1024:>8.0f} KiB{drift:>10}"
            f"{x['first_us']:>9.1f} us{x['last_us']:>9.1f} us{x['ratio']:>7.3f}x"
            f"{x['beside_new']:>9.3f}x"
        )
        print(json.dumps(x), flush=True)


if __name__ == "__main__":
    main()
