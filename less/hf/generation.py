"""``generate`` on an attached model: which prompts and modes run, and which are refused."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from torch import Tensor

from less.hf import interface
from less.hf.binding import ANOTHER_PROMPT, NO_CACHE, NO_EMBEDS, Binding
from less.hf.switch import shadow

_MODES = ("greedy_search", "sample", "beam_search", "beam_sample")  # of generate


def watch_generate(model: Any, binding: Binding, leave: ExitStack) -> None:
    """Shadow, on this instance alone, the three methods where ``generate`` must be checked.

    ``generate`` feeds ``input_ids[:, seen:]``, whatever the first ``seen`` tokens are, so another
    prompt on a used cache would run, cut and mixed up. Its ``_prefill`` is the one place that holds
    prompt, mask and cache of every decoding mode.
    """
    for name in ("_prefill", "_validate_generation_mode"):
        if not hasattr(model, name):
            import transformers

            raise RuntimeError(
                f"attach: transformers {transformers.__version__} has no GenerationMixin.{name}, "
                "by which a second prompt on a used cache is recognised; less needs 5.23 or a "
                "version like it"
            )

    def prefill(
        original: Callable[..., Any],
        input_ids: Tensor,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        check_prompt(binding, input_ids, generation_config, model_kwargs)
        return original(input_ids, generation_config, model_kwargs, *args, **kwargs)

    def validate(original: Callable[..., Any], mode: Any, *args: Any, **kwargs: Any) -> Any:
        if mode.value == "assisted_generation":
            binding.cache.activate_past_recording()  # raises, with the reason
        if mode.value not in _MODES:
            raise NotImplementedError(
                f"generate: {mode.value} needs to go back or to copy rows, which a bounded cache "
                f"cannot; it does {', '.join(_MODES)}"
            )
        return original(mode, *args, **kwargs)

    def generate(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("custom_generate") is not None:
            raise NotImplementedError(
                "generate: custom_generate brings a loop of its own, in which a second prompt on a "
                "used cache would go unnoticed. Feed the model yourself: model(ids, "
                "past_key_values=cache)"
            )
        if kwargs.get("past_key_values") is None:  # generate would make a full cache
            raise ValueError(NO_CACHE.format(op="generate"))
        return original(*args, **kwargs)

    shadow(model, "_prefill", prefill, leave)
    shadow(model, "_validate_generation_mode", validate, leave)
    shadow(model, "generate", generate, leave)


def check_prompt(
    binding: Binding, input_ids: Tensor, generation_config: Any, model_kwargs: dict[str, Any]
) -> None:
    """Refuse a prompt that does not continue what the cache has seen.

    Args:
        binding: The cache at work in the model.
        input_ids: The prompt, integers [B, T].
        generation_config: Of ``generate``.
        model_kwargs: Of ``generate``: what it passes on to the model.

    Raises:
        ValueError: The message says what to do instead.
    """
    cache = binding.cache
    binding.check_cache("generate", model_kwargs.get("past_key_values"))
    if model_kwargs.get("use_cache") is False:
        raise ValueError("generate: use_cache=False, but a cache is attached to the model")
    if model_kwargs.get("inputs_embeds") is not None:
        raise ValueError(NO_EMBEDS.format(op="generate"))
    rows, length = input_ids.shape
    if rows != cache.batch:
        raise ValueError(
            f"generate: the cache has batch={cache.batch}, got {rows} rows (the prompts, times "
            f"num_beams or num_return_sequences); build the cache with batch={rows}"
        )
    end, room = getattr(generation_config, "max_length", None), cache.max_columns
    if room is not None and end is not None and end - 1 > room:  # the last is never fed
        raise ValueError(
            f"generate: prompt and new tokens may come to {end - 1}, padding included, but the "
            f"cache has room for {room} in its layers of full attention; build it with a "
            "larger max_tokens"
        )
    mask = model_kwargs.get("attention_mask")
    if isinstance(mask, Tensor) and mask.dim() == 2:
        empty = (mask == 0).all(1).nonzero()[:, 0].tolist()
        if empty:
            raise ValueError(
                f"generate: attention_mask marks no token of rows {empty} as text: there is "
                "nothing to go on from. Leave such rows out"
            )
    seen = cache.columns
    if seen == 0:
        return
    binding.check_whole()
    # generate drops a mask of ones, and notes its length.
    dropped = getattr(generation_config, "_mask_length", -1)
    width = dropped if mask is None else mask.shape[1]
    if width != length:  # only the new tokens were passed, with the mask of the whole text
        if width != seen + length:
            text = interface.mask_message([rows, width], rows, seen + length, length)
            raise ValueError(f"generate: {text}")
        return
    if length <= seen:
        raise ValueError(
            f"generate: the prompt has {length} columns, but the cache has already seen "
            f"{seen}. " + ANOTHER_PROMPT
        )
    valid = (mask[:, :seen] != 0) if mask is not None else None
    same = cache.session.is_prefix(input_ids[:, :seen], valid, cache.seen)
    if same is None:
        raise ValueError(
            f"generate: the cache has seen {seen} columns, but not all of them through an "
            "attached model, so the prompt cannot be compared with them. Call cache.reset() "
            "first; or, to continue, pass the new tokens alone with the attention_mask of the "
            "whole text"
        )
    if not same:
        raise ValueError(
            f"generate: the cache has already seen {seen} columns of another text or padding. "
            + ANOTHER_PROMPT
        )
