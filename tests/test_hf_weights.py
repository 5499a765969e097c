"""A sidekick knows the weights of the model that it was trained on."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch

pytest.importorskip("transformers")

import less.hf
from less import Sidekick
from less.evaluate import assets
from less.evaluate.families import FAMILIES, build
from less.evaluate.matrix import SMALL, sidekick_for
from less.hf.models import describe
from less.hf.weights import FIELD, note_weights
from less.sidekick import shipped_names


def noting(model):
    """A sidekick of the model's shape that notes its weights, as training does."""
    sidekick = sidekick_for(model)
    sidekick.config["model"] = {"name": "first"}
    sidekick.config[FIELD] = note_weights(describe(model, "test"))
    return sidekick


def cache_for(model, sidekick):
    return less.hf.cache_for(model, SMALL, sidekick, backend="reference")


def other_weights(model, share, seed=0):
    """A copy of a model, every matrix moved by a share of its size."""
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for x in other.parameters():
            x += share * x.std(unbiased=False) * torch.randn(x.shape, generator=generator)
    return other


@pytest.fixture(scope="module")
def model():
    return build("llama")


@pytest.fixture
def silent():
    """Within the test, a warning is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


OTHER = r"sidekick 'first' was trained on 'first', and the weights of .* are others: of 12 matrices"


def test_a_model_of_other_weights_warns_once_and_both_are_named(model):
    sidekick = noting(model)
    other = build("llama")
    with torch.no_grad():
        for x in other.parameters():
            x.copy_(torch.randn(x.shape, generator=torch.Generator().manual_seed(9)))
    other.config._name_or_path = "second"
    with pytest.warns(UserWarning, match=OTHER.replace(".*", "'second'") + " 12 differ"):
        cache = cache_for(other, sidekick)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            with less.hf.attach(other, cache):
                pass


def test_a_cache_that_is_attached_to_another_model_than_its_own_warns(model):
    cache = cache_for(model, noting(model))
    other = other_weights(model, 0.5)
    with pytest.warns(UserWarning, match=OTHER), less.hf.attach(other, cache):
        pass


@pytest.mark.parametrize("share", [0.02, 1.0])
def test_a_model_that_was_trained_on_is_told_from_the_first(model, share):
    with pytest.warns(UserWarning, match=OTHER):
        cache_for(other_weights(model, share), noting(model))


def test_one_other_matrix_is_found(model):
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.model.layers[1].self_attn.v_proj.weight += 0.01
    with pytest.warns(UserWarning, match=r"12 matrices 1 differ, 1\.v_proj\.weight by"):
        cache_for(other, noting(model))


@pytest.mark.parametrize("noted", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("loaded", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_the_same_weights_in_another_dtype_are_the_same(model, silent, noted, loaded):
    sidekick = noting(copy.deepcopy(model).to(noted))
    cache_for(copy.deepcopy(model).to(loaded), sidekick)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_kind_of_model_has_weights_to_note(family):
    noted = note_weights(describe(build(family), "test"))
    assert len({name.partition(".")[0] for name in noted}) > 1
    assert all(any(entry["values"]) for entry in noted.values())


def test_a_sidekick_that_notes_no_weights_is_not_compared(model, silent):
    cache_for(other_weights(model, 1.0), sidekick_for(model))


def test_weights_of_another_name_shape_or_kind_are_not_compared(model, silent):
    sidekick = noting(model)
    fused = {f"0.fused.{i}": entry for i, entry in enumerate(sidekick.config[FIELD].values())}
    sidekick.config[FIELD] = fused
    cache_for(model, sidekick)
    sidekick = noting(model)
    for entry in sidekick.config[FIELD].values():
        entry["shape"] = [1, 1]
    cache_for(other_weights(model, 1.0), sidekick)
    offloaded = copy.deepcopy(model)
    for layer in offloaded.model.layers:
        layer.self_attn.q_proj.to("meta")
    assert not any("q_proj" in name for name in note_weights(describe(offloaded, "test")))


@pytest.mark.parametrize("entry", [[1.0], {"shape": [1]}, {"shape": [1], "values": ["x"]}])
def test_a_damaged_note_is_refused_by_name(model, entry):
    sidekick = noting(model)
    sidekick.config[FIELD]["0.q_proj.weight"] = entry
    with pytest.raises(ValueError, match=r"sidekick 'first' must hold .*0\.q_proj\.weight"):
        cache_for(model, sidekick)


@pytest.mark.slow
@pytest.mark.parametrize("name", shipped_names())
def test_shipped_sidekicks_know_their_model_in_every_dtype_and_no_other(name, silent):
    try:
        model, _ = assets.load_model()
    except assets.AssetError as error:
        pytest.skip(str(error))
    sidekick = Sidekick.from_pretrained(name)
    assert len(sidekick.config[FIELD]) == 12
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        less.hf.cache_for(model.to(dtype), SMALL.at_capacity(32), sidekick)
    with torch.no_grad():
        for x in model.parameters():
            x *= 1.01
    with pytest.warns(UserWarning, match=f"sidekick {name!r} was trained on 'SmolLM2-135M-Ins"):
        less.hf.cache_for(model, SMALL.at_capacity(32), sidekick)
