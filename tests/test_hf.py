"""less.hf against transformers' own models: tiny random configurations, no hub."""

from __future__ import annotations

import copy
import subprocess
import sys
import threading

import pytest
import torch

pytest.importorskip("transformers")

import transformers
from transformers import DynamicCache, TextIteratorStreamer
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import less.hf
from less import LessKVCache, Sidekick, SinkRecent
from less.backend import ops
from less.cache.session import extend_digest
from less.evaluate.families import LAYERS, VOCAB, D, K, Q, build
from less.evaluate.matrix import SMALL, WIDE, Spy, feed, generate, left_padded, prompt, sidekick_for
from less.hf import interface
from tests.helpers import assert_close

BACKENDS = ["reference"] + (["native"] if ops.missing(torch.device("cpu")) is None else [])


@pytest.fixture(scope="module")
def shared():
    return build("llama")


@pytest.fixture
def model(shared):
    """The shared model; every test must leave it as it was."""
    before = footprint(shared)
    yield shared
    assert footprint(shared) == before


def footprint(model):
    """All that attach could leave behind on a model."""
    return (
        {
            id(m.config): m.config._attn_implementation
            for m in model.modules()
            if hasattr(m, "config")
        },
        {
            name: (sorted(vars(m)), len(m._forward_hooks), len(m._forward_pre_hooks))
            for name, m in model.named_modules()
        },
        len(interface.bound),
    )


def new_cache(model, policy=SMALL, sidekick=None, batch=1, dtype=None, backend="reference"):
    return less.hf.cache_for(model, policy, sidekick, batch=batch, dtype=dtype, backend=backend)


# -- the same answers --------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("policy", [SMALL, SinkRecent(sinks=2, recent=6), WIDE])
def test_a_left_padded_batch_equals_its_rows_alone(model, policy, backend):
    rows = [prompt(n, seed=n)[0] for n in (20, 3, 11, 16)]
    sidekick = sidekick_for(model)
    cache = new_cache(model, policy, sidekick, batch=4, backend=backend)
    options = {"output_logits": True, "return_dict_in_generate": True}
    got = generate(model, cache, left_padded(rows), **options)
    assert cache.seen.tolist() == [31, 14, 22, 27]
    for i, row in enumerate(rows):
        alone = new_cache(model, policy, sidekick, backend=backend)
        want = generate(model, alone, row[None], **options)
        assert torch.equal(got.sequences[i, 20:], want.sequences[0, len(row) :])
        assert_close(
            torch.stack(got.logits)[:, i], torch.stack(want.logits)[:, 0], torch.float32, factor=3
        )


def test_positions_stay_those_of_the_text_after_evictions(model):
    # A prompt's last logits do not depend on what is evicted after it, if rotary positions do not.
    ids = prompt(40)
    cache = new_cache(model, WIDE)
    feed(model, cache, ids[:, :39])
    want = feed(model, cache, ids[:, 39:])
    with torch.no_grad():
        assert_close(want[:, -1], model(ids).logits[:, -1], torch.float32)
    small = new_cache(model, SMALL)
    spy = Spy(small)
    feed(model, small, ids[:, :39])
    feed(model, small, ids[:, 39:])
    full = new_cache(model, WIDE)
    spy_full = Spy(full)
    feed(model, full, ids)
    _, k, _, _ = spy.layer(0)
    _, k_full, _, _ = spy_full.layer(0)
    assert_close(k, k_full, torch.float32)  # layer 0's keys depend on the position alone


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int8])
def test_small_slots_serve_a_float32_model(model, dtype, backend):
    ids = prompt(20)
    got = feed(model, new_cache(model, WIDE, dtype=dtype, backend=backend), ids)
    assert got.dtype == torch.float32
    with torch.no_grad():
        want = model(ids).logits
    assert (got - want).norm() / want.norm() < 0.05


def test_a_bfloat16_model_runs_on_a_cache_of_its_dtype():
    model = build("llama").to(torch.bfloat16)
    cache = new_cache(model, WIDE)
    assert cache.dtype == torch.bfloat16
    assert generate(model, cache, prompt(9)).shape == (1, 21)


# -- ways of generating ------------------------------------------------------------------------


def test_sampling_draws_what_the_model_itself_draws(model):
    ids = prompt(15)
    options = {"do_sample": True, "num_return_sequences": 3}
    torch.manual_seed(3)
    got = generate(model, new_cache(model, WIDE, batch=3), ids, **options)
    torch.manual_seed(3)
    assert torch.equal(got, model.generate(ids, max_new_tokens=12, **options))


def test_beam_search_reorders_slots_and_state(model):
    sidekick = sidekick_for(model)
    cache = new_cache(model, SMALL, sidekick, batch=4)
    got = generate(model, cache, prompt(18), num_beams=4, num_return_sequences=4)
    # The best beam, fed again from the start, leaves the same cache as its row.
    best = new_cache(model, SMALL, sidekick)
    feed(model, best, prompt(18))
    for token in got[0, 18:-1]:
        feed(model, best, token.view(1, 1))
    wanted = best.state(LAYERS - 1)[0][0]
    rows = cache.state(LAYERS - 1)[0]
    assert min((row - wanted).abs().max() for row in rows) <= 1e-4 * wanted.abs().max()


def test_streaming_yields_the_generated_tokens(model):
    class Ids:
        """A tokenizer for the streamer: token 7 is the word "7 "."""

        def decode(self, ids, **kwargs):
            return "".join(f"{int(i)} " for i in ids)

    ids = prompt(10)
    streamer = TextIteratorStreamer(Ids(), skip_prompt=True, timeout=60)
    result = []
    worker = threading.Thread(
        target=lambda: result.append(generate(model, new_cache(model), ids, streamer=streamer))
    )
    worker.start()
    text = "".join(streamer)
    worker.join()
    assert text.split() == [str(int(i)) for i in result[0][0, 10:]]


def test_rows_may_finish_at_different_times():
    model = build("llama")
    rows = [prompt(n, seed=n)[0] for n in (12, 5)]
    first = generate(model, new_cache(model, WIDE, batch=2), left_padded(rows))
    stop = int(first[0, 15])
    options = {"eos_token_id": stop, "pad_token_id": 0}
    got = generate(model, new_cache(model, WIDE, batch=2), left_padded(rows), **options)
    want = model.generate(**left_padded(rows), max_new_tokens=12, do_sample=False, **options)
    assert torch.equal(got, want)
    assert (got[0] == stop).any()


def test_turns_of_a_conversation_continue_on_one_cache(model):
    cache = new_cache(model, SMALL, sidekick_for(model))
    spy = Spy(cache)
    text = prompt(14)
    for turn in range(3):
        text = generate(model, cache, text, new=5)
        text = torch.cat([text, prompt(6, seed=turn)], 1)
    assert cache.columns == text.shape[1] - 7  # less the last turn and the last token sampled
    fed = sum(q.shape[2] for layer, q, *_ in spy.calls if layer == 0)
    assert fed == cache.columns  # nothing twice
    wide = new_cache(model, WIDE)
    text = generate(model, wide, prompt(14), new=5)
    text = torch.cat([text, prompt(6)], 1)
    want = model.generate(text, max_new_tokens=5, do_sample=False)
    assert torch.equal(generate(model, wide, text, new=5), want)


def test_a_padded_conversation_continues_with_the_whole_mask(model):
    inputs = left_padded([prompt(n, seed=n)[0] for n in (12, 5)])
    cache = new_cache(model, WIDE, batch=2)
    text = generate(model, cache, inputs, new=4)
    ids = torch.cat([text, prompt(3, rows=2)], 1)
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 7), value=1)
    both = {"input_ids": ids, "attention_mask": mask}
    want = model.generate(**both, max_new_tokens=4, do_sample=False)
    assert torch.equal(generate(model, cache, both, new=4), want)


def test_new_tokens_alone_continue_with_the_mask_of_the_whole_text(model):
    cache = new_cache(model, WIDE)
    text = generate(model, cache, prompt(14), new=5)
    rest = torch.cat([text[:, -1:], prompt(6)], 1)
    ids = {"input_ids": rest, "attention_mask": torch.ones(1, cache.columns + 7).long()}
    got = generate(model, cache, ids, new=5)
    want = model.generate(torch.cat([text, prompt(6)], 1), max_new_tokens=5, do_sample=False)
    assert torch.equal(got[:, 7:], want[:, 25:])


def test_chunked_turns_continue_on_one_cache(model):
    cache = new_cache(model, WIDE)
    text = generate(model, cache, prompt(14), new=5, prefill_chunk_size=4)
    text = torch.cat([text, prompt(11)], 1)
    want = model.generate(text, max_new_tokens=5, do_sample=False)
    assert torch.equal(generate(model, cache, text, new=5, prefill_chunk_size=4), want)


def test_inference_mode_and_no_grad_may_alternate(model):
    cache = new_cache(model, WIDE)
    with less.hf.attach(model, cache), torch.inference_mode():
        model(prompt(9), past_key_values=cache)
    text = torch.cat([prompt(9), prompt(4, seed=1)], 1)
    want = model.generate(text, max_new_tokens=12, do_sample=False)
    assert torch.equal(generate(model, cache, text), want)


def test_a_base_model_without_a_head_runs_too(model):
    ids = prompt(9)
    cache = new_cache(model.model, WIDE)
    with less.hf.attach(model.model, cache), torch.no_grad():
        got = model.model(ids, past_key_values=cache).last_hidden_state
    with torch.no_grad():
        assert_close(got, model.model(ids).last_hidden_state, torch.float32)


# -- one text per cache ------------------------------------------------------------------------


def used(model, length=10, new=4, **kwargs):
    cache = new_cache(model, **kwargs)
    generate(model, cache, prompt(length), new=new)
    return cache


@pytest.mark.parametrize("length", [5, 13, 14, 30])
@pytest.mark.parametrize("chunk", [None, 4])
def test_a_second_prompt_without_reset_is_refused(model, length, chunk):
    cache = used(model)
    before = cache.state_dict()
    other = prompt(length, seed=9)
    with pytest.raises(ValueError, match=r"reset\(\)"):
        generate(model, cache, other, prefill_chunk_size=chunk)
    assert_same_state(cache.state_dict(), before)
    with pytest.raises(ValueError, match=r"reset\(\)"):
        generate(model, cache, {"input_ids": other, "attention_mask": torch.ones_like(other)})
    cache.reset()
    want = generate(model, new_cache(model), other, prefill_chunk_size=chunk)
    assert torch.equal(generate(model, cache, other, prefill_chunk_size=chunk), want)


def assert_same_state(got, want):
    assert got["columns"] == want["columns"]
    for name, x in want["tensors"].items():
        assert torch.equal(got["tensors"][name], x), name


def test_the_same_prompt_again_is_refused_too(model):
    cache = used(model)
    with pytest.raises(ValueError, match="already seen 13"):
        generate(model, cache, prompt(10))


def test_one_changed_token_in_the_past_is_noticed(model):
    cache = new_cache(model)
    text = generate(model, cache, prompt(10), new=4)
    text = torch.cat([text, prompt(3)], 1)
    changed = text.clone()
    changed[0, 2] += 1
    with pytest.raises(ValueError, match="another text"):
        generate(model, cache, changed)
    generate(model, cache, text)


def test_other_padding_in_the_past_is_noticed(model):
    rows = [prompt(n, seed=n)[0] for n in (12, 5)]
    cache = new_cache(model, batch=2)
    inputs = left_padded(rows)
    text = generate(model, cache, inputs, new=4)
    text = torch.cat([text, prompt(3, rows=2)], 1)
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 7), value=1)
    mask[1, 6] = 1
    with pytest.raises(ValueError, match="another text or padding"):
        generate(model, cache, {"input_ids": text, "attention_mask": mask})


def test_a_second_prompt_by_hand_is_refused_where_mask_or_positions_show_it(model):
    cache = used(model)
    other = prompt(8, seed=9)
    with pytest.raises(ValueError, match=r"Is this another prompt.*reset\(\)"):
        feed(model, cache, other, attention_mask=torch.ones_like(other))
    with pytest.raises(ValueError, match=r"position_ids start at \[0\].*reset\(\)"):
        feed(model, cache, other, position_ids=torch.arange(8)[None])
    wrong = torch.ones(1, 21).long()
    wrong[0, 0] = 0
    with pytest.raises(ValueError, match=r"marks \[12\] of the first 13 columns"):
        feed(model, cache, other, attention_mask=wrong)
    assert cache.columns == 13
    feed(model, cache, other)  # by hand, going on is what past_key_values means


def test_tokens_of_unknown_origin_cannot_be_taken_for_a_prefix(model):
    cache = new_cache(model, WIDE)
    for layer in range(LAYERS):
        cache.attend(layer, torch.ones(1, Q, 3, D), torch.ones(1, K, 3, D), torch.ones(1, K, 3, D))
    with pytest.raises(ValueError, match="not all of them through an attached model"):
        generate(model, cache, prompt(9))


def test_a_digest_is_of_the_text_however_it_is_cut():
    ids = torch.randint(0, VOCAB, (3, 37), generator=torch.Generator().manual_seed(1))
    valid = torch.ones(3, 37, dtype=torch.bool)
    valid[1, :11] = False
    valid[2] = torch.rand(37, generator=torch.Generator().manual_seed(2)) < 0.5
    start = torch.zeros(3, dtype=torch.int64)
    want = []
    for row, keep in zip(ids.tolist(), valid.tolist(), strict=True):
        h = 0
        for i, ok in zip(row, keep, strict=True):
            h = (h * 1_103_515_245 + i + 1) % (2**31 - 1) if ok else h
        want.append(h)
    assert extend_digest(start, ids, valid).tolist() == want
    for cut in (1, 8, 36):
        half = extend_digest(start, ids[:, :cut], valid[:, :cut])
        assert extend_digest(half, ids[:, cut:], valid[:, cut:]).tolist() == want


# -- refusals ----------------------------------------------------------------------------------


def test_a_cache_without_attach_raises(model):
    cache = new_cache(model)
    with pytest.raises(RuntimeError, match=r"less\.hf\.attach"):
        model.generate(prompt(5), past_key_values=cache, max_new_tokens=2)
    assert cache.columns == 0


def test_a_module_that_runs_on_less_without_a_cache_raises(model):
    interface.register()
    lost = build("llama")
    lost.set_attn_implementation("less")
    with pytest.raises(RuntimeError, match="no cache is bound"):
        lost(prompt(5))


def test_a_model_that_shares_the_config_object_is_not_confused(model):
    twin = copy.deepcopy(model)
    for module in twin.modules():
        if hasattr(module, "config"):
            module.config = model.config
    cache = new_cache(model)
    with less.hf.attach(model, cache), torch.no_grad():
        with pytest.raises(RuntimeError, match="shares the attached model's config"):
            twin(prompt(5), past_key_values=cache)
        assert cache.columns == 0
        model(prompt(5), past_key_values=cache)
        other = build("llama")
        other.generate(prompt(5), max_new_tokens=2)
    assert cache.columns == 5


WRONG_CALLS = {
    "no cache": ({}, r"past_key_values is missing: .* call the model as .* model\(ids, past_key"),
    "a full cache": (
        {"past_key_values": DynamicCache()},
        r"past_key_values must be that cache, got another cache \(DynamicCache\)",
    ),
    "use_cache=False": ({"use_cache": False}, "use_cache=False"),
    "output_attentions": ({"output_attentions": True}, "output_attentions"),
    "a mask too short": ({"attention_mask": torch.ones(1, 4)}, r"must have shape \[1, 5\]"),
    "a mask of two rows": ({"attention_mask": torch.ones(2, 5)}, r"must have shape \[1, 5\]"),
    "a mask of four dims": ({"attention_mask": torch.ones(1, 1, 5, 5)}, "padding mask"),
    "two rows": ({"input_ids": prompt(5, rows=2)}, "batch=1"),
    "no tokens": ({"input_ids": prompt(5)[:, :0]}, "input_ids must have shape"),
    "embeddings": ({"input_ids": None, "inputs_embeds": torch.ones(1, 5, Q * D)}, "inputs_embeds"),
}


@pytest.mark.parametrize("case", WRONG_CALLS)
def test_a_wrong_forward_is_refused_and_changes_nothing(model, case):
    changes, message = WRONG_CALLS[case]
    cache = used(model, length=3, new=1)
    cache.reset()
    given = {"input_ids": prompt(5), "past_key_values": cache}
    if case == "no cache":
        del given["past_key_values"]
    with pytest.raises(ValueError, match=message), less.hf.attach(model, cache), torch.no_grad():
        model(**{**given, **changes})
    assert cache.columns == 0
    assert cache.seen.tolist() == [0]
    feed(model, cache, prompt(5))


WRONG_GENERATES = {
    "no cache": (
        {"past_key_values": None},
        ValueError,
        r"^generate: past_key_values is missing: .* model\.generate\(..., past_key_values=cache\)",
    ),
    "a full cache": (
        {"past_key_values": DynamicCache()},
        ValueError,
        r"past_key_values must be that cache, got another cache \(DynamicCache\)",
    ),
    "a row of padding alone": (
        {"attention_mask": torch.zeros(1, 5, dtype=torch.int64)},
        ValueError,
        r"attention_mask marks no token of rows \[0\] as text",
    ),
    "use_cache=False": ({"use_cache": False}, ValueError, "use_cache=False"),
    "beams": ({"num_beams": 2}, ValueError, r"batch=1, got 2 rows.*num_beams.*batch=2"),
    "sequences": ({"num_return_sequences": 2, "do_sample": True}, ValueError, "batch=2"),
    "prompt lookup": ({"prompt_lookup_num_tokens": 2}, NotImplementedError, "cannot roll back"),
    "contrastive search": (
        {"penalty_alpha": 0.6, "top_k": 4, "trust_remote_code": True},
        NotImplementedError,
        "contrastive_search needs to go back",
    ),
    "DoLa": (
        {"dola_layers": "low", "trust_remote_code": True},
        NotImplementedError,
        "dola_generation needs to go back",
    ),
    "custom loop": ({"custom_generate": lambda **_: None}, NotImplementedError, "custom_generate"),
}


@pytest.mark.parametrize("case", WRONG_GENERATES)
def test_a_wrong_generate_is_refused_and_changes_nothing(model, case):
    changes, error, message = WRONG_GENERATES[case]
    cache = new_cache(model)
    with pytest.raises(error, match=message), less.hf.attach(model, cache):
        model.generate(prompt(5), **{"past_key_values": cache, "max_new_tokens": 3, **changes})
    assert cache.columns == 0
    generate(model, cache, prompt(5))


def test_generate_without_the_cache_says_how_to_pass_it(model):
    cache = new_cache(model)
    with (
        pytest.raises(ValueError, match="past_key_values is missing"),
        less.hf.attach(model, cache),
    ):
        model.generate(prompt(5), max_new_tokens=3)
    assert cache.columns == 0


def test_of_a_batch_the_row_without_a_token_is_named(model):
    cache = new_cache(model, batch=3)
    inputs = {"input_ids": prompt(6, rows=3), "attention_mask": torch.ones(3, 6, dtype=torch.int64)}
    inputs["attention_mask"][1] = 0
    with pytest.raises(ValueError, match=r"no token of rows \[1\] as text.*Leave such rows out"):
        generate(model, cache, inputs)
    assert cache.columns == 0


def test_a_row_whose_text_comes_in_a_later_chunk_may_begin_with_padding_alone(model):
    ids = prompt(12, rows=2)
    mask = torch.ones(2, 12, dtype=torch.int64)
    mask[1, :8] = 0
    cache, alone = new_cache(model, batch=2), new_cache(model)
    with less.hf.attach(model, cache), torch.no_grad():
        model(ids[:, :6], attention_mask=mask[:, :6], past_key_values=cache)
        assert cache.seen.tolist() == [6, 0]
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, 6:]
        got = model(
            ids[:, 6:], attention_mask=mask, position_ids=positions, past_key_values=cache
        ).logits[1, -1]
    want = feed(model, alone, ids[1:, 8:])
    assert_close(got, want[0, -1], torch.float32)


def test_a_model_whose_numbers_become_nan_is_refused_and_its_rows_are_named():
    model = build("llama")
    cache = new_cache(model, batch=3)
    ids = prompt(6, rows=3).clamp(max=9)
    ids[1, 2] = 11
    with torch.no_grad():
        model.model.embed_tokens.weight[11] = float("nan")
    with less.hf.attach(model, cache):
        with pytest.raises(RuntimeError, match=r"NaN or infinite in rows \[1\].*cache.reset\(\)"):
            model.generate(ids, past_key_values=cache, max_new_tokens=2, do_sample=False)
        with pytest.raises(RuntimeError, match=r"in rows \[1\]"), torch.no_grad():
            model(ids[:, :1], past_key_values=cache)  # it attends to NaN from now on
        cache.reset()
        with torch.no_grad():
            model(ids[:, :2], past_key_values=cache)


def test_nan_under_padding_is_nobodys(model):
    cache = new_cache(model, batch=2)
    ids, mask = prompt(6, rows=2), torch.ones(2, 6, dtype=torch.int64)
    mask[1, :3] = 0

    def spoil(module, args, hidden):
        hidden[1, :3] = float("nan")

    hook = model.model.layers[-1].register_forward_hook(spoil)
    try:
        with less.hf.attach(model, cache), torch.no_grad():
            logits = model(ids, attention_mask=mask, past_key_values=cache).logits
    finally:
        hook.remove()
    assert logits.isnan().all(2).tolist() == (mask == 0).tolist()


def test_assisted_decoding_is_refused_with_the_reason(model):
    with pytest.raises(NotImplementedError, match="assisted decoding"):
        generate(model, new_cache(model), prompt(5), assistant_model=build("llama"))


def test_a_forward_that_wants_gradients_is_refused(model):
    cache = new_cache(model)
    with pytest.raises(ValueError, match="no_grad"), less.hf.attach(model, cache):
        model(prompt(5), past_key_values=cache)
    assert cache.columns == 0


@pytest.mark.parametrize("family", ["gpt2", "opt", "gpt_bigcode"])
def test_learned_positions_end_and_a_text_that_goes_on_is_refused(family):
    positions = {"opt": "max_position_embeddings"}.get(family, "n_positions")
    model = build(family, **{positions: 24})
    rows = [prompt(20)[0], prompt(9, seed=1)[0]]
    generate(model, new_cache(model, batch=2), left_padded(rows), new=5)  # feeds 24 columns
    cache = new_cache(model, batch=2)
    with pytest.raises(ValueError, match=r"24 learned positions.*bring the text to 25 tokens"):
        generate(model, cache, left_padded(rows), new=6)
    assert cache.columns == 24
    short = new_cache(model)  # what counts is tokens, not columns of padding
    padded = torch.nn.functional.pad(prompt(9), (20, 0))
    mask = (torch.arange(29) >= 20).long()[None]
    generate(model, short, {"input_ids": padded, "attention_mask": mask}, new=8)


def test_falcons_attention_is_its_own_again_afterwards():
    model = build("falcon (7B)")
    with less.hf.attach(model, new_cache(model)):
        assert "forward" in vars(model.transformer.h[0].self_attention)
    assert "forward" not in vars(model.transformer.h[0].self_attention)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": 2}, r"cache\.layers must be 3"),
        ({"q_heads": 8}, r"cache\.q_heads must be 4"),
        ({"kv_heads": 4}, r"cache\.kv_heads must be 2"),
        ({"head_dim": 16}, r"cache\.head_dim must be 8"),
        ({"scale": 0.5}, r"cache\.scale must be"),
        ({"softcap": 30.0}, r"cache\.softcap must be None for .*, got 30"),
        ({"device": "meta"}, "cache must be on cpu"),
    ],
)
def test_a_cache_of_another_shape_is_refused_by_name(model, changes, message):
    shape = {"layers": LAYERS, "q_heads": Q, "kv_heads": K, "head_dim": D, **changes}
    cache = LessKVCache(**shape, batch=1, policy=SMALL, backend="reference")
    with pytest.raises(ValueError, match=message), less.hf.attach(model, cache):
        pass


def test_a_sidekick_of_another_model_is_refused(model):
    other = Sidekick.random(
        LAYERS, Q, K, D + 8, rank=4, hidden=16, generator=torch.Generator().manual_seed(0)
    )
    with pytest.raises(ValueError, match="head_dim"):
        new_cache(model, sidekick=other)
    wrong = sidekick_for(model)
    wrong.config["model"] = {"name": "another", "model_type": "qwen2"}
    with pytest.raises(ValueError, match="qwen2"):
        new_cache(model, sidekick=wrong)


def test_what_is_no_model_or_no_cache_is_refused(model):
    with pytest.raises(TypeError, match="must be a LessKVCache, got DynamicCache"):
        less.hf.attach(model, DynamicCache()).__enter__()
    with pytest.raises(
        TypeError, match=r"cache_for: policy must be given.*H2O\(heavy=32, recent=32"
    ):
        less.hf.cache_for(model)
    with pytest.raises(TypeError, match="PreTrainedModel, got Linear"):
        less.hf.cache_for(torch.nn.Linear(2, 2), SMALL)
    with pytest.raises(TypeError, match=r"torch\.compile"):
        less.hf.cache_for(torch.compile(build("llama")), SMALL)


def test_training_with_dropout_is_refused(model):
    noisy = build("llama", attention_dropout=0.1)
    cache = new_cache(noisy)
    noisy.train()
    with pytest.raises(less.hf.UnsupportedModelError, match=r"model\.eval\(\)"):
        less.hf.attach(noisy, cache).__enter__()
    noisy.eval()
    with less.hf.attach(noisy, cache), torch.no_grad():
        noisy.train()
        with pytest.raises(ValueError, match="dropout"):
            noisy(prompt(5), past_key_values=cache)
    assert cache.columns == 0


def test_a_layer_that_changes_its_attention_inside_the_block_is_refused(model):
    cache = new_cache(model)
    with less.hf.attach(model, cache), torch.no_grad():
        model.config._attn_implementation_internal = "sdpa"
        with pytest.raises(RuntimeError, match=r"layers \[0, 1, 2\] did not attend"):
            model(prompt(5), past_key_values=cache)


# -- what the block leaves behind --------------------------------------------------------------


def test_leaving_restores_the_model_even_after_an_error():
    model = build("llama")
    model.config._attn_implementation = "eager"
    before = footprint(model)
    want = model.generate(prompt(9), max_new_tokens=4, do_sample=False)
    cache = new_cache(model)
    with less.hf.attach(model, cache):
        assert model.config._attn_implementation == "less"
        assert footprint(model) != before
    assert footprint(model) == before
    with pytest.raises(KeyError), less.hf.attach(model, cache):
        raise KeyError("mine")
    assert footprint(model) == before
    assert model.config._attn_implementation == "eager"
    assert torch.equal(model.generate(prompt(9), max_new_tokens=4, do_sample=False), want)
    with pytest.raises(RuntimeError, match="not attached"):
        cache.update(torch.ones(1), torch.ones(1), 0)


def test_registration_is_idempotent_and_leaves_the_other_functions_alone():
    others = {
        n: (ALL_ATTENTION_FUNCTIONS.get(n), ALL_MASK_ATTENTION_FUNCTIONS.get(n))
        for n in ("sdpa", "eager", "flex_attention")
    }
    interface.register()
    interface.register()
    assert ALL_ATTENTION_FUNCTIONS["less"] is interface.attention
    assert ALL_MASK_ATTENTION_FUNCTIONS["less"] is interface.mask
    for n, pair in others.items():
        assert (ALL_ATTENTION_FUNCTIONS.get(n), ALL_MASK_ATTENTION_FUNCTIONS.get(n)) == pair


def test_a_shadow_of_someone_else_comes_back():
    model = build("llama")
    theirs = model._prefill
    model._prefill = theirs
    with less.hf.attach(model, new_cache(model)):
        assert model._prefill is not theirs
    assert vars(model)["_prefill"] is theirs


def test_nested_attach_is_refused_and_the_outer_block_goes_on(model):
    cache = new_cache(model)
    with less.hf.attach(model, cache):
        with (
            pytest.raises(RuntimeError, match="model has a cache attached"),
            less.hf.attach(model, new_cache(model)),
        ):
            pass
        with (
            pytest.raises(RuntimeError, match="cache is attached to a model"),
            less.hf.attach(build("llama"), cache),
        ):
            pass
        model.generate(prompt(5), past_key_values=cache, max_new_tokens=2)


def test_two_models_run_side_by_side(model):
    other = build("qwen3")
    a, b = new_cache(model, WIDE), new_cache(other, WIDE)
    with less.hf.attach(model, a), less.hf.attach(other, b):
        got = model.generate(prompt(8), past_key_values=a, max_new_tokens=4, do_sample=False)
        also = other.generate(prompt(8), past_key_values=b, max_new_tokens=4, do_sample=False)
    assert torch.equal(got, model.generate(prompt(8), max_new_tokens=4, do_sample=False))
    assert torch.equal(also, other.generate(prompt(8), max_new_tokens=4, do_sample=False))


def test_a_forward_that_fails_halfway_is_noticed_at_the_next(model):
    cache = new_cache(model)

    def fail(*args):
        raise KeyboardInterrupt

    hook = model.model.layers[1].mlp.register_forward_pre_hook(fail)
    try:
        with pytest.raises(KeyboardInterrupt):
            feed(model, cache, prompt(5))
    finally:
        hook.remove()
    with pytest.raises(RuntimeError, match=r"failed on its way.*reset\(\)"):
        feed(model, cache, prompt(5))
    cache.reset()
    feed(model, cache, prompt(5))


def test_a_copy_of_an_attached_cache_is_not_attached(model):
    cache = new_cache(model)
    with less.hf.attach(model, cache), torch.no_grad():
        model(prompt(6), past_key_values=cache)
        kept = copy.deepcopy(cache)
        with pytest.raises(ValueError, match="another cache"):
            model(prompt(6), past_key_values=kept)
    text = torch.cat([prompt(6), prompt(3, seed=1)], 1)
    assert torch.equal(generate(model, kept, text), generate(model, cache, text))


def test_a_snapshot_brings_its_text_with_it(model):
    cache = new_cache(model, SMALL, sidekick_for(model))
    text = torch.cat([generate(model, cache, prompt(10), new=4), prompt(5)], 1)
    snapshot = cache.state_dict()
    want = generate(model, cache, text)
    cache.reset()
    generate(model, cache, prompt(10, seed=7), new=4)  # as many tokens, another text
    cache.load_state_dict(snapshot)
    with pytest.raises(ValueError, match="another text"):
        generate(model, cache, torch.cat([prompt(13, seed=7), prompt(5)], 1))
    assert torch.equal(generate(model, cache, text), want)
    other = new_cache(model, SMALL, sidekick_for(model))
    other.load_state_dict(snapshot)
    assert torch.equal(generate(model, other, text), want)


def test_reordered_rows_keep_their_text(model):
    cache = new_cache(model, WIDE, batch=2)
    inputs = left_padded([prompt(9)[0], prompt(9, seed=1)[0]])
    text = torch.cat([generate(model, cache, inputs, new=3), prompt(4, rows=2)], 1)
    cache.reorder(torch.tensor([1, 0]))
    with pytest.raises(ValueError, match="another text"):
        generate(model, cache, text)
    want = model.generate(text.flip(0), max_new_tokens=3, do_sample=False)
    assert torch.equal(generate(model, cache, text.flip(0), new=3), want)


# -- the protocol ------------------------------------------------------------------------------


def test_lengths_count_columns_seen_not_slots_held(model):
    cache = new_cache(model, SMALL, batch=2)
    rows = [prompt(n, seed=n)[0] for n in (20, 6)]
    generate(model, cache, left_padded(rows), new=5)
    assert cache.get_seq_length() == cache.get_query_offset(1) == 24
    assert cache.get_mask_sizes(3, 0) == (27, 0)
    assert cache.seen.tolist() == [24, 10]
    assert cache.get_max_length() == cache.get_max_cache_shape() == -1
    assert (cache.is_compileable, cache.is_croppable, cache.is_initialized) == (False, False, True)
    assert cache.is_sliding == cache.is_linear == cache.is_dummy == [False] * LAYERS
    assert cache.batch_size == 2


def test_what_cannot_be_undone_is_refused_with_the_reason(model):
    cache = new_cache(model, batch=2)
    with pytest.raises(NotImplementedError, match="cannot be rolled back"):
        cache.crop(-1)
    with pytest.raises(NotImplementedError, match="assisted decoding"):
        cache.activate_past_recording()
    with pytest.raises(ValueError, match="batch=6"):
        cache.batch_repeat_interleave(3)
    with pytest.raises(ValueError, match="allocated for 2 rows"):
        cache.batch_select_indices(torch.tensor([0]))
    cache.batch_repeat_interleave(1)


def test_selecting_rows_reorders_them(model):
    cache = new_cache(model, batch=2)
    generate(model, cache, left_padded([prompt(9)[0], prompt(4)[0]]), new=2)
    cache.batch_select_indices(torch.tensor([1, 0]))
    assert cache.seen.tolist() == [5, 10]


def test_the_cache_has_every_method_of_transformers_cache():
    theirs = {n for n in dir(transformers.Cache) if not n.startswith("_")}
    # Not ours: offloading layer by layer, and the states of linear layers.
    theirs -= {"offload", "prefetch", "has_previous_state"}
    theirs -= {n for n in theirs if n.endswith(("conv_state", "recurrent_state", "indexer"))}
    assert theirs <= set(dir(LessKVCache))


# -- imports -----------------------------------------------------------------------------------


def python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_importing_less_imports_and_changes_nothing_of_transformers():
    done = python(
        "import sys\n"
        "import less, less.hf\n"
        "assert not [m for m in sys.modules if m.split('.')[0] == 'transformers']\n"
        "from transformers import AttentionInterface, AttentionMaskInterface\n"
        "assert 'less' not in AttentionInterface()\n"
        "assert 'less' not in AttentionMaskInterface()\n"
    )
    assert done.returncode == 0, done.stderr


def test_importing_less_works_without_transformers():
    done = python(
        "import sys\n"
        "sys.modules['transformers'] = None\n"
        "import less, less.hf\n"
        "less.LessKVCache(1, 2, 1, 4, 1, less.H2O(2, 2), backend='reference')\n"
    )
    assert done.returncode == 0, done.stderr


def test_importing_less_costs_little_more_than_torch():
    done = python(
        "import sys, torch\n"
        "before = set(sys.modules)\n"
        "import less, less.hf\n"
        "new = set(sys.modules) - before\n"
        "others = {m.split('.')[0] for m in new} - {'less'} - set(sys.stdlib_module_names)\n"
        "assert not others, others\n"
        "assert len(new) <= 70, sorted(new)\n"
    )
    assert done.returncode == 0, done.stderr
