"""Maps trained for a cache as it is served: packed rows, a calibration, slots per head."""

from dataclasses import replace

import pytest
import torch

from less import H2O, Calibration, LessConfig, LessKVCache, Sidekick, reference
from less.cli import main
from less.fit import Eviction, Recipe, Tuning, fit_layer, objective, schedule, train, tune
from less.fit.capture import LayerWalk
from less.fit.eviction import all_served
from less.fit.tune import bounded
from less.hf.models import describe
from less.layer import PageLayout, Space
from tests.helpers import random_maps, random_qkv
from tests.tiny_model import TEXT, save_tiny, tiny_calibration, tiny_model

POLICY = H2O(heavy=9, recent=3, decay=0.9)
CAPACITIES = (14, 22)
HOT = {"sinks": 2, "hot": 4}
CONFIG = LessConfig(bytes=7500, rows="k4v4", shape="calibrated", policy=POLICY, sinks=1, hot=3)
RECIPE = Recipe(kind="centroid", rank=4, steps=20, rows=8, held_rows=32)


def token_ids(chunks=6, tokens=64):
    return torch.randint(256, (chunks, tokens), generator=torch.Generator().manual_seed(3))


def calibration_with_curves():
    """Of the tiny model; the second head of a layer gains more from slots than the first."""
    plain = tiny_calibration()
    curve = torch.tensor([[1.0, 0.9, 0.8], [4.0, 2.0, 0.5]])
    layers = [{**plain[i], "curve": curve} for i in range(2)]
    return Calibration(layers, plain.config, (8, 16, 32), 64)


def space_of(D, seed=1):
    g = torch.Generator().manual_seed(seed)
    numbers = [torch.randn(2, D, generator=g) for _ in range(4)]
    return Space.of(
        2, D, key_mean=numbers[0], key_scale=numbers[1].exp(),
        value_mean=numbers[2], value_scale=numbers[3].exp(),
    )  # fmt: skip


def packed(D=16):
    return Eviction(POLICY, PageLayout(2, D, CAPACITIES, "k4v4", 0, **HOT), space_of(D))


def cache_of(eviction, D=16, rows=2, sidekick=None):
    """The cache that evicts so, of one layer."""
    space = eviction.space
    names = ("key_mean", "key_scale", "value_mean", "value_scale")
    layer = {n: getattr(space, n).float().abs() if n[-1] == "e" else getattr(space, n)
             for n in names}  # fmt: skip
    calibration = Calibration([layer], {})
    return LessKVCache(
        1, 4, 2, D, rows, POLICY, sidekick, "k4v4", calibration=calibration,
        capacities=[CAPACITIES], **HOT,
    )  # fmt: skip


def test_the_schedule_of_packed_rows_and_heads_of_their_own_slots_is_the_cache_s():
    q, k, v = random_qkv(2, 4, 2, 60, 16)
    eviction = packed()
    left = schedule(q, k, v, eviction)
    cache = cache_of(eviction)
    for t in range(60):
        cache.attend(0, *(x[:, :, t : t + 1] for x in (q, k, v)))
        positions = cache.positions(0)
        for b in range(2):
            for head in range(2):
                held = sorted(p for p in positions[b, head].tolist() if p >= 0)
                assert held == (left[b, head, : t + 1] > t + 1).nonzero()[:, 0].tolist()
    counts = (left == 61).sum(2)
    assert counts.tolist() == [list(CAPACITIES)] * 2
    assert not torch.equal(left, schedule(q, k, v, H2O(heavy=10, recent=4, decay=0.9)))


def test_the_state_takes_the_rows_that_training_takes_for_it():
    q, k, v = random_qkv(2, 4, 2, 60, 16)
    eviction = packed()
    mean = eviction.space.key_mean.float()
    maps = random_maps(4, 2, 16, 0, 5, "centroid")
    sidekick = Sidekick([{**maps, "key_mean": mean}], "centroid")
    cache = cache_of(eviction, sidekick=sidekick)
    for t in range(60):
        cache.attend(0, *(x[:, :, t : t + 1] for x in (q, k, v)))
    cold_k, cold_v = eviction.cold(k, v)
    left = schedule(q, k, v, eviction)
    last = torch.tensor([[60], [60]])  # a query after all of them
    rows = objective.prepare(
        torch.ones(2, 4, 61, 16), cold_k, cold_v, torch.ones(2, 4, 61, 16), left, last, 0.25,
        taken=(cold_k - mean[:, None], cold_v),
    )  # fmt: skip
    ones = {**maps, "q_factor": torch.zeros(4), "q_bias": torch.zeros(4, 5)}  # phi is 1
    mass, sums = objective.low_rank(rows, ones, "centroid")
    H, z = cache.state(0)
    total = z.sum(2)[..., None, None]
    torch.testing.assert_close(mass[:, :, :1], total, rtol=1e-3, atol=1e-5)
    mean_value = reference.values_out_of_space(H.sum(2, keepdim=True) / total, eviction.space)
    torch.testing.assert_close(sums[:, :, :1] / total, mean_value, rtol=1e-3, atol=1e-3)
    assert 0.05 < (k - cold_k).abs().median() < 0.5  # four bits round, and no more


def test_float_rows_leave_as_they_came():
    _, k, v = random_qkv(1, 4, 2, 9, 16)
    for mine, given in zip(Eviction(POLICY).cold(k, v), (k, v), strict=True):
        assert torch.equal(mine, given)


def test_the_state_of_bounded_attention_takes_what_rounding_left():
    q, k, v = random_qkv(2, 4, 2, 40, 8, seed=5)
    maps = random_maps(4, 2, 8, 0, 3, "centroid")
    left = schedule(q, k, v, H2O(4, 4))
    kept = bounded(q, k, v, left, {}, None, 0.3, 0.0)
    off = (torch.full_like(k, 0.2), torch.full_like(v, 0.5))
    rounded = bounded(q, k, v, left, maps, None, 0.3, 0.0, off)
    exact = bounded(q, k, v, left, maps, None, 0.3, 0.0)
    # Of values alone: what the state weighs of 1, times the error.
    moved = bounded(q, k, v, left, maps, None, 0.3, 0.0, (torch.zeros_like(k), off[1])) - exact
    assert float(moved.min()) >= -1e-6
    assert 0.01 < float(moved.max()) < 0.5 + 1e-6
    assert torch.equal(bounded(q, k, v, left, {}, None, 0.3, 0.0, off), kept)
    assert not torch.allclose(rounded - moved, exact, atol=1e-4)


def test_a_config_s_evictions_are_those_of_its_cache():
    model, calibration = tiny_model(), calibration_with_curves()
    (found,) = all_served(model, describe(model, "t"), [CONFIG], calibration, "centroid", 4)
    drawn = Sidekick.random(2, 4, 2, 16, 4, 1, "centroid", 0)
    means = [{**maps, "key_mean": calibration.space(i).key_mean} for i, maps in enumerate(drawn)]
    cache = CONFIG.cache(model, sidekick=Sidekick(means, "centroid"), calibration=calibration)
    for eviction, layout, policy in zip(found.layers, cache.layouts, cache.policies, strict=True):
        assert eviction.layout == replace(layout, rank=0)
        assert layout.rank == 4
        assert eviction.policy == policy
    first, second = found.layers[0].capacities
    assert second > first
    assert found.budgets == (first, second)
    assert found.policy.recent * 3 == pytest.approx(found.policy.heavy, abs=3)


def test_maps_are_trained_for_a_config_and_serve_beside_its_calibration():
    model, calibration = tiny_model(), calibration_with_curves()
    sidekick = train(
        model, token_ids(), CONFIG, calibration=calibration, recipe=RECIPE, held=2,
        tuning=Tuning(steps=2, window=60, rows=8, held=1),
    )  # fmt: skip
    layers = [i for i in range(2) if i not in sidekick.absent]
    assert layers
    for i in layers:
        assert torch.equal(sidekick.key_mean(i).half(), calibration.space(i).key_mean)
    slots = sidekick.config["budgets"]
    assert slots[0] < slots[1]
    cache = CONFIG.cache(model, sidekick=sidekick, calibration=calibration)  # of the same means
    assert cache.victim == "fold"
    assert {n for x in cache.layouts for n in x.capacities} <= set(range(slots[0], slots[1] + 1))
    tuned = tune(
        model, token_ids(), sidekick, [CONFIG], Tuning(steps=1, window=60, rows=8, held=1),
        held=2, calibration=calibration,
    )  # fmt: skip
    assert tuned.config["training"]["tuning"]["divergence_before"][0] > 0


def test_a_layer_that_nothing_leaves_has_no_maps(tmp_path):
    model = tiny_model()
    walk = LayerWalk(model, token_ids(tokens=32), tmp_path)
    walk.start()
    captured = walk.capture(0)
    maps, record = fit_layer(captured, [Eviction(H2O(20, 20))], RECIPE, 0, 2)
    assert maps == {}
    assert not record.helps
    both = [Eviction(H2O(20, 20)), Eviction(H2O(4, 4))]
    maps, record = fit_layer(captured, both, RECIPE, 0, 2)
    assert maps.keys() >= {"centroids"}
    assert len(record.eviction) == 1


def test_what_does_not_go_together_is_refused_by_name():
    model, calibration = tiny_model(), calibration_with_curves()
    rest = {"recipe": RECIPE, "held": 2}
    with pytest.raises(ValueError, match="calibration belongs to budgets of a LessConfig"):
        train(model, token_ids(), H2O(4, 4), calibration=calibration, **rest)
    with pytest.raises(ValueError, match="all caches must have the same rows"):
        train(model, token_ids(), [CONFIG, H2O(4, 4)], calibration=calibration, **rest)
    merging = replace(CONFIG, victim="merge")
    with pytest.raises(ValueError, match="victim 'fold' and a sidekick belong together"):
        train(model, token_ids(), merging, calibration=calibration, **rest)
    with pytest.raises(ValueError, match="needs a calibration with curves"):
        train(model, token_ids(), CONFIG, **rest)
    with pytest.raises(ValueError, match="longer than the largest budget"):
        train(model, token_ids(tokens=8), CONFIG, calibration=calibration, **rest)
    start = train(model, token_ids(), H2O(4, 4), **rest)
    with pytest.raises(ValueError, match="start must have the calibration's key_mean"):
        train(model, token_ids(), CONFIG, calibration=calibration, start=start, **rest)


def test_the_command_trains_for_caches_of_so_many_bytes(tmp_path, capsys):
    save_tiny(tmp_path / "model")
    (tmp_path / "text.txt").write_text(TEXT * 20)
    calibration_with_curves().save_pretrained(tmp_path / "calibration")
    words = [
        "train", "--model", str(tmp_path / "model"), "--text", str(tmp_path / "text.txt"),
        "--out", str(tmp_path / "out"), "--bytes-of", "45", "--length", "96", "--chunks", "6",
        "--steps", "2", "--rank", "4", "--kind", "centroid", "--tune", "0",
        "--calibration", str(tmp_path / "calibration"),
    ]  # fmt: skip
    assert main(words) == 0
    sidekick = Sidekick.from_pretrained(tmp_path / "out")
    assert sidekick.config["policies"][0]["decay"] == 0.98
    assert sidekick.config["budgets"][0] >= 21  # four sinks, sixteen recent rows, and a slot
    capsys.readouterr()
    for more, message in (
        (["--budget", "32"], "--bytes-of is in place of --budget"),
        (["--kind", "exp", "--tune", "1"], "maps must be of kind 'centroid', got 'exp'"),
    ):
        assert main([*words, *more]) == 2
        assert message in capsys.readouterr().err.replace("\n", " ")
    without = [w for w in words if w not in ("--bytes-of", "45")]
    assert main(without) == 2
    assert "--calibration goes with --bytes-of" in capsys.readouterr().err
