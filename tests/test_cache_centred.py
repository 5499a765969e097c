"""Caches whose maps take keys without their mean, and layers that have no maps."""

import json

import pytest
import torch

from less import (
    H2O,
    Calibration,
    LessKVCache,
    PagedLayer,
    PageLayout,
    Sidekick,
    SinkRecent,
    reference,
)
from less.calibration import NAMES
from less.layer import Maps, Space
from tests.helpers import assert_close, random_maps, random_qkv

Q, K, D, R = 4, 2, 64, 5
POLICY = H2O(heavy=9, recent=12, decay=0.95)
CALLS = [30, 1, 1, 5, 1, 60, 1, 1, 1]


def means_of(seed=7):
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(K, D, generator=g) * 1.5).half().float()


def sidekick_of(layers=1, means=True, absent=(), kind="centroid"):
    def layer(i):
        maps = random_maps(Q, K, D, 12, R, kind, seed=i)
        return maps | ({"key_mean": means_of(i)} if means else {})

    return Sidekick([{} if i in absent else layer(i) for i in range(layers)], kind=kind)


def build(sidekick, dtype=torch.float32, backend="native", layers=1, policy=POLICY, **settings):
    where = {"backend": backend} | settings
    return LessKVCache(layers, Q, K, D, 2, policy, sidekick, dtype=dtype, **where)


def feed(cache, q, k, v, calls=CALLS, layer=0):
    split = zip(*(x.split(calls, 2) for x in (q, k, v)), strict=True)
    return torch.cat([cache.attend(layer, *part) for part in split], 2)


def text(dtype=torch.float32, seed=1):
    q, k, v = random_qkv(2, Q, K, sum(CALLS), D, seed=seed, dtype=torch.float64)
    return [x.to(dtype) for x in (q / 3, k + means_of(0).double()[:, None], v)]


def in_float64(sidekick, q, k, v):
    """The recurrence on keys without their mean, whose logits lack the same for every key."""
    maps = {n: x.double() for n, x in sidekick[0].items()}
    centred = k.double() - maps.pop("key_mean")[:, None]
    run = Maps("centroid", maps)
    return reference.run(q.double(), centred, v.double(), POLICY, run, prompt=CALLS[0]).out


@pytest.mark.parametrize("backend", ["reference", "native"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_a_centred_cache_is_the_recurrence_on_keys_without_their_mean(backend, dtype):
    sidekick = sidekick_of()
    q, k, v = text(dtype)
    cache = build(sidekick, dtype, backend)
    calls = [CALLS[0], *[1] * (sum(CALLS) - CALLS[0])]
    got = feed(cache, q, k, v, calls)
    want = in_float64(sidekick, q, k, v)
    assert cache.stats()["memory_share"][0] > 0.02
    if dtype == torch.float32:
        assert_close(got, want, dtype, factor=4)
    else:  # rows are rounded in the space, and who stays may differ by it
        error = (got.double() - want).abs().mean() / want.abs().mean()
        assert error < (0.02 if dtype == torch.float16 else 0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int8, "k4v4"], ids=str)
def test_every_backend_makes_the_same_of_centred_maps(simd, dtype):
    q, k, v = text()
    native, plain = (build(sidekick_of(), dtype, b) for b in ("native", "reference"))
    assert_close(feed(native, q, k, v), feed(plain, q, k, v), torch.float32, factor=10)
    assert torch.equal(native.positions(0).sort(-1).values, plain.positions(0).sort(-1).values)
    for x, y in zip(native.state(0), plain.state(0), strict=True):
        assert_close(x, y, torch.float32, factor=10)


def test_a_gpu_refuses_centred_maps_by_name(launched):
    q, k, v = (x.to(launched) for x in text())
    cache = build(sidekick_of(), device=launched)
    before = cache.pools[0].clone()
    with pytest.raises(RuntimeError, match=r"kind 2 \(centroid\) has no CUDA kernel yet"):
        cache.attend(0, q[:, :, :1], k[:, :, :1], v[:, :, :1])
    assert torch.equal(cache.pools[0], before)


def test_a_row_of_centred_maps_has_its_bits_in_any_batch_and_page():
    device = "cpu"
    sidekick = sidekick_of()
    layout = PageLayout(K, D, POLICY.capacity, torch.float16, R)
    layer = PagedLayer(POLICY, layout, Q, maps=sidekick[0], kind="centroid", device=device)
    q, k, v = (x.to(device) for x in text(torch.float16))

    def run(rows, pages):
        pool = layer.new_pool(5)
        index = torch.tensor(pages, dtype=torch.int32, device=device)
        split = zip(*(x[rows].split(CALLS, 2) for x in (q, k, v)), strict=True)
        outs = [layer.attend(pool, *part, pages=index) for part in split]
        return torch.cat(outs, 2), pool[index.long()]

    out, pool = run([0, 1], [3, 1])
    for b in range(2):
        alone, own = run([b], [4])
        assert torch.equal(alone[0], out[b])
        assert torch.equal(own[0], pool[b])


def calibration_of(mean, scale=1.3):
    layer = {n: torch.ones(K, D) * scale for n in NAMES} | {"value_mean": torch.zeros(K, D)}
    return Calibration([layer | {"key_mean": mean}])


def test_a_calibration_of_the_same_key_mean_is_another_scale_of_the_same_cache():
    q, k, v = text()
    plain = feed(build(sidekick_of()), q, k, v)
    scaled = feed(build(sidekick_of(), calibration=calibration_of(means_of(0))), q, k, v)
    assert_close(scaled, plain, torch.float32, factor=10)


REFUSED = {
    "another key mean": (
        lambda: build(sidekick_of(), calibration=calibration_of(means_of(8))),
        "calibration must have the key_mean that the sidekick 'unnamed' was trained with, and has "
        "another in layer 0",
    ),
    "a key mean that maps were trained without": (
        lambda: build(sidekick_of(means=False), calibration=calibration_of(means_of(0))),
        "calibration must have the key_mean",
    ),
    "a layer's space of another key mean": (
        lambda: PagedLayer(
            POLICY, PageLayout(K, D, 21, torch.float16, R), Q, maps=sidekick_of()[0],
            kind="centroid", space=Space.of(K, D, key_mean=means_of(8)),
        ),
        "space must have the key_mean that the maps were trained with",
    ),
    "a soft-cap": (
        lambda: build(sidekick_of(), softcap=2.0),
        "maps must have no key_mean under a soft-cap",
    ),
    "a key mean of another kind": (
        lambda: sidekick_of(kind="exp"),
        "unknown: key_mean",
    ),
    "a key mean of another shape": (
        lambda: Sidekick([sidekick_of()[0] | {"key_mean": torch.ones(K, D + 1)}], kind="centroid"),
        r"key_mean'\] must have shape \[K, D\] with D = 64",
    ),
    "no layer with maps": (
        lambda: Sidekick([{}, {}], kind="centroid"),
        "at least one layer with maps",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_belong_together_is_refused_by_name(case):
    call, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        call()


def test_maps_without_a_key_mean_take_keys_as_they_come():
    q, k, v = text()
    sidekick = sidekick_of(means=False)
    calls = [CALLS[0], *[1] * (sum(CALLS) - CALLS[0])]
    got = feed(build(sidekick), q, k, v, calls)
    maps = Maps("centroid", {n: x.double() for n, x in sidekick[0].items()})
    want = reference.run(q.double(), k.double(), v.double(), POLICY, maps, prompt=CALLS[0])
    assert_close(got, want.out, torch.float32, factor=4)


@pytest.mark.parametrize("kind", ["exp", "centroid"])
def test_a_layer_without_maps_evicts_alone_and_has_no_state(kind):
    sidekick = sidekick_of(layers=3, means=False, absent=(1,), kind=kind)
    assert sidekick.absent == (1,)
    cache, alone = build(sidekick, layers=3), build(None, layers=3)
    assert [x.rank for x in cache.layouts] == [R, 0, R]
    q, k, v = text()
    outs = {i: (feed(cache, q, k, v, layer=i), feed(alone, q, k, v, layer=i)) for i in range(3)}
    assert torch.equal(*outs[1])
    assert not torch.equal(*outs[0])
    assert cache.stats()["memory_share"][1] == 0.0
    with pytest.raises(ValueError, match="layer 1 has no maps in the sidekick"):
        cache.state(1)


def test_a_sidekick_with_layers_without_maps_comes_back(tmp_path):
    sidekick = sidekick_of(layers=4, absent=(0, 3)).to(torch.int8)
    folder = sidekick.save_pretrained(tmp_path)
    assert json.loads((folder / "config.json").read_text())["layers_without_maps"] == [0, 3]
    loaded = Sidekick.from_pretrained(folder)
    assert loaded.absent == (0, 3)
    assert loaded.key_mean(0) is None
    for mine, theirs in zip(loaded, sidekick, strict=True):
        assert list(mine) == list(theirs)
        assert all(torch.equal(mine[n], theirs[n]) for n in mine)
    part = Sidekick.from_pretrained(folder, shard=(1, 2))
    assert part.absent == (0, 3)
    assert torch.equal(part[1]["centroids"], sidekick[1]["centroids"][1:])
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"layers_without_maps": [1]}))
    with pytest.raises(ValueError, match="layer 1 must have no tensors"):
        Sidekick.from_pretrained(folder)


def test_a_snapshot_knows_the_means_and_the_layers_without_maps():
    snapshot = build(sidekick_of(2), layers=2).state_dict()
    build(sidekick_of(2), layers=2).load_state_dict(snapshot)
    others = [sidekick_of(2)[0], sidekick_of(2)[1] | {"key_mean": means_of(9)}]
    with pytest.raises(ValueError, match="key_mean must be"):
        build(Sidekick(others, kind="centroid"), layers=2).load_state_dict(snapshot)
    with pytest.raises(ValueError, match="layers_without_maps must be"):
        build(sidekick_of(2, absent=(1,)), layers=2).load_state_dict(snapshot)


@pytest.mark.parametrize("backend", ["reference", "native"])
def test_a_policy_without_scores_folds_into_centred_maps(backend):
    q, k, v = text()
    policy = SinkRecent(sinks=4, recent=17)
    cache = build(sidekick_of(), backend=backend, policy=policy)
    plain = build(sidekick_of(), backend="reference", policy=policy)
    got = feed(cache, q, k, v)
    assert_close(got, feed(plain, q, k, v), torch.float32, factor=10)
