"""A forward pass that ends at any of its modules, in a prompt and in a decode step.

What is left goes on as if the pass had not begun, or is refused by name at the next.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

import less.hf
from less import H2O, LessKVCache
from less.evaluate.families import build
from less.evaluate.matrix import sidekick_for

POLICY = H2O(heavy=4, recent=4)


class ModelError(Exception):
    """An error of the model's own."""


class Interrupter:
    """Ends a model's pass at its n-th event: a module that begins or returns, or attention."""

    def __init__(self, model: torch.nn.Module, n: int, error: type[BaseException]) -> None:
        self.left, self.error = n, error
        self.hooks = []
        names = ("embed_tokens", "self_attn", "mlp", "norm", "lm_head")
        modules = [m for name, m in model.named_modules() if name.endswith(names)]
        for module in [*modules, *model.model.layers]:
            self.hooks.append(module.register_forward_pre_hook(lambda *_: self.event()))
            self.hooks.append(module.register_forward_hook(lambda *_: self.event()))

    def event(self) -> None:
        self.left -= 1
        if self.left == 0:
            raise self.error

    def __enter__(self) -> Interrupter:
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self.hooks:
            hook.remove()


def ids(T: int, seed: int) -> torch.Tensor:
    return torch.randint(2, 61, (2, T), generator=torch.Generator().manual_seed(seed))


def passes(model: Any, cache: LessKVCache, calls: list[torch.Tensor]) -> torch.Tensor:
    with less.hf.attach(model, cache), torch.no_grad():
        return torch.cat([model(x, past_key_values=cache).logits for x in calls], 1)


def interrupted(
    model: Any, new: Callable[[], LessKVCache], before: list[torch.Tensor], T: int, error: type
) -> tuple[int, int]:
    """Interrupt a call at every event; how many caches went on, and how many were refused."""
    call, after = ids(T, seed=2), ids(1, seed=3)
    cache = new()
    if before:
        passes(model, cache, before)
    start = cache.state_dict()
    want = passes(model, cache, [call, after])
    went_on = refused = n = 0
    while True:
        n += 1
        cache.load_state_dict(start)
        with Interrupter(model, n, error) as interrupter:
            try:
                passes(model, cache, [call])
            except error:
                pass
            else:
                assert interrupter.left > 0
                return went_on, refused
        # Once the layers have returned, the pass counts, whatever the model's head does.
        counted = torch.equal(cache.session.fed_tokens()[:, 0], start["fed"][:, 0] + T)
        rest = [after] if counted else [call, after]
        try:
            got = passes(model, cache, rest)
        except RuntimeError as error_of_next:
            refusal = str(error_of_next)
            refused += 1
        else:
            went_on += 1
            assert torch.equal(got, want[:, -got.shape[1] :]), f"event {n}"
            continue
        assert "an earlier call" in refusal
        assert "reset()" in refusal
        cache.reset()
        got = passes(model, cache, [*before, call, after])
        assert torch.equal(got[:, -T - 1 :], want)


@pytest.mark.parametrize(
    ("family", "T", "error"),
    [
        ("llama", 1, KeyboardInterrupt),
        ("llama", 13, ModelError),
        ("gemma3_text", 1, ModelError),
        ("gemma3_text", 13, KeyboardInterrupt),
    ],
)
def test_a_pass_that_ends_anywhere_leaves_a_cache_that_goes_on_or_is_refused(
    family: str, T: int, error: type
) -> None:
    model = build(family)
    sidekick = sidekick_for(model)

    def new() -> LessKVCache:
        return less.hf.cache_for(model, POLICY, sidekick, batch=2)

    before = [ids(11, seed=1)] if T == 1 else []
    went_on, refused = interrupted(model, new, before, T, error)
    # Until the first layer's attention nothing has changed.
    assert went_on >= 4
    assert refused >= 20


def test_a_prompt_of_generate_that_ends_behind_the_last_layer_is_not_fed_twice() -> None:
    model = build("llama")
    cache = less.hf.cache_for(model, POLICY, batch=2)

    def fail(*_: object) -> None:
        raise ModelError

    norm = model.model.norm.register_forward_pre_hook(fail)
    with less.hf.attach(model, cache), pytest.raises(ModelError):
        model.generate(ids(9, seed=1), past_key_values=cache, max_new_tokens=2)
    norm.remove()
    with (
        less.hf.attach(model, cache),
        pytest.raises(RuntimeError, match=r"an earlier call failed.*reset\(\)"),
    ):
        model.generate(ids(12, seed=1), past_key_values=cache, max_new_tokens=2)
