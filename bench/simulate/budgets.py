"""Error curves of a training text, along which ``less.budget.deal_curves`` deals slots to heads.

A head's error at a capacity is what its part of the layer's output loses, after the output
projection, with inputs that are exact. A layer's errors are divided by the mean square of the
residual stream that they are added to. ``less.fit.curves`` measures the same through the real
cache, with one layer after another in memory.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bench.simulate import quantizers
from bench.simulate.model import full, nats
from bench.simulate.native import Cache, simulate

GRID = (8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 724)


@dataclass(frozen=True)
class Curves:
    """What heads lose at each of some capacities.

    Attributes:
        capacities: Slots, ascending.
        error: By layer: float64 [K, capacities], per part of the residual stream's mean square.
    """

    capacities: tuple[int, ...]
    error: dict[int, Tensor]


def merging(slots: int) -> Cache:
    """Exact rows that merge under decayed H2O, a quarter recent: what curves are measured with."""
    exact, recent = quantizers.EXACT, max(slots // 4, 1)
    return Cache(exact, exact, slots, exact, sinks=0, hot=0, recent=recent, victim="merge")


def curves(
    model: Any,
    chunks: Tensor,
    grid: Sequence[int] = GRID,
    cache: Callable[[int], Cache] = merging,
) -> Curves:
    """Measure the curves of each layer that attends fully.

    Args:
        model: A causal language model of transformers.
        chunks: Token ids, int64 [chunks, length]; the first quarter of each is not counted.
        grid: Slots of a head.
        cache: The cache of so many slots.
    """
    start = chunks.shape[1] // 4
    lost: dict[int, Tensor] = {}
    power: dict[int, float] = {}

    def attend(
        module: nn.Module, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float
    ) -> Tensor:
        exact = full(module, layer, q, k, v, scale)
        K, (_, T, D) = k.shape[0], q.shape
        heads = module.o_proj.weight.detach().float().view(-1, K, q.shape[0] // K * D)
        errors = torch.zeros(K, len(grid), dtype=torch.float64)
        for i, slots in enumerate(grid):
            apart = (simulate(q, k, v, cache(slots), scale) - exact)[:, start:]
            apart = apart.view(K, -1, T - start, D).transpose(1, 2).reshape(K, T - start, -1)
            for h in range(K):
                errors[h, i] = (apart[h] @ heads[:, h].T).square().sum(-1).double().mean()
        lost[layer] = lost.get(layer, 0) + errors
        return exact

    with _residual(model, start, power):
        nats(model, chunks, attend, chunks.shape[1] - 1)
    return Curves(tuple(grid), {layer: error / power[layer] for layer, error in lost.items()})


@contextlib.contextmanager
def _residual(model: Any, start: int, power: dict[int, float]) -> Iterator[None]:
    """Sum into `power` the mean square norm, over positions, of what each layer is given."""

    def look(layer: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else kwargs["hidden_states"]
            mean = float(x[:, start:].float().square().sum(-1).mean())
            power[layer] = power.get(layer, 0.0) + mean

        return hook

    layers = model.get_decoder().layers
    handles = [
        block.register_forward_pre_hook(look(i), with_kwargs=True) for i, block in enumerate(layers)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
