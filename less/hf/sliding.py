"""Layers that bound themselves: a sliding window is served by transformers' own cache and code.

In a mixed model (Gemma, Cohere 2, OLMo 3, ...) some layers attend to the last few tokens alone.
Their memory is bounded already, and what they forget they were trained to forget, so a bounded
cache leaves them as they are: the same cache layer, mask function and attention function as
without ``attach``, inside the one cache object that ``generate`` knows.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from less.hf.models import ModelFacts, UnsupportedModelError

if TYPE_CHECKING:
    from less.cache import LessKVCache

# Implementations that need no more than a module, q, k, v and a mask.
_IMPLEMENTATIONS = ("eager", "sdpa")


def make_sliding(cache: LessKVCache, facts: ModelFacts) -> None:
    """Give a cache the cache layers of a model's sliding layers, where it has none yet.

    Raises:
        ValueError: The cache has one of another window.
    """
    from transformers.cache_utils import DynamicSlidingWindowLayer

    for layer, window in facts.windows.items():
        at = cache.session.sliding[layer]
        if at is None:
            cache.session.sliding[layer] = DynamicSlidingWindowLayer(sliding_window=window)
        elif at.sliding_window != window:
            raise ValueError(
                f"attach: the cache's layer {layer} must slide by {window} tokens for "
                f"{facts.name}, got {at.sliding_window}; less.hf.cache_for builds a cache that fits"
            )


def window_of(mask_function: Any) -> int | None:
    """The window of transformers' sliding causal mask; None of any other mask function."""
    from transformers import masking_utils

    like = masking_utils.sliding_window_causal_mask_function(1)
    if getattr(mask_function, "__code__", None) is not like.__code__:
        return None
    both = mask_function.__closure__[0].cell_contents
    wanted = like.__closure__[0].cell_contents
    if [f.__code__ for f in both] != [f.__code__ for f in wanted]:
        return None
    window: int = both[0].__closure__[0].cell_contents
    return window


class SlidingAttention:
    """The attention and mask functions that a model's sliding layers had before ``attach``."""

    def __init__(self, facts: ModelFacts) -> None:
        """Look both up.

        Raises:
            UnsupportedModelError: They are not among those that run without the model's config
                naming them.
        """
        from transformers import AttentionInterface, AttentionMaskInterface

        name = facts.config._attn_implementation
        if name not in _IMPLEMENTATIONS:
            raise UnsupportedModelError(
                f"attach: {facts.name}: its sliding layers run the model's own attention, which "
                f"must be one of {', '.join(_IMPLEMENTATIONS)}, got {name!r}; call "
                f"model.set_attn_implementation({_IMPLEMENTATIONS[0]!r}) first"
            )
        self.windows = frozenset(facts.windows.values())
        # "eager" is no entry of the interface: each model's file has its own.
        module = sys.modules[type(facts.modules[0]).__module__]
        eager = getattr(module, "eager_attention_forward", None)
        self._attention = AttentionInterface().get_interface(name, eager)
        self.mask = AttentionMaskInterface()[name]

    def attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Any,
        **kwargs: Any,
    ) -> Tensor:
        """What the module would have computed: [B, T, Q, D]."""
        out: Tensor = self._attention(module, query, key, value, mask, **kwargs)[0]
        return out
