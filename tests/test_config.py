"""Budgets in tokens, shares and bytes; shapes; and the config that holds them."""

import itertools
import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("transformers")

from less import H2O, Full, LessConfig, LessKVCache, SinkRecent
from less.budget import deal, parse_bytes, pyramid
from less.hf import attach
from tests.tiny_model import tiny_model, tiny_sidekick


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def kept(cache):
    return [p.capacity for p in cache.policies if p is not None]


# -- dealing out --------------------------------------------------------------------------------


@given(st.integers(0, 10**6), st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=40))
def test_dealing_loses_and_invents_no_token(total, weights):
    dealt = deal(total, weights)
    assert sum(dealt) == total
    for tokens, weight in zip(dealt, weights, strict=True):
        assert abs(tokens - total * weight / sum(weights)) < 1 + 1e-6


@given(st.integers(2, 80), st.floats(1, 100))
def test_a_pyramid_falls_in_equal_steps_and_keeps_the_mean(layers, beta):
    weights = pyramid(layers, beta)
    steps = [a - b for a, b in itertools.pairwise(weights)]
    assert all(abs(step - steps[0]) < 1e-9 for step in steps)
    assert steps[0] > -1e-12
    assert sum(weights) == pytest.approx(layers)
    assert weights[-1] == pytest.approx(1 / beta)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (4096, 4096), ("4096", 4096), ("64MiB", 64 << 20), ("1.5 GB", 1_500_000_000),
        ("2k", 2000), ("3 KiB", 3072), ("1gib", 1 << 30),
    ],
)  # fmt: skip
def test_bytes_may_be_written_with_a_unit(text, wanted):
    assert parse_bytes("x", text) == wanted


@pytest.mark.parametrize("text", ["", "-3", "12 XB", "MiB", 0, -1, True, 1.5, "0.2"])
def test_other_bytes_are_refused(text):
    with pytest.raises(ValueError, match="x: bytes must be"):
        parse_bytes("x", text)


# -- what is left open --------------------------------------------------------------------------


def test_a_budget_in_bytes_alone_is_four_bits_and_merging(model):
    cache = LessConfig(bytes=60_000).cache(model, backend="reference")
    assert (cache.dtype, cache.victim) == ("k4v4", "merge")
    for policy in cache.policies:
        quarter = policy.capacity // 4
        assert policy == H2O(heavy=policy.capacity - quarter, recent=quarter, decay=0.98)
    pages = sum(layout.nbytes for layout in cache.layouts)
    assert all(layout.weights for layout in cache.layouts)
    assert 57_000 < pages <= 60_000


@pytest.mark.parametrize(
    "said",
    [{"dtype": "float32"}, {"rows": "k3v3"}, {"policy": H2O(3, 1)}, {"victim": "forget"}],
    ids=str,
)
def test_what_is_said_is_not_filled_in(model, said):
    config = LessConfig(bytes=60_000, **said)
    assert config.settled() is config
    assert config.cache(model, backend="reference").victim == "forget"


def test_a_budget_in_tokens_or_a_sidekick_leaves_rows_and_victim_alone(model):
    assert LessConfig(tokens=24).settled() == LessConfig(tokens=24)
    cache = LessConfig(bytes=60_000).cache(model, sidekick=tiny_sidekick())
    assert (cache.dtype, cache.victim) == (torch.float32, "fold")


def test_the_preset_of_the_paper_folds_by_its_policy(model):
    config = LessConfig(tokens=24, preset="paper")
    cache = config.cache(model, sidekick=tiny_sidekick())
    assert cache.policy == H2O(heavy=12, recent=12)
    assert cache.victim == "fold"
    with pytest.raises(ValueError, match="preset 'paper' needs a sidekick"):
        config.cache(model)


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"preset": "best"}, "preset must be 'paper' or None, got 'best'"),
        ({"preset": "paper", "rows": "k4v4"}, "preset 'paper' brings its own rows"),
        ({"victim": "blend"}, "victim must be one of forget, fold, merge, got 'blend'"),
        ({"victim": "merge", "sidekick": "x"}, "exclude each other"),
    ],
)
def test_wrong_actions_are_refused_by_name(said, message):
    with pytest.raises(ValueError, match=message):
        LessConfig(bytes=60_000, **said)


# -- budgets ------------------------------------------------------------------------------------


def test_tokens_are_those_of_every_layer(model):
    cache = LessConfig(tokens=24).cache(model, batch=3)
    assert kept(cache) == [24, 24]
    assert cache.policy == H2O(heavy=12, recent=12, decay=0.98)
    assert cache.batch == 3


def test_a_list_of_tokens_is_one_number_per_layer(model):
    assert kept(LessConfig(tokens=[7, 31]).cache(model)) == [7, 31]
    with pytest.raises(ValueError, match="tokens must list 2 numbers, one per layer, got 3"):
        LessConfig(tokens=[1, 2, 3]).cache(model)


@pytest.mark.parametrize("share", [0.1, 0.25, 0.29, 1])
@pytest.mark.parametrize("prompt", [10, 100, 333])
def test_a_share_is_of_the_prompt(model, share, prompt):
    assert (
        kept(LessConfig(share=share).cache(model, prompt_tokens=prompt))
        == [round(share * prompt)] * 2
    )


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
@pytest.mark.parametrize("maps", [True, False])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("shape", ["uniform", "pyramid", (1, 5)])
def test_a_budget_in_bytes_is_kept_and_used_up(model, dtype, maps, batch, shape):
    config = LessConfig(bytes="90 kB", dtype=dtype, shape=shape, beta=4)
    cache = config.cache(model, batch=batch, sidekick=tiny_sidekick() if maps else None)
    memory = cache.memory()
    held = memory["slots"] + memory["state"] + memory["workspace"]
    # One token more in each layer would be too much, however its fields are aligned.
    layouts = [replace(layout, capacity=layout.capacity + 1) for layout in cache.layouts]
    assert held <= 90_000 < batch * sum(layout.nbytes for layout in layouts)
    assert (memory["maps"] > 0) == maps


def test_bytes_pay_for_full_layers_too(model):
    config = LessConfig(bytes=60_000, full_layers=1, max_tokens=100, dtype="float32")
    cache = config.cache(model, sidekick=tiny_sidekick())
    memory = cache.memory()
    assert isinstance(cache.policies[0], Full)
    assert 59_000 < memory["slots"] + memory["state"] + memory["workspace"] <= 60_000
    with pytest.raises(
        ValueError, match="bytes=60,000 cannot hold one token per head in each of 1"
    ):
        config.cache(model, max_tokens=10_000)


def test_a_pyramid_keeps_as_many_tokens_as_the_uniform_budget(model):
    flat = LessConfig(tokens=20).cache(model)
    steep = LessConfig(tokens=20, shape="pyramid", beta=4).cache(model)
    assert kept(steep) == [35, 5]
    assert sum(kept(flat)) == sum(kept(steep))


def test_weights_deal_out_the_same_total():
    out = LessConfig(tokens=10, shape=[1, 2, 3]).capacities(3)
    assert out == [5, 10, 15]


def test_native_layers_get_nothing_and_the_others_share_the_total():
    config = LessConfig(tokens=10, shape=[1, 9, 1, 3], full_layers=1, max_tokens=50)
    assert config.capacities(4, native=[1]) == [50, None, 5, 15]
    assert config.capacities(4, native=[0]) == [None, 50, 5, 15]


@pytest.mark.parametrize(
    ("config", "arguments", "message"),
    [
        (LessConfig(share=0.5), {}, "share needs prompt_tokens"),
        (LessConfig(share=0.01), {"prompt_tokens": 30}, "share=0.01 of 30 tokens is less than one"),
        (LessConfig(tokens=2, shape="pyramid"), {}, "layer 2 would keep 0 tokens: 6 for 3 layers"),
        (LessConfig(tokens=2, shape=[1, 1]), {}, "shape must list 3 numbers, one per layer, got 2"),
        (LessConfig(tokens=2, full_layers=1), {}, "full_layers needs max_tokens"),
        (
            LessConfig(tokens=2, full_layers=3, max_tokens=9), {},
            "full_layers=3 leaves none of 3 layers",
        ),
        (
            LessConfig(bytes=100), {"layer_bytes": lambda n, evicts: 30 * n + 20 * evicts},
            "one token per head in each of 3 layers: that takes 150",
        ),
        (
            LessConfig(bytes=100, full_layers=1, max_tokens=3),
            {
                "layer_bytes": lambda n, evicts: 30 * n + 20 * evicts, "native": [0],
                "native_bytes": 7,
            },
            "beside 7 bytes of the windows of layers that slide and 90 bytes of full layers: that "
            "takes 147",
        ),
    ],
)  # fmt: skip
def test_what_would_keep_nothing_is_refused_by_name(config, arguments, message):
    with pytest.raises(ValueError, match=message):
        config.capacities(3, **arguments)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "one of tokens, share and bytes must be given, got none"),
        ({"tokens": 1, "bytes": 5}, "got tokens and bytes"),
        ({"tokens": 0}, "tokens must be a whole number >= 1"),
        ({"tokens": 2.5}, "tokens must be a whole number >= 1"),
        ({"tokens": [3, 0]}, "tokens must be a whole number >= 1"),
        ({"tokens": [3, 4], "shape": "pyramid"}, "a list of tokens is a shape already"),
        ({"share": 0}, r"share must be in \(0, 1\], got 0"),
        ({"share": 1.5}, r"share must be in \(0, 1\], got 1.5"),
        ({"share": "half"}, "share must be a number, got 'half'"),
        ({"bytes": "much"}, "bytes must be a number of bytes or a text as '64MiB'"),
        (
            {"tokens": 8, "shape": "cone"},
            "shape must be 'uniform', 'pyramid', 'calibrated' or a list",
        ),
        ({"tokens": 8, "shape": [1, 0]}, "weights of shape must be above 0, got 0"),
        ({"tokens": 8, "shape": "pyramid", "beta": 0.5}, "beta must be 1 or more, got 0.5"),
        ({"tokens": 8, "full_layers": -1}, "full_layers must be a whole number >= 0"),
        ({"tokens": 8, "policy": "h2o"}, "policy must be a Policy, got str"),
        ({"tokens": 8, "policy": Full(9)}, "policy Full has no budget"),
        ({"tokens": 8, "dtype": "float8"}, "dtype must be one of float32"),
        ({"tokens": 8, "sidekick": 7}, "sidekick must be a folder or a shipped name"),
    ],
)
def test_a_wrong_setting_is_refused_by_name(settings, message):
    with pytest.raises(ValueError, match=message):
        LessConfig(**settings)


# -- policies -----------------------------------------------------------------------------------


def test_the_sidekicks_own_policy_is_the_default(model):
    assert LessConfig(tokens=40).cache(model, sidekick=tiny_sidekick(decay=0.9)).policy == H2O(
        20, 20, decay=0.9
    )


def test_a_policy_keeps_its_proportions_in_every_layer(model):
    config = LessConfig(tokens=[8, 40], policy=H2O(heavy=3, recent=1, per_age=True))
    assert config.cache(model).policies == (H2O(6, 2, per_age=True), H2O(30, 10, per_age=True))
    config = LessConfig(tokens=[8, 40], policy=SinkRecent(4, 1))
    assert config.cache(model).policies == (SinkRecent(4, 4), SinkRecent(4, 36))


def test_no_part_of_a_policy_rounds_to_nothing():
    assert H2O(99, 1).at_capacity(2) == H2O(1, 1)
    assert H2O(1, 99).at_capacity(3) == H2O(1, 2)
    with pytest.raises(ValueError, match="heavy and recent tokens need 2 or more, got 1"):
        H2O(1, 1).at_capacity(1)
    with pytest.raises(ValueError, match="4 sinks and a window do not fit into 4 tokens"):
        SinkRecent(4, 9).at_capacity(4)


# -- at work ------------------------------------------------------------------------------------


def generate(model, cache, ids, new=8):
    with attach(model, cache):
        return model.generate(
            ids, past_key_values=cache, max_new_tokens=new, do_sample=False,
            attention_mask=torch.ones_like(ids),
        )  # fmt: skip


def test_budgets_as_long_as_the_text_give_the_models_own_text(model):
    ids = torch.randint(0, 256, (2, 30), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    want = model.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False)
    config = LessConfig(tokens=64, full_layers=1, max_tokens=48)
    cache = config.cache(model, batch=2, sidekick=tiny_sidekick())
    assert torch.equal(generate(model, cache, ids), want)
    assert cache.stats()["evictions"] == [0, 0]


def test_layers_that_slide_keep_their_windows_and_the_others_share_the_budget():
    from less.evaluate.families import VOCAB, build

    model = build("gemma3_text")
    config = LessConfig(tokens=[1, 9, 1, 5], policy=H2O(1, 1))
    cache = config.cache(model, batch=2)
    slides = [i for i, policy in enumerate(cache.policies) if policy is None]
    assert slides == list(cache.native) != []
    ids = torch.randint(2, VOCAB, (2, 30), generator=torch.Generator().manual_seed(2))
    generate(model, cache, ids)
    assert cache.stats()["kept"] == [
        2 * 37 if i in slides else 2 * n for i, n in enumerate(config.tokens)
    ]


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
def test_a_budget_in_bytes_pays_for_the_windows_of_layers_that_slide(batch, dtype):
    from less.evaluate.families import VOCAB, build

    model = build("gemma3_text")
    config = LessConfig(bytes=20_000, shape=[1, 2, 1, 2], dtype=dtype)
    cache = config.cache(model, batch=batch)
    ids = torch.randint(2, VOCAB, (batch, 30), generator=torch.Generator().manual_seed(2))
    most = 0
    with attach(model, cache), torch.no_grad():
        for part in (ids[:, :4], ids[:, 4:28], ids[:, 28:29], ids[:, 29:]):
            model(part, past_key_values=cache)
            memory = cache.memory()
            most = max(most, memory["slots"] + memory["state"] + memory["native"])
    assert memory["native"] > 0
    assert 19_000 < most <= 20_000


def test_windows_that_take_the_whole_budget_are_refused_with_their_bytes():
    from less.evaluate.families import WINDOW, D, K, build

    model = build("gemma3_text")
    windows = 2 * WINDOW * 2 * K * D * 4 * 3  # of two layers, k and v, float32, three rows
    with pytest.raises(
        ValueError,
        match=f"bytes={windows:,} cannot hold one token per head in each of 2 layers beside "
        f"{windows:,} bytes of the windows of layers that slide: that takes ",
    ):
        LessConfig(bytes=windows, dtype="float32").cache(model, batch=3)


def test_full_layers_are_the_first_of_those_that_do_not_slide():
    from less.evaluate.families import build

    model = build("gemma3_text")  # layers 0 and 2 slide
    config = LessConfig(tokens=8, full_layers=1, max_tokens=50, policy=H2O(1, 1))
    cache = config.cache(model)
    assert cache.policies == (None, Full(50), None, H2O(heavy=4, recent=4))
    with pytest.raises(
        ValueError, match=r"full_layers=2 leaves none of 2 layers to be bounded \(2 others slide\)"
    ):
        replace(config, full_layers=2).cache(model)


def test_beams_reorder_layers_of_different_budgets(model):
    ids = torch.randint(0, 256, (1, 30), generator=torch.Generator().manual_seed(3))
    settings = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 8, "num_beams": 3}
    cache = LessConfig(tokens=[64, 50], full_layers=1, max_tokens=40).cache(model, batch=3)
    with attach(model, cache):
        got = model.generate(ids, past_key_values=cache, do_sample=False, **settings)
    assert torch.equal(got, model.generate(ids, do_sample=False, **settings))
    small = LessConfig(tokens=[12, 30]).cache(model, batch=3, sidekick=tiny_sidekick())
    with attach(model, small):
        model.generate(ids, past_key_values=small, do_sample=False, **settings)
    assert small.stats()["kept"] == [36, 90]


def test_generate_refuses_at_once_what_a_full_layer_has_no_room_for(model):
    ids = torch.ones(1, 30, dtype=torch.long)
    cache = LessConfig(tokens=8, full_layers=1, max_tokens=37).cache(model)
    with pytest.raises(ValueError, match="may come to 38, padding included, but .* room for 37"):
        generate(model, cache, ids, new=9)
    assert cache.columns == 0
    assert generate(model, cache, ids, new=8).shape[1] == 38
    with (
        attach(model, cache),
        torch.no_grad(),
        pytest.raises(ValueError, match="has seen 37 tokens and has room for 37"),
    ):
        model(ids[:, :1], past_key_values=cache)
    assert cache.columns == 37


# -- JSON ---------------------------------------------------------------------------------------

CONFIGS = [
    LessConfig(tokens=64),
    LessConfig(tokens=[3, 4], policy=SinkRecent(4, 8), dtype="int8"),
    LessConfig(share=0.25, shape="pyramid", beta=3, full_layers=1, max_tokens=4096),
    LessConfig(bytes="64MiB", shape=[1, 2.5], policy=H2O(3, 1, decay=0.98)),
    LessConfig(bytes=12345, sidekick="smollm2-135m-instruct"),
]


@pytest.mark.parametrize("config", CONFIGS)
def test_json_gives_back_the_same_config(config, tmp_path):
    assert LessConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    config.save_pretrained(tmp_path)
    assert LessConfig.from_pretrained(tmp_path) == config
    assert hash(config) == hash(replace(config))


def test_beside_its_sidekick_a_config_may_be_moved(model, tmp_path):
    tiny_sidekick().save_pretrained(tmp_path / "here")
    LessConfig(tokens=20, sidekick=tmp_path / "here").save_pretrained(tmp_path / "here")
    assert json.loads((tmp_path / "here" / "less_config.json").read_text())["sidekick"] == "."
    (tmp_path / "here").rename(tmp_path / "there")
    cache = LessConfig.from_pretrained(tmp_path / "there").cache(model)
    assert cache.sidekick.rank == tiny_sidekick().rank


def test_elsewhere_it_names_the_whole_path(tmp_path):
    tiny_sidekick().save_pretrained(tmp_path / "sidekick")
    config = LessConfig(tokens=20, sidekick=str(tmp_path / "sidekick"))
    config.save_pretrained(tmp_path / "config")
    assert LessConfig.from_pretrained(tmp_path / "config") == config


def test_a_file_of_another_kind_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"cannot read .*less_config.json"):
        LessConfig.from_pretrained(tmp_path)
    d = LessConfig(tokens=3).to_dict()
    for change, message in (
        ({"format": "x"}, "format must be 'less-config' version 1, got 'x' 1"),
        ({"version": 2}, "got 'less-config' 2"),
        ({"budget": 3}, r"unknown settings \['budget'\]"),
        ({"policy": {"name": "Mine"}}, "name must be one of"),
    ):
        with pytest.raises(ValueError, match=message):
            LessConfig.from_dict({**d, **change})


def test_a_list_goes_to_a_cache_without_transformers():
    capacities = LessConfig(tokens=16, shape="pyramid", beta=2).capacities(3)
    assert capacities == [24, 16, 8]
    cache = LessKVCache(3, 4, 2, 8, 1, [H2O(c // 2, c - c // 2) for c in capacities])
    assert kept(cache) == capacities
