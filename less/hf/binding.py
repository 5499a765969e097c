"""``Binding``: a cache at work in a model, pass by pass."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from less.cache import LessKVCache
from less.hf import interface
from less.hf.models import ModelFacts
from less.hf.sliding import SlidingAttention

NO_CACHE = (
    "{op}: past_key_values is missing: inside less.hf.attach(model, cache), call the model as "
    "model.generate(..., past_key_values=cache) or model(ids, past_key_values=cache); without it a "
    "full cache would grow with the text"
)
NO_EMBEDS = (
    "{op}: inside less.hf.attach, pass input_ids, not inputs_embeds: by its tokens a prompt is "
    "told from the one before"
)
ANOTHER_PROMPT = (
    "For another prompt call cache.reset() first; to continue, pass the whole text, "
    "beginning with what the cache has seen"
)


@dataclass
class _Call:
    """A forward pass under way."""

    ids: Tensor  # [B, T]
    valid: Tensor | None  # bool [B, T]
    columns: int  # seen before


class Binding:
    """A cache at work in a model: checks each forward pass and serves its attention."""

    def __init__(
        self, cache: LessKVCache, facts: ModelFacts, sliding: SlidingAttention | None = None
    ) -> None:
        self.cache = cache
        self.facts = facts
        self.sliding = sliding
        self.signature = inspect.signature(facts.decoder.forward)
        self.call: _Call | None = None
        self.handed: tuple[int, Tensor] | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """A copy of an attached cache is not attached."""
        return

    # -- a forward pass ------------------------------------------------------------------------

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Check a forward pass before any layer runs: what is refused here changes nothing."""
        op = type(module).__name__
        self.call = self.handed = None
        given = self.signature.bind_partial(*args, **kwargs).arguments
        given = {**given, **given.get("kwargs", {})}
        cache = self.cache
        self.check_cache(op, given.get("past_key_values"))
        if given.get("use_cache") is False:
            raise ValueError(f"{op}: use_cache=False, but a cache is attached to the model")
        if given.get("output_attentions") or getattr(self.facts.config, "output_attentions", False):
            raise ValueError(
                f"{op}: output_attentions: a bounded cache computes no attention weights over the "
                "text; leave the attach block for them"
            )
        ids = given.get("input_ids")
        if ids is None or given.get("inputs_embeds") is not None:
            raise ValueError(NO_EMBEDS.format(op=op))
        if ids.dim() != 2 or ids.shape[0] != cache.batch or ids.shape[1] == 0:
            raise ValueError(
                f"{op}: input_ids must have shape [{cache.batch}, T] (the cache has "
                f"batch={cache.batch}), got {list(ids.shape)}"
            )
        if torch.is_grad_enabled() and any(p.requires_grad for p in module.parameters()):
            raise ValueError(f"{op}: the cache has no backward; call under torch.no_grad()")
        self.check_whole()
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
        cache.session.passing = cache.columns

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
        self.cache.session.passing = None
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

    def check_cache(self, op: str, given: object) -> None:
        """Refuse a call that was given no cache, or another one.

        Raises:
            ValueError: It was.
        """
        if given is self.cache:
            return
        if given is None:
            raise ValueError(NO_CACHE.format(op=op))
        raise ValueError(
            f"{op}: inside less.hf.attach(model, cache), past_key_values must be that cache, got "
            f"another cache ({type(given).__name__})"
        )

    def check_whole(self) -> None:
        """Refuse to go on where a pass has ended amid the layers, or before its text was noted.

        Raises:
            RuntimeError: One has.
        """
        session = self.cache.session
        columns = set(session.columns)
        # Of a pass that ended before its first layer wrote, nothing is left.
        left = session.passing is not None and columns != {session.passing}
        if len(columns) != 1 or left:
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
                f"{self.cache.seen.tolist()} tokens. " + ANOTHER_PROMPT
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
        if self.sliding is not None and layer in self.facts.windows:
            return self.sliding.attend(
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
