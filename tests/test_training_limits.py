"""What a sidekick was trained for, its texts' length and its budgets, is heeded by a warning."""

import copy
import warnings

import pytest
import torch

from less import H2O, Full, LessKVCache, Sidekick, SinkRecent
from tests.helpers import random_qkv

LENGTH = 24


def sidekick(budgets=(8, 16), length=LENGTH):
    made = Sidekick.random(2, 4, 2, 8, 3, 6, "exp", 0)
    made.config["model"] = {"name": "tiny"}
    made.config["budgets"] = list(budgets)
    made.config["training"] = {"text": {"chunk_tokens": length}}
    return made


def build(policy=None, maps=None, **more):
    policy = policy or H2O(4, 4)
    return LessKVCache(2, 4, 2, 8, 1, policy, maps or sidekick(), **more)


def feed(cache, tokens):
    for layer in range(cache.layers):
        cache.attend(layer, *random_qkv(1, 4, 2, tokens, 8, seed=layer))


@pytest.fixture
def silent():
    """Within the test, a warning is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


BEYOND = r"sidekick 'tiny' was trained on texts of 24 tokens, and this text has come to {}:"


def test_a_text_beyond_the_trained_length_warns_once_by_name(silent):
    cache = build()
    feed(cache, LENGTH)
    with pytest.warns(UserWarning, match=BEYOND.format(25)) as caught:
        feed(cache, 1)
    assert len(caught) == 1
    feed(cache, 30)
    cache.reset()
    feed(cache, 40)


def test_a_prompt_beyond_the_trained_length_warns_and_so_does_another_cache():
    for _ in range(2):
        with pytest.warns(UserWarning, match=BEYOND.format(60)) as caught:
            feed(build(), 60)
        assert len(caught) == 1


def test_replayed_steps_and_snapshots_count_towards_the_length(silent):
    cache = build()
    feed(cache, 20)
    snapshot = cache.state_dict()
    cache.advance(4)
    with pytest.warns(UserWarning, match=BEYOND.format(25)):
        cache.advance(1)
    snapshot["columns"] = [30, 30]
    with pytest.warns(UserWarning, match=BEYOND.format(30)):
        build().load_state_dict(snapshot)


def test_a_copy_of_a_cache_that_has_warned_does_not_warn_again(silent):
    cache = build()
    with pytest.warns(UserWarning, match="texts of 24"):
        feed(cache, 25)
    feed(copy.deepcopy(cache), 1)


def test_where_nothing_has_left_the_length_does_not_matter(silent):
    cache = build(H2O(20, 20), sidekick(budgets=[40]))
    feed(cache, 40)
    with pytest.warns(UserWarning, match=BEYOND.format(41)):
        feed(cache, 1)


def test_an_unknown_length_and_unknown_budgets_claim_nothing(silent):
    feed(build(H2O(99, 99), Sidekick.random(2, 4, 2, 8, 3, 6, "exp", 0)), 400)


@pytest.mark.parametrize(
    ("policy", "named"),
    [
        (H2O(2, 2), "4"),
        (H2O(64, 64), "128"),
        (SinkRecent(1, 3), "4"),
        ([H2O(2, 2), H2O(10, 7)], "4, 17"),
        ([H2O(4, 4), H2O(10, 7)], "17"),
    ],
)
def test_budgets_beyond_those_trained_for_warn_once_by_name(policy, named):
    message = f"sidekick 'tiny' was trained for 8, 16 tokens per head, and not for {named}:"
    with pytest.warns(UserWarning, match=message) as caught:
        build(policy)
    assert len(caught) == 1


def test_budgets_between_those_trained_for_and_full_layers_do_not_warn(silent):
    for policy in (H2O(4, 4), H2O(6, 6), H2O(8, 8), [Full(400), H2O(8, 8)]):
        build(policy)


def test_of_native_layers_no_budget_is_asked(silent):
    build([None, H2O(4, 4)], native=[0])


def test_maps_in_another_dtype_warn_as_they_do_in_float32():
    for maps in (sidekick().to(torch.float16), sidekick().to(torch.int8)):
        with pytest.warns(UserWarning, match="not for 4"):
            build(H2O(2, 2), maps)
