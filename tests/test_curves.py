"""What heads' slots are worth: measured, dealt out, and kept in a cache."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("transformers")

from less import H2O, LessConfig, reference
from less.budget import deal_curves, page_bytes
from less.calibration import CURVE, NAMES, Calibration
from less.evaluate import heat_map
from less.fit import calibrate
from less.fit import curves as fit_curves
from less.fit.capture import Captured, LayerWalk
from less.fit.curves import first_counted, grid, measure_curves
from less.fit.text import repeat_passage
from less.hf import attach
from less.sidekick.identity import model_identity
from tests.tiny_model import tiny_model, tiny_sidekick

GRID = (8, 16, 32, 64, 128)


# -- measured -----------------------------------------------------------------------------------


def captured(N=2, Q=4, K=2, T=72, D=16, dtype=torch.float32, softcap=0.0):
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(N, h, T, D, generator=g).to(dtype) for h in (Q, K, K))
    weight = torch.randn(40, Q * D, generator=g).to(dtype)
    return Captured(q, k, v, torch.full_like(q, torch.nan), weight, 0.4, softcap)


@pytest.mark.parametrize("softcap", [0.0, 3.0])
def test_a_curve_is_the_error_of_the_reference_after_the_output_projection(softcap):
    c = captured(softcap=softcap)
    (N, K, T, D), capacities = c.k.shape, (8, 12, 32)
    got = measure_curves(c, capacities)
    assert got.shape == (N, K, 3)
    double = [x.double() for x in (c.q, c.k, c.v)]
    never = torch.full((N, K, T), T + 1)
    full = reference.parallel(*double, never, scale=c.scale, softcap=c.softcap)
    for i, capacity in enumerate(capacities):
        policy = H2O(heavy=capacity - capacity // 4, recent=capacity // 4, decay=0.98)
        out = reference.run(*double, policy, scale=c.scale, softcap=c.softcap, victim="merge").out
        for head in range(K):
            off = (out - full)[:, head * 2 : head * 2 + 2, first_counted(T) :]
            rows = off.permute(0, 2, 1, 3).flatten(2)
            weight = c.o_weight.double()[:, head * 2 * D : (head + 1) * 2 * D]
            error = (rows @ weight.T).square().sum(-1).mean(1)
            torch.testing.assert_close(got[:, head, i].double(), error, rtol=2e-4, atol=0)


def test_a_capacity_that_holds_the_whole_text_causes_no_error():
    got = measure_curves(captured(), (8, 72, 92))
    assert float(got[..., 0].min()) > 1
    assert float(got[..., 1:].max()) < 1e-9


def test_rows_of_16_bits_are_measured_as_they_are_stored():
    """The model's own output is rounded to its dtype: that is no error of a head."""
    got = measure_curves(captured(dtype=torch.bfloat16), (8, 72))
    assert float(got[..., 0].min()) > 1
    assert float(got[..., 1].max()) < 1e-9


def test_capacities_that_exceed_one_layout_are_measured_in_turns(monkeypatch):
    capacities, ticks = (8, 12, 32), []
    wanted = measure_curves(captured(), capacities)
    monkeypatch.setattr(fit_curves, "MAX_KV_HEADS", 2)
    got = measure_curves(captured(), capacities, ticks.append)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=0)
    assert ticks == sorted(ticks)
    assert ticks[-1] == 1


@pytest.mark.parametrize("length", [32, 100, 1024, 5000])
def test_a_grid_ascends_in_half_octaves_to_three_quarters_of_a_chunk_at_most(length):
    capacities = grid(length)
    assert capacities[0] == 8
    assert capacities[-1] <= min(724, length * 3 // 4)
    assert capacities[-1] * 1.5 > min(724, length * 3 // 4)
    assert all(1.3 < b / a <= 1.5 for a, b in itertools.pairwise(capacities))
    assert first_counted(length) <= 256


def test_curves_are_divided_by_the_residual_stream_that_enters_their_layer(tmp_path):
    model = tiny_model()
    ids = torch.randint(0, 256, (2, 160), generator=torch.Generator().manual_seed(1))
    steps = []
    calibration = calibrate(model, ids, show=lambda *at: steps.append(at))
    assert calibration.capacities == grid(160)
    assert calibration.length == 160
    assert steps == sorted(steps)
    assert any(done % 1 for done, _ in steps)
    with torch.no_grad():
        states = model(ids, output_hidden_states=True).hidden_states
    walk = LayerWalk(model, ids, tmp_path)
    walk.start()
    for layer in range(2):
        curves = measure_curves(walk.capture(layer), calibration.capacities)
        norm = states[layer][:, first_counted(160) :].square().sum(-1).mean()
        torch.testing.assert_close(calibration.curve(layer), curves.mean(0) / norm)


def test_chunks_that_repeat_have_a_quarter_of_a_curve_and_no_part_in_means(tmp_path):
    model = tiny_model()
    ids = torch.randint(0, 256, (2, 160), generator=torch.Generator().manual_seed(1))
    repeats = repeat_passage(ids)[:1]
    calibration = calibrate(model, ids, repeats=repeats)
    assert calibration.config["chunks"] == 2
    assert calibration.config["repeats"] == 1
    plain = calibrate(model, ids)
    for name in NAMES:
        assert torch.equal(calibration[1][name], plain[1][name])
    walk = LayerWalk(model, torch.cat([ids, repeats]), tmp_path)
    walk.start()
    curves = measure_curves(walk.capture(0), calibration.capacities)
    wanted = 0.75 * curves[:2].mean(0) + 0.25 * curves[2]
    power = walk.mean_square(0, first_counted(160))
    torch.testing.assert_close(calibration.curve(0), wanted / power)


def test_repeats_that_no_curve_can_use_are_refused():
    ids = torch.randint(0, 256, (2, 160))
    with pytest.raises(ValueError, match="repeats must be chunks of 160 tokens like ids"):
        calibrate(tiny_model(), ids, repeats=ids[:, :80])
    with pytest.raises(ValueError, match="budgets=False"):
        calibrate(tiny_model(), ids, repeats=ids, budgets=False)


def test_budgets_may_be_left_out():
    ids = torch.randint(0, 256, (2, 160))
    calibration = calibrate(tiny_model(), ids, budgets=False)
    assert calibration.capacities == ()
    assert set(calibration[0]) == set(NAMES)


def test_chunks_too_short_for_curves_are_refused():
    ids = torch.randint(0, 256, (20, 24))
    with pytest.raises(ValueError, match="chunks of 32 tokens or more for budgets, got 24"):
        calibrate(tiny_model(), ids)
    calibrate(tiny_model(), ids, budgets=False)


# -- dealt out ----------------------------------------------------------------------------------


def falling(heads, seed):
    """Curves that fall, by very different factors."""
    g = torch.Generator().manual_seed(seed)
    falls = torch.rand(heads, len(GRID), generator=g).square().cumsum(1)
    return (torch.randn(heads, 1, generator=g) * 3 - falls).exp()


def float16_bytes(slots):
    return page_bytes(1, 64, torch.float16, slots)


def packed_bytes(slots):
    return page_bytes(1, 64, "k4v4", slots)


COSTS = pytest.mark.parametrize("cost", [float16_bytes, packed_bytes, lambda slots: slots])


@COSTS
@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.integers(1, 4), min_size=1, max_size=6),
    st.integers(0, 10**6),
    st.integers(34, 3000),
)
def test_a_budget_is_kept_and_used_up(cost, heads, seed, mean):
    budget = sum(heads) * cost(mean)
    curves = [falling(K, seed + i) for i, K in enumerate(heads)]
    dealt = deal_curves(curves, GRID, budget, cost, 33)
    assert [len(layer) for layer in dealt] == heads
    slots = [n for layer in dealt for n in layer]
    assert min(slots) >= 33
    spent = sum(map(cost, slots))
    # No head could have one slot more.
    assert spent <= budget < spent + max(cost(n + 1) - cost(n) for n in slots)


@COSTS
@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.lists(st.integers(33, 3000), min_size=2, max_size=6))
def test_a_larger_budget_gives_no_head_fewer_slots(cost, seed, means):
    curves = [falling(3, seed), falling(2, seed + 1)]
    dealt = [
        [n for layer in deal_curves(curves, GRID, 5 * cost(mean) + 77, cost, 33) for n in layer]
        for mean in sorted(means)
    ]
    for smaller, larger in itertools.pairwise(dealt):
        assert all(a <= b for a, b in zip(smaller, larger, strict=True))


@given(st.integers(0, 10**6), st.integers(20, 2000))
@settings(max_examples=25, deadline=None)
def test_equal_curves_get_equal_slots_but_for_the_last_step(seed, mean):
    one = falling(1, seed)
    dealt = deal_curves([one.repeat(3, 1)] * 2, GRID, 6 * mean, lambda slots: slots, 13)
    slots = [n for layer in dealt for n in layer]
    assert max(slots) - min(slots) <= max(min(slots) // 8, 4)


def test_a_flat_curve_gets_the_least():
    flat = torch.full((1, len(GRID)), 1e3)
    none = torch.zeros(1, len(GRID))
    dealt = deal_curves([flat, falling(2, 1), none], GRID, 400, lambda slots: slots, 16)
    assert dealt[0] == dealt[2] == (16,)
    assert sum(dealt[1]) == 400 - 32


def test_heads_without_a_gain_share_alike():
    dealt = deal_curves([torch.zeros(4, len(GRID))], GRID, 400, lambda slots: slots, 16)
    assert max(dealt[0]) - min(dealt[0]) <= 12
    assert sum(dealt[0]) == 400


def test_slots_go_where_the_error_falls_most():
    steep = torch.tensor([[1.0, 0.5, 0.25, 0.12, 0.06]])
    dealt = deal_curves([steep, steep / 100], GRID, 200, lambda slots: slots, 8)
    assert dealt[0][0] > 3 * dealt[1][0]
    assert dealt[1][0] >= 8


def test_a_gain_that_comes_late_is_seen_from_afar():
    """A head that needs 64 slots to work at all, beside one that always gains a little."""
    late = torch.tensor([[1.0, 1.0, 1.0, 0.0, 0.0]])
    early = torch.tensor([[0.02, 0.01, 0.005, 0.0025, 0.00125]])
    dealt = deal_curves([late, early], GRID, 96, lambda slots: slots, 8)
    assert dealt[0][0] >= 64


def test_an_error_that_grows_with_the_slots_is_noise():
    noisy = torch.tensor([[1.0, 0.2, 0.4, 0.2, 0.2]])
    same = torch.tensor([[1.0, 0.2, 0.2, 0.2, 0.2]])
    other = falling(1, 3)
    noisy, same = (
        deal_curves([x, other], GRID, 150, lambda slots: slots, 8) for x in (noisy, same)
    )
    assert noisy == same


def test_beyond_the_last_capacity_no_head_starves_the_others():
    """A text may be longer than what curves were measured on, and there all heads need more."""
    local = torch.tensor([[1e-2, 1e-3, 1e-4, 1e-5, 1e-6]])
    retrieval = torch.tensor([[1.0, 0.9, 0.8, 0.7, 0.1]])
    dealt = deal_curves([local, retrieval], GRID, 2 * 4096, lambda slots: slots, 16)
    assert dealt[0][0] > 128


def test_a_budget_below_the_least_is_refused():
    with pytest.raises(ValueError, match="budget must be 99 or more, for 33 slots of each of 3"):
        deal_curves([falling(3, 0)], GRID, 98, lambda slots: slots, 33)
    assert deal_curves([falling(3, 0)], GRID, 99, lambda slots: slots, 33) == [(33, 33, 33)]


# -- kept ---------------------------------------------------------------------------------------


def with_curves(config, layers=2, K=2, D=16, slides=(), seed=0):
    """A calibration of means 0 and scales 1, with curves."""
    plain = {n: torch.full((K, D), float(n.endswith("scale"))) for n in NAMES}
    return Calibration(
        [None if i in slides else {**plain, CURVE: falling(K, seed + i)} for i in range(layers)],
        {"model": model_identity(config)},
        GRID,
        256,
    )


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.mark.parametrize(
    "rows", [{"rows": "k4v4", "sinks": 2, "hot": 6}, {"dtype": "float16"}, {"dtype": "int8"}]
)
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("maps", [True, False])
def test_a_budget_in_bytes_is_dealt_to_heads_kept_and_used_up(model, rows, batch, maps):
    config = LessConfig(bytes=60_000 * batch, shape="calibrated", **rows)
    calibration = with_curves(model)
    sidekick = tiny_sidekick() if maps else None
    cache = config.cache(model, batch=batch, sidekick=sidekick, calibration=calibration)
    memory = cache.memory()
    held = memory["slots"] + memory["state"] + memory["workspace"]
    assert held <= 60_000 * batch < held + batch * 128 * 5  # fields of one head that grow
    capacities = [n for layout in cache.layouts for n in layout.capacities]
    assert len(set(capacities)) > 1
    assert cache.policies == tuple(config.policies(model, batch, None, sidekick, None, calibration))


def test_a_budget_in_tokens_or_a_share_is_the_mean_over_heads(model, tmp_path):
    with_curves(model).save_pretrained(tmp_path)
    config = LessConfig(tokens=40, shape="calibrated", calibration=tmp_path)
    dealt = [layout.capacities for layout in config.cache(model).layouts]
    assert sum(map(sum, dealt)) == 4 * 40
    share = LessConfig(share=0.4, shape="calibrated", calibration=tmp_path)
    cache = share.cache(model, prompt_tokens=100)
    assert [layout.capacities for layout in cache.layouts] == dealt
    assert LessConfig.from_dict(config.to_dict()) == config


def test_a_calibrated_cache_generates_and_its_recent_tokens_are_in_proportion(model):
    calibration = with_curves(model)
    config = LessConfig(tokens=40, shape="calibrated", policy=H2O(heavy=3, recent=1, decay=0.98))
    ids = torch.randint(0, 256, (2, 200), generator=torch.Generator().manual_seed(1))
    cache = config.cache(model, batch=2, calibration=calibration)
    with attach(model, cache), torch.no_grad():
        for part in ids.split([150, *[1] * 50], 1):
            logits = model(part, past_key_values=cache).logits
    assert bool(logits.isfinite().all())
    for i, layout in enumerate(cache.layouts):
        positions = cache.positions(i)
        for head, slots in enumerate(layout.capacities):
            kept = positions[:, head][positions[:, head] >= 0].view(2, -1)
            assert kept.shape == (2, slots)
            recent = cache.policies[i].rule.for_slots(slots).recent
            assert recent == cache.policies[i].recent * slots // max(layout.capacities)
            assert bool((kept.sort(1).values[:, -recent:] >= 200 - recent).all())


def test_layers_that_slide_or_keep_everything_take_no_part():
    from less.evaluate.families import D, K, build

    model = build("gemma3_text")  # layers 0 and 2 slide
    calibration = with_curves(model, 4, K, D, slides=(0, 2))
    config = LessConfig(bytes=60_000, shape="calibrated", full_layers=1, max_tokens=50)
    cache = config.cache(model, calibration=calibration)
    assert [None if p is None else type(p).__name__ for p in cache.policies] == [
        None, "Full", None, "H2O",
    ]  # fmt: skip
    assert cache.layouts[1].capacities == (50,) * K
    memory = cache.memory()
    windows = sum(2 * K * D * 4 * w for w in (model.config.sliding_window,) * 2)
    assert 59_000 < memory["slots"] + windows <= 60_000


@pytest.mark.parametrize("more", [0, 1, 5, 12, 13])
def test_every_head_gets_a_dozen_slots_beyond_the_fewest_where_the_budget_pays(model, more):
    config = LessConfig(tokens=21 + more, rows="k4v4", shape="calibrated")
    cache = config.cache(model, calibration=with_curves(model))
    slots = [n for layout in cache.layouts for n in layout.capacities]
    assert min(slots) == 21 + min(more, 12)
    assert sum(slots) == 4 * (21 + more)


def test_a_budget_in_bytes_alone_is_dealt_by_curves_where_there_are_any(model):
    calibration = with_curves(model)
    config = LessConfig(bytes=60_000)
    assert config.settled(None, calibration).shape == "calibrated"
    assert config.settled().shape is None
    for said in ("uniform", "pyramid"):
        assert replace(config, shape=said).settled(None, calibration).shape == said
    cache = config.cache(model, calibration=calibration, backend="reference")
    assert len({n for layout in cache.layouts for n in layout.capacities}) > 1


@pytest.mark.parametrize(
    ("settings", "calibration", "message"),
    [
        ({"tokens": 40}, lambda m: None, "needs a calibration with curves.* got none"),
        (
            {"tokens": 40},
            lambda m: Calibration([{n: x for n, x in with_curves(m)[0].items() if n != CURVE}] * 2),
            "needs a calibration with curves.* got one without curves",
        ),
        (
            {"tokens": 20, "rows": "k4v4"}, with_curves,
            "every head must keep 21 tokens or more, got a mean of 20",
        ),
        (
            {"bytes": 500, "rows": "k4v4"}, with_curves,
            "bytes=500 cannot hold 21 tokens per head in each of 2",
        ),
        (
            {"tokens": 40}, lambda m: with_curves(m, layers=3),
            "calibration must have layers=2, got layers=3",
        ),
        (
            {"tokens": 40}, lambda m: with_curves(m, slides=(1,)),
            "calibration must have a curve of layer 1, got none",
        ),
        ({"tokens": 40}, lambda m: with_curves(tiny_model(head_dim=32), D=32), "not on"),
    ],
)  # fmt: skip
def test_what_cannot_be_dealt_out_is_refused_by_name(model, settings, calibration, message):
    config = LessConfig(shape="calibrated", **settings)
    with pytest.raises(ValueError, match=message):
        config.cache(model, calibration=calibration(model))


# -- shown --------------------------------------------------------------------------------------


def test_a_heat_map_has_a_line_for_each_layer_and_a_shade_for_each_octave():
    slots = [(40, 80), None, (160, 320), (10, 1600)]
    lines = heat_map.text(slots).splitlines()
    assert lines == [
        "   0     40      80░",
        "   1  slides",
        "   2    160▒    320▓",
        "   3     10   1,600█",
        "10th, 50th and 90th percentile: 25, 120, 960; most 1,600",
    ]
    wide = heat_map.text([(40, 80, 160, 320) * 8]).splitlines()
    assert wide[0] == "   0 " + " ░▒▓" * 8


def test_the_heat_map_shows_what_a_config_deals_out(model, tmp_path):
    calibration = with_curves(model, layers=3, slides=(1,))
    slots = heat_map.dealt_slots(calibration, 100)
    assert slots[1] is None
    assert sum(slots[0]) + sum(slots[2]) == 4 * 100
    pytest.importorskip("matplotlib")
    heat_map.plot(slots, tmp_path / "map.png", "slots")
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")
