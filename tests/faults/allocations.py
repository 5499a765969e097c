"""Every allocation of every call of a cache fails once: run by test_allocations.py, preloaded.

Prints a line of JSON: for each case and call, how many allocations were failed, and after how many
of them the cache was as before, and refused by name. An argument N: beyond the first few, one of N.
"""

from __future__ import annotations

import copy
import ctypes
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import less.hf
from less import H2O, LessKVCache, Sidekick
from less.evaluate.families import build
from less.evaluate.matrix import sidekick_for
from tests.faults.test_interrupts import ids, passes
from tests.helpers import HeavyValues, random_maps

Q, K, D = 4, 2, 16
REFUSED = "stopped half way, and the cache is no longer whole. Call cache.reset()"
seam = ctypes.CDLL(None)
seam.fail_allocation.argtypes = [ctypes.c_long]
seam.allocations_left.restype = ctypes.c_long
seam.watch.argtypes = [ctypes.c_size_t, ctypes.c_size_t]


def maps(kind: str) -> Sidekick:
    return Sidekick([random_maps(Q, K, D, 8, 4, kind, i) for i in range(2)], kind=kind)


CASES: dict[str, Callable[[], dict[str, Any]]] = {
    "folded": lambda: {"policy": H2O(4, 4), "sidekick": maps("exp")},
    "merged": lambda: {"policy": H2O(4, 4, decay=0.9), "victim": "merge"},
    "packed": lambda: {"policy": H2O(4, 5), "sidekick": maps("exp"), "dtype": "k4v2", "hot": 3},
    "ragged": lambda: {"policy": H2O(4, 4), "dtype": torch.int8, "capacities": [[6, 9], None]},
    "without a rule": lambda: {"policy": HeavyValues(8), "sidekick": maps("centroid")},
    "reference": lambda: {
        "policy": H2O(4, 4),
        "sidekick": maps("paper"),
        "backend": "reference",
    },
    "two threads": lambda: {"policy": H2O(4, 4), "sidekick": maps("exp"), "batch": 48},
}


def tokens(B: int, T: int, g: torch.Generator) -> list[torch.Tensor]:
    """T random tokens of B rows: q, k, v."""
    return [torch.randn(B, heads, T, D, generator=g) for heads in (Q, K, K)]


def fed(cache: LessKVCache, T: int, seed: int) -> torch.Tensor:
    """T random tokens of every row into both layers; what came out."""
    g = torch.Generator().manual_seed(seed)
    valid = torch.rand(cache.batch, T, generator=g) < 0.8
    outs = []
    for layer in range(2):
        q, k, v = tokens(cache.batch, T, g)
        outs.append(cache.attend(layer, q, k, v, valid=valid))
    return torch.stack(outs)


def contents(cache: LessKVCache) -> list[Any]:
    """Every bit that a cache holds, and what it counts."""
    s = cache.session
    return [*(pool.clone() for pool in cache.pools.values()), s.fed_tokens().clone(), s.columns[:]]


def same(a: list[Any], b: list[Any]) -> bool:
    return all(
        torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y
        for x, y in zip(a, b, strict=True)
    )


def calls(like: LessKVCache) -> dict[str, Callable[[LessKVCache], object]]:
    """What is called, by name, of a cache that has seen some tokens."""
    other = copy.deepcopy(like)
    fed(other, 3, seed=9)
    snapshot = other.state_dict()

    def attend(T: int) -> Callable[[LessKVCache], torch.Tensor]:
        q, k, v = tokens(like.batch, T, torch.Generator().manual_seed(T))
        return lambda cache: cache.attend(1, q, k, v)

    rows = torch.arange(like.batch).flip(0)
    return {
        "prompt": attend(20),
        "chunk": attend(7),
        "token": attend(1),
        "state_dict": lambda cache: list(cache.state_dict()["tensors"].values()),
        "load_state_dict": lambda cache: cache.load_state_dict(snapshot),
        "reorder": lambda cache: cache.reorder(rows),
        "to": lambda cache: cache._move(torch.device("cpu")),
        "reset": lambda cache: cache.reset(),
        "deepcopy": copy.deepcopy,
    }


def failed_at(n: int, call: Callable[[], object]) -> tuple[bool, Exception | None, object]:
    """Call with the n-th allocation failing: whether one did, what was raised, the result."""
    raised, result = None, None
    seam.fail_allocation(n)
    try:
        result = call()
    except Exception as error:
        raised = error
    finally:
        failed = seam.allocations_left() <= 0
        seam.fail_allocation(0)
    return failed, raised, result


def equal(a: object, b: object) -> bool:
    """Whether two calls returned the same."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    return not isinstance(a, list) or all(map(torch.equal, a, b))


def attack(start: LessKVCache, call: Callable[[LessKVCache], object], every: int) -> dict[str, int]:
    """Fail every allocation of a call once; beyond the first few one of ``every``."""
    found = {"points": 0, "as before": 0, "refused": 0}
    n = 1
    done = copy.deepcopy(start)
    call(done)  # scratch that threads keep
    want_result, want, before = call(copy.deepcopy(start)), contents(done), contents(start)
    cache, snapshot = copy.deepcopy(start), start.state_dict()
    while True:
        cache.load_state_dict(snapshot)
        failed, raised, result = failed_at(n, lambda: call(cache))
        if raised is None:
            assert equal(result, want_result), "a result of memory that was not there"
            assert same(contents(cache), want)
            if not failed:
                return found
        found["points"] += 1
        n += 1 if n < 12 else every
        if raised is None:
            continue
        assert isinstance(raised, (RuntimeError, MemoryError)), repr(raised)
        again: Exception | None = None
        held = contents(cache)
        try:
            cache.state_dict()
        except RuntimeError as error:
            again = error
        if again is None:
            found["as before"] += 1
            assert same(held, before), f"changed, though it goes on: {raised}"
            assert equal(call(cache), want_result)
            assert same(contents(cache), want)
        else:
            found["refused"] += 1
            assert REFUSED in str(again), again
            cache.reset()
            fed(cache, 5, seed=3)


def attack_model(T: int, every: int) -> dict[str, int]:
    """Fail every allocation of a model's pass of T tokens, its own and the cache's, or some.

    Until the layers have returned a pass that fails is to be made again, or what follows is refused
    by name; then it counts.
    """
    model = build("llama")
    sidekick = sidekick_for(model)
    cache = less.hf.cache_for(model, H2O(4, 4), sidekick, batch=2)
    before = [] if T > 1 else [ids(11, seed=1)]
    call, after = ids(T, seed=2), ids(1, seed=3)
    if before:
        passes(model, cache, before)
    start = cache.state_dict()
    want = passes(model, cache, [call, after])
    found = {"points": 0, "as before": 0, "refused": 0}
    n = 1
    while True:
        cache.load_state_dict(start)
        failed, raised, _ = failed_at(n, lambda: passes(model, cache, [call]))
        if not failed:
            return found
        found["points"] += 1
        n += 1 if n < 12 else every
        assert isinstance(raised, (RuntimeError, MemoryError, type(None))), repr(raised)
        counted = torch.equal(cache.session.fed_tokens()[:, 0], start["fed"][:, 0] + T)
        assert counted or raised is not None
        rest = [after] if counted else [call, after]
        refusal = ""
        try:
            got = passes(model, cache, rest)
        except RuntimeError as error:
            refusal = str(error)
        if refusal:
            found["refused"] += 1
            assert "an earlier call" in refusal, refusal
            assert "reset()" in refusal, refusal
            cache.reset()
            got = passes(model, cache, [*before, call, after])[:, -T - 1 :]
        else:
            found["as before"] += 1
        assert torch.equal(got, want[:, -got.shape[1] :]), f"point {n}"


def main() -> None:
    maps_of = [x for x in Path("/proc/self/maps").read_text().splitlines() if "/less/_C." in x]
    ends = [int(end, 16) for x in maps_of for end in x.split()[0].split("-")]
    seam.watch(min(ends), max(ends))
    every = int(sys.argv[1]) if len(sys.argv) > 1 else 1
    found: dict[str, dict[str, int]] = {}
    for name, arguments in CASES.items():
        of = arguments()

        def new(of: dict[str, Any] = of) -> LessKVCache:
            return LessKVCache(2, Q, K, D, **({"batch": 2} | of))

        torch.set_num_threads(2 if name == "two threads" else 1)
        points = 0
        while failed_at(points + 1, new)[0]:
            points += 1
        found[f"{name}: constructor"] = {"points": points, "as before": points, "refused": 0}
        start = new()
        fed(start, 19, seed=1)
        for label, call in calls(start).items():
            if name == "two threads" and label not in ("prompt", "chunk"):
                continue
            try:
                found[f"{name}: {label}"] = attack(
                    new() if label == "prompt" else start,
                    call,
                    every * (5 if name == "reference" else 1),
                )
            except AssertionError as error:
                raise AssertionError(f"{name}: {label}: {error}") from error
    torch.set_num_threads(1)
    for name, T in (("prompt", 13), ("token", 1)):
        found[f"model: {name}"] = attack_model(T, every if every == 1 else 5 * every)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
