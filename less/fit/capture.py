"""Capture q, k, v of one decoder layer at a time, over a pool of chunks, with a full cache.

A forward through the whole model for every trained layer would cost L forwards. Instead the hidden
states between two layers are kept for all chunks, one boundary in a memory-mapped file, and the
next layer alone is run over them: it yields its q, k, v and the next boundary. However long the
text and however many the layers, what is held is one boundary on disk (two while a layer runs) and
q, k, v and the output of one layer in memory.

q, k, v are caught where a bounded cache gets them (``less.hf.switch``): by an attention function
registered with transformers for the time of the call. The model and the registry leave as they
came.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from less import reference
from less.hf import interface
from less.hf.models import ModelFacts, describe
from less.hf.switch import switch_attention

_NAME = "less_fit_capture"


@dataclass(frozen=True)
class Captured:
    """What one layer's attention saw and gave, over N chunks of T tokens.

    Attributes:
        q: Queries after the rotary embedding [N, Q, T, D].
        k: Keys after the rotary embedding [N, K, T, D].
        v: Values [N, K, T, D].
        out: Full attention's output before the output projection [N, Q, T, D].
        o_weight: The output projection's weight [hidden size, Q * D].
        scale: Factor of q.k.
        softcap: What scale q.k is held within; 0: nothing.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    o_weight: Tensor
    scale: float
    softcap: float = 0.0


@dataclass(frozen=True)
class _Call:
    """What one call of the attention function got and gave, with a batch of one."""

    tensors: tuple[Tensor, Tensor, Tensor, Tensor]  # q, k, v, out as in Captured
    scale: float
    softcap: float


# What a layer is given beside the hidden states, by place and by name.
_Arguments = tuple[tuple[Any, ...], dict[str, Any]]


class _ReachedError(Exception):
    """Raised by a hook to leave a forward early; never seen outside."""


class LayerWalk:
    """Walk a model's decoder layers over a fixed pool of chunks, first to last.

    Args:
        model: A transformers causal language model that a bounded cache can serve
            (``less.hf.SUPPORTED``).
        ids: Token ids, int64 [N, T].
        folder: Where the boundary's file lies; made by `start` if missing.

    Raises:
        TypeError: it is no transformers model.
        UnsupportedModelError: a ValueError; no bounded cache can serve it, so it needs no sidekick.
        ValueError: its heads are dealt out to several processes, its learned positions end before
            a chunk does, or its layers are in no list.
    """

    def __init__(self, model: Any, ids: Tensor, folder: str | os.PathLike[str]) -> None:
        self.facts = describe(model, "LayerWalk")
        if self.facts.part != (0, 1):
            raise ValueError(
                f"LayerWalk: {self.facts.name} must be whole, but its heads are dealt out to "
                f"{self.facts.part[1]} processes (tensor parallel)"
            )
        if self.facts.longest is not None and ids.shape[1] > self.facts.longest:
            raise ValueError(
                f"LayerWalk: {self.facts.name} has {self.facts.longest} learned positions; ids "
                f"must have no more tokens in a chunk, got {ids.shape[1]}"
            )
        self.model = model
        self.ids = ids
        self.folder = Path(folder)
        self.decoder: Any = self.facts.decoder
        self.layers = _layers(self.facts)
        self._arguments: list[_Arguments] | None = None

    @property
    def sliding(self) -> tuple[int, ...]:
        """The layers that have a sliding window: they are walked through, not captured."""
        return tuple(sorted(self.facts.windows))

    @property
    def boundaries(self) -> list[int]:
        """The layers whose input lies ready on disk, ascending."""
        return sorted(int(p.stem.split("-")[1]) for p in self.folder.glob("before-*.f32"))

    def seek(self, layer: int) -> None:
        """Bring the input of `layer` to disk, from the nearest boundary before it or the text."""
        have = [b for b in self.boundaries if b <= layer]
        if not have:
            self.start()
        for passed in range(max(have, default=0), layer):
            self._run(passed, keep=False)
            self.release(passed)

    def start(self) -> None:
        """Write the input of layer 0 for every chunk."""
        self.folder.mkdir(parents=True, exist_ok=True)
        first: list[Tensor] = []

        def stop(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            first.append(_hidden_states(args, kwargs))
            raise _ReachedError

        with self._as_it_was(), self._map(0, "part") as boundary, torch.no_grad():
            handle = self.layers[0].register_forward_pre_hook(stop, with_kwargs=True)
            try:
                for i in range(len(self.ids)):
                    with contextlib.suppress(_ReachedError):
                        self.decoder(input_ids=self._row(i), use_cache=False)
                    boundary[i] = first.pop()[0].float().cpu()
            finally:
                handle.remove()
        self._finish(0)

    def capture(self, layer: int, tick: Callable[[], None] = lambda: None) -> Captured:
        """Run one layer over all chunks: its q, k, v and output; the next boundary on disk.

        Args:
            layer: Its input must lie on disk (`seek`).
            tick: Called after each chunk.

        Raises:
            ValueError: the boundary before this layer is not there, the layer slides, or its
                attention is not a causal softmax over all tokens.
        """
        window = self.facts.windows.get(layer)
        if window is not None:
            raise ValueError(
                f"capture: layer {layer} slides (sliding_window={window}): it bounds itself, and "
                "has no sidekick"
            )
        captured = self._run(layer, keep=True, tick=tick)
        assert captured is not None
        return captured

    def _run(
        self, layer: int, keep: bool, tick: Callable[[], None] = lambda: None
    ) -> Captured | None:
        if layer not in self.boundaries:
            raise ValueError(
                f"capture: layer must be one whose input is ready {self.boundaries}, got {layer}"
            )
        N, T = self.ids.shape
        args, kwargs = self._layer_arguments()[layer]
        module = self.layers[layer]
        parameter = next(module.parameters())
        held: list[Tensor] = []
        scale = softcap = 0.0
        with (
            self._as_it_was(),
            _catching(self.model, self.facts) as caught,
            self._map(layer) as before,
            self._map(layer + 1, "part") as after,
            torch.no_grad(),
        ):
            for i in range(N):
                x = before[i : i + 1].to(parameter.device, parameter.dtype, copy=True)
                y = module(x, *args, **kwargs)
                after[i] = (y[0] if isinstance(y, tuple) else y)[0].float().cpu()
                if len(caught) != 1:
                    raise ValueError(
                        f"capture: layer {layer} ({type(module).__name__}) must call its attention "
                        f"function once, got {len(caught)} calls"
                    )
                call = caught.pop()
                scale, softcap = call.scale, call.softcap
                if keep:
                    held = held or [t.new_empty((N, *t.shape[1:])) for t in call.tensors]
                    for store, tensor in zip(held, call.tensors, strict=True):
                        store[i] = tensor[0]
                tick()
        self._finish(layer + 1)
        if not keep:
            return None
        if held[0].shape[2] != T or held[1].shape[2] != T:
            raise ValueError(f"capture: layer {layer} attends to {held[1].shape[2]} of {T} tokens")
        q, k, v, out = held
        weight = _output_weight(self.facts.modules[layer])
        return Captured(q, k, v, out, weight, scale, softcap)

    def mean_square(self, layer: int, first: int = 0) -> float:
        """The mean squared norm of the residual stream that enters a layer.

        Args:
            layer: Its input must lie on disk (`seek`).
            first: The first token of a chunk that counts.
        """
        with self._map(layer) as x:
            squares = [chunk[first:].square().sum(-1, dtype=torch.float64).mean() for chunk in x]
        return float(torch.stack(squares).mean())

    def release(self, layer: int) -> None:
        """Delete the boundary before `layer`, once that layer needs it no more."""
        self._path(layer).unlink(missing_ok=True)

    def close(self) -> None:
        """Delete every boundary file."""
        for path in self.folder.glob("before-*"):
            path.unlink()

    # -- inside ------------------------------------------------------------------------------

    def _row(self, i: int) -> Tensor:
        return self.ids[i : i + 1].to(self.decoder.get_input_embeddings().weight.device)

    def _path(self, layer: int, suffix: str = "f32") -> Path:
        return self.folder / f"before-{layer}.{suffix}"

    def _finish(self, layer: int) -> None:
        os.replace(self._path(layer, "part"), self._path(layer))

    @contextlib.contextmanager
    def _map(self, layer: int, suffix: str = "f32") -> Iterator[Tensor]:
        """The boundary before a layer, [N, T, hidden] float32, mapped from its file."""
        shape = (*self.ids.shape, int(self.facts.config.hidden_size))
        size = shape[0] * shape[1] * shape[2]
        path = self._path(layer, suffix)
        if suffix == "f32" and path.stat().st_size != 4 * size:
            raise ValueError(f"capture: {path} holds another pool of chunks; delete it")
        yield torch.from_file(str(path), shared=True, size=size, dtype=torch.float32).view(shape)

    @contextlib.contextmanager
    def _as_it_was(self) -> Iterator[None]:
        training = self.model.training
        self.model.eval()
        try:
            yield
        finally:
            self.model.train(training)

    def _layer_arguments(self) -> list[_Arguments]:
        """The arguments beside the hidden states that the model gives each layer, batch 1."""
        if self._arguments is None:
            found: list[_Arguments] = []
            with (
                self._as_it_was(),
                _catching(self.model, self.facts) as caught,
                contextlib.ExitStack() as leave,
                torch.no_grad(),
            ):

                def note(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                    caught.clear()  # the layer before is of no use, and as large as any
                    others = {k: v for k, v in kwargs.items() if k != "hidden_states"}
                    found.append((args[1:], others))

                for layer in self.layers:
                    leave.callback(layer.register_forward_pre_hook(note, with_kwargs=True).remove)
                self.decoder(input_ids=self._row(0), use_cache=False)
            if len(found) != len(self.layers):
                raise ValueError(
                    f"capture: the model called {len(found)} of its {len(self.layers)} layers"
                )
            self._arguments = found
        return self._arguments


def _layers(facts: ModelFacts) -> nn.ModuleList:
    """The decoder's layers: the list whose i-th entry holds the attention of layer i."""
    for found in facts.decoder.modules():
        if isinstance(found, nn.ModuleList) and len(found) == facts.layers:
            pairs = zip(found, facts.modules, strict=True)
            if all(any(m is attention for m in layer.modules()) for layer, attention in pairs):
                return found
    raise ValueError(f"LayerWalk: {facts.name} must have its decoder layers in one ModuleList")


def _hidden_states(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    x = args[0] if args else kwargs["hidden_states"]
    assert isinstance(x, Tensor)
    return x


def _output_weight(attention: nn.Module) -> Tensor:
    from transformers.pytorch_utils import Conv1D

    for name in ("o_proj", "out_proj", "dense", "c_proj"):
        projection = getattr(attention, name, None)
        if isinstance(projection, nn.Linear):
            return projection.weight.detach()
        if isinstance(projection, Conv1D):  # GPT-2's linear layer, whose weight lies transposed
            weight: Tensor = projection.weight
            return weight.detach().T
    raise ValueError(
        f"capture: {type(attention).__name__} must have its output projection as a linear layer "
        "'o_proj', 'out_proj', 'dense' or 'c_proj'"
    )


@contextlib.contextmanager
def _catching(model: Any, facts: ModelFacts) -> Iterator[list[_Call]]:
    """Let each call of the model's attention append what it got and gave to a list."""
    caught: list[_Call] = []

    def attend(
        _module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        scale: float,
        softcap: float,
    ) -> Tensor:
        out = attend_fully(query, key, value, mask, scale, softcap)
        caught.append(_Call((query, key, value, out), scale, softcap))
        return out

    with calling(model, facts, attend):
        yield caught


#: Attention of a module over a whole text: module, q, k, v, mask, scale, soft-cap -> [B, Q, T, D].
Attention = Callable[[nn.Module, Tensor, Tensor, Tensor, Tensor | None, float, float], Tensor]


@contextlib.contextmanager
def calling(model: Any, facts: ModelFacts, attend: Attention) -> Iterator[None]:
    """Let the model call another attention function; it leaves as it came.

    Raises:
        ValueError: In a call of the model: a layer is no causal softmax over all tokens.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    sliding = {id(facts.modules[i]) for i in facts.windows}

    def attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        dropout: float = 0.0,
        softcap: float | None = None,
        **others: Any,
    ) -> tuple[Tensor, None]:
        if id(module) in sliding:  # the mask has the window
            others.pop("sliding_window", None)
        special = interface.not_plain(others)
        if special:
            raise ValueError(
                f"capture: {type(module).__name__} is not a causal softmax over all tokens "
                f"({', '.join(special)}); such a layer cannot have a sidekick"
            )
        scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
        out = attend(module, query, key, value, attention_mask, scale, softcap or 0.0)
        return out.transpose(1, 2).contiguous(), None

    # An entry of one object of the interface would be overlooked: where the class has none, a model
    # makes no mask at all, and a window would be forgotten.
    AttentionInterface.register(_NAME, attention)
    AttentionMaskInterface.register(_NAME, AttentionMaskInterface()["sdpa"])
    with contextlib.ExitStack() as leave:
        for registry in (AttentionInterface, AttentionMaskInterface):
            leave.callback(registry._global_mapping.pop, _NAME)
        switch_attention(model, facts, _NAME, leave)
        yield


def attend_fully(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, softcap: float
) -> Tensor:
    """Attention over a whole text [B, Q, T, D]; mask: bool [B, 1, T, T], or None: causal."""
    B, Q, T, D = query.shape
    K = key.shape[1]
    if not softcap:
        return nn.functional.scaled_dot_product_attention(
            query, key, value, mask, is_causal=mask is None, scale=scale, enable_gqa=K != Q
        )
    # As the model's own eager attention has it, but in float32 throughout, as the cache does.
    rows = query.float().reshape(B, K, Q // K * T, D)
    logits = reference.capped(rows @ key.float().transpose(2, 3) * scale, softcap)
    seen = torch.ones(T, T, dtype=torch.bool, device=query.device).tril() if mask is None else mask
    logits = logits.view(B, Q, T, T).masked_fill(~seen, -torch.inf).view_as(logits)
    return (logits.softmax(-1) @ value.float()).view(B, Q, T, D).to(query.dtype)
