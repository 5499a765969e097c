"""``attach``: run a model on a bounded cache for the length of a ``with`` block."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from less.hf import interface
from less.hf.models import ModelFacts, check_fits, check_ready, describe
from less.hf.sliding import SlidingAttention, make_sliding
from less.hf.switch import shadow, switch_attention
from less.hf.weights import warn_of_other_weights

if TYPE_CHECKING:
    from less.cache import LessKVCache
    from less.policies import Policy
    from less.sidekick import Sidekick


def cache_for(
    model: nn.Module,
    policy: Policy | Sequence[Policy | None] | None = None,
    sidekick: Sidekick | None = None,
    batch: int = 1,
    dtype: torch.dtype | None = None,
    backend: str | None = None,
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
        dtype: Of the slots; the model's by default.
        backend: As in ``LessKVCache``.

    Raises:
        TypeError: ``policy`` is not given, or the model is not a transformers model.
        UnsupportedModelError: The model cannot run on a bounded cache.
        ValueError: The sidekick belongs to another model, or an argument is wrong.
    """
    from less.cache import LessKVCache
    from less.sidekick import Sidekick

    if policy is None:
        raise TypeError(
            "cache_for: policy must be given, who stays in the cache: cache_for(model, "
            "H2O(heavy=32, recent=32)); or from a budget, LessConfig(tokens=64).cache(model)"
        )
    facts = describe(model, "cache_for")
    check_ready("cache_for", facts)
    if isinstance(sidekick, Sidekick) and sidekick.part == (0, 1) != facts.part:
        sidekick.check_model(facts.config)  # its message speaks of the whole model
        sidekick = sidekick.shard(*facts.part)
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
    )
    cache.part = facts.part
    check_fits("cache_for", cache, facts)
    warn_of_other_weights(cache, facts)
    make_sliding(cache, facts)
    return cache


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
    from less.cache import LessKVCache

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
    native = SlidingAttention(facts) if facts.windows else None
    make_sliding(cache, facts)
    with ExitStack() as leave:
        binding = Binding(cache, facts, native)
        switch_attention(model, facts, interface.NAME, leave)
        leave.callback(setattr, cache.session, "bound", None)
        cache.session.bound = binding
        if native is not None:
            interface.sliding_masks[id(facts.decoder.config)] = native
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
            _watch_generate(model, binding, leave)
        yield cache


def _watch_generate(model: Any, binding: Binding, leave: ExitStack) -> None:
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
        binding.check_prompt(input_ids, generation_config, model_kwargs)
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
            raise ValueError(_NO_CACHE.format(op="generate"))
        return original(*args, **kwargs)

    shadow(model, "_prefill", prefill, leave)
    shadow(model, "_validate_generation_mode", validate, leave)
    shadow(model, "generate", generate, leave)


@dataclass
class _Call:
    """A forward pass under way."""

    ids: Tensor  # [B, T]
    valid: Tensor | None  # bool [B, T]
    columns: int  # seen before


class Binding:
    """A cache at work in a model: checks each forward pass and serves its attention."""

    def __init__(
        self, cache: LessKVCache, facts: ModelFacts, native: SlidingAttention | None = None
    ) -> None:
        self.cache = cache
        self.facts = facts
        self.native = native
        self.signature = inspect.signature(facts.decoder.forward)
        self.call: _Call | None = None
        self.handed: tuple[int, Tensor] | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """A copy of an attached cache is not attached."""
        return

    # -- a prompt of generate ------------------------------------------------------------------

    def check_prompt(
        self, input_ids: Tensor, generation_config: Any, model_kwargs: dict[str, Any]
    ) -> None:
        """Refuse a prompt that does not continue what the cache has seen."""
        cache = self.cache
        self._check_cache("generate", model_kwargs.get("past_key_values"))
        if model_kwargs.get("use_cache") is False:
            raise ValueError("generate: use_cache=False, but a cache is attached to the model")
        if model_kwargs.get("inputs_embeds") is not None:
            raise ValueError(_NO_EMBEDS.format(op="generate"))
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
        self._check_whole()
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
                f"{seen}. " + _ANOTHER_PROMPT
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
                + _ANOTHER_PROMPT
            )

    # -- a forward pass ------------------------------------------------------------------------

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Check a forward pass before any layer runs: what is refused here changes nothing."""
        op = type(module).__name__
        self.call = self.handed = None
        given = self.signature.bind_partial(*args, **kwargs).arguments
        given = {**given, **given.get("kwargs", {})}
        cache = self.cache
        self._check_cache(op, given.get("past_key_values"))
        if given.get("use_cache") is False:
            raise ValueError(f"{op}: use_cache=False, but a cache is attached to the model")
        if given.get("output_attentions") or getattr(self.facts.config, "output_attentions", False):
            raise ValueError(
                f"{op}: output_attentions: a bounded cache computes no attention weights over the "
                "text; leave the attach block for them"
            )
        ids = given.get("input_ids")
        if ids is None or given.get("inputs_embeds") is not None:
            raise ValueError(_NO_EMBEDS.format(op=op))
        if ids.dim() != 2 or ids.shape[0] != cache.batch or ids.shape[1] == 0:
            raise ValueError(
                f"{op}: input_ids must have shape [{cache.batch}, T] (the cache has "
                f"batch={cache.batch}), got {list(ids.shape)}"
            )
        if torch.is_grad_enabled() and any(p.requires_grad for p in module.parameters()):
            raise ValueError(f"{op}: the cache has no backward; call under torch.no_grad()")
        self._check_whole()
        if cache.max_columns is not None and cache.columns + ids.shape[1] > cache.max_columns:
            raise ValueError(
                f"{op}: the cache has seen {cache.columns} tokens and has room for "
                f"{cache.max_columns} in its layers of full attention, got {ids.shape[1]} more"
            )
        cache.session.fed_tokens()  # starts a new record after a reset
        valid = self._check_mask(op, given.get("attention_mask"), ids.shape[1])
        self._check_length(op, ids.shape[1], valid)
        self._check_positions(op, given.get("position_ids"), valid)
        self.call = _Call(ids, valid, cache.columns)

    def after(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        """Check that every layer went through the cache, and note the tokens."""
        call, self.call, self.handed = self.call, None, None
        if call is None:
            return
        want = call.columns + call.ids.shape[1]
        missed = [i for i, n in enumerate(self.cache.session.columns) if n != want]
        if missed:
            raise RuntimeError(
                f"{type(module).__name__}: layers {missed} did not attend through the cache; "
                "its content is no longer whole, call cache.reset()"
            )
        self.cache.session.feed(call.ids, call.valid)
        self._check_finite(type(module).__name__, call, output)

    def _check_finite(self, op: str, call: _Call, output: Any) -> None:
        """Refuse to go on where the model's own numbers have become NaN or infinite.

        Asking a GPU costs a wait, so there a call of one token is not looked at.
        """
        hidden = output[0]  # [B, T, width], of a tuple as of transformers' ModelOutput
        if torch.compiler.is_compiling() or (hidden.shape[1] == 1 and hidden.device.type != "cpu"):
            return
        bad = ~torch.isfinite(hidden).all(2)
        if call.valid is not None:
            bad &= call.valid.to(bad.device)
        if bool(bad.any()):
            raise RuntimeError(
                f"{op}: the model's hidden states are NaN or infinite in rows "
                f"{bad.any(1).nonzero()[:, 0].tolist()}, and so are keys and values that the cache "
                f"now holds. Does the model overflow in {hidden.dtype}? Call cache.reset(), or "
                "load_state_dict a snapshot"
            )

    def _check_cache(self, op: str, given: object) -> None:
        if given is self.cache:
            return
        if given is None:
            raise ValueError(_NO_CACHE.format(op=op))
        raise ValueError(
            f"{op}: inside less.hf.attach(model, cache), past_key_values must be that cache, got "
            f"another cache ({type(given).__name__})"
        )

    def _check_whole(self) -> None:
        columns = set(self.cache.session.columns)
        if len(columns) != 1:
            raise RuntimeError(
                f"the cache's layers have seen {sorted(columns)} columns: an earlier call failed "
                "on its way through the model. Call cache.reset(), or load_state_dict a snapshot"
            )

    def _check_length(self, op: str, length: int, valid: Tensor | None) -> None:
        """Where positions are learned, a text has a longest length, whatever the cache holds."""
        longest = self.facts.longest
        if longest is None or self.cache.columns + length <= longest:
            return
        new = length if valid is None else valid.sum(1).to(self.cache.device)
        tokens = int((self.cache.seen + new).max())
        if tokens > longest:
            raise ValueError(
                f"{op}: {self.facts.name} has {longest} learned positions, and this call would "
                f"bring the text to {tokens} tokens; a bounded cache does not make it longer"
            )

    def _check_mask(self, op: str, mask: Any, length: int) -> Tensor | None:
        if mask is None:
            return None
        cache = self.cache
        columns = cache.columns + length
        if not isinstance(mask, Tensor) or mask.dim() != 2:
            got = list(mask.shape) if hasattr(mask, "shape") else type(mask).__name__
            raise ValueError(
                f"{op}: attention_mask must be the padding mask [B, columns], got {got}; a bounded "
                "cache cannot follow a mask of its own"
            )
        if mask.shape != (cache.batch, columns):
            raise ValueError(
                f"{op}: " + interface.mask_message(list(mask.shape), cache.batch, columns, length)
            )
        # What earlier calls took for text cannot be changed. (Asking a device costs a wait.)
        if length > 1 or mask.device.type == "cpu":
            earlier = (mask[:, : cache.columns] != 0).sum(1)
            if not torch.equal(earlier.cpu(), cache.seen.cpu()):
                raise ValueError(
                    f"{op}: attention_mask marks {earlier.tolist()} of the first {cache.columns} "
                    f"columns as text, but the cache has seen {cache.seen.tolist()} tokens there. "
                    "Is this another prompt? Then call cache.reset() first"
                )
        return interface.text_columns(mask, length)

    def _check_positions(self, op: str, positions: Any, valid: Tensor | None) -> None:
        """A prompt that starts again at position 0 is another prompt."""
        if not isinstance(positions, Tensor) or positions.dim() != 2:
            return
        if positions.shape[1] == 1 or not self.cache.columns:
            return
        first = positions.expand(self.cache.batch, -1)
        if valid is not None:
            first = first.masked_fill(~valid.to(first.device), torch.iinfo(first.dtype).max)
        start = first.amin(1).cpu()
        if bool((start < self.cache.seen.cpu()).any()):
            raise ValueError(
                f"{op}: position_ids start at {start.tolist()}, but the cache has seen "
                f"{self.cache.seen.tolist()} tokens. " + _ANOTHER_PROMPT
            )

    # -- a layer -------------------------------------------------------------------------------

    def hand(self, layer_idx: int, key: Tensor) -> None:
        """Keys come by on their way from ``update`` to ``attend``."""
        self.handed = (layer_idx, key)

    def update_sliding(self, layer_idx: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """A layer that slides: [B, K, T, D] into its own cache; what its queries may see of it."""
        cache, call = self.cache, self.call
        at = cache.session.sliding[layer_idx]
        if call is None or at is None:
            raise RuntimeError(f"layer {layer_idx}: called outside of the attached model's forward")
        T = key.shape[2]
        # Counted before it is stored: a call that fails between the two is then found unfinished.
        cache.session.columns[layer_idx] += T
        seen = cache.session.sliding_seen[layer_idx]
        seen += T if call.valid is None else call.valid.sum(1).to(seen.device)
        key, value = at.update(key, value)
        if T > 1:  # what the layer keeps is a view, which would hold the memory of all T tokens
            assert at.keys is not None
            assert at.values is not None
            at.keys, at.values = at.keys.clone(), at.values.clone()
        self.handed = (layer_idx, key)
        return key, value

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
        """Serve one layer's attention: [B, T, Q, D]; arguments as in ``interface.attention``.

        A layer that slides has its tokens by now, and runs the model's own attention function.
        """
        op = f"{type(module).__name__} (layer {layer})"
        handed, self.handed = self.handed, None
        if self.call is None:
            raise RuntimeError(f"{op}: called outside of the attached model's forward pass")
        if handed is None or handed[0] != layer or handed[1] is not key:
            raise RuntimeError(
                f"{op}: its keys did not come through cache.update, so this is not the attached "
                "cache's attention (was the model called with another cache, or without?)"
            )
        if self.native is not None and layer in self.facts.windows:
            return self.native.attend(
                module, query, key, value, valid, scaling=scaling, dropout=dropout, **others
            )
        if dropout:
            raise ValueError(f"{op}: dropout={dropout}: call model.eval()")
        if scaling is not None and abs(scaling - self.cache.scale) > 1e-6 * self.cache.scale:
            raise ValueError(f"{op}: scaling must be cache.scale {self.cache.scale}, got {scaling}")
        if others.get("softcap") != self.cache.softcap:
            raise ValueError(
                f"{op}: softcap must be cache.softcap {self.cache.softcap}, got "
                f"{others.get('softcap')}"
            )
        changed = interface.not_plain(others)
        if changed:
            raise ValueError(f"{op}: a bounded cache does not do {', '.join(changed)}")
        if valid is not None and (valid.dim() != 2 or valid.dtype != torch.bool):
            raise ValueError(
                f"{op}: attention_mask must come from less.hf's mask function, bool [B, T], got "
                f"{valid.dtype} {list(valid.shape)}"
            )
        out = self.cache.attend(layer, query, key, value, valid=valid)
        return out.transpose(1, 2).contiguous()


_MODES = ("greedy_search", "sample", "beam_search", "beam_sample")  # of generate
_NO_CACHE = (
    "{op}: past_key_values is missing: inside less.hf.attach(model, cache), call the model as "
    "model.generate(..., past_key_values=cache) or model(ids, past_key_values=cache); without it a "
    "full cache would grow with the text"
)
_NO_EMBEDS = (
    "{op}: inside less.hf.attach, pass input_ids, not inputs_embeds: by its tokens a prompt is "
    "told from the one before"
)
_ANOTHER_PROMPT = (
    "For another prompt call cache.reset() first; to continue, pass the whole text, "
    "beginning with what the cache has seen"
)
