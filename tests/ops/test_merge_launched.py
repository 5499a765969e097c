"""Merging where kernels are launched: steps, prompts and chunks, against the reference."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from less import H2O, PagedLayer, PageLayout
from less.dtypes import FORMATS
from less.layer import Paged
from less.reference import Attended
from less.reference.codec import slot_floats
from tests.helpers import random_maps, random_qkv
from tests.ops.common import assert_alone_as_in_a_batch, space_of

pytest.importorskip("less._C")

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.float8_e4m3fn)
HEAD_DIMS = (64, 80, 96, 128, 256)
#: Of rows that are other rows once they were decoded and encoded again.
INEXACT = ("k4v4",)


def layers(dtype, D=64, Q=4, K=2, capacity=40, device="cpu", policy=None, **layout):
    """The same layer twice: native on the device, and the reference."""
    S = max(capacity) if isinstance(capacity, tuple) else capacity
    policy = policy or H2O(heavy=S - 6, recent=6, decay=0.97)
    made = {"q_heads": Q, "victim": "merge"}
    if isinstance(dtype, str):
        layout = {"sinks": 2, "hot": 5, "weights": True} | layout
        made["space"] = space_of(K, D)
    page = PageLayout(K, D, capacity, dtype, **layout)
    native = PagedLayer(policy, page, backend="native", device=device, **made)
    return native, PagedLayer(policy, page, backend="reference", **made)


def numbers(slots):
    """Rows of slots, in float64."""
    return (x.double() for x in slot_floats(slots))


def assert_same(layout, pool, want):
    """Two pools hold the same pages, but for the rounding of sums; returns who stands for many."""
    merged = 0
    for mine, its in zip(layout.views(pool.cpu()), layout.views(want), strict=True):
        assert torch.equal(mine.seen, its.seen)
        assert torch.equal(mine.slots.position, its.slots.position)
        for name in ("scores", "log_weight"):
            got, wanted = getattr(mine.slots, name), getattr(its.slots, name)
            near = 2**-10 if its.slots.counts and name == "scores" else 2e-5
            torch.testing.assert_close(
                got, wanted, rtol=near, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
            )
        held = its.slots.position >= 0
        for name, got, wanted in zip("kv", numbers(mine.slots), numbers(its.slots), strict=True):
            far = (got - wanted)[held].abs().amax(-1)
            size = wanted[held].abs().amax(-1)
            bound = {"float32": 1e-5, "bfloat16": 2**-7, "float16": 2**-10}.get(
                str(layout.dtype).removeprefix("torch.")
            )
            if bound is not None:
                assert bool((far <= bound * size).all()), (name, (far / size).max())
                continue
            # A mean that lies between two codes, but for the rounding of sums, has either.
            assert bool((far <= 0.3 * size).all()), (name, (far / size).max())
            assert int((far > 1e-3 * size).sum()) <= 1 + far.numel() // 100, name
        merged += int((its.slots.log_weight > 0).sum())
    return merged


def begun(reference, T, B):
    """Pages of the reference's after a call of T tokens, of scores that are drawn."""
    Q, K, D = reference.plan.spec.q_heads, reference.layout.kv_heads, reference.layout.head_dim
    pool = reference.new_pool(B)
    _, k, v = random_qkv(B, Q, K, T, D, seed=99)
    g = torch.Generator().manual_seed(99)
    score = torch.rand(B, K, reference.layout.slots + T, generator=g)
    step = Attended(torch.empty(0), score, torch.zeros(B, Q, T))
    new = reference.backend.rounded(k, v, reference.plan)
    reference.backend.compact(new, None, step, Paged(pool), reference.plan, None)
    return pool


def check_calls(
    native, reference, lengths, B=2, dtype=torch.float16, pages=None, valid=None, start=None
):
    """Calls of so many tokens each, from empty pages or others; each from those that the one
    before left."""
    Q, K, D = native.plan.spec.q_heads, native.layout.kv_heads, native.layout.head_dim
    N = B if pages is None else 5
    pool = native.new_pool(N) if start is None else start.to(native.device)
    merged = 0
    for i, T in enumerate(lengths):
        # Of other seeds some lie as near to one target as to another, but for 1 part in 10^6.
        q, k, v = random_qkv(B, Q, K, T, D, seed=i + (100 if D == 256 else 0), dtype=dtype)
        there = None if valid is None else valid(i, T)
        a = {"pages": pages, "valid": there}
        on = {n: None if x is None else x.to(native.device) for n, x in a.items()}
        want = pool.cpu().clone()
        moved = (x.to(native.device) for x in (q, k, v))
        out = native.attend(pool, *moved, out=torch.full_like(q, torch.nan).to(native.device), **on)
        expected = reference.attend(want, q, k, v, **a)
        bound = {torch.float32: 2e-5, torch.float16: 2**-10, torch.bfloat16: 2**-7}[dtype]
        size = expected.abs().max().item()
        assert (out.cpu() - expected).abs().max() <= bound * size
        merged += assert_same(native.layout, pool, want)
    assert merged > 0
    return pool


@pytest.mark.parametrize("D", HEAD_DIMS)
@pytest.mark.parametrize("dtype", [*DTYPES, *FORMATS], ids=str)
def test_a_launched_step_merges_as_the_reference(launched, meeting, dtype, D):
    for G in (1, 4):
        native, reference = layers(dtype, D, Q=2 * G, capacity=40, device=launched)
        check_calls(native, reference, [1] * 44)


@pytest.mark.parametrize("D", HEAD_DIMS)
@pytest.mark.parametrize("dtype", [*DTYPES, *FORMATS], ids=str)
def test_prompts_and_chunks_merge_as_the_reference(launched, dtype, D):
    native, reference = layers(dtype, D, Q=6, capacity=40, device=launched)
    check_calls(native, reference, [70, 1, 3, 9, 1, 60])


@pytest.mark.parametrize("G", [1, 3, 8, 71])
@pytest.mark.parametrize("dtype", [torch.float16, torch.int8, "k4v4"], ids=str)
def test_blocks_of_many_slots_find_one_target(launched, meeting, dtype, G):
    native, reference = layers(dtype, Q=2 * G, capacity=300, device=launched)
    check_calls(native, reference, [1] * 6, start=begun(reference, 330, 2))


@pytest.mark.parametrize("dtype", [torch.float16, "k4v4"], ids=str)
def test_more_slots_than_a_cluster_holds_meet_in_the_workspace(launched, dtype):
    native, reference = layers(dtype, Q=1, K=1, capacity=8300, device=launched)
    check_calls(native, reference, [1], B=1, start=begun(reference, 8310, 1))


@pytest.mark.parametrize("dtype", [torch.float16, "k3v2"], ids=str)
def test_a_long_prompt_goes_into_few_slots(launched, dtype):
    native, reference = layers(dtype, capacity=40, device=launched)
    check_calls(native, reference, [300, 1, 100])


@pytest.mark.parametrize(
    "policy",
    [H2O(heavy=33, recent=7, sinks=3, per_age=True), H2O(heavy=40, recent=0, decay=0.9)],
    ids=["per age", "heavy alone"],
)
@pytest.mark.parametrize("dtype", [torch.float32, "k4v4"], ids=str)
def test_any_rule_says_who_takes_others(launched, meeting, dtype, policy):
    native, reference = layers(dtype, capacity=40, policy=policy, device=launched)
    check_calls(native, reference, [*[1] * 45, 25, *[1] * 6])


@pytest.mark.parametrize("dtype", [torch.float16, "k4v4"], ids=str)
def test_heads_of_different_capacity_merge_by_themselves(launched, dtype):
    policy = H2O(heavy=100, recent=40, decay=0.97)
    capacity = (40, 9, 140, 40)
    native, reference = layers(dtype, Q=4, K=4, capacity=capacity, policy=policy, device=launched)
    check_calls(native, reference, [30, 1, 1, 20, *[1] * 8, 150, 1])


@pytest.mark.parametrize(("sinks", "hot"), [(0, 1), (0, 8), (4, 16), (9, 1)])
def test_any_number_of_slots_is_hot(launched, sinks, hot):
    native, reference = layers("k4v4", capacity=37, sinks=sinks, hot=hot, device=launched)
    check_calls(native, reference, [*[1] * 24, 12, *[1] * 24])


@pytest.mark.parametrize("dtype", [torch.float32, "k4v4"], ids=str)
def test_padding_and_absent_pages_stay_as_they_are(launched, dtype):
    native, reference = layers(dtype, device=launched)
    pages = torch.tensor([3, -1, 1], dtype=torch.int32)

    def valid(i, T):
        return torch.rand(3, T, generator=torch.Generator().manual_seed(i)) < 0.7

    check_calls(native, reference, [50, *[1] * 12, 5], 3, torch.float32, pages, valid)


@pytest.mark.parametrize("dtype", [torch.float16, torch.int8, "k4v4"], ids=str)
def test_a_row_that_merges_has_the_same_bits_alone_and_in_a_batch(launched, meeting, dtype):
    native, _ = layers(dtype, capacity=200, device=launched)
    assert_alone_as_in_a_batch(native, [230, 1, 40, *[1] * 4])


def compacted(dtype, device, change, T=5, S=24, rank=None, D=64):
    """What both make of a call of T tokens, of scores that are given.

    Args:
        dtype: Of the slots, which are full.
        device: Of the kernels.
        change: Called with the slots, the call's keys and values, and the scores [1, 1, S + T].
        T: Tokens of the call.
        S: Slots.
        rank: float32 [1, 1, S + T] or None.
        D: Head dim.

    Returns:
        The slots before, the native ones after, and the reference's.
    """
    policy = H2O(heavy=S, recent=0, decay=0.97)
    native, reference = layers(dtype, D, Q=1, K=1, capacity=S, policy=policy, device=device)
    pool = native.new_pool(1)
    native.attend(pool, *(x.to(device) for x in random_qkv(1, 1, 1, S, D, seed=1)))
    start = pool.cpu().clone()
    _, k, v = random_qkv(1, 1, 1, T, D, seed=2)
    score = torch.rand(1, 1, S + T, generator=torch.Generator().manual_seed(3))
    (before,) = native.layout.views(start)
    change(before.slots, k, v, score)
    want = start.clone()
    for layer, of, on in ((native, pool.copy_(start), device), (reference, want, "cpu")):
        new = layer.backend.rounded(k.to(on), v.to(on), layer.plan)
        step = Attended(torch.empty(0), score.to(on), torch.zeros(1, 1, T, device=on))
        ranks = None if rank is None else rank.to(on)
        layer.backend.compact(new, None, step, Paged(of), layer.plan, ranks)
    (mine,), (its,) = (native.layout.views(x) for x in (pool.cpu(), want))
    assert_equal(mine, its)
    return before.slots, mine.slots


def assert_equal(mine, its):
    """All of two pages but log-weights that are no counts are the same bits: of the same scores."""
    for name, x in its.tensors().items():
        y = mine.tensors()[name]
        if name == "weight" and x.is_floating_point():
            torch.testing.assert_close(y, x, rtol=1e-6, atol=1e-6)
        else:
            assert torch.equal(
                *(a.new_empty(a.shape).copy_(a).view(torch.uint8) for a in (x, y))
            ), name


def nothing(*_):
    pass


@pytest.mark.parametrize("D", HEAD_DIMS)
@pytest.mark.parametrize("T", [1, 5, 200])
@pytest.mark.parametrize("dtype", [*DTYPES, *FORMATS], ids=str)
def test_means_have_the_bits_of_the_reference(launched, dtype, T, D):
    _, after = compacted(dtype, launched, nothing, T, D=D)
    assert after.log_weight.exp().sum().round() == 24 + T


@pytest.mark.parametrize("dtype", [*DTYPES, "k8v4", "k4v4"], ids=str)
def test_of_identical_keys_the_older_takes_who_leaves(launched, dtype):
    younger, older = 9, 4

    def change(slots, k, v, score):
        W = slots.hot_slots
        score.fill_(1.0)
        score[..., W] = 0.0
        for x in (slots.k, slots.k_scale):
            if x is not None:
                x[:, :, younger] = x[:, :, older] = x[:, :, 0]

    before, after = compacted(dtype, launched, change, T=1)
    W = before.hot_slots
    if dtype not in INEXACT:
        assert torch.equal(after.k[0, 0, older], before.k[0, 0, older])
    assert after.log_weight[0, 0, W + older] == pytest.approx(math.log(2))
    assert after.log_weight[0, 0, W + younger] == 0
    assert after.score[0, 0, W + older] == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8, "k4v4"], ids=str)
def test_a_key_of_nan_takes_nobody_and_goes_to_nobody(launched, dtype):
    def change(slots, k, v, score):
        x = slots.k if slots.k_scale is None else slots.k_scale.unsqueeze(-1)
        x[:, :, [1, 4, 5]] = torch.nan
        score[..., slots.hot_slots + 5] = 0.0  # it leaves first

    before, after = compacted(dtype, launched, change, T=2)
    W = before.hot_slots
    assert (after.log_weight[0, 0, [W + 1, W + 4]] == 0).all()
    assert after.log_weight.exp().sum().round() == 25  # one who left counts no more


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8, "k4v4"], ids=str)
def test_who_is_protected_takes_nobody(launched, dtype):
    S, T = 24, 3
    rank = torch.full((1, 1, S + T), torch.inf)
    rank[..., [8, 12, 16, 20]] = torch.tensor([0.0, 1.0, 2.0, 3.0])
    _, after = compacted(dtype, launched, nothing, T, S, rank)
    many = (after.log_weight[0, 0] > 0).nonzero()[:, 0].tolist()
    assert len(many) == 1  # who alone stays without protection
    rank.fill_(torch.inf)
    _, after = compacted(dtype, launched, nothing, T, S, rank)
    assert (after.log_weight == 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.int8, "k4v4"], ids=str)
def test_without_a_target_a_step_forgets(launched, meeting, dtype):
    native, reference = layers(dtype, capacity=24, policy=H2O(heavy=0, recent=24), device=launched)
    pool, want = native.new_pool(2), reference.new_pool(2)
    for i in range(30):
        call = random_qkv(2, 4, 2, 1, 64, seed=i)
        native.attend(pool, *(x.to(launched) for x in call))
        reference.attend(want, *call)
    (mine,), (its,) = (native.layout.views(x) for x in (pool.cpu(), want))
    assert torch.equal(mine.slots.position, its.slots.position)
    assert torch.equal(mine.slots.k, its.slots.k)
    assert (mine.slots.log_weight == 0).all()


@pytest.mark.parametrize("dtype", [*DTYPES, "k8v4", "k4v4"], ids=str)
def test_a_step_of_a_key_that_slots_have_changes_none(launched, meeting, dtype):
    """The token's key is every slot's: all costs are 0, and the oldest who may takes who leaves."""
    native, reference = layers(
        dtype, Q=2, capacity=24, policy=H2O(heavy=24, recent=0), device=launched
    )
    pool, want = native.new_pool(2), reference.new_pool(2)
    _, k, v = random_qkv(2, 2, 2, 1, 64)
    for i in range(40):
        q = random_qkv(2, 2, 2, 1, 64, seed=i)[0]
        native.attend(pool, *(x.to(launched) for x in (q, k, v)))
        reference.attend(want, q, k, v)
    (mine,), (its,) = (native.layout.views(x) for x in (pool.cpu(), want))
    assert torch.equal(mine.slots.position, its.slots.position)
    torch.testing.assert_close(mine.slots.log_weight, its.slots.log_weight)
    if dtype not in INEXACT:
        assert torch.equal(mine.slots.k, mine.slots.k[:, :, :1].expand_as(mine.slots.k))


@pytest.mark.parametrize("dtype", ["k8v4", "k4v4"])
def test_scores_and_counts_of_packed_slots_stop_at_the_largest(launched, meeting, dtype):
    native, reference = layers(dtype, capacity=24, device=launched)
    for layer in (native, reference):
        layer.plan = replace(layer.plan, spec=replace(layer.plan.spec, decay=1.0))
    start = begun(reference, 60, 2)
    (views,) = native.layout.views(start)
    views.slots.score.fill_(65504)
    views.slots.weight[..., views.slots.hot_slots :] = 32767
    pool = check_calls(native, reference, [1, 1, 3], start=start)
    (now,) = native.layout.views(pool.cpu())
    assert bool(now.slots.scores.isfinite().all())
    assert int((now.slots.score == 65504).sum()) > 2 * 2 * 10
    assert now.slots.weight.min() >= 1
    assert now.slots.weight.max() == 32767


@pytest.mark.parametrize("victim", ["forget", "none"])
def test_log_weights_of_packed_slots_count_whatever_becomes_of_who_leaves(
    launched, meeting, victim
):
    native, reference = layers("k4v4", capacity=40, device=launched)
    pool = native.new_pool(2)
    for T in (60, 1, 1):
        native.attend(pool, *(x.to(launched) for x in random_qkv(2, 4, 2, T, 64, seed=T)))
    want = pool.cpu().clone()
    for layer in (native, reference):
        layer.plan = replace(layer.plan, spec=replace(layer.plan.spec, victim=victim))
    q, k, v = random_qkv(2, 4, 2, 1, 64, seed=9)
    got = native.attend(pool, *(x.to(launched) for x in (q, k, v)))
    expected = reference.attend(want, q, k, v)
    torch.testing.assert_close(got.cpu(), expected, rtol=1e-5, atol=1e-5)
    assert_same(native.layout, pool, want)


def test_merging_with_a_state_is_refused_by_name(launched):
    page = PageLayout(2, 64, 40, torch.float16, rank=4)
    maps = random_maps(2, 2, 64, 16, 4, "exp")
    native = PagedLayer(H2O(34, 6), page, 2, maps=maps, victim="merge", device=launched)
    pool = native.new_pool(1)
    before = pool.clone()
    rows = (x.to(launched) for x in random_qkv(1, 2, 2, 1, 64))
    with pytest.raises(RuntimeError, match="victim merge with a low-rank state has no CUDA kernel"):
        native.attend(pool, *rows)
    assert torch.equal(pool, before)
