"""Layers of packed rows on the CPU's kernels, against the reference: the same page, bit for bit.

Scores are sums in another order, hence close; everything else that a page holds is equal, as long
as no two ranks are closer than that.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from less import H2O, Candidates, PageLayout, Policy
from less.cache.paged import PagedLayer
from less.dtypes import FORMATS
from less.layer import PageRows, Space
from tests.helpers import random_maps

B, Q, K = 2, 4, 2
NULL = 3


@dataclass(frozen=True)
class Ranked(Policy):
    """A built-in ranking without a rule: tokens that come alone go the way of many."""

    like: H2O

    @property
    def capacity(self):
        return self.like.capacity

    def rank(self, tokens: Candidates):
        return self.like.rank(tokens)


def policy_of(capacity):
    return H2O(heavy=capacity - 3, recent=3, decay=0.97)


def space_of(D, seed=5):
    """Means and scales that differ by channel, as a model's do."""
    g = torch.Generator().manual_seed(seed)

    def normal(factor):
        return torch.randn(K, D, generator=g) * factor

    return Space.of(
        K,
        D,
        key_mean=normal(2.0),
        key_scale=normal(0.5).exp(),
        value_mean=normal(0.3),
        value_scale=normal(0.5).exp(),
    )


def layer_of(name, layout, policy, *, state=False, **options):
    maps = random_maps(Q, K, layout.head_dim, 16, layout.rank, "exp", seed=1) if state else None
    return PagedLayer(policy, layout, Q, maps=maps, null_page=NULL, backend=name, **options)


def call_of(T, D, seed, padding=0.0):
    g = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(B, heads, T, D, generator=g) for heads in (Q, K, K))
    valid = torch.rand(B, T, generator=g) >= padding
    return 1.5 * q, 1.5 * k, v, valid


def assert_same_pages(layout, got, want):
    for mine, its in zip(layout.views(got), layout.views(want), strict=True):
        for name, x in its.tensors().items():
            y = mine.tensors()[name]
            if name in ("score", "share", "H", "z"):
                bound = 2**-10 if x.dtype == torch.float16 else 2e-5
                far = (y.double() - x.double()).abs().max()
                assert far <= bound * max(1.0, x.abs().max().item()), name
            elif name == "position" or name.startswith(("hot_", "k", "v")):
                there = its.slots.position >= 0
                assert torch.equal(mine.slots.position, its.slots.position)
                W = its.slots.hot_slots
                if name != "position":
                    there = there[..., :W] if name.startswith("hot_") else there[..., W:]
                assert torch.equal(y[there], x[there]), name
            else:
                assert torch.equal(y, x), name


def run(layout, policy, calls, *, pages=(2, 0), padding=0.0, same=assert_same_pages, **options):
    """Calls of these lengths: after each the output is close, and the pages are the same.

    Pages begin as NaN. Returns the reference's last pages and output.
    """
    layers = [layer_of(name, layout, policy, **options) for name in ("native", "reference")]
    pools = [torch.full((3, layout.nbytes), 0xFF, dtype=torch.uint8) for _ in layers]
    for i, T in enumerate(calls):
        q, k, v, valid = call_of(T, layout.head_dim, i, padding)
        begins = torch.full((B,), i == 0)
        rows = PageRows(torch.tensor(pages, dtype=torch.int32), begins, null_page=NULL)
        got, want = (
            layer.attend(pool, q, k, v, pages=rows, valid=valid)
            for layer, pool in zip(layers, pools, strict=True)
        )
        assert (got - want).abs().max() <= 2e-5 * max(1.0, want.abs().max().item())
        held = [p for p in pages if p != NULL]
        same(layout, *(pool[held] for pool in pools))
        untouched = [p for p in range(3) if p not in held]
        assert bool((pools[0][untouched] == 0xFF).all())
    return pools[1][held], want


# Before the window is full, through it, and past it at once.
CALLS = (5, 1, 40, 1, 5, 5, 1, 40, 1, 1)


@pytest.mark.parametrize("hot_dtype", [torch.int8, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("D", [64, 80, 128])
def test_calls_of_any_length_leave_the_pages_of_the_reference(D, dtype, hot_dtype):
    layout = PageLayout(K, D, 21, dtype, sinks=2, hot=6, hot_dtype=hot_dtype)
    run(layout, Ranked(policy_of(21)), CALLS, space=space_of(D), padding=0.2)


def test_every_level_leaves_the_pages_of_the_reference(simd):
    for dtype in FORMATS:
        for D in (8, 72, 96):
            layout = PageLayout(K, D, 21, dtype, sinks=2, hot=6)
            run(layout, Ranked(policy_of(21)), CALLS, space=space_of(D))


@pytest.mark.parametrize("dtype", ["k8v4", "k4v4", "k3v2"])
@pytest.mark.parametrize("D", [64, 80])
def test_victims_fold_outside_of_their_space_and_queries_find_them_there(simd, D, dtype):
    layout = PageLayout(K, D, 21, dtype, rank=4, sinks=2, hot=6)
    pages, _ = run(layout, Ranked(policy_of(21)), CALLS, space=space_of(D), state=True, padding=0.2)
    (views,) = layout.views(pages)
    assert bool((views.share > 0.05 * sum(CALLS)).all())  # or nothing of it was seen


@pytest.mark.parametrize("state", [False, True])
def test_heads_may_differ_in_slots_and_rows_in_their_lengths(simd, state):
    layout = PageLayout(K, 64, (21, 9), "k4v4", rank=4 * state, sinks=2, hot=6)
    options = {"space": space_of(64), "state": state}
    run(layout, Ranked(policy_of(21)), CALLS, padding=0.7, **options)


def test_a_row_without_a_page_writes_nothing_and_gets_zero(simd):
    layout = PageLayout(K, 64, 21, "k4v4", sinks=2, hot=6)
    for pages in ((NULL, 1), (1, NULL)):
        _, out = run(layout, Ranked(policy_of(21)), CALLS, pages=pages, space=space_of(64))
        assert bool((out[pages.index(NULL)] == 0).all())


def test_a_soft_cap_holds_in_the_space(simd):
    layout = PageLayout(K, 64, 21, "k4v4", rank=4, sinks=2, hot=6)
    options = {"space": space_of(64), "state": True, "softcap": 3.0}
    run(layout, Ranked(policy_of(21)), CALLS, **options)


@pytest.mark.parametrize(
    ("sinks", "hot", "capacity"), [(0, 1, 2), (0, 6, 7), (5, 1, 21), (4, 3, 8)]
)
def test_a_window_may_be_of_one_token_and_one_slot_all_that_is_not_hot(sinks, hot, capacity):
    layout = PageLayout(K, 64, capacity, "k4v4", rank=4, sinks=sinks, hot=hot)
    policy = Ranked(H2O(heavy=capacity, recent=0))
    run(layout, policy, CALLS, space=space_of(64), state=True, padding=0.2)


def test_chunks_by_a_rule_leave_the_pages_of_the_reference(simd):
    layout = PageLayout(K, 64, 21, "k4v4", rank=4, sinks=2, hot=6)
    run(layout, policy_of(21), (5, 40, 2, 5, 40), space=space_of(64), state=True, padding=0.2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8], ids=str)
def test_rows_that_are_not_packed_may_live_in_a_space_too(simd, dtype):
    layout = PageLayout(K, 80, 21, dtype, rank=4)
    run(layout, Ranked(policy_of(21)), CALLS, space=space_of(80), state=True, padding=0.2)


@pytest.mark.parametrize("state", [False, True])
@pytest.mark.parametrize("D", [64, 80])
def test_a_space_changes_float32_rows_by_no_more_than_rounding(D, state):
    layout = PageLayout(K, D, 21, torch.float32, rank=4 * state)
    plain, turned = (
        layer_of("native", layout, Ranked(policy_of(21)), state=state, space=space)
        for space in (None, space_of(D))
    )
    pools = [layer.new_pool(B) for layer in (plain, turned)]
    for i, T in enumerate(CALLS):
        q, k, v, valid = call_of(T, D, i)
        want, got = (
            layer.attend(pool, q, k, v, valid=valid)
            for layer, pool in zip((plain, turned), pools, strict=True)
        )
        assert (got - want).abs().max() <= 2e-5 * want.abs().max()


def test_pages_are_the_same_alone_and_for_any_thread_count(simd, with_threads):
    layout = PageLayout(K, 64, 21, "k3v3", rank=4, sinks=2, hot=6)
    layer = layer_of("native", layout, Ranked(policy_of(21)), state=True, space=space_of(64))
    pools = [layer.new_pool(B) for _ in range(3)]
    for i, T in enumerate(CALLS):
        call = call_of(T, 64, i)
        outs = []
        for threads, pool in zip((1, 3), pools, strict=False):
            with_threads(threads)
            outs.append(layer.attend(pool, *call[:3], valid=call[3]))
        q, k, v, valid = (x[1:] for x in call)
        alone = layer.attend(pools[2][1:], q, k, v, valid=valid)
        assert torch.equal(outs[0], outs[1])
        assert torch.equal(outs[0][1:], alone)
    assert torch.equal(pools[0], pools[1])
    assert torch.equal(pools[0][1], pools[2][1])
