"""Mixed models: layers that slide keep transformers' own cache, inside a bounded one."""

from __future__ import annotations

import copy

import pytest
import torch

pytest.importorskip("transformers")

import transformers

import less.hf
from less import H2O, LessKVCache, Sidekick, SinkRecent
from less.evaluate.families import MIXED, REFUSED, VOCAB, WINDOW, D, K, Q, build, build_refused
from less.evaluate.matrix import NEW, SMALL, WIDE, Spy, feed, generate, left_padded, prompt
from less.evaluate.perplexity import full_attention, through_caches
from less.evaluate.side_by_side import SideBySide
from less.fit import LayerWalk, Recipe, train
from less.hf import UnsupportedModelError
from tests.helpers import assert_close
from tests.test_hf import footprint

LAYERS = 4
NATIVE, FULL = (0, 2), (1, 3)
KINDS = MIXED["layer_types"]


@pytest.fixture(scope="module")
def shared():
    return build("gemma3_text")


@pytest.fixture
def model(shared):
    """The shared model; every test must leave it as it was."""
    before = footprint(shared)
    yield shared
    assert footprint(shared) == before
    assert not less.hf.interface.sliding_masks


def sidekick():
    generator = torch.Generator().manual_seed(5)
    return Sidekick.random(LAYERS, Q, K, D, rank=4, hidden=16, kind="exp", generator=generator)


def new_cache(model, policy=SMALL, maps=None, batch=1, backend="reference"):
    return less.hf.cache_for(model, policy, maps, batch=batch, backend=backend)


OUTPUT = {"output_logits": True, "return_dict_in_generate": True}


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_sliding_layers_run_the_attention_that_the_model_had(attention):
    model = build("gemma3_text", attention)
    rows = left_padded([prompt(n, seed=n)[0] for n in (20, 3, 11)])
    want = model.generate(**rows, max_new_tokens=NEW, do_sample=False, **OUTPUT)
    got = generate(model, new_cache(model, WIDE, batch=3), rows, **OUTPUT)
    assert torch.equal(got.sequences, want.sequences)
    assert_close(torch.stack(got.logits), torch.stack(want.logits), torch.float32, factor=3)
    assert model.config._attn_implementation == attention


@pytest.mark.parametrize("policy", [SMALL, SinkRecent(sinks=2, recent=6)])
def test_a_left_padded_batch_equals_its_rows_alone(model, policy):
    rows = [prompt(n, seed=n)[0] for n in (20, 3, 11, 16)]
    cache = new_cache(model, policy, sidekick(), batch=4)
    got = generate(model, cache, left_padded(rows), **OUTPUT)
    assert cache.seen.tolist() == [31, 14, 22, 27]
    for i, row in enumerate(rows):
        want = generate(model, new_cache(model, policy, sidekick()), row[None], **OUTPUT)
        assert torch.equal(got.sequences[i, 20:], want.sequences[0, len(row) :])
        assert_close(
            torch.stack(got.logits)[:, i], torch.stack(want.logits)[:, 0], torch.float32, factor=3
        )


@pytest.mark.parametrize("chunk", [3, 7])
def test_a_chunked_prompt_equals_the_models_own(model, chunk):
    rows = left_padded([prompt(n, seed=n)[0] for n in (25, 4, 13)])
    want = model.generate(**rows, max_new_tokens=NEW, do_sample=False)
    cache = new_cache(model, WIDE, batch=3)
    assert torch.equal(generate(model, cache, rows, prefill_chunk_size=chunk), want)


def test_a_snapshot_continues_bit_for_bit(model):
    text = prompt(30, rows=2)
    cache = new_cache(model, SMALL, sidekick(), batch=2)
    feed(model, cache, text[:, :17])
    snapshot, copied = cache.state_dict(), copy.deepcopy(cache)
    want = feed(model, cache, text[:, 17:])
    feed(model, cache, text[:, :5])  # whatever came since
    cache.load_state_dict(snapshot)
    fresh = new_cache(model, SMALL, sidekick(), batch=2)
    fresh.load_state_dict(snapshot)
    for one in (cache, copied, fresh):
        assert torch.equal(feed(model, one, text[:, 17:]), want)


def test_a_snapshot_before_the_first_token_is_empty(model):
    cache = new_cache(model)
    empty = cache.state_dict()
    want = feed(model, cache, prompt(9))
    cache.load_state_dict(empty)
    assert cache.memory()["native"] == 0
    assert torch.equal(feed(model, cache, prompt(9)), want)


def test_reset_starts_another_text(model):
    cache = new_cache(model, SMALL, sidekick())
    want = generate(model, cache, prompt(20))
    generate(model, cache, torch.cat([want, prompt(4, seed=2)], 1))
    cache.reset()
    assert cache.memory()["native"] == 0
    assert torch.equal(generate(model, cache, prompt(20)), want)


def test_memory_counts_the_windows_and_stays_bounded(model):
    cache = new_cache(model, batch=2)
    each = 2 * 2 * K * D * 4  # k and v of a token in one layer, both rows, float32
    assert cache.memory()["native"] == 0
    feed(model, cache, prompt(4, rows=2))
    assert cache.memory()["native"] == 4 * each * len(NATIVE)
    for length in (3, 40, 1, 1):
        feed(model, cache, prompt(length, seed=length, rows=2))
    held = cache.memory()
    # transformers keeps a view of the tokens that a step's query saw: one more than the next needs.
    assert held["native"] == WINDOW * each * len(NATIVE)
    assert held["total"] == sum(held[n] for n in ("slots", "state", "maps", "workspace", "native"))
    assert held["full"] == 49 * each * len(FULL) + held["native"]
    stats = cache.stats()
    assert stats["seen"] == [98] * LAYERS
    assert stats["kept"] == [98, 16, 98, 16]
    assert stats["evictions"] == [0, 82, 0, 82]


def test_slots_state_and_maps_are_those_of_the_other_layers(model):
    mixed = new_cache(model, SMALL, sidekick()).memory()
    alone = LessKVCache(
        layers=2,
        q_heads=Q,
        kv_heads=K,
        head_dim=D,
        batch=1,
        policy=SMALL,
        sidekick=Sidekick([sidekick()[i] for i in FULL], kind="exp"),
        backend="reference",
    ).memory()
    for name in ("slots", "state", "maps"):
        assert mixed[name] == alone[name]


def test_what_a_native_layer_does_not_have_is_refused(model):
    cache = new_cache(model, SMALL, sidekick())
    x = torch.zeros(1, Q, 1, D)
    for call in (
        lambda: cache.positions(0),
        lambda: cache.scores(0),
        lambda: cache.weights(2),
        lambda: cache.state(2),
        lambda: cache.attend(0, x, x[:, :K], x[:, :K]),
    ):
        with pytest.raises(ValueError, match=r"layer \d slides"):
            call()
    assert cache.positions(1).shape == (1, K, SMALL.capacity)
    assert cache.is_sliding == [True, False, True, False]
    assert cache.get_seq_length(0) == cache.get_seq_length(1) == 0


def test_columns_are_counted_alike_and_mask_sizes_by_layer(model):
    cache = new_cache(model)
    feed(model, cache, prompt(20))
    assert [cache.get_seq_length(i) for i in range(LAYERS)] == [20] * LAYERS
    assert cache.get_mask_sizes(2, 0) == (WINDOW - 1 + 2, 20 - WINDOW + 1)
    assert cache.get_mask_sizes(2, 1) == (22, 0)


@pytest.mark.parametrize(
    ("native", "message"),
    [
        ([4], r"native must be in 0 \.\. 3, got 4"),
        ([-1], "native"),
        ([0.5], "native"),
        (range(4), "nothing to bound"),
    ],
)
def test_wrong_native_layers_are_refused(native, message):
    with pytest.raises(ValueError, match=message):
        LessKVCache(
            layers=4, q_heads=Q, kv_heads=K, head_dim=D, batch=1, policy=SMALL, native=native
        )


def test_a_cache_of_other_native_layers_is_refused(model):
    shape = {"layers": LAYERS, "q_heads": Q, "kv_heads": K, "head_dim": D, "batch": 1}
    options = {"policy": SMALL, "backend": "reference", "scale": 5**-0.5}
    for native in ((), (0,), (1, 3)):
        cache = LessKVCache(**shape, **options, native=native)
        message = r"cache\.native must be \(0, 2\)"
        with pytest.raises(ValueError, match=message), less.hf.attach(model, cache):
            pass
    by_hand = LessKVCache(**shape, **options, native=[2, 0])
    snapshot = new_cache(model).state_dict()
    with pytest.raises(ValueError, match="load the snapshot after that"):
        by_hand.load_state_dict(snapshot)
    want = generate(model, new_cache(model), prompt(20))
    assert torch.equal(generate(model, by_hand, prompt(20)), want)


def test_a_snapshot_of_another_window_is_refused(model):
    snapshot = new_cache(model).state_dict()
    other = new_cache(build("gemma3_text", sliding_window=9))
    with pytest.raises(ValueError, match="native must be"):
        other.load_state_dict(snapshot)
    with pytest.raises(ValueError, match="slide by 6"), less.hf.attach(model, other):
        pass


def test_an_unfinished_call_is_found(model):
    cache = new_cache(model)
    feed(model, cache, prompt(5))

    def fail(*_):
        raise KeyboardInterrupt

    handle = model.model.layers[1].register_forward_pre_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        feed(model, cache, prompt(3))
    handle.remove()
    with pytest.raises(RuntimeError, match="cache.reset"):
        feed(model, cache, prompt(3))


def test_windows_that_a_cache_cannot_follow_are_refused():
    model = build("qwen3 (mixed)")
    model.config.layer_types = [*KINDS[:3], "sliding_attention"]
    with pytest.raises(UnsupportedModelError, match=r"layers \[0, 2\] slide, but"):
        less.hf.cache_for(model, SMALL)


def test_another_attention_than_eager_and_sdpa_is_refused():
    model = build("gemma3_text")
    cache = new_cache(model)
    model.config._attn_implementation_internal = "flash_attention_2"
    message = "got 'flash_attention_2'"
    with pytest.raises(UnsupportedModelError, match=message), less.hf.attach(model, cache):
        pass


def test_a_mask_of_another_pattern_is_refused(model):
    from transformers import masking_utils as masks

    window_of = less.hf.sliding.window_of
    assert window_of(masks.sliding_window_causal_mask_function(WINDOW)) == WINDOW
    native = less.hf.sliding.SlidingAttention(less.hf.models.describe(model, "test"))
    assert native.windows == {WINDOW}
    causal, overlay = masks.causal_mask_function, masks.sliding_window_overlay(WINDOW)
    for other in (
        causal,
        None,
        overlay,
        masks.sliding_window_bidirectional_mask_function(WINDOW),
        masks.and_masks(overlay, causal, causal),
        masks.or_masks(overlay, causal),
    ):
        assert window_of(other) is None
    assert window_of(masks.sliding_window_causal_mask_function(WINDOW + 1)) == WINDOW + 1


def test_the_text_part_of_a_model_with_images_works_and_the_whole_is_refused():
    config = transformers.Gemma3Config(**REFUSED["gemma3 (images)"].settings)
    torch.manual_seed(0)
    model = transformers.Gemma3ForConditionalGeneration(config).eval()
    with pytest.raises(UnsupportedModelError, match="language_model"):
        less.hf.cache_for(model, SMALL)
    part = model.model.language_model
    ids = prompt(20)
    with torch.no_grad():
        want = part(ids).last_hidden_state
        cache = less.hf.cache_for(part, WIDE, backend="reference")
        with less.hf.attach(part, cache):
            got = torch.cat(
                [part(c, past_key_values=cache).last_hidden_state for c in ids.split(7, 1)], 1
            )
    assert_close(got, want, torch.float32)


def test_perplexity_through_several_caches_is_that_of_each_alone(model):
    chunks = prompt(24, rows=2)
    caches = [new_cache(model, p, batch=2) for p in (WIDE, SMALL)]
    together = through_caches(model, chunks, caches)
    for cache, got in zip(caches, together, strict=True):
        cache.reset()
        alone = through_caches(model, chunks, [cache])[0]
        assert torch.equal(alone.values[:, 1:], got.values[:, 1:])
    want = full_attention(model, chunks)
    assert together[0].mean(1) == pytest.approx(want.mean(1), abs=1e-4)
    assert abs(together[1].mean(1) - want.mean(1)) > 1e-3
    with pytest.raises(ValueError, match="one after the other"):
        SideBySide(caches)


def test_training_leaves_sliding_layers_out_and_its_sidekick_serves_the_others(model, tmp_path):
    text = prompt(40, rows=4)
    recipe = Recipe(rank=4, hidden=8, steps=2, rows=4, held_rows=4)
    made = train(model, text, H2O(4, 4), recipe=recipe, held=1)
    assert [r["layer"] for r in made.config["training"]["layers"]] == list(FULL)
    for layer, maps in enumerate(made):
        assert any(bool(t.any()) for t in maps.values()) == (layer in FULL)
    made.save_pretrained(tmp_path)
    loaded = Sidekick.from_pretrained(tmp_path)
    cache = new_cache(model, SMALL, loaded)
    generate(model, cache, prompt(20))
    assert [share > 0 for share in cache.stats()["memory_share"]] == [i in FULL for i in range(4)]


def test_a_walk_through_a_mixed_model_gives_what_its_bounded_layers_saw(model, tmp_path):
    ids = prompt(25, rows=2)
    walk = LayerWalk(model, ids, tmp_path)
    assert walk.sliding == NATIVE
    cache = new_cache(model, WIDE, batch=2)
    spy = Spy(cache)
    feed(model, cache, ids)
    for layer in FULL:
        walk.seek(layer)
        captured = walk.capture(layer)
        for got, want in zip(
            (captured.q, captured.k, captured.v, captured.out), spy.layer(layer), strict=True
        ):
            assert_close(got, want, torch.float32)
    walk.seek(2)
    with pytest.raises(ValueError, match="sliding_window=6"):
        walk.capture(2)


def test_training_a_model_that_slides_in_every_layer_is_refused():
    with pytest.raises(ValueError, match="nothing to bound"):
        train(build_refused("mistral (v0.1)"), prompt(40, rows=4), H2O(4, 4), held=1)


def test_prompts_of_one_token_and_of_a_window_work(model):
    for length in (1, WINDOW - 1, WINDOW, WINDOW + 1):
        ids = prompt(length)
        want = model.generate(ids, max_new_tokens=NEW, do_sample=False)
        assert torch.equal(generate(model, new_cache(model, WIDE), ids), want)
        assert want.max() < VOCAB


def test_scores_decay_applies_to_the_bounded_layers_alone(model):
    cache = new_cache(model, H2O(heavy=4, recent=4, decay=0.9))
    generate(model, cache, prompt(20))
    assert [cache.scores(i).abs().sum() > 0 for i in FULL] == [True, True]
