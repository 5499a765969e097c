"""One case per op, and the whole decode step beside torch's attention over a full cache.

A case carries what it runs, how it proves itself right, and the bytes it cannot avoid moving.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from less import H2O, LessKVCache, Sidekick, ops, reference
from less.policies.base import Rule

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


@dataclass(frozen=True)
class Shape:
    """Sizes of one model's attention, and of its bounded cache."""

    name: str
    Q: int  # query heads
    K: int  # kv heads
    D: int  # head dim
    S: int  # slots, tokens kept a head
    R: int  # rank
    E: int  # hidden width of the maps
    full: int = 4096  # tokens of the full cache it is compared with
    B: int = 1


SHAPES = (
    Shape("smollm2-135m", Q=9, K=3, D=64, S=64, R=8, E=64),
    Shape("llama-7b", Q=32, K=32, D=128, S=205, R=8, E=64),
    Shape("llama-8b-gqa", Q=32, K=8, D=128, S=256, R=8, E=64),
)
SMALL = Shape("small", Q=4, K=2, D=16, S=12, R=3, E=8, full=64)


@dataclass(frozen=True)
class Case:
    """What is timed."""

    run: Callable[[], object]
    error: Callable[[], float]  # relative to the float64 reference, before any timing
    bytes: int  # the least a run must read and write
    formula: str  # of those bytes


def difference(got: Tensor, want: Tensor) -> float:
    """Largest difference, relative to the largest value."""
    scale = max(float(want.abs().max()), 1e-30)
    return float((got.double() - want.double()).abs().max()) / scale


class Data:
    """A layer in mid-life: full slots, a state, maps, one new token."""

    def __init__(self, s: Shape, dtype: torch.dtype):
        """Draw everything from one seed."""
        g = torch.Generator().manual_seed(7)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=g)

        self.q = draw(s.B, s.Q, 1, s.D).to(dtype)
        self.k, self.v = (draw(s.B, s.K, 1, s.D).to(dtype) for _ in range(2))
        self.slot_k, self.slot_v = (draw(s.B, s.K, s.S, s.D).to(dtype) for _ in range(2))
        order = torch.arange(s.S, dtype=torch.int32)
        self.position = order.expand(s.B, s.K, s.S).contiguous()
        self.seen = torch.full((s.B,), s.S, dtype=torch.int64)
        self.score = torch.rand(s.B, s.K, s.S, generator=g)
        self.weight = torch.zeros(s.B, s.K, s.S)
        self.H, self.z = draw(s.B, s.K, s.R, s.D), torch.rand(s.B, s.K, s.R, generator=g)
        self.share = torch.zeros(s.B, s.K, dtype=torch.float64)
        self.phi_q = torch.rand(s.B, s.Q, 1, s.R, generator=g)
        self.psi_k = torch.rand(s.B, s.K, 1, s.R, generator=g)
        self.maps = {
            "q_w1": draw(s.Q, s.D, s.E) / s.D**0.5,
            "q_w2": draw(s.Q, s.E, s.R) / s.E**0.5,
            "q_bias": draw(s.Q, s.R),
            "k_w1": draw(s.K, s.D, s.E) / s.D**0.5,
            "k_w2": draw(s.K, s.E, s.R) / s.E**0.5,
            "k_bias": draw(s.K, s.R),
        }
        self.scale = s.D**-0.5

    def slots(self) -> tuple[Tensor, ...]:
        """Slots and what is kept beside each."""
        return self.slot_k, self.slot_v, self.position, self.score, self.weight


def fold(s: Shape, dtype: torch.dtype) -> Case:
    """One evicted token per head into H and z."""
    a = Data(s, dtype)

    def error() -> float:
        H, z = reference.fold(a.H.double(), a.z.double(), a.psi_k.double(), a.v.double())
        ops.fold(a.H, a.z, a.psi_k, a.v)
        return max(difference(a.H, H), difference(a.z, z))

    heads = s.B * s.K
    return Case(
        run=lambda: ops.fold(a.H, a.z, a.psi_k, a.v),
        error=error,
        bytes=heads * (8 * s.R * s.D + 12 * s.R + s.D * dtype.itemsize),
        formula="BK(8RD + 12R + D bytes)",
    )


def quantize(s: Shape, dtype: torch.dtype) -> Case:
    """A call of 512 tokens, rounded to int8 rows."""
    tokens = 512
    g = torch.Generator().manual_seed(11)
    x = torch.randn(s.B, s.K, tokens, s.D, generator=g).to(dtype)

    def error() -> float:
        same = all(
            torch.equal(a, b) for a, b in zip(ops.quantize(x), reference.quantize(x), strict=True)
        )
        return 0.0 if same else float("inf")

    return Case(
        run=lambda: ops.quantize(x),
        error=error,
        bytes=s.B * s.K * tokens * (s.D * (dtype.itemsize + 1) + 4),
        formula="BKT(D (bytes + 1) + 4), T = 512",
    )


def feature_map(s: Shape, dtype: torch.dtype) -> Case:
    """Phi of one token's queries."""
    a = Data(s, dtype)
    wide = {name: weight.double() for name, weight in a.maps.items()}

    def error() -> float:
        want = reference.phi(a.q.double(), wide, "exp")
        return difference(ops.phi(a.q, a.maps, "exp"), want)

    return Case(
        run=lambda: ops.phi(a.q, a.maps, "exp"),
        error=error,
        bytes=s.Q * (4 * (s.D * s.E + s.E * s.R + s.R) + s.B * (s.D * dtype.itemsize + 4 * s.R)),
        formula="Q(4(DE + ER + R) + B(D bytes + 4R))",
    )


def chunk_attention(s: Shape, dtype: torch.dtype) -> Case:
    """One token's queries over slots, state and itself; scores updated."""
    a = Data(s, dtype)
    options = {"scale": a.scale, "decay": 0.98}

    def run() -> tuple[Tensor, ...]:
        low = {"phi_q": a.phi_q, "H": a.H, "z": a.z}
        return ops.chunk_attention(a.q, a.k, a.v, None, *a.slots(), **low, **options)

    def error() -> float:
        inputs = (a.q, a.k, a.v, None, *a.slots())
        wide = [x.double() if x is not None and x.is_floating_point() else x for x in inputs]
        low = {"phi_q": a.phi_q.double(), "H": a.H.double(), "z": a.z.double()}
        want = reference.chunk_attention(*wide, **low, **options)  # type: ignore[arg-type]
        out, slot_score, *_ = run()
        return max(difference(out, want.out), difference(slot_score, want.slot_score))

    tokens = 2 * s.D * dtype.itemsize * (s.S + 1)
    return Case(
        run=run,
        error=error,
        bytes=s.B * s.K * (tokens + 16 * s.S + 4 * s.R * (s.D + 1))
        + 2 * s.B * s.Q * s.D * dtype.itemsize,
        formula="BK(2D bytes (S + 1) + 16S + 4R(D + 1)) + 2BQD bytes",
    )


def prompt_scores(s: Shape, dtype: torch.dtype) -> Case:
    """Scores of a prompt of 256 tokens, the queries' masses unknown."""
    tokens = 256
    g = torch.Generator().manual_seed(13)
    q, k = (torch.randn(s.B, heads, tokens, s.D, generator=g).to(dtype) for heads in (s.Q, s.K))
    options = {"scale": s.D**-0.5, "decay": 0.98}

    def run() -> Tensor:
        return ops.prompt_scores(q, k, **options)

    return Case(
        run=run,
        error=lambda: difference(run(), reference.prompt_scores(q.double(), k.double(), **options)),
        bytes=s.B * tokens * ((s.Q + s.K) * s.D * dtype.itemsize + 4 * s.K),
        formula="BT((Q + K) D bytes + 4K), T = 256",
    )


def compact(s: Shape, dtype: torch.dtype) -> Case:
    """One token enters, one leaves and is folded."""
    a = Data(s, dtype)
    chunk_score = torch.full((s.B, s.K, 1), 0.1)
    rule = Rule(recent=s.S // 2, sinks=0, by_score=True, per_age=False)
    low = {"maps": a.maps, "kind": "exp", "rule": rule}

    def run() -> None:
        ops.compact(a.k, a.v, chunk_score, a.score, None, *a.slots(), a.seen, H=a.H, z=a.z, **low)

    def error() -> float:
        want = reference.compact(
            a.k, a.v, chunk_score, None, *a.slots(), a.seen, H=a.H, z=a.z, **low
        )
        run()
        if not torch.equal(a.position, want.position):
            return float("inf")
        return max(difference(a.H, want.H), difference(a.z, want.z))

    moved = 4 * s.D * dtype.itemsize  # the victim is read, the new token read and written
    return Case(
        run=run,
        error=error,
        bytes=s.B * s.K * (8 * s.S + moved + 8 * s.R * (s.D + 1))
        + 4 * s.K * (s.D * s.E + s.E * s.R + s.R),
        formula="BK(8S + 4D bytes + 8R(D + 1)) + 4K(DE + ER + R)",
    )


def decode_step(s: Shape, dtype: torch.dtype) -> Case:
    """The fused op: attention, scores, the victim folded, the token in its place."""
    a, check = Data(s, dtype), Data(s, dtype)
    rule = Rule(recent=s.S // 2, sinks=0, by_score=True, per_age=False)
    out = torch.empty_like(a.q)

    def run(a: Data = a) -> None:
        ops.decode_step(
            a.q, a.k, a.v, None, out, *a.slots(), a.seen, H=a.H, z=a.z, share=a.share,
            maps=a.maps, kind="exp", scale=a.scale, decay=0.98, rule=rule,
        )  # fmt: skip

    def error() -> float:
        inputs = (check.q, check.k, check.v, None, *check.slots(), check.seen)
        wide = [x.double() if x is not None and x.is_floating_point() else x for x in inputs]
        attended, after = reference.decode_step(
            *wide, H=check.H.double(), z=check.z.double(),  # type: ignore[arg-type]
            maps={n: x.double() for n, x in check.maps.items()}, scale=check.scale, decay=0.98,
            rule=rule,
        )  # fmt: skip
        run(check)
        if not torch.equal(check.position, after.position) or after.H is None:
            return float("inf")
        return max(difference(out, attended.out), difference(check.H, after.H))

    heads = s.B * s.K
    return Case(
        run=run,
        error=error,
        bytes=heads * (2 * s.S * s.D * dtype.itemsize + 16 * s.S + 8 * s.R * (s.D + 1))
        + 4 * (s.Q + s.K) * (s.D * s.E + s.E * s.R + s.R),
        formula="BK(2SD bytes + 16S + 8R(D + 1)) + 4(Q + K)(DE + ER + R)",
    )


def step(s: Shape, dtype: torch.dtype) -> Case:
    """A whole decode step of one layer through LessKVCache."""
    a = Data(s, dtype)
    half = s.S // 2
    sidekick = Sidekick(layers=[a.maps], kind="exp")

    def cache(backend: str) -> LessKVCache:
        made = LessKVCache(
            layers=1, q_heads=s.Q, kv_heads=s.K, head_dim=s.D, batch=s.B, dtype=dtype,
            policy=H2O(heavy=s.S - half, recent=half, decay=0.98), sidekick=sidekick,
            backend=backend,
        )  # fmt: skip
        g = torch.Generator().manual_seed(3)
        shapes = ((s.B, heads, s.S + 8, s.D) for heads in (s.Q, s.K, s.K))
        made.attend(0, *(torch.randn(shape, generator=g).to(dtype) for shape in shapes))
        return made

    native = cache("native")

    def error() -> float:
        check, plain = cache("native"), cache("reference")
        got, want = (c.attend(0, a.q, a.k, a.v) for c in (check, plain))
        if not torch.equal(check.positions(0).sort().values, plain.positions(0).sort().values):
            return float("inf")
        return difference(got, want)

    parts = [make(s, dtype).bytes for make in (feature_map, chunk_attention, compact)]
    return Case(
        run=lambda: native.attend(0, a.q, a.k, a.v),
        error=error,
        bytes=sum(parts),
        formula="feature_map + chunk_attention + compact",
    )


def full_attention(s: Shape, dtype: torch.dtype) -> Case:
    """What it is compared with: torch's attention of one token over a full cache."""
    g = torch.Generator().manual_seed(5)
    q = torch.randn(s.B, s.Q, 1, s.D, generator=g).to(dtype)
    k, v = (torch.randn(s.B, s.K, s.full, s.D, generator=g).to(dtype) for _ in range(2))

    def run() -> Tensor:
        attention = torch.nn.functional.scaled_dot_product_attention
        return attention(q, k, v, enable_gqa=s.Q != s.K)

    def error() -> float:
        keys, values = (x.double().repeat_interleave(s.Q // s.K, 1) for x in (k, v))
        weights = torch.softmax(q.double() @ keys.mT * s.D**-0.5, -1)
        return difference(run(), weights @ values)

    return Case(
        run=run,
        error=error,
        bytes=2 * s.B * s.K * s.full * s.D * dtype.itemsize,
        formula="2BK full D bytes",
    )


CASES: dict[str, Callable[[Shape, torch.dtype], Case]] = {
    case.__name__: case
    for case in (
        fold,
        quantize,
        feature_map,
        chunk_attention,
        prompt_scores,
        compact,
        decode_step,
        step,
        full_attention,
    )
}
