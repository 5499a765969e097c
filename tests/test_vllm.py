"""The vLLM backend without vLLM: settings, refusals, the shape of a model, steps of a batch."""

import json
import re
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("transformers")

from less import H2O, LessConfig, PagedLayer, PageLayout
from less.cache.limits import BiasedKeys
from less.hf import UnsupportedModelError
from less.integrations.vllm import check_version
from less.integrations.vllm.settings import Settings
from less.integrations.vllm.shape import facts_of, layers_of, request_cache
from less.integrations.vllm.steps import Steps, look
from tests.helpers import HeavyValues
from tests.test_curves import with_curves
from tests.tiny_model import tiny_calibration, tiny_model, tiny_sidekick

CPU = torch.device("cpu")


def vllm_config(less=None, *, cache=None, parallel=None, scheduler=None, **others):
    """The fields of vLLM's config that are read; prompts are never cut."""
    return SimpleNamespace(
        additional_config={"less": {"tokens": 32} if less is None else less},
        model_config=SimpleNamespace(max_model_len=128),
        speculative_config=others.get("speculative_config"),
        kv_transfer_config=others.get("kv_transfer_config"),
        cache_config=SimpleNamespace(
            **{
                "cache_dtype": "auto",
                "enable_prefix_caching": True,
                "kv_offloading_size": None,
                "kv_sharing_fast_prefill": False,
                **(cache or {}),
            }
        ),
        parallel_config=SimpleNamespace(
            **{
                "pipeline_parallel_size": 1,
                "prefill_context_parallel_size": 1,
                "decode_context_parallel_size": 1,
                "use_ubatching": False,
                **(parallel or {}),
            }
        ),
        scheduler_config=SimpleNamespace(
            **{
                "enable_chunked_prefill": False,
                "long_prefill_token_threshold": 0,
                "long_prefill_token_threshold_adaptive": False,
                "max_num_seqs": 4,
                "max_num_batched_tokens": 512,
                "max_num_scheduled_tokens": None,
                **(scheduler or {}),
            }
        ),
    )


# -- settings ------------------------------------------------------------------------------------


def test_settings_are_those_of_less_config(tmp_path):
    own = {"bytes": "1MiB", "rows": "k4v4", "policy": {"name": "H2O", "heavy": 3, "recent": 1}}
    config = LessConfig(bytes="1MiB", rows="k4v4", policy=H2O(heavy=3, recent=1))
    assert Settings.of(vllm_config(own)) == Settings(config)
    assert Settings.of(vllm_config(own | {"backend": "reference"})).backend == "reference"
    config.save_pretrained(tmp_path)
    assert Settings.of(vllm_config({"config": str(tmp_path)})) == Settings(config)


def test_layers_that_keep_every_token_have_room_for_the_longest_text():
    assert Settings.of(vllm_config({"tokens": 32, "full_layers": 1})).config.max_tokens == 128
    with pytest.raises(ValueError, match="max_tokens must be 128 or more, vLLM's max_model_len"):
        Settings.of(vllm_config({"tokens": 32, "full_layers": 1, "max_tokens": 100}))


@pytest.mark.parametrize(
    ("less", "message"),
    [
        ({"tokens": 32, "token": 1}, r"unknown settings \['token'\]"),
        ({"share": 0.5}, "share is a part of one prompt"),
        ({}, "one of tokens, share and bytes must be given"),
        ({"tokens": 32, "any_chunks": 1}, "any_chunks must be true or false, got 1"),
        ({"config": "folder", "tokens": 32}, "config must be a folder, and then the settings"),
        ({"tokens": 32, "rows": "k5v5"}, "rows must be one of"),
    ],
)
def test_a_wrong_setting_is_refused_by_name(less, message):
    with pytest.raises(ValueError, match=message):
        Settings.of(vllm_config(less))


@pytest.mark.parametrize("given", [{}, {"less": 32}, None])
def test_the_settings_must_be_given(given):
    config = vllm_config()
    config.additional_config = given
    with pytest.raises(ValueError, match="additional_config must have 'less', an object"):
        Settings.of(config)


@pytest.mark.parametrize(
    ("asked", "name"),
    [
        ({"speculative_config": object()}, "speculative_config"),
        ({"kv_transfer_config": object()}, "kv_transfer_config"),
        ({"cache": {"cache_dtype": "fp8"}}, "kv_cache_dtype"),
        ({"cache": {"kv_offloading_size": 1.0}}, "kv_offloading_size"),
        ({"cache": {"kv_sharing_fast_prefill": True}}, "kv_sharing_fast_prefill"),
        ({"parallel": {"pipeline_parallel_size": 2}}, "pipeline_parallel_size"),
        ({"parallel": {"prefill_context_parallel_size": 2}}, "prefill_context_parallel_size"),
        ({"parallel": {"decode_context_parallel_size": 2}}, "decode_context_parallel_size"),
        ({"parallel": {"use_ubatching": True}}, "enable_dbo"),
    ],
)
def test_what_a_page_per_request_cannot_serve_is_refused_by_name(asked, name):
    with pytest.raises(ValueError, match=f"vLLM's {name} does not go with a bounded cache: "):
        Settings.of(vllm_config(**asked))


def test_prefix_caching_is_refused_where_the_command_line_asks_for_it(monkeypatch):
    for asked in ("--enable-prefix-caching", "--enable_prefix_caching"):
        monkeypatch.setattr(sys, "argv", ["server", "--model", "folder", asked])
        with pytest.raises(ValueError, match="vLLM's enable_prefix_caching does not go with"):
            Settings.of(vllm_config())
        Settings.of(vllm_config(cache={"enable_prefix_caching": False}))  # a model has none
    monkeypatch.setattr(sys, "argv", ["server", "--no-enable-prefix-caching"])
    Settings.of(vllm_config())


CUT = {"enable_chunked_prefill": True, "long_prefill_token_threshold": 16}


@pytest.mark.parametrize(
    ("scheduler", "chunk"),
    [
        ({}, 0),
        (CUT, 16),
        (CUT | {"max_num_batched_tokens": 64}, 16),
        (CUT | {"max_num_batched_tokens": 512, "max_num_scheduled_tokens": 64}, 16),
        # vLLM's defaults: a prompt is cut where the step is full
        ({"enable_chunked_prefill": True}, None),
        # a request that is alone is not cut at the threshold, but where the step is full
        (CUT | {"max_num_batched_tokens": 72}, None),
        # four requests that are cut do not fit in a step
        (CUT | {"max_num_batched_tokens": 48}, None),
        (CUT | {"max_num_scheduled_tokens": 48}, None),
        (CUT | {"long_prefill_token_threshold_adaptive": True}, None),
        ({"long_prefill_token_threshold": 16}, None),
    ],
)
def test_chunks_that_depend_on_traffic_are_refused(scheduler, chunk):
    config = vllm_config(scheduler=scheduler)
    if chunk is not None:
        assert Settings.of(config).chunk == chunk
        return
    with pytest.raises(ValueError, match="its chunks depend on traffic"):
        Settings.of(config)
    assert Settings.of(vllm_config({"tokens": 32, "any_chunks": True}, scheduler=scheduler))


def test_the_settings_that_the_page_shows_are_accepted():
    page = (Path(__file__).parent.parent / "docs" / "serving.md").read_text()
    shown = re.findall(r'^ +(\{"less": .*\})$', page, re.MULTILINE)
    assert len(shown) == 4
    for text in shown:
        Settings.of(vllm_config(json.loads(text)["less"]))


def test_another_vllm_is_refused_by_name():
    check_version("0.32.4")
    for version in ("0.31.0", "0.33.0rc1", "1.32.0"):
        with pytest.raises(RuntimeError, match=rf"vllm must be 0.32.x.*got {version}"):
            check_version(version)


# -- a model ---------------------------------------------------------------------------------------


def facts(part=(0, 1)):
    return facts_of(tiny_model().config, torch.bfloat16, CPU, part)


def test_a_model_is_known_from_its_config_alone():
    whole, part = facts(), facts((1, 2))
    assert (whole.layers, whole.q_heads, whole.kv_heads, whole.head_dim) == (2, 4, 2, 16)
    assert (part.q_heads, part.kv_heads, part.part) == (2, 1, (1, 2))
    assert whole.dtype == torch.bfloat16
    assert torch.get_default_dtype() == torch.float32


def test_a_model_that_is_not_served_is_refused_by_name():
    from transformers import BloomConfig

    with pytest.raises(UnsupportedModelError, match="'bloom'.*alibi"):
        facts_of(BloomConfig(hidden_size=64, n_head=4, n_layer=2), torch.float32, CPU, (0, 1))
    with pytest.raises(ValueError, match="kv_heads must be a multiple of world = 4, got 2"):
        facts((0, 4))


def pages(less, part=(0, 1)):
    layers = layers_of(facts(part), request_cache(facts(part), Settings.of(vllm_config(less))))
    return [layer.layout for layer in layers]


def test_a_page_is_that_of_one_row_of_the_same_cache(tmp_path):
    tiny_sidekick().save_pretrained(tmp_path / "sidekick")
    with_curves(tiny_model()).save_pretrained(tmp_path / "curves")
    model = tiny_model().to(torch.bfloat16)
    for own in (
        {"tokens": 32},
        {"tokens": 32, "sidekick": str(tmp_path / "sidekick")},
        {"bytes": 60000, "calibration": str(tmp_path / "curves")},
        {"tokens": 48, "full_layers": 1, "max_tokens": 128},
    ):
        cache = LessConfig.from_settings(own).cache(model)
        assert pages(own) == [layer.layout for layer in cache.held]


def test_each_process_has_the_pages_of_its_heads(tmp_path):
    tiny_sidekick().save_pretrained(tmp_path / "sidekick")
    tiny_calibration().save_pretrained(tmp_path / "calibration")
    for own in (
        {"tokens": 32, "sidekick": str(tmp_path / "sidekick")},
        {"tokens": 48, "rows": "k4v4", "calibration": str(tmp_path / "calibration")},
    ):
        for layout, whole in zip(pages(own, (1, 2)), pages(own), strict=True):
            assert layout.kv_heads == 1
            assert layout.capacity == whole.capacity


def test_a_policy_without_a_rule_is_refused_by_name():
    settings = Settings(LessConfig(tokens=32, policy=HeavyValues(32)))
    with pytest.raises(ValueError, match="policy HeavyValues has no rule"):
        request_cache(facts(), settings)


def test_an_engine_says_once_that_texts_may_be_longer_than_a_sidekicks_training(tmp_path):
    sidekick = tiny_sidekick()
    sidekick.config["training"] = {"text": {"chunk_tokens": 64}}
    sidekick.save_pretrained(tmp_path)
    own = {"tokens": 32, "sidekick": str(tmp_path)}
    limits = request_cache(facts(), Settings.of(vllm_config(own))).limits
    with pytest.warns(UserWarning, match="texts of 64 tokens, and texts may come to 65 here"):
        limits.expect(65)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        limits.expect(66)


# -- steps -----------------------------------------------------------------------------------------

Q, K, D, S = 4, 2, 16, 12


def layer(**settings):
    layout = PageLayout(K, D, S, torch.float32)
    return PagedLayer(H2O(heavy=6, recent=6, decay=0.9), layout, Q, **settings)


def batch(requests, blocks, padding=0):
    """vLLM's metadata of requests (tokens before, tokens now), then of those that pad."""
    now = torch.tensor([t for _, t in requests] + [0] * padding)
    before = torch.tensor([b for b, _ in requests] + [0] * padding)
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), now.cumsum(0)]).int()
    table = torch.tensor([[b] for b in blocks] + [[0]] * padding, dtype=torch.int32)
    return SimpleNamespace(
        query_start_loc=starts.clone(),
        query_start_loc_cpu=starts,
        seq_lens=(before + now).int(),
        block_table_tensor=table,
        num_reqs=len(table),
        max_query_len=int(now.max()),
    )


def one_by_one(of, pool, requests, blocks, q, k, v, chunk):
    """The same step, a call for each request and chunk."""
    out, at = torch.zeros_like(q), 0
    for (before, tokens), block in zip(requests, blocks, strict=True):
        if before == 0:
            of.layout.clear(pool[block : block + 1])
        for first in range(0, tokens, chunk or tokens or 1):
            last = min(first + (chunk or tokens), tokens)
            own = slice(at + first, at + last)
            rows = [x[own].transpose(0, 1).unsqueeze(0) for x in (q, k, v)]
            made = of.attend(pool, *rows, pages=torch.tensor([block], dtype=torch.int32))
            out[own] = made[0].transpose(0, 1)
        at += tokens
    return out


STEPS = {
    "prompts begin": ([(0, 20), (0, 7), (0, 20)], [3, 1, 2]),
    "all decode": ([(20, 1), (7, 1), (20, 1)], [3, 1, 2]),
    "one decodes, prompts go on and begin": ([(21, 1), (8, 5), (21, 5), (0, 9)], [3, 1, 2, 4]),
    "a prompt of one token begins": ([(22, 1), (0, 1), (13, 1)], [3, 5, 1]),
    "a block is used again": ([(0, 30), (1, 1), (9, 8)], [3, 5, 4]),
    "those of one length lie apart": ([(0, 4), (14, 9), (0, 4), (30, 9)], [6, 1, 2, 3]),
}


@pytest.mark.parametrize("chunk", [0, 6])
def test_a_step_computes_what_a_call_for_each_request_does(chunk):
    steps, of = Steps(8, chunk, CPU), layer()
    pool, wanted_pool = (torch.full((8, of.layout.nbytes), 77, dtype=torch.uint8) for _ in "ab")
    g = torch.Generator().manual_seed(0)
    for name, (requests, blocks) in STEPS.items():
        tokens = sum(t for _, t in requests)
        fused = torch.randn(tokens, Q + 2 * K, D, generator=g)  # a projection's output
        q, k, v = fused.split([Q, K, K], 1)
        out = torch.full((tokens, Q, D), torch.nan)
        step = steps.of(batch(requests, blocks))
        assert step.attend(of, pool, q, k, v, out) is out
        assert len(step.groups) == len({t for _, t in requests})
        wanted = one_by_one(of, wanted_pool, requests, blocks, q, k, v, chunk)
        assert torch.equal(out, wanted), name
        assert torch.equal(pool[blocks], wanted_pool[blocks]), name
    untouched = [0, 7]
    assert bool((pool[untouched] == 77).all())


def test_a_batch_that_decodes_is_one_call_without_a_copy():
    calls = []
    of = layer()
    decode_step = of.backend.decode_step
    of.backend = SimpleNamespace(
        decode_step=lambda call, at, plan: calls.append(call) or decode_step(call, at, plan)
    )
    fused = torch.randn(16, Q + 2 * K, D)
    q, k, v = fused.split([Q, K, K], 1)
    out = torch.empty(16, Q, D)
    step = Steps(16, 0, CPU).of(batch([(5, 1)] * 16, range(1, 17)))
    step.attend(of, of.new_pool(17), q, k, v, out)
    (call,) = calls
    given = (call.q, call.k, call.v, call.out)
    assert [x.data_ptr() for x in given] == [x.data_ptr() for x in (q, k, v, out)]


def test_requests_that_pad_a_batch_read_and_write_nothing():
    """A CUDA graph's batch is padded to a size that was captured; all its tokens are written."""
    of, pool = layer(), torch.full((4, layer().layout.nbytes), 77, dtype=torch.uint8)
    q, k, v = torch.randn(4, Q + 2 * K, D).split([Q, K, K], 1)
    out = torch.full((4, Q, D), torch.nan)
    step = Steps(8, 0, CPU).of(batch([(0, 1), (0, 1)], [2, 1], padding=2))
    step.attend(of, pool, q, k, v, out)
    assert torch.equal(out[2:], torch.zeros(2, Q, D))
    torch.testing.assert_close(out[:2], v[:2].repeat_interleave(Q // K, 1))
    assert bool((pool[[0, 3]] == 77).all())


def test_batches_of_one_size_lie_in_the_same_memory():
    steps = Steps(8, 0, CPU)
    first = steps.of(batch([(5, 1)] * 3, [1, 2, 3], padding=1)).groups[0].parts[0].rows.packed
    other = steps.of(batch([(5, 1)] * 5, [1, 2, 3, 4, 5])).groups[0].parts[0].rows.packed
    again = steps.of(batch([(5, 1), (0, 1)], [6, 4], padding=2)).groups[0].parts[0].rows.packed
    assert again.data_ptr() == first.data_ptr() == other.data_ptr()
    assert again.is_contiguous()
    assert again[0].tolist() == [6, 4, -1, -1]
    assert again[1, :2].tolist() == [0, 1]


def test_biased_keys_are_found_in_the_first_prompt_that_shows_them():
    biased, steps = BiasedKeys(None, "k4v4"), Steps(32, 0, CPU)
    keys = torch.randn(20, K, D) * 0.1 + torch.linspace(1, 2, D)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not look(biased, steps.of(batch([(5, 1)] * 20, range(1, 21))), keys)
        assert not look(biased, steps.of(batch([(0, 20)], [0])), keys)  # the engine warms up
    with pytest.warns(UserWarning, match="so that k4v4 rows lose much"):
        assert look(biased, steps.of(batch([(0, 20)], [3])), keys)
    assert not biased.looks
    assert look(BiasedKeys(None, torch.float32), steps.of(batch([(5, 1)], [1])), keys[:1])


def test_groups_of_layers_share_a_step():
    steps, same = Steps(8, 0, CPU), batch([(5, 1)], [1])
    assert steps.of(same) is steps.of(same)
    assert steps.of(same) is not steps.of(batch([(5, 1)], [1]))


# -- the plug-in -----------------------------------------------------------------------------------


def test_what_vllm_loads_imports_nothing_of_less():
    code = (
        "import sys, less_vllm; less_vllm.register(); "
        "assert not {'less', 'torch'} & set(sys.modules), 'imported'; print('nothing')"
    )
    block = "import sys; sys.modules['vllm'] = None; "  # as where it is not installed
    done = subprocess.run(
        [sys.executable, "-c", block + code], capture_output=True, text=True, check=False
    )
    assert done.stdout == "nothing\n", done.stderr
