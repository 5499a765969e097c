"""The two functions that transformers calls: attention and mask, both named ``less``.

Both must be registered: where a mask function is missing, transformers hands no mask at all to the
attention function, and padding would be taken for text. Being registered changes nothing for a
model whose attention implementation is another, so they stay registered after ``attach``: what is
left running on ``less`` without a cache meets an error that says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from less.hf.sliding import SlidingAttention, window_of

NAME = "less"
# Arguments by which models change what attention computes, beside scale and soft-cap.
_CHANGES_RESULT = (
    "head_mask",
    "output_attentions",
    "position_bias",
    "s_aux",
    "sliding_window",
)


class Server(Protocol):
    """Who serves the attention modules of an attached model: its ``Binding``."""

    def attend(
        self,
        module: nn.Module,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        valid: Tensor | None,
        scaling: float | None,
        dropout: float,
        others: dict[str, Any],
    ) -> Tensor:
        """Serve one layer's attention: [B, T, Q, D]; arguments as in ``attention``."""


# Attention module -> who serves it, and as which layer of the cache.
bound: WeakKeyDictionary[nn.Module, tuple[Server, int]] = WeakKeyDictionary()
# id of an attached model's config -> what its sliding layers run. Of the model, a mask function
# learns its config alone.
sliding_masks: dict[int, SlidingAttention] = {}


def register() -> None:
    """Register both functions with transformers; again is a no-op.

    Raises:
        RuntimeError: Somebody else has registered the name.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    for interface, function in ((AttentionInterface, attention), (AttentionMaskInterface, mask)):
        current = interface().get(NAME)
        if current is None:
            interface.register(NAME, function)
        elif current is not function:
            raise RuntimeError(
                f"attach: {interface.__name__} already has another function named {NAME!r}: "
                f"{current!r}"
            )


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend through the cache that the module is bound to.

    Args:
        module: The attention module that calls.
        query: [B, Q, T, D], after the rotary embedding.
        key: [B, K, T, D], the call's own tokens alone.
        value: [B, K, T, D].
        attention_mask: What ``mask`` returned: bool [B, T] or None; of a layer that slides, what
            the model's own mask function did.
        scaling: Factor of q.k.
        dropout: Must be 0.
        **kwargs: Whatever else the model passes on; what would change the result is refused.

    Returns:
        [B, T, Q, D], and None for the attention weights, which nobody computed.

    Raises:
        RuntimeError: The module is not bound to a cache.
        ValueError: The model asks for something that a bounded cache does not do.
    """
    entry = bound.get(module)
    if entry is None:
        raise RuntimeError(
            f"{type(module).__name__} runs with attention implementation {NAME!r} but no cache is "
            "bound to it: use `with less.hf.attach(model, cache):`. (Another model that shares the "
            "attached model's config object meets this too: give it a copy of the config.)"
        )
    binding, layer = entry
    return binding.attend(
        module, layer, query, key, value, attention_mask, scaling, dropout, kwargs
    ), None


def mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Any = None,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Tensor | None:
    """Which of the call's tokens are text, not padding; for layers that slide, their own mask.

    Layers that slide run the attention function that the model had before ``attach``, so their
    mask is made by its mask function, as if nobody had been here.

    For the others, causality needs no mask: the cache knows the order. What was padding in earlier
    calls never entered the cache, so only the mask's last columns matter.

    Returns:
        bool [B, T], False for padding; None if there is none. Or what the model's own mask
        function returns.

    Raises:
        ValueError: The mask does not cover the columns seen and the call's own, or the model asks
            for another pattern than causal attention.
    """
    from transformers.masking_utils import causal_mask_function

    sliding = sliding_masks.get(id(kwargs.get("config")))
    window = window_of(mask_function)
    if sliding is not None and window in sliding.windows:
        own: Tensor | None = sliding.mask(
            batch_size=batch_size,
            q_length=q_length,
            kv_length=kv_length,
            q_offset=q_offset,
            kv_offset=kv_offset,
            mask_function=mask_function,
            attention_mask=attention_mask,
            **kwargs,
        )
        return own
    if window == 0:  # of no layer: a model makes it although none of its layers slides (Qwen2-MoE)
        return None
    if mask_function is not None and mask_function is not causal_mask_function:
        raise ValueError(
            "less.hf: the model asks for an attention pattern that is not plain causal attention "
            "(packed sequences, a sliding window, bidirectional blocks or a mask function of its "
            "own); a bounded cache has no such pattern"
        )
    if attention_mask is None:
        return None
    # kv_length is that of layer 0, which may slide; the columns seen are everybody's.
    columns = q_offset + q_length
    if attention_mask.shape != (batch_size, columns):
        raise ValueError(mask_message(list(attention_mask.shape), batch_size, columns, q_length))
    return text_columns(attention_mask, q_length)


def not_plain(others: Mapping[str, Any]) -> list[str]:
    """Of an attention call's other arguments, those that make it more than a causal softmax."""
    return [
        f"{name}={others[name]!r}"
        for name in _CHANGES_RESULT
        if others.get(name) is not None and others[name] is not False
    ]


def text_columns(attention_mask: Tensor, length: int) -> Tensor | None:
    """The mask's last ``length`` columns as bool; None where all are text and asking is cheap."""
    valid = attention_mask[:, -length:] != 0
    if valid.device.type == "cpu" and bool(valid.all()):  # elsewhere, asking would wait
        return None
    return valid.contiguous()


def mask_message(got: list[int], batch: int, columns: int, length: int) -> str:
    """What to say about a mask of the wrong shape."""
    seen = columns - length
    text = (
        f"attention_mask must have shape [{batch}, {columns}] (the {seen} columns that the cache "
        f"has seen and the {length} of this call), got {got}"
    )
    if seen and len(got) == 2 and got[1] < columns:
        text += (
            ". Is this another prompt? Then call cache.reset() first. To continue, pass the mask "
            "of the whole text"
        )
    return text
