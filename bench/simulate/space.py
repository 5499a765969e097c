"""The space in which rows of few bits lie: means taken off, channels scaled, signs, Hadamard."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from less.layer.space import block_size, butterflies, signs

FIRST = 4  # tokens left out of moments: the first of a text are unlike all others


@functools.cache
def rotation(D: int) -> Tensor:
    """The cache's rotation as a matrix, orthogonal, float32 [D, D]: x @ rotation(D)."""
    return signs(D)[:, None] * butterflies(torch.eye(D)) * block_size(D) ** -0.5


@dataclass(frozen=True)
class Moments:
    """What calibration measures of a layer, per kv head and channel: float64 [K, D].

    Attributes:
        k_mean: Mean of keys.
        k_var: Their variance.
        q_square: Mean square of the queries of the group.
        v_mean: Mean of values.
        v_var: Their variance.
        v_weight: Squares of the output projection's weights of the channel, summed.
    """

    k_mean: Tensor
    k_var: Tensor
    q_square: Tensor
    v_mean: Tensor
    v_var: Tensor
    v_weight: Tensor


def moments(q: Tensor, k: Tensor, v: Tensor, projection: Tensor) -> Moments:
    """Moments of tokens [B, heads, T, D]; `projection` is the layer's output weight [., Q * D]."""
    B, K, _, D = k.shape
    q, k, v = q.double(), k.double(), v.double()
    weight = projection.double().square().sum(0).view(K, -1, D).sum(1)
    return Moments(
        k_mean=k.mean((0, 2)),
        k_var=k.transpose(0, 1).reshape(K, -1, D).var(1),
        q_square=q.reshape(B, K, -1, D).square().mean((0, 2)),
        v_mean=v.mean((0, 2)),
        v_var=v.transpose(0, 1).reshape(K, -1, D).var(1),
        v_weight=weight,
    )


def _balanced(important: Tensor, spread: Tensor) -> Tensor:
    """Factors of channels [K, D]: after them, noise of one size costs the least; mean log 0."""
    tiny = 1e-9
    c = (important.clamp(min=tiny) / spread.clamp(min=tiny)) ** 0.25
    return c / c.log().mean(-1, keepdim=True).exp()


class Space:
    """Into the space and back. Attention in it is attention: q.k changes by a query's constant.

    Args:
        K: Kv heads.
        D: Head dim.
        measured: Means and scales come from it; None: 0 and 1.
        means: Take the means off.
        scales: Scale the channels.
    """

    def __init__(
        self,
        K: int,
        D: int,
        measured: Moments | None = None,
        means: bool = True,
        scales: bool = True,
    ) -> None:
        self.rotation = rotation(D)
        self.k_mean = self.v_mean = torch.zeros(K, 1, D)
        self.c_k = self.c_v = torch.ones(K, 1, D)
        if measured is not None and means:
            self.k_mean = measured.k_mean.float()[:, None]
            self.v_mean = measured.v_mean.float()[:, None]
        if measured is not None and scales:
            self.c_k = _balanced(measured.q_square, measured.k_var).float()[:, None]
            self.c_v = _balanced(measured.v_weight, measured.v_var).float()[:, None]

    def enter(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [Q, T, D], keys and values [K, T, D] in the space."""
        K, _, D = k.shape
        query = (q.view(K, -1, D) / self.c_k).view(q.shape)
        return (
            query @ self.rotation,
            ((k - self.k_mean) * self.c_k) @ self.rotation,
            ((v - self.v_mean) * self.c_v) @ self.rotation,
        )

    def key_without_mean(self, k: Tensor) -> Tensor:
        """Keys [K, T, D] of the space as the layer's own, less their mean."""
        return (k @ self.rotation.T) / self.c_k

    def leave(self, out: Tensor) -> Tensor:
        """An output [Q, T, D] of the space as the layer's own."""
        K, D = self.c_v.shape[0], out.shape[-1]
        back = (out @ self.rotation.T).view(K, -1, D)
        return (back / self.c_v + self.v_mean).view(out.shape)


SPACES = ("calibrated", "means", "hadamard", "prompt", "prompt-means", "none")
PROMPT = 256  # first tokens of a text that ``prompt`` takes its moments from


def space_by_name(
    name: str, calibrated: dict[int, Moments]
) -> Callable[[int, Tensor, Tensor, Tensor, Tensor], Space] | None:
    """How a layer finds its space, given index, q, k, v and output weight; None: as they come.

    ``calibrated``: means and scales of a training text; ``means``: its means alone; ``prompt``,
    ``prompt-means``: the same of the text's own first tokens; ``hadamard``: neither.
    """
    if name == "none":
        return None

    def space(layer: int, q: Tensor, k: Tensor, v: Tensor, projection: Tensor) -> Space:
        measured = None
        if name in ("calibrated", "means"):
            measured = calibrated[layer]
        elif name in ("prompt", "prompt-means"):
            measured = moments(*(x[None, :, FIRST:PROMPT] for x in (q, k, v)), projection)
        return Space(k.shape[0], k.shape[2], measured, scales=not name.endswith("means"))

    return space
