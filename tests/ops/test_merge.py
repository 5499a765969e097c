"""Victim merge on the CPU's kernels, against the reference: the same page, bit for bit.

Scores are given, so that both weigh alike; log-weights are close. Pages are in mid-life: every row
is what its format can hold, and scores span five orders of magnitude.
"""

from __future__ import annotations

import pytest
import torch

from less import H2O, PageLayout
from less import backend as backends
from less.dtypes import FORMATS
from less.layer import Call, LayerPlan, LayerSpec, Paged, plain_space
from less.policies import Rule
from less.reference import Attended
from tests.ops import pages
from tests.ops.test_packed import CALLS, Ranked, assert_same_pages, call_of, layer_of, run, space_of

pytest.importorskip("less._C")

B, Q, K = 2, 4, 2
PLAIN = (torch.float32, torch.bfloat16, torch.float16, torch.int8)
DTYPES = (*PLAIN, *FORMATS)
RULES = [
    Rule(recent=4, sinks=0, by_score=True, per_age=False),
    Rule(recent=9, sinks=3, by_score=True, per_age=True),
    Rule(recent=0, sinks=0, by_score=True, per_age=False),
    Rule(recent=24, sinks=0, by_score=True, per_age=False, capacity=42),
]
NOBODY_IS_PROTECTED = RULES[2]
OUT = (
    1e-4  # of outputs: where sums are of whole numbers, each weight is within 2^-16 of the largest
)
NATIVE, REFERENCE = (backends.choose(name, torch.device("cpu")) for name in ("native", "reference"))


def layout_of(dtype, capacity=21, D=64):
    hot = {"sinks": 2, "hot": 6} if dtype in FORMATS else {}
    return PageLayout(K, D, capacity, dtype, weights=True, **hot)


def plan_of(layout, rule, **spec):
    made = {"scale": 0.2, "decay": 0.97, "scores": False, "victim": "merge"} | spec
    space = plain_space(K, layout.head_dim, "cpu") if layout.format.packed else None
    return LayerPlan(LayerSpec(Q, rule=rule, **made), layout, space=space)


def scores_of(shape, seed):
    g = torch.Generator().manual_seed(seed)
    return torch.rand(shape, generator=g) * 10 ** (5 * torch.rand(shape, generator=g) - 4)


def weigh(layout, pool, seed):
    """Draw the tokens' scores and log-weights; what lies in a hot slot stands for one token."""
    for views in layout.views(pool):
        slots = views.slots
        there = slots.position >= 0
        score = scores_of(there.shape, seed)
        weight = 2 * torch.rand(there.shape, generator=torch.Generator().manual_seed(seed + 1))
        weight[..., : slots.hot_slots] = 0.0
        if slots.counts:
            weight = weight.exp().round()
        slots.score.copy_(torch.where(there, score, 0.0))
        slots.weight.copy_(torch.where(there, weight, 0.0))


def aged(plan, seed=0, tokens=60, empty=0.0, k=None):
    """A pool of B pages that have seen so many tokens."""
    layout = plan.layout
    policy = Ranked(H2O(heavy=max(layout.capacities), recent=0))
    layer = layer_of("reference", layout, policy)
    pool = layer.new_pool(B)
    q, keys, v, _ = call_of(tokens, layout.head_dim, seed)
    layer.attend(pool, q, keys if k is None else k.expand_as(keys), v)
    g = torch.Generator().manual_seed(seed)
    for views in layout.views(pool):
        gone = torch.rand(views.slots.position.shape, generator=g) < empty
        gone[..., : views.slots.hot_slots] = False
        views.slots.position.masked_fill_(gone, -1)
    weigh(layout, pool, seed)
    return pool


def assert_same(layout, got, want):
    """As pages of packed rows are compared, but for log-weights that are no counts."""
    for mine, its in zip(layout.views(got), layout.views(want), strict=True):
        if not mine.slots.counts:
            assert (mine.slots.weight - its.slots.weight).abs().max() <= 1e-5
            mine.slots.weight.copy_(its.slots.weight)
        assert torch.equal(mine.slots.score, its.slots.score)
    assert_same_pages(layout, got, want)


def compact_both(plan, pool, T, seed, rank=None, k=None):
    """What both backends make of a call, on copies of a pool; returns the reference's."""
    layout = plan.layout
    _, keys, v, valid = call_of(T, layout.head_dim, seed, padding=0.2)
    new = REFERENCE.rounded(keys if k is None else k, v, plan)
    score = scores_of((B, K, layout.slots + T), seed)
    for views in layout.views(pool):  # an empty slot has no score
        own = score[:, views.heads, : views.slots.position.shape[2]]
        own.masked_fill_(views.slots.position < 0, 0.0)
    pools = [pool.clone(), pool.clone()]
    for backend, mine in zip((NATIVE, REFERENCE), pools, strict=True):
        step = Attended(torch.empty(0), score, torch.zeros(B, Q, T))
        backend.compact(new, valid, step, Paged(mine), plan, rank)
    assert_same(layout, *pools)
    return pools[1]


def step_both(plan, pool, seed, k=None):
    """The same of a step."""
    layout = plan.layout
    q, key, v, _ = call_of(1, layout.head_dim, seed)
    pools = [pool.clone(), pool.clone()]
    got, want = (
        backend.decode_step(Call(q, key if k is None else k, v), Paged(mine), plan)
        for backend, mine in zip((NATIVE, REFERENCE), pools, strict=True)
    )
    assert (got - want).abs().max() <= OUT * max(1.0, want.abs().max().item())
    assert_same(layout, *pools)
    return pools[1]


def steps_both(plan, pool, steps):
    for step in range(steps):
        pool = step_both(plan, pool, step)
        weigh(plan.layout, pool, 100 + step)


def merged(layout, pool):
    """How many slots stand for several tokens, of a pool in which none did."""
    return sum(int((views.slots.log_weight > 0).sum()) for views in layout.views(pool))


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("T", [1, 5, 40, 130])
def test_a_call_leaves_the_pages_of_the_reference(dtype, rule, T):
    plan = plan_of(layout_of(dtype), rule)
    compact_both(plan, aged(plan, empty=0.2 if T == 5 else 0.0), T, seed=T)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8, "k4v4", "k8v4"], ids=str)
@pytest.mark.parametrize("D", [8, 72, 128])
def test_a_call_leaves_them_at_every_level_and_head_dim(simd, dtype, D):
    plan = plan_of(layout_of(dtype, D=D), RULES[1])
    compact_both(plan, aged(plan), 60, seed=D)


def test_a_call_takes_the_policys_own_ranks(simd):
    g = torch.Generator().manual_seed(2)
    for dtype in (torch.float16, "k4v4"):
        plan = plan_of(layout_of(dtype), None)
        rank = torch.rand(B, K, 21 + 40, generator=g)
        rank[0, 0, ::3] = torch.nan
        rank[1] = 0.5
        rank[0, 1, 3:30] = torch.inf
        compact_both(plan, aged(plan), 40, seed=1, rank=rank)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_where_all_others_are_protected_who_leaves_is_forgotten(simd, dtype):
    layout = layout_of(dtype)
    plan = plan_of(layout, Rule(recent=1000, sinks=0, by_score=True, per_age=False))
    pool = aged(plan)
    for views in layout.views(pool):
        views.slots.weight.clamp_(max=int(views.slots.counts))
    assert merged(layout, compact_both(plan, pool, 40, seed=1)) == 0
    assert merged(layout, step_both(plan, pool, 1)) == 0


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_steps_leave_the_pages_of_the_reference(simd, dtype, rule):
    plan = plan_of(layout_of(dtype), rule)
    steps_both(plan, aged(plan, empty=0.1), 12)  # through the filling of the slots


@pytest.mark.parametrize("D", [8, 72, 96, 128, 256, 1280])
def test_steps_leave_them_at_every_head_dim(simd, D):
    for dtype in DTYPES if D < 1000 else ("k4v4", "k8v4"):
        plan = plan_of(layout_of(dtype, D=D), RULES[0])
        steps_both(plan, aged(plan), 2)


@pytest.mark.parametrize("capacity", [9, 10, 12, 23, 24, 25, 41, 90, (40, 11)], ids=str)
def test_steps_and_calls_leave_them_with_any_number_of_slots(simd, capacity):
    for dtype in (torch.float32, torch.float16, torch.int8, "k4v4", "k3v2"):
        for rule in (NOBODY_IS_PROTECTED, RULES[3]):
            plan = plan_of(layout_of(dtype, capacity), rule)
            pool = aged(plan, tokens=100)
            steps_both(plan, pool, 2)
            compact_both(plan, pool, 9, seed=1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_token_that_joins_may_leave_or_take_another_in(simd, dtype):
    layout = layout_of(dtype)
    plan = plan_of(layout, NOBODY_IS_PROTECTED)
    for joins in (False, True):
        pool = aged(plan, tokens=60)
        (views,) = layout.views(pool)
        W, slots = views.slots.hot_slots, views.slots
        # Slot 3 has the new token's key. It weighs nothing, or the least but the new token.
        slots.score.clamp_(min=0.1)
        slots.score[..., W + 3] = 0.0 if joins else 1e-3
        token = 60 - layout.hot if W else 60
        k = call_of(60, layout.head_dim, 0)[1][:, :, token : token + 1] if W else None
        key = call_of(1, layout.head_dim, 9)[1] if k is None else k
        new = REFERENCE.rounded(key, key, plan)
        if W:
            slots.score[slots.position == token] = 1e-3 if joins else 0.0
            from less.reference import eviction

            rows = eviction._candidate_rows(slots, new)["k"]
            codes, scale = (None if x is None else x[:, :, 2 + (token - 2) % 6] for x in rows)
        else:
            codes, scale = new.k[:, :, 0], None if new.k_scale is None else new.k_scale[:, :, 0]
        slots.k[:, :, 3] = codes
        if scale is not None:
            slots.k_scale[:, :, 3] = scale
        victim = slots.position[..., W + 3].clone()
        weight = slots.log_weight[..., W + 3].clone()
        after = step_both(plan, pool, 9, k=key)
        (now,) = layout.views(after)
        assert bool((now.slots.position[..., W + 3] == token).all()), "the later position stays"
        assert not bool((now.slots.position == victim[..., None]).any())
        want = torch.logaddexp(weight, torch.zeros(()))
        assert (now.slots.log_weight[..., W + 3] - want).abs().max() <= 1e-5


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_of_equal_keys_the_oldest_takes_in(simd, dtype):
    layout = layout_of(dtype)
    plan = plan_of(layout, NOBODY_IS_PROTECTED)
    k = call_of(1, layout.head_dim, 5)[1]
    pool = aged(plan, k=k)
    (views,) = layout.views(pool)
    W = views.slots.hot_slots
    views.slots.score[..., W + 3] = 0.0
    after = step_both(plan, pool, 1, k=k)
    (now,) = layout.views(after)
    position = views.slots.position[..., W:].clone()
    position[..., 3] = 1 << 30
    oldest = position.argmin(-1, keepdim=True)
    before, grown = (x.slots.weight[..., W:].gather(-1, oldest) for x in (views, now))
    assert bool((grown > before).all())
    compact_both(plan, pool, 40, seed=3, k=k.expand(-1, -1, 40, -1).contiguous())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_keys_and_scores_of_nan_are_no_targets_and_have_none(simd, dtype):
    layout = layout_of(dtype)
    plan = plan_of(layout, NOBODY_IS_PROTECTED)
    pool = aged(plan)
    (views,) = layout.views(pool)
    W, slots = views.slots.hot_slots, views.slots
    for x in (slots.k_scale, slots.k):
        if x is not None and x.is_floating_point():
            x[0, :, ::3] = torch.nan
            break
    slots.score[1, 0, W + 4] = torch.nan
    slots.score[1, 1, W + 5] = torch.finfo(torch.float16).max if W else torch.inf
    for seed in range(3):
        after = pool.clone()
        q, key, v, _ = call_of(1, layout.head_dim, seed)
        want = pool.clone()
        NATIVE.decode_step(Call(q, key, v), Paged(after), plan)
        REFERENCE.decode_step(Call(q, key, v), Paged(want), plan)
        for x, y in zip(layout.views(after), layout.views(want), strict=True):
            for name in ("position", "score", "weight"):
                a, b = x.tensors()[name].double(), y.tensors()[name].double()
                assert torch.allclose(a, b, rtol=1e-5, equal_nan=True), name
        slots.score[..., W + 6 + seed] = 1e-7


def assert_close_pages(layout, got, want):
    """Equal positions; scores and log-weights that are close."""
    for mine, its in zip(layout.views(got), layout.views(want), strict=True):
        assert torch.equal(mine.slots.position, its.slots.position)
        for name in ("scores", "log_weight"):
            x, y = getattr(mine.slots, name), getattr(its.slots, name)
            bound = 2**-10 if its.slots.counts and name == "scores" else 2e-5
            assert (x - y).abs().max() <= bound * max(1.0, y.abs().max().item()), name


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("dtype", [torch.float16, "k8v4", "k4v4", "k3v2"], ids=str)
def test_attention_weighs_slots_that_stand_for_several_tokens(simd, dtype, softcap):
    layout = layout_of(dtype)
    options = {"space": space_of(64), "victim": "merge", "softcap": softcap}
    policy = Ranked(H2O(heavy=18, recent=3, decay=0.97))
    run(layout, policy, CALLS, padding=0.2, same=assert_close_pages, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("softcap", [0.0, 3.0])
def test_a_steps_own_scores_choose_and_weigh(simd, dtype, softcap):
    layout = layout_of(dtype)
    plan = plan_of(layout, RULES[0], scores=True, softcap=softcap)
    pool = aged(plan)
    q, k, v, _ = call_of(1, layout.head_dim, 3)
    pools = [pool.clone(), pool.clone()]
    got, want = (
        backend.decode_step(Call(q, k, v), Paged(mine), plan)
        for backend, mine in zip((NATIVE, REFERENCE), pools, strict=True)
    )
    assert (got - want).abs().max() <= OUT * max(1.0, want.abs().max().item())
    assert_close_pages(layout, *pools)


@pytest.mark.parametrize("dtype", ["k8v4", "k4v4", "k3v2"])
def test_scores_and_counts_of_packed_slots_stop_at_the_largest(simd, dtype):
    layout = layout_of(dtype)
    plan = plan_of(layout, RULES[0], scores=True, decay=1.0)
    pool = aged(plan)
    (views,) = layout.views(pool)
    cold = views.slots.hot_slots
    views.slots.score.fill_(65504)
    views.slots.weight[..., cold:] = 32767
    for after in (step_both(plan, pool, 1), compact_both(plan, pool, 3, seed=1)):
        (now,) = layout.views(after)
        assert bool(now.slots.scores.isfinite().all())
        assert now.slots.weight.min() >= 1
        assert now.slots.weight.max() == 32767
    (stepped,) = layout.views(step_both(plan, pool, 1))
    assert (stepped.slots.score == 65504).sum() == B * K * (layout.slots - 1)


@pytest.mark.parametrize("dtype", ["k8v4", "k4v4", "k3v2"])
def test_of_scores_that_are_one_half_the_older_leaves(simd, dtype):
    """Two scores differ by less than float16 tells apart: the older token is the victim."""
    layout = layout_of(dtype)
    plan = plan_of(layout, NOBODY_IS_PROTECTED, victim="forget")
    pool = aged(plan, tokens=60)
    (views,) = layout.views(pool)
    pair = [views.slots.hot_slots + 2, views.slots.hot_slots + 7]
    position = views.slots.position[..., pair]
    older = position.amin(-1)
    score = torch.ones(B, K, layout.slots + 1)
    score[..., pair] = torch.where(position == older[..., None], 0.100002, 0.100001)
    new = REFERENCE.rounded(*call_of(1, layout.head_dim, 9)[1:3], plan)
    for backend in (NATIVE, REFERENCE):
        after = pool.clone()
        step = Attended(torch.empty(0), score, torch.zeros(B, Q, 1))
        backend.compact(new, None, step, Paged(after), plan, None)
        (now,) = layout.views(after)
        assert not bool((now.slots.position == older[..., None]).any())


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8, "k4v4"], ids=str)
def test_threads_and_neighbours_never_change_a_bit(simd, with_threads, dtype):
    layout = layout_of(dtype)
    plan = plan_of(layout, RULES[0], scores=True)
    start = aged(plan)
    q, k, v, valid = call_of(70, 64, 4, padding=0.2)
    ends = []
    for threads, rows in ((1, slice(0, 2)), (3, slice(0, 2)), (1, slice(1, 2))):
        with_threads(threads)
        pool = start[rows].clone()
        new = NATIVE.rounded(k[rows], v[rows], plan)
        step = Attended(torch.empty(0), scores_of((B, K, 91), 1)[rows], torch.zeros(2, Q, 70)[rows])
        NATIVE.compact(new, valid[rows], step, Paged(pool), plan, None)
        for t in range(9):
            call = Call(*(x[rows, :, t : t + 1] for x in (q, k, v)))
            NATIVE.decode_step(call, Paged(pool), plan)
        ends.append(pool)
    assert torch.equal(ends[0], ends[1])
    assert torch.equal(ends[0][1:], ends[2])


@pytest.mark.parametrize("dtype", [torch.float16, torch.int8], ids=str)
@pytest.mark.parametrize("op", ["decode_step", "compact"])
def test_merging_passes_opcheck(op, dtype):
    args = pages.arguments(op, dtype=dtype, state=False, victim="merge")
    torch.library.opcheck(getattr(torch.ops.less, op).default, tuple(args.values()))
