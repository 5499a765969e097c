"""A model of transformers whose attention a function computes, a whole text at once."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from bench.simulate.native import Cache, Features, Noise, cold_keys, simulate
from bench.simulate.space import FIRST, Moments, Space, moments
from less.evaluate.perplexity import FROM, Nats

NAME = "bench_simulate"
#: (module, layer, q [Q, T, D], k [K, T, D], v, scale) -> [Q, T, D]
Attend = Callable[[nn.Module, int, Tensor, Tensor, Tensor, float], Tensor]
_serving: list[Attend] = []


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if kwargs.get("sliding_window") or not _serving:  # a layer that slides bounds itself
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **kwargs
        )
    if kwargs.get("softcap"):
        raise ValueError(
            f"bench.simulate: {type(module).__name__} caps its logits, which is not simulated"
        )
    scale = 1 / math.sqrt(query.shape[-1]) if scaling is None else scaling
    q, k, v = (x[0].contiguous() for x in (query, key, value))
    out = _serving[-1](module, module.layer_idx, q, k, v, scale)
    return out[None].transpose(1, 2), None


@contextlib.contextmanager
def _served(model: Any, attend: Attend | None) -> Iterator[None]:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    before = model.config._attn_implementation
    model.set_attn_implementation(NAME)
    if attend is not None:
        _serving.append(attend)
    try:
        yield
    finally:
        if attend is not None:
            _serving.pop()
        model.set_attn_implementation(before)


class _Narrow(nn.Module):
    """A linear layer whose weights and inputs are bfloat16, and its output float32."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight = linear.weight.detach().bfloat16()
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        y = nn.functional.linear(x.bfloat16(), self.weight).float()
        return y if self.bias is None else y + self.bias


def narrow(module: nn.Module) -> None:
    """Let all linear layers multiply in bfloat16, which is faster; the residual stays float32."""
    for name, child in module.named_children():
        if isinstance(child, nn.Linear):
            setattr(module, name, _Narrow(child))
        else:
            narrow(child)


def nats(model: Any, chunks: Tensor, attend: Attend | None, start: int = FROM) -> Nats:
    """Nats of chunks [chunks, length] at positions `start` on, NaN before; None: full attention."""
    values = torch.full(chunks.shape, math.nan, dtype=torch.float64)
    keep = chunks.shape[1] - start + 1
    with torch.inference_mode(), _served(model, attend):
        for i, ids in enumerate(chunks):
            logits = model(ids[None], use_cache=False, logits_to_keep=keep).logits[0, :-1]
            for at in range(0, len(logits), 128):
                part, target = logits[at : at + 128].float(), ids[start + at : start + at + 128]
                cost = nn.functional.cross_entropy(part, target, reduction="none")
                values[i, start + at : start + at + 128] = cost.double()
    return Nats(values)


def calibrate(model: Any, chunks: Tensor) -> dict[int, Moments]:
    """Moments of each layer that attends fully, over the tokens of chunks."""
    seen: dict[int, list[tuple[nn.Module, Tensor, Tensor, Tensor]]] = {}

    def attend(
        module: nn.Module, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float
    ) -> Tensor:
        part = [x[:, FIRST:].clone() for x in (q, k, v)]
        seen.setdefault(layer, []).append((module, *part))
        return full(module, layer, q, k, v, scale)

    nats(model, chunks, attend, chunks.shape[1] - 1)
    return {
        layer: moments(*(torch.stack([p[i] for p in parts]) for i in (1, 2, 3)),
                       parts[0][0].o_proj.weight.detach())  # type: ignore[union-attr, arg-type]
        for layer, parts in seen.items()
    }  # fmt: skip


def full(module: nn.Module, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Full causal attention."""
    G = q.shape[0] // k.shape[0]
    k, v = k.repeat_interleave(G, 0), v.repeat_interleave(G, 0)
    return nn.functional.scaled_dot_product_attention(
        q[None], k[None], v[None], is_causal=True, scale=scale
    )[0]


#: (layer, q [Q, T, D], k [K, T, D], scale) -> features, None where a layer has none. q is the
#: layer's own; k the rows as they are held once they are cold, outside of their space, without its
#: mean.
SidekickFeatures = Callable[[int, Tensor, Tensor, float], "Features | None"]


def bounded(
    cache: Callable[[int], Cache],
    space: Callable[[int, Tensor, Tensor, Tensor, Tensor], Space] | None,
    noise: Noise | None = None,
    sidekick: SidekickFeatures | None = None,
) -> Attend:
    """Attention through a simulated cache for each layer.

    Args:
        cache: That of a layer.
        space: That of a layer's rows, given index, q, k, v and output weight; None: there is none.
        noise: What is added to.
        sidekick: What makes the low-rank state of a layer; None: there is none.
    """

    def attend(
        module: nn.Module, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float
    ) -> Tensor:
        held = cache(layer)
        inside = None if space is None else space(layer, q, k, v, module.o_proj.weight)
        rows = (q, k, v) if inside is None else inside.enter(q, k, v)
        features = None
        if sidekick is not None:
            keys = cold_keys(rows[1], held)
            keys = keys if inside is None else inside.key_without_mean(keys)
            features = sidekick(layer, q, keys, scale)
        out = simulate(*rows, held, scale, noise, features)
        return out if inside is None else inside.leave(out)

    return attend
