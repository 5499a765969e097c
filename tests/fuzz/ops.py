"""Wrong calls straight at ``torch.ops.less``: ``python -m tests.fuzz.ops COUNT [SEED]``.

Each call has one or two arguments changed. It is refused with nothing written, or it computes what
the same call computes with tensors that lie apart; what lies around its tensors is not written.
A process of its own, so that a crash is one process's end.
"""

from __future__ import annotations

import contextlib
import faulthandler
import random
import sys
import time
from collections import Counter
from typing import Any

import torch

import less.backend.ops  # noqa: F401 - registers the ops
from tests.ops import pages

GUARD = 512  # bytes around every tensor
WRITTEN = {"out", "pool", "H", "z"}
INTEGERS = [-(2**63), -1, 0, 1, 2, 3, 7, 64, 129, 2**16, 2**31 - 1, 2**31, 2**40, 2**62, 2**63 - 1]
NUMBERS = [float("nan"), float("inf"), -float("inf"), 1e38, -1e38, 1e-45, 1e-38, 65504.0, 0.0]
DTYPES = [torch.float16, torch.float32, torch.bfloat16, torch.int8]


def base(of: random.Random, op: str) -> dict[str, Any]:
    """Arguments that the op takes."""
    if op in pages.OPS:
        dtype = of.choice(DTYPES)
        options = {"state": of.random() < 0.6, "victim": of.choice(["fold", "forget", "merge"])}
        if options["state"] != (options["victim"] == "fold"):
            options["victim"] = "fold" if options["state"] else "forget"
        if options["state"]:
            options["kind"] = of.choice(["exp", "paper", "centroid"])
        return pages.arguments(op, dtype=dtype, **options)
    plan = pages.plan_of(torch.float32, True, kind=of.choice(["exp", "paper", "centroid"]))
    B, Q, K, D, T = pages.B, pages.Q, pages.K, pages.D, 5
    x, k = torch.randn(B, Q, T, D), torch.randn(B, K, T, D)
    maps, layer = plan.maps.memory, plan.encoded
    valid = torch.ones(B, T, dtype=torch.bool)
    return {
        "fold": {
            "H": torch.randn(B, K, 4, D),
            "z": torch.rand(B, K, 4),
            "psi_k": torch.rand(B, K, T, 4),
            "v": k,
            "keep": torch.ones(B, K, T, dtype=torch.bool),
        },
        "quantize": {"x": x, "fp8": False},
        "feature_map": {"x": x, "maps": maps, "layer": layer, "query": True},
        "rotate": {"x": k, "valid": valid, "maps": maps, "layer": layer, "rotation": 0},
        "prompt_scores": {
            "q": x,
            "k": k,
            "k_scale": None,
            "valid": valid,
            "lse": None,
            "workspace": None,
            "scale": 0.2,
            "softcap": 0.0,
            "decay": 0.9,
        },
    }[op]


OPS = (*pages.OPS, "fold", "quantize", "feature_map", "rotate", "prompt_scores")


def guarded(x: torch.Tensor) -> torch.Tensor:
    """A contiguous copy with bytes of a known value on both sides."""
    memory = torch.full((x.nbytes + 2 * GUARD,), 0xA5, dtype=torch.uint8)
    inner = memory[GUARD : GUARD + x.nbytes].view(x.dtype).view(x.shape)
    inner.copy_(x)
    return inner


def guards(x: torch.Tensor) -> bool:
    """Whether those bytes are what they were; ``x`` is any view of such a tensor."""
    memory = torch.tensor([], dtype=torch.uint8).set_(x.untyped_storage())
    return bool((memory[:GUARD] == 0xA5).all() and (memory[-GUARD:] == 0xA5).all())


def strided(of: random.Random, x: torch.Tensor) -> torch.Tensor:
    """Other strides within the same memory."""
    way = of.randrange(6)
    if way == 0 and x.dim() > 1:
        return x.transpose(*of.sample(range(x.dim()), 2))
    if way == 1 and x.dim() > 0:
        return x.narrow(of.randrange(x.dim()), 0, 1).expand_as(x)
    if way == 2 and x.dim() > 0:
        return x.flip(of.randrange(x.dim()))
    if way == 3:
        sizes = [of.choice([0, 1, n, n + 1, 2**20, 2**40]) for n in x.shape]
        try:
            return x[(slice(0, 1),) * x.dim()].expand(sizes)
        except RuntimeError:
            return x[..., :0]
    if way == 4 and x.dim() > 0:
        strides = [of.choice([0, 1, s, s // 2]) for s in x.stride()]
        last = sum((n - 1) * s for n, s in zip(x.shape, strides, strict=True))
        if last < x.numel():
            return x.as_strided(x.shape, strides, x.storage_offset())
    return x.reshape(-1)[: of.randrange(1 + x.numel())]


def changed(of: random.Random, args: dict[str, Any]) -> dict[str, Any]:
    """One argument is another."""
    name = of.choice(list(args))
    x = args[name]
    if name == "layer" and of.random() < 0.8 and isinstance(x, torch.Tensor):
        flat = x[0, 0].clone()
        flat[of.randrange(flat.numel())] = of.choice([*INTEGERS, of.randrange(-(2**63), 2**63)])
        return args | {name: flat.expand(x.shape)}
    if not isinstance(x, torch.Tensor):
        values = [None, True, -1, 2**40, 0.0, float("nan"), float("inf"), -0.5, 1e300, "x"]
        tensors = [v for v in args.values() if isinstance(v, torch.Tensor)]
        return args | {name: of.choice([*values, of.choice(tensors)])}
    way = of.randrange(9)
    if way == 0:
        y = strided(of, x)
    elif way == 1:
        few = x if x.numel() < 1 << 22 else x[(slice(0, 1),) * x.dim()]  # each is looked at
        y = of.choice([None, [x], x.to("meta"), few.to_sparse(), 3.0])
    elif way == 2:
        y = guarded(x.to(of.choice([*DTYPES, torch.float64, torch.int64, torch.bool, torch.uint8])))
    elif way == 3 and x.dim():
        y = x.narrow(of.randrange(x.dim()), 0, 1)
    elif way == 4:  # in the place of another
        other = of.choice([v for v in args.values() if isinstance(v, torch.Tensor)])
        y = other
        if other.numel() >= x.numel() and other.dtype == x.dtype and other.is_contiguous():
            y = other.view(-1)[: x.numel()].view(x.shape)
    elif way == 5 and x.is_floating_point() and x.numel():
        y = guarded(x)
        for _ in range(of.randrange(1, 8)):
            y.view(-1)[of.randrange(x.numel())] = of.choice(NUMBERS)
    elif way == 6 and x.dtype in (torch.uint8, torch.int32) and x.numel():
        y = guarded(x)
        memory = y.view(-1).view(torch.uint8)
        for _ in range(of.randrange(1, 64)):
            memory[of.randrange(memory.numel())] = of.randrange(256)
    elif way == 7 and x.dtype == torch.uint8:
        y = guarded(torch.randint(0, 256, x.shape).byte())
    elif x.numel() > 1:
        memory = x.new_zeros(x.numel() + 1 + 2 * GUARD)  # one number off
        y = memory[GUARD + 1 : GUARD + 1 + x.numel()].view(x.shape)
    else:
        y = x
    return args | {name: y}


def copies(args: dict[str, Any]) -> dict[str, Any]:
    """The arguments in memory that nothing else lies in."""
    return {n: x.clone() if isinstance(x, torch.Tensor) else x for n, x in args.items()}


def same(a: Any, b: Any) -> bool:
    """Equal bits but for NaN."""
    if isinstance(a, (tuple, list)):
        return all(same(x, y) for x, y in zip(a, b, strict=True))
    if not isinstance(a, torch.Tensor):
        return a is b
    if a.is_meta or b.is_meta:  # a trace, of shapes alone
        return True
    if a.is_floating_point():
        return torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())
    return torch.equal(a, b)


def storages(args: dict[str, Any]) -> list[torch.Tensor]:
    """All bytes of all tensors that have memory."""
    tensors = [
        x
        for x in args.values()
        if isinstance(x, torch.Tensor) and x.layout == torch.strided and x.device.type == "cpu"
    ]
    return [torch.tensor([], dtype=torch.uint8).set_(x.untyped_storage()) for x in tensors]


def one(of: random.Random, op: str) -> str:
    """Make one wrong call; says what became of it.

    Raises:
        AssertionError: It was neither refused nor right.
    """
    args = {
        n: guarded(x) if isinstance(x, torch.Tensor) and n != "layer" else x
        for n, x in base(of, op).items()
    }
    whole = args
    for _ in range(of.randrange(1, 3)):
        with contextlib.suppress(RuntimeError, IndexError):  # twice, with no such view
            args = changed(of, args)
    memory = storages(whole | args) + storages(whole)
    before = [x.clone() for x in memory]
    small = all(not isinstance(x, torch.Tensor) or x.numel() < 1 << 22 for x in args.values())
    apart = None
    if small:
        try:
            apart = copies(args)
        except RuntimeError:  # of what has no values
            apart = None
    said = None
    try:
        got = pages.call(op, args)
    except (RuntimeError, TypeError, ValueError, NotImplementedError, IndexError) as error:
        said = str(error)
    if said is not None:
        assert said, "refused without a word"
        for x, y in zip(before, memory, strict=True):
            assert torch.equal(x, y), f"refused, but written: {said}"
        return "refused"
    for name, x in whole.items():
        if isinstance(x, torch.Tensor) and name != "layer":
            assert guards(x), f"what lies around {name} was written"
    if apart is not None:
        want = pages.call(op, apart)
        assert same(got, want), "other results than with tensors that lie apart"
        for name in WRITTEN & args.keys():
            assert same(args[name], apart[name]), f"{name} is other than with tensors apart"
    return "taken"


def run(count: int, seed: int) -> Counter[str]:
    """Make wrong calls; what became of them."""
    faulthandler.enable()
    torch.set_num_threads(1)
    found: Counter[str] = Counter()
    for n in range(count):
        of = random.Random(f"{seed}.{n}")
        torch.manual_seed(n)
        op = of.choice(OPS)
        print(f"{n} {op}", file=sys.stderr, flush=True)  # the last line, where it crashes
        begin = time.monotonic()
        try:
            found[one(of, op)] += 1
        except AssertionError as error:
            found["wrong"] += 1
            print(f"call {n} of seed {seed}, {op}: {error}", flush=True)
        if time.monotonic() - begin > 20:
            found["slow"] += 1
            print(f"call {n} of seed {seed}, {op}: {time.monotonic() - begin:.0f} s", flush=True)
    return found


if __name__ == "__main__":
    result = run(int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0)
    print(dict(result))
    sys.exit(bool(result["wrong"] or result["slow"]))
