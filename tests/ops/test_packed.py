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


def both(layout, policy, *, state=False, space=None, softcap=None):
    """The same layer, computed by the kernels and by the reference."""
    maps = random_maps(Q, K, layout.head_dim, 16, layout.rank, "exp", seed=1) if state else None
    return [
        PagedLayer(
            policy, layout, Q, maps=maps, space=space, softcap=softcap, null_page=NULL, backend=name
        )
        for name in ("native", "reference")
    ]


def call_of(T, D, seed, padded=True):
    g = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(B, heads, T, D, generator=g) for heads in (Q, K, K))
    valid = torch.ones(B, T, dtype=torch.bool)
    if padded and T > 1:
        valid[1, : T // 3] = False
    return 1.5 * q, 1.5 * k, v, valid


def assert_same_pages(layout, got, want):
    for mine, its in zip(layout.views(got), layout.views(want), strict=True):
        for name, x in its.tensors().items():
            y = mine.tensors()[name]
            if name in ("score", "share", "H", "z"):
                bound = 2e-5 * max(1.0, x.abs().max().item())
                assert (y - x).abs().max() <= bound, name
            elif name == "position" or name.startswith(("hot_", "k", "v")):
                there = its.slots.position >= 0
                assert torch.equal(mine.slots.position, its.slots.position)
                W = its.slots.hot_slots
                if name != "position":
                    there = there[..., :W] if name.startswith("hot_") else there[..., W:]
                assert torch.equal(y[there], x[there]), name
            else:
                assert torch.equal(y, x), name


def run(layout, policy, calls, **options):
    """Calls of these lengths: after each the output is close and the pages are the same."""
    native, reference = both(layout, policy, **options)
    pools = [layer.new_pool(3) for layer in (native, reference)]
    pages = PageRows(torch.tensor([2, 0], dtype=torch.int32), null_page=NULL)
    for i, T in enumerate(calls):
        q, k, v, valid = call_of(T, layout.head_dim, seed=i)
        outs = [
            layer.attend(pool, q, k, v, pages=pages, valid=valid)
            for layer, pool in zip((native, reference), pools, strict=True)
        ]
        bound = 2e-5 * max(1.0, outs[1].abs().max().item())
        assert (outs[0] - outs[1]).abs().max() <= bound
        assert_same_pages(layout, *pools)


CALLS = (5, 1, 40, 1, 5, 5, 1, 40)


@pytest.mark.parametrize("hot_dtype", [torch.int8, torch.float16, torch.float32])
@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("D", [64, 80, 128])
def test_calls_of_any_length_leave_the_pages_of_the_reference(D, dtype, hot_dtype):
    layout = PageLayout(K, D, 21, dtype, sinks=2, hot=6, hot_dtype=hot_dtype)
    run(layout, Ranked(policy_of(21)), CALLS, space=space_of(D))


def test_every_level_leaves_the_pages_of_the_reference(simd):
    for dtype in FORMATS:
        for D in (8, 72, 96):
            layout = PageLayout(K, D, 21, dtype, rank=4, sinks=2, hot=6)
            run(layout, Ranked(policy_of(21)), CALLS, space=space_of(D), state=True)
