"""The cache in the middle of things: snapshots, copies and moves while text is generated.

Also what torch.compile makes of a model that runs on the cache.
"""

from __future__ import annotations

import copy
import io
import json

import pytest
import torch

pytest.importorskip("transformers")

from transformers import StoppingCriteria, StoppingCriteriaList

import less.hf
from less.evaluate.families import build
from less.evaluate.matrix import SMALL, generate, prompt, sidekick_for
from tests import test_hf
from tests.test_hf import BACKENDS

MODES = {
    "greedy": {},
    "sampling": {"do_sample": True, "top_k": 0},
    "beams": {"num_beams": 3},
    "sequences": {"do_sample": True, "num_return_sequences": 3},
    "beams and sequences": {"num_beams": 3, "num_return_sequences": 2},
    "sampled beams": {"do_sample": True, "num_beams": 3},
}


@pytest.fixture(scope="module", params=["llama", "gemma3_text"])
def model(request):
    return build(request.param)


class Amid(StoppingCriteria):
    """Calls a function with the cache at one step of ``generate``; never stops it."""

    def __init__(self, function, columns):
        self.function = function
        self.columns = columns
        self.calls = 0

    def __call__(self, input_ids, scores, **kwargs):
        if input_ids.shape[1] == self.columns:
            self.calls += 1
            self.function()
        return torch.zeros(len(input_ids), dtype=torch.bool)


def new_cache(model, policy, sidekick=None, batch=1):
    """The fastest that is built: what holds of its bits holds of the reference's."""
    return test_hf.new_cache(model, policy, sidekick, batch, backend=BACKENDS[-1])


def rows_of(options, prompts=1):
    return prompts * max(options.get("num_beams", 1), options.get("num_return_sequences", 1))


def held(cache):
    """All tensors of a cache."""
    return cache.state_dict()["tensors"]


def assert_same(got, want):
    assert got.keys() == want.keys()
    for name, x in want.items():
        assert torch.equal(got[name], x), name


def through_torch(snapshot):
    """A snapshot written and read as plain data: no code in it."""
    file = io.BytesIO()
    torch.save(snapshot, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def through_safetensors(snapshot):
    """A snapshot as one safetensors file, its settings as JSON in the header."""
    from safetensors.torch import load, save

    plain = {name: snapshot[name] for name in ("cache", "columns")}
    blob = save(
        {**{n: x.contiguous() for n, x in snapshot["tensors"].items()}, "fed": snapshot["fed"]},
        {"plain": json.dumps(plain)},
    )
    size = int.from_bytes(blob[:8], "little")
    tensors = load(blob)
    plain = json.loads(json.loads(blob[8 : 8 + size])["__metadata__"]["plain"])
    return {**plain, "fed": tensors.pop("fed"), "tensors": tensors}


@pytest.mark.parametrize("way", [lambda d: d, through_torch, through_safetensors])
@pytest.mark.parametrize("mode", MODES)
def test_a_snapshot_amid_generation_changes_no_bit(model, mode, way):
    options = MODES[mode]
    sidekick = sidekick_for(model)
    ends = []
    for disturbed in (False, True):
        cache = new_cache(model, SMALL, sidekick, batch=rows_of(options, prompts=2))

        def restore(cache=cache):
            snapshot = way(cache.state_dict())
            cache.reset()
            cache.load_state_dict(snapshot)

        amid = Amid(restore if disturbed else lambda: None, 17)
        torch.manual_seed(7)
        tokens = generate(
            model,
            cache,
            prompt(13, rows=2),
            stopping_criteria=StoppingCriteriaList([amid]),
            **options,
        )
        assert amid.calls >= 1
        ends.append((tokens, held(cache)))
    assert torch.equal(ends[0][0], ends[1][0])
    assert_same(ends[1][1], ends[0][1])


@pytest.mark.parametrize("mode", ["greedy", "sampling", "sequences"])
def test_a_copy_made_amid_generation_goes_on_to_the_same_end(model, mode):
    options = MODES[mode]
    rows = rows_of(options)
    sidekick = sidekick_for(model)
    cache = new_cache(model, SMALL, sidekick, batch=rows)
    kept = {}

    def keep():
        kept["snapshot"] = cache.state_dict()
        kept["copy"] = copy.deepcopy(cache)
        kept["random"] = torch.get_rng_state()

    torch.manual_seed(7)
    amid = StoppingCriteriaList([Amid(keep, 17)])
    tokens = generate(model, cache, prompt(13), stopping_criteria=amid, new=12, **options)
    loaded = new_cache(model, SMALL, sidekick, batch=rows)
    loaded.load_state_dict(kept["snapshot"])
    rest = {**options, "num_return_sequences": 1}  # the text has its rows by now
    for other in (kept["copy"], loaded):
        torch.set_rng_state(kept["random"])
        again = generate(model, other, tokens[:, :17], new=8, **rest)
        assert torch.equal(again, tokens)
        assert_same(held(other), held(cache))


def test_a_copy_shares_nothing_with_its_original(model):
    cache = new_cache(model, SMALL, sidekick_for(model))
    generate(model, cache, prompt(13))
    before = held(cache)
    other = copy.deepcopy(cache)
    other.reset()
    generate(model, other, prompt(9, seed=2))
    assert_same(held(cache), before)


# -- moving ------------------------------------------------------------------------------------


def test_moving_to_where_it_is_changes_nothing(model):
    cache = new_cache(model, SMALL, sidekick_for(model))
    generate(model, cache, prompt(13))
    before = held(cache)
    with less.hf.attach(model, cache):
        assert cache.to("cpu") is cache
    assert_same(held(cache), before)


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("meta", "must hold values, got 'meta'"),
        ("nowhere", "must be one that is here, got 'nowhere'"),
        (None if torch.cuda.is_available() else "cuda", "must be one that is here"),
    ],
)
def test_a_device_that_cannot_hold_it_is_refused_and_nothing_moves(model, device, message):
    if device is None:
        pytest.skip("there is a cuda device here")
    cache = new_cache(model, SMALL, sidekick_for(model))
    generate(model, cache, prompt(13))
    before = held(cache)
    with pytest.raises(ValueError, match=message):
        cache.to(device)
    assert cache.device == torch.device("cpu")
    assert_same(held(cache), before)


def test_what_is_moved_is_all_of_it(model):
    ends = []
    for moved in (False, True):
        cache = new_cache(model, SMALL, sidekick_for(model))
        text = torch.cat([generate(model, cache, prompt(13)), prompt(3, seed=1)], 1)
        if moved:
            cache._move(torch.device("cpu"))  # the steps of a move, for want of a second device
        ends.append((generate(model, cache, text), held(cache)))
    assert torch.equal(ends[0][0], ends[1][0])
    assert_same(ends[1][1], ends[0][1])


def test_there_and_back_amid_a_text_changes_no_bit(cuda, model):
    ends = []
    for moved in (False, True):
        cache = test_hf.new_cache(model, SMALL, sidekick_for(model), backend="reference")
        text = torch.cat([generate(model, cache, prompt(13)), prompt(3, seed=1)], 1)
        if moved:
            with less.hf.attach(model, cache), pytest.raises(RuntimeError, match="attached"):
                cache.to("cuda")
            cache.to("cuda")
            assert all(x.is_cuda for x in held(cache).values())
            with pytest.raises(ValueError, match="cache must be on cpu"):
                generate(model, cache, text)
            cache.to("cpu")
        ends.append((generate(model, cache, text), held(cache)))
    assert torch.equal(ends[0][0], ends[1][0])
    assert_same(ends[1][1], ends[0][1])


# -- torch.compile -------------------------------------------------------------------------------


def test_a_compiled_model_gives_the_same_without_a_graph_break_but_compiles_each_call():
    import torch._dynamo
    from torch._dynamo.utils import counters

    model = build("llama")
    calls = [prompt(12), *(prompt(1, seed=i) for i in range(3))]

    def logits(run):
        cache = new_cache(model, SMALL, sidekick_for(model))
        with less.hf.attach(model, cache), torch.no_grad():
            return [run(ids, past_key_values=cache).logits for ids in calls], held(cache)

    want, want_held = logits(model)
    torch._dynamo.reset()
    counters.clear()
    try:
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        got, got_held = logits(compiled)
        # What docs/transformers.md says: whole graphs, and one for each call, since the counts of
        # columns, by which a call is checked, are constants of the graph.
        assert not counters["graph_break"]
        assert counters["stats"]["unique_graphs"] == len(calls)
    finally:
        torch._dynamo.reset()
        counters.clear()
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)
    assert_same(got_held, want_held)


def test_generate_does_not_compile_on_its_own(model):
    assert not new_cache(model, SMALL).is_compileable


def test_static_caches_are_not_asked_for(model):
    with pytest.raises(ValueError, match="cache_implementation"):
        generate(model, new_cache(model, SMALL), prompt(9), cache_implementation="static")
