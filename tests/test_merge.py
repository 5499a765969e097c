"""Merging: the definition against float64 arithmetic, and what a cache does with it."""

import math

import pytest
import torch

import less
from less import H2O, LessKVCache, SinkRecent
from less.layer import PageLayout
from less.layer.rows import noted_score
from less.reference.merge import merged, nearest

LEAST = 1e-6


def brute_nearest(k, score, position, i, targets):
    """The target of least cost in plain Python floats."""
    best = None
    for j in targets:
        w_i, w_j = float(score[i]) + LEAST, float(score[j]) + LEAST
        far = sum((float(a) - float(b)) ** 2 for a, b in zip(k[i], k[j], strict=True))
        offer = (w_i * w_j / (w_i + w_j) * far, int(position[j]), j)
        best = offer if best is None or offer < best else best
    return best[2] if best else -1


def tokens(n, D, seed):
    g = torch.Generator().manual_seed(seed)
    k, v = (torch.randn(n, D, generator=g) for _ in "kv")
    score = torch.rand(n, generator=g) * torch.logspace(-4, 1, n)
    position = torch.randperm(3 * n, generator=g)[:n].int()
    return k, v, score, position


def test_each_leaver_goes_to_the_target_of_least_cost():
    k, _, score, position = tokens(40, 16, 0)
    leaves, target = torch.zeros(40, dtype=torch.bool), torch.zeros(40, dtype=torch.bool)
    leaves[:7], target[12:] = True, True
    into = nearest(k, score, position, leaves, target)
    for i in range(7):
        assert into[i] == brute_nearest(k, score, position, i, range(12, 40))
    assert (into[7:] == -1).all()


def test_of_equal_costs_the_older_takes_the_leaver():
    k, _, score, position = tokens(8, 16, 1)
    k[3] = k[5] = k[0]
    leaves = torch.arange(8) == 0
    into = nearest(k, score, position, leaves, ~leaves)
    assert into[0] == (3 if position[3] < position[5] else 5)


def test_a_key_of_nan_is_no_target_and_has_none():
    k, _, score, position = tokens(8, 16, 2)
    leaves = torch.arange(8) < 2
    k[0] = math.nan
    k[4] = math.nan
    into = nearest(k, score, position, leaves, ~leaves)
    assert into[0] == -1
    assert into[1] == brute_nearest(k, score, position, 1, [2, 3, 5, 6, 7])
    assert (nearest(k, score, position, leaves, torch.zeros(8, dtype=torch.bool)) == -1).all()


def test_means_weigh_by_score_in_order_of_position():
    k, v, score, position = tokens(10, 16, 3)
    into = torch.full((10,), -1)
    into[0] = into[1] = into[2] = 6
    into[3] = 7
    weight = torch.rand(10)
    got = merged(k, v, score, weight, position, into)
    w = score.double() + LEAST
    of = [6, 0, 1, 2]
    share = (w[of] / w[of].sum())[:, None]
    torch.testing.assert_close(got[0][6].double(), (share * k[of]).sum(0), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(got[1][6].double(), (share * v[of]).sum(0), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(got[2][6], score[of].sum())
    torch.testing.assert_close(got[3][6], weight[of].logsumexp(0))
    assert got[4][6] == position[of].max()
    for x, y in zip(got, (k, v, score, weight, position), strict=True):
        assert torch.equal(x[[8, 9]], y[[8, 9]])


@pytest.fixture(params=["reference", "native"])
def backend(request):
    if request.param == "native":
        pytest.importorskip("less._C")
    return request.param


def cache(policy=None, backend="reference", **settings):
    shape = {"layers": 1, "q_heads": 4, "kv_heads": 2, "head_dim": 16, "batch": 2}
    shape |= {"victim": "merge"} | settings
    return LessKVCache(
        policy=policy or H2O(heavy=9, recent=3, decay=0.9),
        backend=backend,
        **shape,
    )


def feed(cache, calls, seed=0):
    g = torch.Generator().manual_seed(seed)
    out = []
    for T in calls:
        q = torch.randn(cache.batch, cache.q_heads, T, cache.head_dim, generator=g)
        k, v = (torch.randn(cache.batch, 2, T, cache.head_dim, generator=g) for _ in "kv")
        out.append(cache.attend(0, q, k, v))
    return torch.cat(out, 2)


def test_nothing_leaves_and_merging_changes_nothing(backend):
    mine, other = cache(backend=backend), cache(victim="forget", backend=backend)
    torch.testing.assert_close(feed(mine, [12]), feed(other, [12]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int8, "k4v4", "k3v2"])
def test_every_token_counts_whatever_left(dtype, backend):
    policy = H2O(heavy=30, recent=10, decay=0.9)
    calls = [25] + 60 * [1] + [7, 33]
    mine = cache(policy, dtype=dtype, backend=backend)
    feed(mine, calls)
    counts = torch.where(mine.positions(0) >= 0, mine.weights(0).exp(), 0.0)
    torch.testing.assert_close(counts.sum(2), torch.full((2, 2), float(sum(calls))))
    assert mine.stats()["kept"] == [2 * 40]
    if isinstance(dtype, str):
        assert (mine.weights(0)[..., :20] == 0).all()  # hot slots stand for one token


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8, "k4v4", "k3v2"])
def test_a_merging_cache_is_the_same_on_every_backend(dtype):
    pytest.importorskip("less._C")
    policy = H2O(heavy=30, recent=10, decay=0.9)
    calls = [25, *(30 * [1]), 7, 33, *(10 * [1])]
    mine, other = (cache(policy, name, dtype=dtype) for name in ("native", "reference"))
    torch.testing.assert_close(feed(mine, calls), feed(other, calls), atol=1e-3, rtol=1e-3)
    assert torch.equal(mine.positions(0), other.positions(0))


def test_a_token_of_a_packed_layout_has_a_weight_only_where_it_merges():
    plain = PageLayout(2, 64, 200, "k4v4")
    merging = PageLayout(2, 64, 200, "k4v4", weights=True)
    assert merging.nbytes - plain.nbytes == 2 * 384  # 400 bytes a head, in padding too
    with pytest.raises(ValueError, match="weights must be True or None"):
        PageLayout(2, 64, 200, weights=False)


def test_scores_of_packed_rows_are_noted_as_the_nearest_half():
    score = torch.tensor([1 + 2**-11, 1 + 3 * 2**-11, 3e-8, 1e6, torch.inf, torch.nan])
    noted = noted_score(score, torch.float16)
    assert noted.dtype == torch.float32
    wanted = torch.tensor([1, 1 + 2**-9, 2**-24, 65504, 65504, torch.nan])  # of two the even one
    torch.testing.assert_close(noted, wanted, rtol=0, atol=0, equal_nan=True)
    assert noted_score(score, torch.float32) is score


def test_what_cannot_merge_is_refused_by_name():
    with pytest.raises(ValueError, match="victim 'merge' weighs tokens by their scores"):
        cache(SinkRecent(sinks=2, recent=6))
    with pytest.raises(ValueError, match="victim must be one of forget, fold, merge"):
        LessKVCache(1, 4, 2, 16, 1, H2O(heavy=4, recent=4), victim="blend")


def test_a_cache_with_heads_of_several_capacities_is_one_cache_a_head(backend):
    policy = H2O(heavy=12, recent=4, decay=0.9)
    ragged = cache(policy, backend, capacities=[[8, 24]])
    out = feed(ragged, [30] + 20 * [1] + [5])
    assert ragged.positions(0).shape == (2, 2, 24)
    assert (ragged.positions(0)[:, 0, 8:] == -1).all()
    for h, (S, recent) in enumerate([(8, 2), (24, 6)]):
        policy_of_one = H2O(heavy=S - recent, recent=recent, decay=0.9)
        one = cache(policy_of_one, backend, q_heads=2, kv_heads=1)
        g = torch.Generator().manual_seed(0)
        parts = []
        for T in [30] + 20 * [1] + [5]:
            q = torch.randn(2, 4, T, 16, generator=g)[:, 2 * h : 2 * h + 2]
            k, v = (torch.randn(2, 2, T, 16, generator=g)[:, h : h + 1] for _ in "kv")
            parts.append(one.attend(0, q, k, v))
        torch.testing.assert_close(out[:, 2 * h : 2 * h + 2], torch.cat(parts, 2))
        assert torch.equal(ragged.positions(0)[:, h, :S], one.positions(0)[:, 0])
    again = cache(policy, backend, capacities=[[8, 24]])
    again.load_state_dict(ragged.state_dict())
    with pytest.raises(ValueError, match="capacities"):
        cache(policy, backend).load_state_dict(ragged.state_dict())


def test_wrong_capacities_are_refused_by_name():
    for given, message in (
        ([[8]], "capacities\\[0\\] must list 2 numbers"),
        ([[8, 0]], "capacities\\[0\\]\\[1\\]"),
        ([[8, 8], None], "capacities must list 1 entries"),
        (8, "capacities must list 1 entries"),
    ):
        with pytest.raises(ValueError, match=message):
            cache(capacities=given)
    with pytest.raises(ValueError, match="keeps every token"):
        LessKVCache(1, 4, 2, 16, 1, less.Full(16), capacities=[[8, 8]])


def test_merging_by_scores_that_never_decay_warns():
    with pytest.warns(UserWarning, match="never decay"):
        cache(H2O(heavy=9, recent=3))
