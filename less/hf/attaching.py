"""``attach``: run a model on a bounded cache for the length of a ``with`` block."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from less.cache import LessKVCache
from less.calibration import Calibration
from less.hf import interface
from less.hf.binding import Binding
from less.hf.generation import watch_generate
from less.hf.models import ModelFacts, check_fits, check_ready, describe
from less.hf.sliding import SlidingAttention, make_sliding
from less.hf.switch import switch_attention
from less.hf.weights import warn_of_other_weights
from less.policies import Policy
from less.sidekick import Sidekick
from less.sidekick.parts import part_slice


def cache_for(
    model: nn.Module,
    policy: Policy | Sequence[Policy | None] | None = None,
    sidekick: Sidekick | None = None,
    batch: int = 1,
    dtype: torch.dtype | str | None = None,
    backend: str | None = None,
    calibration: Calibration | None = None,
    sinks: int | None = None,
    hot: int | None = None,
    hot_dtype: torch.dtype = torch.int8,
    victim: str | None = None,
    capacities: Sequence[int | Sequence[int] | None] | None = None,
) -> LessKVCache:
    """Build a cache of a model's shape, on its device.

    Args:
        model: A supported transformers model.
        policy: Which tokens stay; required. Or a list of one policy per layer. ``LessConfig.cache``
            makes policies from a budget in tokens, bytes or a share of the prompt.
        sidekick: Feature maps of the low-rank state; None: evicted tokens are forgotten. For a
            model whose heads are sharded over several processes, a whole sidekick is cut to this
            process's heads. A sidekick that notes other weights than the model's warns
            (``less.hf.weights``).
        batch: Rows: prompts, times ``num_beams`` or ``num_return_sequences``.
        dtype: Of the slots, or a packed format such as ``"k4v4"``; the model's by default.
        backend: As in ``LessKVCache``.
        calibration: Means and scales of the model's channels; cut like a sidekick.
        sinks: As in ``LessKVCache``, for packed formats.
        hot: Likewise.
        hot_dtype: Likewise.
        victim: As in ``LessKVCache``.
        capacities: As in ``LessKVCache``, of all kv heads of the model; cut like a sidekick.

    Raises:
        TypeError: ``policy`` is not given, or the model is not a transformers model.
        UnsupportedModelError: The model cannot run on a bounded cache.
        ValueError: The sidekick or the calibration belongs to another model, or an argument is
            wrong.
    """
    if policy is None:
        raise TypeError(
            "cache_for: policy must be given, who stays in the cache: cache_for(model, "
            "H2O(heavy=32, recent=32)); or from a budget, LessConfig(tokens=64).cache(model)"
        )
    facts = describe(model, "cache_for")
    check_ready("cache_for", facts)
    cache = cache_of(
        facts,
        policy,
        sidekick,
        batch=batch,
        dtype=dtype,
        backend=backend,
        calibration=calibration,
        sinks=sinks,
        hot=hot,
        hot_dtype=hot_dtype,
        victim=victim,
        capacities=capacities,
    )
    warn_of_other_weights(cache, facts)
    make_sliding(cache, facts)
    return cache


def cache_of(
    facts: ModelFacts,
    policy: Policy | Sequence[Policy | None],
    sidekick: Sidekick | None = None,
    *,
    batch: int = 1,
    dtype: torch.dtype | str | None = None,
    backend: str | None = None,
    calibration: Calibration | None = None,
    **settings: Any,
) -> LessKVCache:
    """Build a cache from what is known of a model, whose weights may be elsewhere.

    Layers that slide get nothing here.

    Args:
        facts: The model.
        policy: As in ``cache_for``, as are all others.
        sidekick: Likewise.
        batch: Likewise.
        dtype: Likewise.
        backend: Likewise.
        calibration: Likewise.
        **settings: ``sinks``, ``hot``, ``hot_dtype``, ``victim`` and ``capacities``.

    Raises:
        ValueError: The sidekick or the calibration belongs to another model, or an argument is
            wrong.
    """
    if isinstance(sidekick, Sidekick) and sidekick.part == (0, 1) != facts.part:
        sidekick.check_model(facts.config)  # its message speaks of the whole model
        sidekick = sidekick.shard(*facts.part)
    if isinstance(calibration, Calibration):
        calibration.check_model(facts.config)
        if facts.part != (0, 1):
            calibration = calibration.shard(*facts.part)
    capacities = settings.pop("capacities", None)
    if capacities is not None and facts.part != (0, 1):
        capacities = [
            _own_heads(f"capacities[{i}]", slots, facts) for i, slots in enumerate(capacities)
        ]
    cache = LessKVCache(
        layers=facts.layers,
        q_heads=facts.q_heads,
        kv_heads=facts.kv_heads,
        head_dim=facts.head_dim,
        batch=batch,
        policy=policy,
        sidekick=sidekick,
        dtype=facts.dtype if dtype is None else dtype,
        device=facts.device,
        scale=facts.scale,
        backend=backend,
        native=sorted(facts.windows),
        softcap=facts.softcap,
        calibration=calibration,
        capacities=capacities,
        **settings,
    )
    cache.part = facts.part
    check_fits("cache_for", cache, facts)
    return cache


def _own_heads(name: str, slots: Any, facts: ModelFacts) -> Any:
    """The entries of this process's kv heads."""
    rank, world = facts.part
    if slots is None:
        return None
    if not isinstance(slots, (list, tuple)) or len(slots) != facts.kv_heads * world:
        raise ValueError(
            f"cache_for: {name} must list {facts.kv_heads * world} numbers of slots, one per kv "
            f"head of the whole model, got {slots}"
        )
    return slots[part_slice(len(slots), rank, world)]


@contextmanager
def attach(model: nn.Module, cache: LessKVCache) -> Iterator[LessKVCache]:
    """Bind a cache to a model's attention for the length of a ``with`` block.

    Inside, every forward pass of the model needs ``past_key_values=cache``: nothing runs on a full
    cache unnoticed. Outside, the model is what it was before. The cache keeps its content, so a
    later block continues the text; ``cache.reset()`` starts another one::

        with less.hf.attach(model, cache):
            model.generate(**inputs, past_key_values=cache)

    Args:
        model: A supported transformers model (``less.hf.SUPPORTED``).
        cache: A cache of its shape, as ``less.hf.cache_for`` builds it.

    Yields:
        The cache.

    Raises:
        TypeError: An argument is of another kind.
        UnsupportedModelError: The model cannot run on a bounded cache; the message says why.
        ValueError: The cache or its sidekick does not fit the model.
        RuntimeError: The model or the cache is attached already.
    """
    if not isinstance(cache, LessKVCache):
        raise TypeError(f"attach: cache must be a LessKVCache, got {type(cache).__name__}")
    facts = describe(model, "attach")
    check_ready("attach", facts)
    check_fits("attach", cache, facts)
    if any(m in interface.bound for m in facts.modules):
        raise RuntimeError("attach: the model has a cache attached; leave that block first")
    if cache.session.bound is not None:
        raise RuntimeError("attach: the cache is attached to a model; leave that block first")
    warn_of_other_weights(cache, facts)
    interface.register()
    sliding = SlidingAttention(facts) if facts.windows else None
    make_sliding(cache, facts)
    with ExitStack() as leave:
        binding = Binding(cache, facts, sliding)
        switch_attention(model, facts, interface.NAME, leave)
        leave.callback(setattr, cache.session, "bound", None)
        cache.session.bound = binding
        if sliding is not None:
            interface.sliding_masks[id(facts.decoder.config)] = sliding
            leave.callback(interface.sliding_masks.pop, id(facts.decoder.config), None)
        for layer, module in enumerate(facts.modules):
            interface.bound[module] = (binding, layer)
            leave.callback(interface.bound.pop, module, None)
        for hook in (
            facts.decoder.register_forward_pre_hook(binding.before, with_kwargs=True),
            facts.decoder.register_forward_hook(binding.after, with_kwargs=True),
        ):
            leave.callback(hook.remove)
        if callable(getattr(model, "generate", None)):
            watch_generate(model, binding, leave)
        yield cache
