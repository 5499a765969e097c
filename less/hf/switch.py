"""Which attention function a model calls: another one until an ``ExitStack`` unwinds.

Transformers' attention interface holds attention functions by name, and most models call the one
that their config names. A model whose attention goes past the interface gets another ``forward``
in its attention modules, which calls the function all the same: so whoever wants to stand in a
model's attention (the cache of ``attach``, training's capture) writes one function for all.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from less.hf.models import ModelFacts


def switch_attention(model: Any, facts: ModelFacts, name: str, leave: ExitStack) -> None:
    """Switch the model, and the configs it shares with its parts, to an attention function.

    Args:
        model: Of transformers.
        facts: What ``describe`` says of it.
        name: Under which both an attention and a mask function are registered. A model whose
            attention modules get another ``forward`` still asks its config for the mask function.
        leave: Undoes it.

    Raises:
        RuntimeError: The model did not take it.
    """
    from transformers import PreTrainedModel
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    configs = {id(m.config): m.config for m in model.modules() if isinstance(m, PreTrainedModel)}
    for config in configs.values():
        # The setter checks what is available and may choose another: restore the plain value.
        before = config._attn_implementation_internal
        leave.callback(setattr, config, "_attn_implementation_internal", before)
    if facts.forward is None:
        model.set_attn_implementation(name)
    else:
        forward = functools.partial(facts.forward, ALL_ATTENTION_FUNCTIONS[name])
        for module in facts.modules:
            shadow(module, "forward", forward, leave)
        for config in configs.values():
            config._attn_implementation_internal = name
    for config in configs.values():
        if config._attn_implementation != name:
            raise RuntimeError(
                f"{type(model).__name__} did not take the attention implementation {name!r}, it "
                f"runs {config._attn_implementation!r}"
            )


def shadow(module: Any, name: str, function: Callable[..., Any], leave: ExitStack) -> None:
    """Set ``function(original, ...)`` on the instance in place of a method; ``leave`` undoes it."""
    original = getattr(module, name)
    if name in vars(module):  # somebody else's shadow
        leave.callback(setattr, module, name, original)
    else:
        leave.callback(delattr, module, name)
    # generate inspects signatures: they stay those of the original.
    setattr(module, name, functools.wraps(original)(functools.partial(function, original)))
