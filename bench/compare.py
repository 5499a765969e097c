"""One layer's decode step against what it replaces, interleaved in one process.

Contenders of a group take turns over layers that do not fit the caches together. Nothing is timed
that does not first agree with ``less.reference`` in float64.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.cases import TOLERANCE, Shape, difference, widened
from bench.interleave import Contender, ReadRate, interleave, layers_for
from less import H2O, LessKVCache, PageLayout, Sidekick, reference
from less.backend import ops
from less.layer import Call, LayerPlan, LayerSpec, PackedMaps, Paged, Rows, allocate
from less.policies import Rule

MODELS = {
    "llama-2-7b": Shape("llama-2-7b", Q=32, K=32, D=128, S=205, R=8, E=64),
    "llama-3-8b": Shape("llama-3-8b", Q=32, K=8, D=128, S=205, R=8, E=64),
    "smollm2": Shape("smollm2", Q=9, K=3, D=64, S=205, R=8, E=64),
}
# Name -> dtype of the slots, dtype of the model (q, k, v, and of the caches compared with).
DTYPES = {
    "float32": (torch.float32, torch.float32),
    "bfloat16": (torch.bfloat16, torch.bfloat16),
    "float16": (torch.float16, torch.float16),
    "int8": (torch.int8, torch.float16),
    "float16 slots, float32 model": (torch.float16, torch.float32),
}
MAPS = {"float32": torch.float32, "float16": torch.float16, "int8": torch.int8}


class NotCorrectError(ValueError):
    """A contender disagrees with the reference, and is not timed."""


def draw(*shape: int, seed: int, dtype: torch.dtype) -> Tensor:
    """Normal values; large tensors repeat a block, for content does not matter to their timing."""
    g = torch.Generator().manual_seed(seed)
    count = 1
    for size in shape:
        count *= size
    block = torch.randn(min(count, (1 << 20) + 7), generator=g).to(dtype)
    return block.repeat(-(-count // max(1, block.numel())))[:count].view(shape).clone()


@dataclass(frozen=True)
class Group:
    """What is timed together."""

    shape: Shape
    dtype: str
    threads: int = 1

    @property
    def slots(self) -> torch.dtype:
        """Of the slots."""
        return DTYPES[self.dtype][0]

    @property
    def model(self) -> torch.dtype:
        """Of q, k, v and of the full cache."""
        return DTYPES[self.dtype][1]


def sidekick(s: Shape, layers: int, maps: str) -> Sidekick:
    """Maps of the `exp` kind that no two layers share."""
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
    return Sidekick(layers=made, kind="exp").to(MAPS[maps])


class Layers:
    """Layers in mid-life: all slots held, one token at the door. The native op's arguments."""

    def __init__(self, group: Group, layers: int, maps: str | None = None) -> None:
        """Fill them."""
        s = group.shape
        self.shape, self.group = s, group
        self.q = draw(s.B, s.Q, 1, s.D, seed=1, dtype=group.model)
        self.k = draw(s.B, s.K, 1, s.D, seed=2, dtype=group.model)
        self.v = draw(s.B, s.K, 1, s.D, seed=3, dtype=group.model)
        self.out = torch.empty_like(self.q)
        weights = sidekick(s, layers, maps) if maps is not None else None
        spec = LayerSpec(
            q_heads=s.Q,
            scale=s.D**-0.5,
            decay=0.98,
            rule=Rule(recent=s.S // 2, sinks=0, by_score=True, per_age=False),
            victim="forget" if weights is None else "fold",
        )
        layout = PageLayout(s.K, s.D, s.S, group.slots, 0 if weights is None else s.R)
        self.plans = [
            LayerPlan(spec, layout, None if weights is None else PackedMaps.pack(weights[i], "exp"))
            for i in range(layers)
        ]
        attends = replace(spec, victim="none", scores=False)
        self.attends = [LayerPlan(attends, layout, plan.maps) for plan in self.plans]
        self.at = [Paged(pool) for pool in allocate([layout] * layers, s.B)]
        for i, at in enumerate(self.at):
            (views,) = layout.views(at.pool)
            for name, j in (("k", 0), ("v", 99)):
                x = draw(s.B, s.K, s.S, s.D, seed=4 + i + j, dtype=torch.float32)
                if group.slots == torch.int8:
                    x, scale = reference.quantize(x)
                    getattr(views.slots, f"{name}_scale").copy_(scale)
                getattr(views.slots, name).copy_(x)
            g = torch.Generator().manual_seed(i)
            order = torch.randperm(s.S, generator=g)
            views.slots.position.copy_(order.expand(s.B, s.K, s.S))
            views.slots.score.copy_(torch.rand(s.B, s.K, s.S, generator=g))
            views.seen.fill_(s.S)
            if views.state is not None:
                views.state.H.copy_(torch.randn(s.B, s.K, s.R, s.D, generator=g))
                views.state.z.copy_(torch.rand(s.B, s.K, s.R, generator=g) + 1)

    @property
    def bytes(self) -> int:
        """Of k and v that a layer's step must read."""
        return self.shape.B * self.plans[0].layout.bytes_of("k", "v", "k_scale", "v_scale")

    def run(self, i: int, victim: str | None = None) -> None:
        """Layer i's step; ``victim="none"`` is attention alone."""
        plan = self.plans[i] if victim is None else self.attends[i]
        ops.decode_step(Call(self.q, self.k, self.v, out=self.out), self.at[i], plan)

    def check(self) -> float:
        """Runs layer 0 beside the reference in float64; the error relative to the largest value.

        Raises:
            NotCorrectError: It is beyond the dtype's tolerance, or another token was evicted.
        """
        plan, at = self.plans[0], self.at[0]
        new = Rows(*reference.floats(reference.rounded(self.k, self.v, self.group.slots)))
        slots, state, seen, maps = widened(plan, at)
        attended, after = reference.decode_step(
            self.q.double(), Rows(new.k.double(), new.v.double()), None, slots, state, seen,
            plan.spec, maps,
        )  # fmt: skip
        self.run(0)
        tolerance = TOLERANCE[self.group.model]
        error = difference(self.out, attended.out)
        (views,) = plan.layout.views(at.pool)
        kept, wanted = views.slots.position, after.slots.position
        same = torch.equal(kept.sort(-1).values, wanted.sort(-1).values)
        if not (error <= tolerance and same):
            raise NotCorrectError(
                f"decode_step {self.shape.name} {self.group.dtype}: off by {error:.2g}, wanted at "
                f"most {tolerance:.2g}; the same tokens were kept: {same}"
            )
        return error


def full_attention(group: Group, tokens: int) -> Contender:
    """torch's SDPA of one token over a cache of so many."""
    s = group.shape
    each = 2 * s.B * s.K * tokens * s.D * group.model.itemsize
    layers = layers_for(each)
    held = [
        [draw(s.B, s.K, tokens, s.D, seed=i + j, dtype=group.model) for j in (0, 77)]
        for i in range(layers)
    ]
    q = draw(s.B, s.Q, 1, s.D, seed=5, dtype=group.model)
    attention = torch.nn.functional.scaled_dot_product_attention

    def run(i: int) -> Tensor:
        return attention(q, *held[i], enable_gqa=s.Q != s.K)

    keys, values = (x[:1].double().repeat_interleave(s.Q // s.K, 1) for x in held[0])
    want = torch.softmax(q[:1].double() @ keys.mT * s.D**-0.5, -1) @ values
    error = difference(run(0)[:1], want)
    if not error <= TOLERANCE[group.model]:
        raise NotCorrectError(f"SDPA over {tokens} {s.name} {group.dtype}: off by {error:.2g}")
    return Contender(f"sdpa {tokens}", run, layers, each)


def dynamic_cache(group: Group, tokens: int) -> Contender:
    """transformers' DynamicCache: the token is appended to so many, then SDPA over all."""
    from transformers import DynamicCache

    s = group.shape
    each = 2 * s.B * s.K * tokens * s.D * group.model.itemsize
    layers = layers_for(each)
    cache = DynamicCache()
    for i in range(layers):
        cache.update(
            *(draw(s.B, s.K, tokens, s.D, seed=i + j, dtype=group.model) for j in (0, 77)), i
        )
    q, k, v = (draw(s.B, heads, 1, s.D, seed=5, dtype=group.model) for heads in (s.Q, s.K, s.K))
    attention = torch.nn.functional.scaled_dot_product_attention

    def run(i: int) -> Tensor:
        return attention(q, *cache.update(k, v, i), enable_gqa=s.Q != s.K)

    return Contender(f"dynamic cache {tokens}", run, layers, each)


def caches(group: Group) -> Iterator[Contender]:
    """``LessKVCache.attend`` by the native kernels and by the plain-torch reference."""
    s = group.shape
    layers = layers_for(2 * s.B * s.K * s.S * s.D * group.slots.itemsize, 256 << 20)
    half = s.S // 2
    weights = sidekick(s, layers, "float32")

    def make(backend: str) -> LessKVCache:
        return LessKVCache(
            layers=layers, q_heads=s.Q, kv_heads=s.K, head_dim=s.D, batch=s.B, dtype=group.slots,
            policy=H2O(heavy=s.S - half, recent=half, decay=0.98), sidekick=weights,
            backend=backend,
        )  # fmt: skip

    native, plain = make("native"), make("reference")
    for i in range(layers):
        q, k, v = (
            draw(s.B, heads, s.S + 8, s.D, seed=i + heads, dtype=group.model)
            for heads in (s.Q, s.K, s.K)
        )
        native.attend(i, q, k, v)
    plain.load_state_dict(native.state_dict())
    q, k, v = (draw(s.B, heads, 1, s.D, seed=heads, dtype=group.model) for heads in (s.Q, s.K, s.K))
    got, want = native.attend(0, q, k, v), plain.attend(0, q, k, v)
    error = difference(got, want.double())
    if not error <= TOLERANCE[group.model]:
        raise NotCorrectError(f"attend {s.name} {group.dtype}: off by {error:.2g}")
    for name, cache in (("attend", native), ("reference", plain)):
        yield Contender(name, partial(_attend, cache, q, k, v), layers)


def _attend(cache: LessKVCache, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
    return cache.attend(layer, q, k, v)


def contenders(group: Group, full: tuple[int, ...], plain: bool) -> Iterator[Contender]:
    """All of a group's.

    Args:
        group: What they have in common.
        full: Tokens of the full caches.
        plain: With the reference and transformers' cache.
    """
    s = group.shape
    each = 2 * s.B * s.K * s.S * s.D * group.slots.itemsize
    layers = layers_for(each)
    alone = Layers(group, layers)
    alone.check()
    yield Contender("step", alone.run, layers, alone.bytes)
    yield Contender("attention alone", partial(alone.run, victim="none"), layers, alone.bytes)
    for name in MAPS:
        kept = Layers(group, layers, maps=name)
        kept.check()
        yield Contender(f"step, {name} maps", kept.run, layers, kept.bytes)
    for tokens in full:
        yield full_attention(group, tokens)
    yield replace(full_attention(group, s.S), name="sdpa kept")
    if plain:
        yield dynamic_cache(group, full[0])
        yield from caches(group)


def measure(
    group: Group, rate: ReadRate, seconds: float, full: tuple[int, ...], plain: bool
) -> list[dict[str, Any]]:
    """Time a group; a record per contender, JSON-ready.

    Raises:
        NotCorrectError: One of them is wrong.
    """
    torch.set_num_threads(group.threads)
    with torch.inference_mode():
        all_ = list(contenders(group, full, plain))
        reads = Contender("read", rate.run, 1)
        interleave([*all_, reads], seconds)
    s = group.shape
    return [
        {
            "part": "compare", "shape": s.name, "B": s.B, "C": s.S, "dtype": group.dtype,
            "threads": group.threads, "contender": each.name, "layers": each.layers,
            "turns": len(each.seconds), "best": each.best, "median": each.median,
            "bytes": each.bytes, "read": rate.best,
        }
        for each in all_
    ]  # fmt: skip


def groups(
    models: list[str], kept: list[int], batches: list[int], threads: list[int], dtypes: list[str]
) -> Iterator[Group]:
    """Their product."""
    for model, C, B, n, dtype in itertools.product(models, kept, batches, threads, dtypes):
        yield Group(replace(MODELS[model], S=C, B=B), dtype, n)


def overhead() -> dict[str, Any]:
    """The op on an empty problem from Python: seconds a call, and torch's allocations."""
    group = Group(replace(MODELS["smollm2"], B=0, S=8), "float16")
    empty = Layers(group, 1)
    full = Layers(Group(replace(MODELS["smollm2"], S=8), "float16"), 1, maps="float16")
    best = float("inf")
    for _ in range(50):
        best = min(best, _seconds(lambda: empty.run(0), 100))
    full.run(0)
    return {"part": "overhead", "best": best, "allocations": allocations(lambda: full.run(0), 10)}


def allocations(run: Callable[[], object], times: int) -> int:
    """How often torch's CPU allocator is asked for memory in some calls.

    The profiler's own events are counted: those that ``profile.events()`` lists belong to an op
    each, which hides what an op frees again.
    """
    with torch.profiler.profile(profile_memory=True) as profile:
        for _ in range(times):
            run()
    events = profile.profiler.kineto_results.events()
    return sum(event.name() == "[memory]" and event.nbytes() > 0 for event in events)


def _seconds(run: Callable[[], object], times: int) -> float:
    import time

    start = time.perf_counter()
    for _ in range(times):
        run()
    return (time.perf_counter() - start) / times
