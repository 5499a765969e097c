"""Capture q, k, v of one decoder layer at a time, over a pool of chunks, with a full cache.

A forward through the whole model for every trained layer would cost L forwards. Instead the hidden
states between two layers are kept for all chunks, one boundary in a memory-mapped file, and the
next layer alone is run over them: it yields its q, k, v and the next boundary. However long the
text and however many the layers, what is held is one boundary on disk (two while a layer runs) and
q, k, v and the output of one layer in memory.

q, k, v are caught by an attention function registered with transformers for the time of the call;
nothing is patched, and the model and the registry leave as they came.
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

_NAME = "less_fit_capture"
#: Arguments that a model gives its attention function when its attention is not plain softmax.
_NOT_PLAIN = ("softcap", "s_aux", "position_bias")


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
    """

    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    o_weight: Tensor
    scale: float


class _ReachedError(Exception):
    """Raised by a hook to leave a forward early; never seen outside."""


class LayerWalk:
    """Walk a model's decoder layers over a fixed pool of chunks, first to last.

    Args:
        model: A transformers causal language model whose attention goes through transformers'
            attention interface (Llama, Mistral, Qwen, ...).
        ids: Token ids, int64 [N, T].
        folder: Where the boundary's file lies; made if missing.

    Raises:
        ValueError: the model has no decoder layers, or no attention that can be caught.
    """

    def __init__(self, model: Any, ids: Tensor, folder: str | os.PathLike[str]) -> None:
        self.model = model
        self.ids = ids
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
        layers = getattr(self.decoder, "layers", None)
        if not isinstance(layers, nn.ModuleList) or len(layers) == 0:
            raise ValueError(
                f"LayerWalk: {type(model).__name__} must have its decoder layers in '.layers'"
            )
        self.layers = layers
        self._kwargs: list[dict[str, Any]] | None = None
        self._hidden = int(self.decoder.get_input_embeddings().weight.shape[1])

    @property
    def sliding(self) -> tuple[int, ...]:
        """The layers that have a sliding window: they are walked through, not captured."""
        kinds = getattr(getattr(self.decoder, "config", None), "layer_types", None) or ()
        return tuple(i for i, kind in enumerate(kinds) if kind == "sliding_attention")

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
            ValueError: the boundary before this layer is not there, or its attention is not a
                plain causal softmax over all tokens.
        """
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
        kwargs = self._layer_kwargs()[layer]
        module = self.layers[layer]
        parameter = next(module.parameters())
        held: list[Tensor] = []
        attention: nn.Module | None = None
        scale = 0.0
        with (
            self._as_it_was(),
            _catching(self.model, windows=not keep) as caught,
            self._map(layer) as before,
            self._map(layer + 1, "part") as after,
            torch.no_grad(),
        ):
            for i in range(N):
                x = before[i : i + 1].to(parameter.device, parameter.dtype, copy=True)
                y = module(x, **kwargs)
                after[i] = (y[0] if isinstance(y, tuple) else y)[0].float().cpu()
                if len(caught) != 1:
                    raise ValueError(
                        f"capture: layer {layer} ({type(module).__name__}) must call transformers' "
                        f"attention interface once, got {len(caught)} calls"
                    )
                attention, scale, *tensors = caught.pop()
                if keep:
                    held = held or [t.new_empty((N, *t.shape[1:])) for t in tensors]
                    for store, tensor in zip(held, tensors, strict=True):
                        store[i] = tensor[0]
                tick()
        self._finish(layer + 1)
        if not keep:
            return None
        if held[0].shape[2] != T or held[1].shape[2] != T:
            raise ValueError(f"capture: layer {layer} attends to {held[1].shape[2]} of {T} tokens")
        q, k, v, out = held
        return Captured(q, k, v, out, _output_weight(attention), scale)

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
        shape = (*self.ids.shape, self._hidden)
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

    def _layer_kwargs(self) -> list[dict[str, Any]]:
        """The arguments beside the hidden states that the model gives each layer, batch 1."""
        if self._kwargs is None:
            found: list[dict[str, Any]] = []

            def note(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                if len(args) > 1:
                    raise ValueError(
                        f"capture: {type(_module).__name__} takes positional arguments beside the "
                        "hidden states; only keyword arguments can be replayed"
                    )
                found.append({k: v for k, v in kwargs.items() if k != "hidden_states"})

            handles = [m.register_forward_pre_hook(note, with_kwargs=True) for m in self.layers]
            try:
                with self._as_it_was(), _catching(self.model, windows=True), torch.no_grad():
                    self.decoder(input_ids=self._row(0), use_cache=False)
            finally:
                for handle in handles:
                    handle.remove()
            if len(found) != len(self.layers):
                raise ValueError(
                    f"capture: the model called {len(found)} of its {len(self.layers)} layers"
                )
            self._kwargs = found
        return self._kwargs


def _hidden_states(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    x = args[0] if args else kwargs["hidden_states"]
    assert isinstance(x, Tensor)
    return x


def _output_weight(attention: nn.Module | None) -> Tensor:
    for name in ("o_proj", "out_proj", "dense"):
        projection = getattr(attention, name, None)
        if isinstance(projection, nn.Linear):
            return projection.weight.detach()
    raise ValueError(
        f"capture: {type(attention).__name__} must have its output projection as a linear layer "
        "'o_proj', 'out_proj' or 'dense'"
    )


@contextlib.contextmanager
def _catching(model: Any, windows: bool = False) -> Iterator[list[Any]]:
    """Let the model's attention append (module, scale, q, k, v, out) to a list, then restore.

    Attention within a window shorter than the text is refused unless `windows`: the mask that the
    model makes says it all, and what is appended is not to be learned from.
    """
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    inner = ALL_ATTENTION_FUNCTIONS["sdpa"]
    caught: list[Any] = []

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
        special = [name for name in _NOT_PLAIN if kwargs.get(name) is not None]
        window = kwargs.get("sliding_window")
        if not windows and window is not None and window < query.shape[2]:
            special.append(f"sliding_window={window}")
        if special:
            raise ValueError(
                f"capture: {type(module).__name__} is not plain full attention "
                f"({', '.join(special)}); such a layer cannot have a sidekick"
            )
        out, _ = inner(
            module, query, key, value, attention_mask, scaling=scaling, dropout=0.0, **kwargs
        )
        scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
        caught.append((module, scale, query, key, value, out.transpose(1, 2)))
        return out, None

    configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}
    before = {key: getattr(c, "_attn_implementation", None) for key, c in configs.items()}
    ALL_ATTENTION_FUNCTIONS[_NAME] = attention
    # An entry of this one object would be overlooked: where the class has none, a model makes no
    # mask at all, and a window would be forgotten.
    masks = type(ALL_MASK_ATTENTION_FUNCTIONS)
    masks.register(_NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    try:
        for config in configs.values():
            config._attn_implementation = _NAME
        yield caught
    finally:
        for key, config in configs.items():
            config._attn_implementation = before[key]
        del ALL_ATTENTION_FUNCTIONS[_NAME]
        del masks._global_mapping[_NAME]
