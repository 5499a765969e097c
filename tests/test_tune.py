"""Centroid maps: trained on keys without their mean, and tuned end to end."""

import importlib
import math

import pytest
import torch

from less import H2O, Sidekick, reference
from less.cli import main
from less.fit import Eviction, Recipe, Tuning, train, tune
from less.fit.capture import LayerWalk
from less.fit.one_layer import fit_layer
from less.fit.recipe import LayerRecord
from less.fit.schedule import schedule
from less.fit.tune import bounded
from less.hf.models import describe
from less.layer import Maps
from tests.helpers import random_maps, random_qkv
from tests.tiny_model import TEXT, save_tiny, tiny_model

POLICIES = [H2O(4, 4, decay=0.98), H2O(8, 8, decay=0.98)]
EVICTIONS = [Eviction(p) for p in POLICIES]


def token_ids(chunks=6, tokens=48):
    return torch.randint(256, (chunks, tokens), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def trained():
    model = tiny_model()
    recipe = Recipe(kind="centroid", rank=4, steps=30, rows=8, held_rows=32)
    return model, train(model, token_ids(), POLICIES, recipe=recipe, held=2)


@pytest.mark.parametrize("softcap", [0.0, 1.5])
@pytest.mark.parametrize("centred", [True, False])
def test_bounded_attention_is_the_recurrence_on_keys_without_their_mean(centred, softcap):
    q, k, v = random_qkv(2, 4, 2, 40, 8, seed=5)
    maps = random_maps(4, 2, 8, 0, 3, "centroid")
    mean = None
    if centred and not softcap:
        mean = torch.randn(2, 8, generator=torch.Generator().manual_seed(0))
    left = schedule(q, k, v, POLICIES[0], 0.3, softcap)
    got = bounded(q, k, v, left, maps, mean, 0.3, softcap)
    x = k if mean is None else k - mean[:, None]
    run = Maps("centroid", {n: t.double() for n, t in maps.items()})
    want = reference.parallel(
        q.double(), x.double(), v.double(), left, run, scale=0.3, softcap=softcap
    )
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-5)
    alone = bounded(q, k, v, left, {}, mean, 0.3, softcap)
    want = reference.parallel(q, k, v, left, scale=0.3, softcap=softcap)
    torch.testing.assert_close(alone, want, rtol=1e-4, atol=1e-5)


def test_bounded_attention_has_a_gradient_for_all_it_is_given():
    q, k, v = (x.requires_grad_() for x in random_qkv(1, 2, 1, 20, 4, seed=5))
    maps = {n: t.requires_grad_() for n, t in random_maps(2, 1, 4, 0, 3, "centroid").items()}
    left = schedule(q.detach(), k.detach(), v.detach(), H2O(2, 2), 0.3)
    bounded(q, k, v, left, maps, None, 0.3, 0.0).square().sum().backward()
    for x in (q, k, v, *maps.values()):
        assert x.grad is not None
        assert x.grad.isfinite().all()
        assert x.grad.abs().max() > 0


def test_maps_are_trained_on_keys_without_the_mean_that_comes_with_them(tmp_path):
    model = tiny_model()
    walk = LayerWalk(model, token_ids(), tmp_path)
    walk.start()
    captured = walk.capture(0)
    recipe = Recipe(kind="centroid", rank=4, steps=20, rows=8, held_rows=32)
    maps, record = fit_layer(captured, EVICTIONS, recipe, 0, 2)
    mean = captured.k[:, :, 4:].double().mean((0, 2))
    torch.testing.assert_close(maps["key_mean"].double(), mean, rtol=1e-3, atol=1e-3)
    assert torch.equal(maps["key_mean"], maps["key_mean"].half().float())
    assert record.ratio < 1
    again, other = fit_layer(captured, EVICTIONS, recipe, 0, 2, start=maps)
    assert torch.equal(again["key_mean"], maps["key_mean"])
    for begun, ended in zip(other.start, record.sidekick, strict=True):
        assert begun == pytest.approx(ended, rel=1e-3)


def test_a_layer_that_loses_more_than_eviction_alone_is_left_without_maps(monkeypatch):
    module = importlib.import_module("less.fit.train")  # less.fit.train is its function

    def worse(captured, policies, recipe, layer, held, tick, start):
        maps, record = fit_layer(captured, policies, recipe, layer, held, tick, start)
        lost = [2 * x for x in record.eviction] if layer == 1 else record.sidekick
        return maps, LayerRecord(layer, record.eviction, record.start, lost, record.seconds)

    monkeypatch.setattr(module, "fit_layer", worse)
    recipe = Recipe(kind="centroid", rank=4, steps=4, rows=8, held_rows=32)
    sidekick = train(tiny_model(), token_ids(), POLICIES, recipe=recipe, held=2)
    assert sidekick.absent == (1,)
    tuned = tune(
        tiny_model(), token_ids(), sidekick, POLICIES, Tuning(steps=1, window=48, held=1), held=2
    )
    assert tuned.absent == (1,)


def test_tuning_brings_outputs_nearer_to_those_of_full_attention(trained):
    model, sidekick = trained
    seen = []
    before = {n: p.clone() for n, p in model.named_parameters()}
    tuned = tune(
        model, token_ids(), sidekick, POLICIES,
        Tuning(steps=12, window=48, rows=24, warmup=2, lr=5e-3, held=2), held=2,
        show=lambda step, steps, divergence: seen.append((step, steps, divergence)),
    )  # fmt: skip
    record = tuned.config["training"]["tuning"]
    assert [s[:2] for s in seen] == [(i, 12) for i in range(1, 13)]
    assert all(math.isfinite(s[2]) for s in seen)
    assert record["kept"] == (sum(record["divergence_after"]) < sum(record["divergence_before"]))
    assert record["kept"]
    assert not torch.equal(tuned[0]["centroids"], sidekick[0]["centroids"])
    assert torch.equal(tuned[0]["key_mean"], sidekick[0]["key_mean"])
    for name, p in model.named_parameters():
        assert p.requires_grad
        assert p.grad is None
        assert torch.equal(p, before[name])
    assert describe(model, "test").config._attn_implementation != "less_fit_capture"


def test_tuned_maps_that_diverge_more_are_not_taken(trained):
    model, sidekick = trained
    kept = tune(
        model, token_ids(), sidekick, POLICIES,
        Tuning(steps=2, window=48, rows=24, warmup=0, lr=30.0, held=2), held=2,
    )  # fmt: skip
    assert not kept.config["training"]["tuning"]["kept"]
    for mine, theirs in zip(kept, sidekick, strict=True):
        assert all(torch.equal(mine[n], theirs[n]) for n in theirs)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"steps": 0}, "steps must be a whole number >= 1"),
        ({"window": True}, "window must be a whole number"),
        ({"lr": float("inf")}, "lr must be a positive number"),
    ],
)
def test_tunings_out_of_range_are_refused_by_name(setting, message):
    with pytest.raises(ValueError, match=message):
        Tuning(**setting)


def test_what_cannot_be_tuned_is_refused_by_name(trained):
    model, sidekick = trained
    other = Sidekick.random(2, 4, 2, 16, 4, 6, "exp", 0)
    with pytest.raises(ValueError, match="maps must be of kind 'centroid', got 'exp'"):
        tune(model, token_ids(), other, POLICIES, held=2)
    with pytest.raises(ValueError, match="longer than the largest budget, 16"):
        tune(model, token_ids(), sidekick, POLICIES, Tuning(window=16), held=2)
    with pytest.raises(ValueError, match="start must have the recipe's rank, 5, got 4"):
        train(model, token_ids(), POLICIES, recipe=Recipe(kind="centroid", rank=5), start=sidekick)
    with pytest.raises(
        ValueError, match="start must have the recipe's kind, 'exp', got 'centroid'"
    ):
        train(model, token_ids(), POLICIES, recipe=Recipe(rank=4), start=sidekick)


def test_the_command_trains_centroids_tunes_them_and_saves_int8(tmp_path, capsys):
    save_tiny(tmp_path / "model")
    (tmp_path / "text.txt").write_text(TEXT * 10)
    words = [
        "train", "--model", str(tmp_path / "model"), "--text", str(tmp_path / "text.txt"),
        "--out", str(tmp_path / "out"), "--budget", "8,16", "--length", "48", "--chunks", "6",
        "--steps", "12", "--rows", "8", "--rank", "4", "--kind", "centroid", "--tune", "2",
    ]  # fmt: skip
    assert main(words) == 0
    sidekick = Sidekick.from_pretrained(tmp_path / "out")
    assert (sidekick.kind, sidekick.dtype) == ("centroid", torch.int8)
    assert sidekick.config["training"]["tuning"]["steps"] == 2
    again = [*words[:6], str(tmp_path / "again"), *words[7:-1], "0", "--start", words[6]]
    assert main(again) == 0
    longer = Sidekick.from_pretrained(tmp_path / "again")
    assert "tuning" not in longer.config["training"]
    i = next(i for i in range(2) if i not in {*sidekick.absent, *longer.absent})
    assert torch.equal(longer[i]["key_mean"], sidekick[i]["key_mean"])
    capsys.readouterr()
    assert main([*words, "--kind", "exp"]) == 2
    assert "maps must be of kind 'centroid', got 'exp'" in capsys.readouterr().err
