"""One case per op, and the whole decode step beside torch's attention over a full cache.

A case carries what it runs, how it proves itself right, and the bytes it cannot avoid moving.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from less import H2O, LessKVCache, PageLayout, Sidekick, reference
from less.backend import ops
from less.layer import (
    Call,
    LayerPlan,
    LayerSpec,
    Maps,
    PackedMaps,
    Paged,
    Rows,
    Slots,
    Space,
    State,
    allocate,
)
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


def widened(plan: LayerPlan, at: Paged) -> tuple[Slots, State | None, Tensor, Maps | None]:
    """Copies of what a layer's pages hold, and its maps, in float64: slots, state, seen, maps.

    Rows and matrices of 8 bits are the numbers that they stand for.
    """
    (views,) = plan.layout.views(at.pool)
    k, v = reference.slot_floats(views.slots)
    numbers = {n: x.double() for n, x in vars(views.slots).items() if n in ("weight", "score")}
    slots = Slots(position=views.slots.position.clone(), k=k.double(), v=v.double(), **numbers)
    state = None if views.state is None else State(views.state.H.double(), views.state.z.double())
    maps = None
    if plan.maps is not None:
        tensors = dict(plan.maps.tensors)
        for name in ("q_w1", "q_w2", "k_w1", "k_w2"):
            if tensors[name].dtype == torch.int8:
                scale = tensors.pop(f"{name}_scale")
                tensors[name] = reference.dequantize(tensors[name], scale, -2)
        maps = Maps(plan.maps.kind, {n: x.double() for n, x in tensors.items()})
    return slots, state, views.seen.clone(), maps


class Data:
    """A layer in mid-life: full slots, a state, maps, one new token."""

    def __init__(self, s: Shape, dtype: torch.dtype):
        """Draw everything from one seed."""
        g = torch.Generator().manual_seed(7)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=g)

        self.q = draw(s.B, s.Q, 1, s.D).to(dtype)
        k, v = (draw(s.B, s.K, 1, s.D).to(dtype) for _ in range(2))
        self.new = Rows(k, v)
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
        spec = LayerSpec(
            q_heads=s.Q,
            scale=s.D**-0.5,
            decay=0.98,
            rule=Rule(recent=s.S // 2, sinks=0, by_score=True, per_age=False),
            victim="fold",
        )
        layout = PageLayout(s.K, s.D, s.S, dtype, s.R)
        self.plan = LayerPlan(spec, layout, PackedMaps.pack(self.maps, "exp"))
        (pool,) = allocate([layout], s.B)
        self.at = Paged(pool)
        (views,) = layout.views(pool)
        for x in (views.slots.k, views.slots.v):
            x.copy_(draw(s.B, s.K, s.S, s.D))
        views.slots.position.copy_(torch.arange(s.S).expand(s.B, s.K, s.S))
        views.slots.score.copy_(torch.rand(s.B, s.K, s.S, generator=g))
        views.seen.fill_(s.S)
        assert views.state is not None
        views.state.H.copy_(draw(s.B, s.K, s.R, s.D))
        views.state.z.copy_(torch.rand(s.B, s.K, s.R, generator=g))
        self.views, self.state = views, views.state

    def wide_call(self) -> tuple[Tensor, Rows]:
        """Queries, keys and values of the token in float64."""
        return self.q.double(), Rows(self.new.k.double(), self.new.v.double())


def fold(s: Shape, dtype: torch.dtype) -> Case:
    """One evicted token per head into H and z."""
    a = Data(s, dtype)
    H, z = a.state.H.contiguous(), a.state.z.contiguous()

    def error() -> float:
        wide = State(H.double(), z.double())
        want = reference.fold(wide, a.psi_k.double(), a.new.v.double())
        ops.fold(H, z, a.psi_k, a.new.v)
        return max(difference(H, want.H), difference(z, want.z))

    heads = s.B * s.K
    return Case(
        run=lambda: ops.fold(H, z, a.psi_k, a.new.v),
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


def rotate(s: Shape, dtype: torch.dtype) -> Case:
    """A call of 512 keys into the space of packed rows."""
    tokens = 512
    g = torch.Generator().manual_seed(12)
    x = torch.randn(s.B, s.K, tokens, s.D, generator=g).to(dtype)
    space = Space.of(s.K, s.D, key_mean=torch.randn(s.K, s.D, generator=g))
    spec = LayerSpec(s.Q, scale=1.0, decay=1.0, rule=None, victim="forget")
    plan = LayerPlan(spec, PageLayout(s.K, s.D, s.S), space=space)

    def error() -> float:
        same = torch.equal(ops.rotate(x, plan, "key"), reference.rotate(x, space, "key"))
        return 0.0 if same else float("inf")

    return Case(
        run=lambda: ops.rotate(x, plan, "key"),
        error=error,
        bytes=s.B * s.K * tokens * s.D * (dtype.itemsize + 4),
        formula="BKTD (bytes + 4), T = 512",
    )


def feature_map(s: Shape, dtype: torch.dtype) -> Case:
    """Phi of one token's queries."""
    a = Data(s, dtype)
    wide = Maps("exp", {name: weight.double() for name, weight in a.maps.items()})

    def error() -> float:
        return difference(ops.phi(a.q, a.plan), reference.phi(a.q.double(), wide))

    return Case(
        run=lambda: ops.phi(a.q, a.plan),
        error=error,
        bytes=s.Q * (4 * (s.D * s.E + s.E * s.R + s.R) + s.B * (s.D * dtype.itemsize + 4 * s.R)),
        formula="Q(4(DE + ER + R) + B(D bytes + 4R))",
    )


def chunk_attention(s: Shape, dtype: torch.dtype) -> Case:
    """One token's queries over slots, state and itself; scores updated."""
    a = Data(s, dtype)

    def run() -> reference.Attended:
        return ops.chunk_attention(a.q, a.new, None, a.at, a.plan, phi_q=a.phi_q)

    def error() -> float:
        q, new = a.wide_call()
        slots, state, _, _ = widened(a.plan, a.at)
        want = reference.chunk_attention(
            q, new, None, slots, a.plan.spec, phi_q=a.phi_q.double(), state=state
        )
        got = run()
        return max(difference(got.out, want.out), difference(got.score, want.score))

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
    score = torch.cat([a.views.slots.score, torch.full((s.B, s.K, 1), 0.1)], 2)

    def run() -> None:
        ops.compact(a.new, None, score, a.at, a.plan)

    def error() -> float:
        slots, state, seen, maps = widened(a.plan, a.at)
        _, new = a.wide_call()
        want = reference.compact(
            new, None, score.double(), slots, seen, a.plan.spec, state=state, maps=maps
        )
        run()
        if not torch.equal(a.views.slots.position, want.slots.position) or want.state is None:
            return float("inf")
        return max(difference(a.state.H, want.state.H), difference(a.state.z, want.state.z))

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
    out = torch.empty_like(a.q)

    def run(a: Data = a) -> None:
        ops.decode_step(Call(a.q, a.new.k, a.new.v, out=out), a.at, a.plan)

    def error() -> float:
        slots, state, seen, maps = widened(check.plan, check.at)
        q, new = check.wide_call()
        attended, after = reference.decode_step(
            q, new, None, slots, state, seen, check.plan.spec, maps
        )
        run(check)
        same = torch.equal(check.views.slots.position, after.slots.position)
        if not same or after.state is None:
            return float("inf")
        return max(difference(out, attended.out), difference(check.state.H, after.state.H))

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
        got, want = (c.attend(0, a.q, a.new.k, a.new.v) for c in (check, plain))
        if not torch.equal(check.positions(0).sort().values, plain.positions(0).sort().values):
            return float("inf")
        return difference(got, want)

    parts = [make(s, dtype).bytes for make in (feature_map, chunk_attention, compact)]
    return Case(
        run=lambda: native.attend(0, a.q, a.new.k, a.new.v),
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
        rotate,
        feature_map,
        chunk_attention,
        prompt_scores,
        compact,
        decode_step,
        step,
        full_attention,
    )
}
