"""A cache whose layers differ: one policy each, and layers that keep everything."""

import copy
import io

import pytest
import torch

from less import H2O, Full, LessKVCache, PagedLayer, PageLayout, Sidekick, SinkRecent
from less.layer import PackedMaps
from tests.helpers import random_maps, random_qkv

MIXED = [Full(40), H2O(3, 5), H2O(9, 2, decay=0.9), SinkRecent(2, 4)]
CALLS = [11, 1, 1, 7, 1, 1, 1]


def sidekick(layers, kind="exp"):
    maps = [random_maps(4, 2, 8, 6, 3, kind, seed=i) for i in range(layers)]
    return Sidekick(layers=maps, kind=kind)


def build(policies=MIXED, batch=2, maps=True, **kw):
    layers = len(policies)
    return LessKVCache(layers, 4, 2, 8, batch, policies, sidekick(layers) if maps else None, **kw)


def feed(cache, calls=CALLS, start=0, valid=None):
    """Feed each layer its own text; returns the outputs, layer by layer."""
    outs = []
    for layer in range(cache.layers):
        q, k, v = random_qkv(cache.batch, 4, 2, 60, 8, seed=layer)
        at = start
        for T in calls:
            part = [x[:, :, at : at + T] for x in (q, k, v)]
            outs.append(cache.attend(layer, *part, valid=valid))
            at += T
    return outs


def held(cache, layer, row):
    return cache.positions(layer)[row].sort(-1).values


@pytest.mark.parametrize("backend", [None, "reference"])
def test_each_layer_is_the_cache_of_its_own_policy(backend):
    mixed = build(backend=backend)
    outs = feed(mixed)
    whole = sidekick(4)
    for layer, policy in enumerate(MIXED):
        maps = None if isinstance(policy, Full) else Sidekick([whole[layer]], kind="exp")
        alone = LessKVCache(1, 4, 2, 8, 2, policy, maps, backend=backend)
        q, k, v = random_qkv(2, 4, 2, 60, 8, seed=layer)
        at = 0
        for i, T in enumerate(CALLS):
            want = alone.attend(0, *[x[:, :, at : at + T] for x in (q, k, v)])
            assert torch.equal(outs[layer * len(CALLS) + i], want)
            at += T
        assert torch.equal(mixed.positions(layer), alone.positions(0))
        assert torch.equal(mixed.scores(layer), alone.scores(0))


def test_a_full_layer_is_plain_causal_attention():
    cache = build([Full(40), H2O(2, 2)])
    out = torch.cat(feed(cache)[: len(CALLS)], 2)
    q, k, v = random_qkv(2, 4, 2, 60, 8, seed=0)
    T = sum(CALLS)
    want = torch.nn.functional.scaled_dot_product_attention(
        q[:, :, :T], k[:, :, :T], v[:, :, :T], is_causal=True, enable_gqa=True
    )
    torch.testing.assert_close(out, want, atol=1e-5, rtol=1e-5)


def test_stats_and_memory_are_those_of_the_layers():
    cache = build()
    feed(cache)
    stats = cache.stats()
    T = sum(CALLS)
    assert stats["seen"] == [2 * T] * 4
    assert stats["kept"] == [2 * min(T, p.capacity) for p in MIXED]
    assert stats["evictions"] == [2 * max(0, T - p.capacity) for p in MIXED]
    assert stats["memory_share"][0] == 0
    assert all(0 < s < 1 for s in stats["memory_share"][1:])
    memory = cache.memory()
    layouts = cache.layouts
    assert [layout.capacity for layout in layouts] == [p.capacity for p in MIXED]
    assert [layout.rank for layout in layouts] == [0, 3, 3, 3]  # three layers evict
    assert memory["state"] == 2 * sum(layout.bytes_of("H", "z") for layout in layouts)
    pages = 2 * sum(layout.nbytes for layout in layouts)
    assert memory["slots"] + memory["state"] + memory["workspace"] == pages
    maps = [PackedMaps.pack(layer, sidekick(4).kind) for layer in list(sidekick(4))[1:]]
    assert memory["maps"] == sum(packed.memory.nbytes for packed in maps)


def test_a_token_too_many_for_a_full_layer_is_refused_and_changes_nothing():
    cache = build([Full(12), H2O(3, 3)])
    feed(cache, [10])
    before = copy.deepcopy(cache.state_dict())
    q, k, v = random_qkv(2, 4, 2, 3, 8)
    with pytest.raises(ValueError, match="layer 0 is full attention with room for 12 tokens"):
        cache.attend(0, q, k, v)
    for name, x in cache.state_dict()["tensors"].items():
        assert torch.equal(x, before["tensors"][name])
    cache.attend(1, q, k, v)  # the other has no end
    assert cache.max_columns == 12
    assert build([H2O(3, 3)] * 2).max_columns is None


def test_padding_enters_no_layer():
    cache, alone = build(batch=2), build(batch=1)
    valid = torch.ones(2, 9, dtype=torch.bool)
    valid[1, :4] = False
    feed(cache, [9], valid=valid)
    for layer in range(4):
        q, k, v = random_qkv(2, 4, 2, 60, 8, seed=layer)
        alone.attend(layer, *[x[1:, :, 4:9] for x in (q, k, v)])
        assert held(cache, layer, 1).equal(held(alone, layer, 0))


def test_a_snapshot_goes_on_bit_for_bit_in_another_cache():
    cache = build()
    feed(cache)
    file = io.BytesIO()
    torch.save(cache.state_dict(), file)
    file.seek(0)
    other = build()
    other.load_state_dict(torch.load(file, weights_only=True))
    start = sum(CALLS)
    for a, b in zip(feed(cache, [1, 4, 1], start), feed(other, [1, 4, 1], start), strict=True):
        assert torch.equal(a, b)


def test_a_snapshot_of_other_layer_budgets_is_refused():
    d = build([H2O(3, 5), H2O(2, 2)]).state_dict()
    with pytest.raises(ValueError, match="policy must be .*0 H2O.*heavy=2.*1 H2O.*heavy=3"):
        build([H2O(2, 2), H2O(3, 5)]).load_state_dict(d)


def test_reorder_and_reset_reach_every_layer():
    cache = build()
    feed(cache)
    before = [cache.positions(i) for i in range(4)]
    scores = [cache.scores(i) for i in range(4)]
    cache.reorder(torch.tensor([1, 0]))
    for i in range(4):
        assert torch.equal(cache.positions(i), before[i].flip(0))
        assert torch.equal(cache.scores(i), scores[i].flip(0))
    cache.reset()
    assert cache.stats()["kept"] == [0] * 4
    outs, fresh = feed(cache), feed(build())
    assert all(torch.equal(a, b) for a, b in zip(outs, fresh, strict=True))


def test_repr_names_runs_of_layers():
    text = repr(build([Full(9), H2O(2, 2), H2O(2, 2), SinkRecent(1, 2)]))
    assert "policy=0 Full(max_tokens=9); 1-2 H2O(" in text
    assert "3 SinkRecent(sinks=1, recent=2)" in text
    assert "policy=H2O(" in repr(build([H2O(2, 2)] * 3))


def test_policy_is_the_one_of_all_layers_or_none():
    assert build([H2O(2, 2)] * 3).policy == H2O(2, 2)
    with pytest.raises(ValueError, match="several; see cache.policies"):
        _ = build().policy
    assert build().policies == tuple(MIXED)


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        ([H2O(1, 1)], "policy must list 2 policies, one per layer, got 1"),
        ([H2O(1, 1), "h2o"], r"policy\[1\] must be a Policy, got str"),
        ([H2O(1, 1), None], r"policy\[1\] must be a Policy, got NoneType"),
        ({0: H2O(1, 1)}, "policy must be a Policy or a list of them, got dict"),
    ],
)
def test_a_wrong_list_is_refused_by_name(policy, message):
    with pytest.raises(ValueError, match=message):
        LessKVCache(2, 4, 2, 8, 1, policy)


def test_a_full_layer_of_nothing_is_refused():
    with pytest.raises(ValueError, match="Full: max_tokens must be 1 or more, got 0"):
        Full(0)


def test_what_full_keeps_has_no_state():
    with pytest.raises(ValueError, match="layer 0 keeps every token"):
        build().state(0)


def test_side_by_side_has_the_room_of_its_members():
    from less.evaluate.side_by_side import SideBySide

    both = SideBySide([build([Full(30), H2O(2, 2)]), build([Full(20), H2O(2, 2)])])
    assert both.max_columns == 20
    assert SideBySide([build([H2O(2, 2)] * 2)]).max_columns is None


def test_side_by_side_counts_the_steps_of_its_members_or_of_none():
    from less.evaluate.side_by_side import SideBySide

    members = [build([Full(20), H2O(2, 2)]), build([Full(30), H2O(2, 2)])]
    both = SideBySide(members)
    both.advance(20)
    assert [cache.columns for cache in (both, *members)] == [20, 20, 20]
    with pytest.raises(ValueError, match="advance: the caches have room for 20 tokens"):
        both.advance(1)
    assert [cache.columns for cache in (both, *members)] == [20, 20, 20]


def test_a_paged_layer_that_keeps_every_token_refuses_one_too_many_and_writes_nothing():
    layer = PagedLayer(Full(12), PageLayout(2, 8, 12, torch.float32), q_heads=4)
    pool = layer.new_pool(3)
    pages = torch.tensor([2, -1], dtype=torch.int32)
    layer.attend(pool, *random_qkv(2, 4, 2, 12, 8), pages=pages)
    before = pool.clone()
    with pytest.raises(ValueError, match="keeps every token and has room for 12, got 13"):
        layer.attend(pool, *random_qkv(2, 4, 2, 1, 8), pages=pages)
    assert torch.equal(pool, before)
    fresh = torch.tensor([True, False])
    out = layer.attend(pool, *random_qkv(2, 4, 2, 12, 8), pages=pages, fresh=fresh)
    assert out[0].isfinite().all()
    assert (out[1] == 0).all()


@pytest.mark.parametrize("pages", [None, torch.tensor([1], dtype=torch.int32)])
def test_a_paged_layer_says_by_name_what_is_no_tensor(pages):
    layer = PagedLayer(H2O(6, 6), PageLayout(2, 8, 12, torch.float32), q_heads=4)
    _, k, v = random_qkv(1, 4, 2, 1, 8)
    with pytest.raises(TypeError, match=r"attend: q must be a torch\.Tensor, got list"):
        layer.attend(layer.new_pool(2), [1.0], k, v, pages=pages)


@pytest.mark.parametrize("heads", [[5, 5], [11, 11]])
@pytest.mark.parametrize("policy", [H2O(4, 4), SinkRecent(2, 6)], ids=repr)
def test_heads_may_all_have_as_many_slots_as_the_policy_does_not_keep(policy, heads):
    """What is recent is in proportion, as where heads differ: here to a head of other slots."""

    def kept(capacities):
        cache = LessKVCache(1, 4, 2, 8, 2, policy, capacities=[capacities])
        for t in range(3):
            cache.attend(0, *random_qkv(2, 4, 2, 9, 8, seed=t))
        return cache.positions(0)[:, 0, : heads[0]].sort(-1).values

    assert torch.equal(kept(heads), kept([heads[0], heads[1] + 1]))


@pytest.mark.parametrize("backend", ["reference", "native"])
@pytest.mark.parametrize("policy", [H2O(13, 2, per_age=True), SinkRecent(13, 2)], ids=repr)
def test_a_head_of_few_slots_keeps_the_newest_token(policy, backend):
    """Two of fifteen are less than one of four."""
    cache = LessKVCache(1, 4, 2, 8, 2, policy, capacities=[[1, 4]], backend=backend)
    for t, T in enumerate([9, 1, 1, 4, 1]):
        cache.attend(0, *random_qkv(2, 4, 2, T, 8, seed=t))
        newest = cache.seen[:, None].expand(-1, 2) - 1
        assert torch.equal(cache.positions(0).amax(-1).long(), newest)
