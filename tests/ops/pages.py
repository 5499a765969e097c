"""The ops over a pool in mid-life: their arguments by the names of their schemas."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from less import PageLayout, reference
from less.dtypes import has_scale
from less.layer import LayerPlan, LayerSpec, PackedMaps, allocate
from less.layer.kinds import KINDS
from less.policies import Rule
from tests.helpers import random_maps, random_qkv

#: The ops that take a layer's pool.
OPS = ("decode_step", "chunk_attention", "compact")
#: Sizes of every case: of batch rows, query heads, kv heads, head dim and pages.
B, Q, K, D, N = 2, 4, 2, 64, 5
RULE = Rule(recent=4, sinks=2, by_score=True, per_age=False)


def layer_fields() -> list[str]:
    """The numbers of an encoded layer in their order, as csrc/ops/layer.h lists them."""
    text = (Path(__file__).parents[2] / "csrc" / "ops" / "layer.h").read_text(encoding="utf-8")
    found = re.search(r"namespace layer_fields \{\s*enum : int64_t \{(.*?)kFixed", text, re.S)
    assert found is not None
    return re.findall(r"\w+", found[1])


def plan_of(
    dtype=torch.float16, state=True, capacity=9, kind="exp", maps_dtype=None, device="cpu", **spec
):
    """A layer of Q, K and D; with a state of rank 4, and its maps, or without."""
    maps = None
    if state:
        tensors = random_maps(Q, K, D, 16, 4, kind)
        for n in KINDS[kind].matrices:
            if maps_dtype == torch.int8:
                tensors[n], tensors[f"{n}_scale"] = reference.quantize(tensors[n], -2)
            elif maps_dtype is not None:
                tensors[n] = tensors[n].to(maps_dtype)
        maps = PackedMaps.pack(tensors, kind, device)
    made = {"scale": 0.2, "decay": 0.97, "rule": RULE, "victim": "fold" if state else "forget"}
    return LayerPlan(
        LayerSpec(Q, **made | spec), PageLayout(K, D, capacity, dtype, 4 if state else 0), maps
    )


def filled(layout, pages, seed=0, device="cpu"):
    """A pool of pages in mid-life: some slots are empty, three times as many tokens were seen."""
    g = torch.Generator().manual_seed(seed)
    pool = allocate([layout], pages)[0]
    for views in layout.views(pool):
        slots = views.slots
        shape = slots.position.shape
        for name in ("k", "v"):
            x = torch.randn(getattr(slots, name).shape, generator=g)
            if has_scale(layout.dtype):
                x, scale = reference.quantize(x, dtype=layout.dtype)
                getattr(slots, f"{name}_scale").copy_(scale)
            getattr(slots, name).copy_(x)
        order = torch.rand(*shape[:2], 3 * shape[2], generator=g).argsort(-1)[..., : shape[2]]
        empty = torch.rand(shape, generator=g) < 0.2
        slots.position.copy_(order.masked_fill(empty, -1))
        for x in (slots.score, slots.weight):
            x.copy_(torch.rand(shape, generator=g).masked_fill(empty, 0.0))
        views.seen.fill_(3 * layout.slots)
        if views.state is not None:
            views.state.H.copy_(torch.randn(views.state.H.shape, generator=g))
            views.state.z.copy_(torch.rand(views.state.z.shape, generator=g))
    return pool.to(device)


def names(op):
    """The arguments of an op, in the order of its schema."""
    return [a.name for a in getattr(torch.ops.less, op).default._schema.arguments]


def arguments(op, *, dtype=torch.float16, state=True, T=None, device="cpu", **options):
    """An op's arguments by name: rows 0 and 1 of the call use pages 3 and 1 of five."""
    T = T or (1 if op == "decode_step" else 5)
    plan = plan_of(dtype, state, device=device, **options)
    S, R = plan.layout.slots, plan.layout.rank
    float_dtype = torch.float16 if has_scale(dtype) else dtype
    q, k, v = random_qkv(B, Q, K, T, D, seed=3, dtype=float_dtype)
    g = torch.Generator().manual_seed(4)
    valid = torch.ones(B, T, dtype=torch.bool)
    valid[1, -1] = False
    scales = None
    if has_scale(dtype) and op != "decode_step":
        (k, k_scale), (v, v_scale) = (reference.quantize(x, dtype=dtype) for x in (k, v))
        scales = torch.stack([k_scale, v_scale])
    every = {
        "q": q,
        "k": k,
        "v": v,
        "scales": scales,
        "valid": valid,
        "out": torch.full_like(q, torch.nan),
        "score": torch.rand(B, K, S + T, generator=g),
        "rank": None,
        "rows": torch.tensor([[3, 1]], dtype=torch.int32),
        "phi_q": torch.rand(B, Q, T, R, generator=g) if state else None,
        "workspace": None,
        "x": q,
        "query": True,
    }
    every = {n: x.to(device) if isinstance(x, torch.Tensor) else x for n, x in every.items()}
    every |= {
        "pool": filled(plan.layout, N, device=device),
        "layer": plan.encoded,
        "maps": None if plan.maps is None else plan.maps.memory,
    }
    return {n: every[n] for n in names(op)}


def call(op, args):
    """Run an op of ``torch.ops.less``."""
    return getattr(torch.ops.less, op)(*args.values())
