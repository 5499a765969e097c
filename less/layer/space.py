"""The space in which rows are stored: rotated by a signed Hadamard matrix, centred and scaled.

    k' = U (c_k * (k - m_k))    q' = U (q / c_k)    v' = U (c_v * (v - m_v))

U, orthogonal and blockwise where D is no power of two, spreads a row's few large channels over all,
so that codes of few bits fit them; m and c are the channels' means and scales. scale q.k is
scale q'.k' plus scale q.m_k, the same for every key of a query. The output comes back by
(U^T out') / c_v + m_v. With m = 0 and c = 1, the defaults, only the rotation is left.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from less._check import require_shape
from less.layer.pieces import in_one_piece

#: The tensors of a space, in the order in which they lie in memory.
SPACE = ("key_mean", "key_scale", "value_mean", "value_scale")


def block_size(D: int) -> int:
    """Numbers that one Hadamard matrix mixes: the largest power of two that divides D."""
    return D & -D


@lru_cache
def _signs(D: int) -> tuple[float, ...]:
    # Bits of a multiplicative generator: the same on every machine, and no dim's neighbour's.
    state, signs = 0x9E3779B9, []
    for _ in range(D):
        state = (state * 1664525 + 1013904223) & 0xFFFFFFFF
        signs.append(1.0 if state >> 31 else -1.0)
    return tuple(signs)


def signs(D: int) -> Tensor:
    """The sign of each dim before U, float32 [D]; fixed."""
    return torch.tensor(_signs(D), dtype=torch.float32)


def butterflies(x: Tensor) -> Tensor:
    """X times the Hadamard matrix of +-1, blockwise over the last dim, in a fixed order.

    For length 1, 2, 4, ... below the block: every pair (i, i + length) becomes its sum and its
    difference. Kernels add in the same order, hence get the same bits.
    """
    D = x.shape[-1]
    length, block = 1, block_size(D)
    while length < block:
        pairs = x.unflatten(-1, (D // (2 * length), 2, length))
        a, b = pairs.select(-2, 0), pairs.select(-2, 1)
        x = torch.stack([a + b, a - b], -2).flatten(-3)
        length *= 2
    return x


@dataclass(frozen=True)
class Space:
    """A layer's space: float16 [K, D] each, which is exact for what is stored here.

    Attributes:
        key_mean: m_k.
        key_scale: c_k times the dim's sign.
        value_mean: m_v.
        value_scale: c_v, likewise.
    """

    key_mean: Tensor
    key_scale: Tensor
    value_mean: Tensor
    value_scale: Tensor

    @classmethod
    def of(
        cls,
        kv_heads: int,
        head_dim: int,
        *,
        key_mean: Tensor | None = None,
        key_scale: Tensor | None = None,
        value_mean: Tensor | None = None,
        value_scale: Tensor | None = None,
    ) -> Space:
        """The space of these means and scales, rounded to float16.

        Args:
            kv_heads: K.
            head_dim: D.
            key_mean: m_k [K, D]; None: 0.
            key_scale: c_k [K, D], above 0; None: 1.
            value_mean: m_v; None: 0.
            value_scale: c_v; None: 1.

        Raises:
            ValueError: A shape is another, or a number is not finite in float16, or a scale not
                above 0.
        """
        shape = [kv_heads, head_dim]

        def tensor(label: str, x: Tensor | None, default: float) -> Tensor:
            if x is None:
                return torch.full(shape, default, dtype=torch.float16)
            require_shape("Space", label, x, shape)
            x = x.detach().to("cpu", torch.float16)
            if not bool(x.isfinite().all()) or (default and not bool((x > 0).all())):
                raise ValueError(f"Space: {label} must be finite{' and above 0' * bool(default)}")
            return x

        sign = signs(head_dim).to(torch.float16)
        return cls(
            key_mean=tensor("key_mean", key_mean, 0.0),
            key_scale=tensor("key_scale", key_scale, 1.0) * sign,
            value_mean=tensor("value_mean", value_mean, 0.0),
            value_scale=tensor("value_scale", value_scale, 1.0) * sign,
        )

    @property
    def factor(self) -> float:
        """What makes the butterflies orthogonal: the root of 1 / block."""
        return float(block_size(self.key_mean.shape[1]) ** -0.5)

    def tensors(self) -> dict[str, Tensor]:
        """By name, in the order of ``SPACE``."""
        return {n: getattr(self, n) for n in SPACE}

    @cached_property
    def memory(self) -> Tensor:
        """All tensors in one piece, uint8 [bytes], as the ops take them."""
        return in_one_piece(self.tensors(), SPACE, self.key_mean.device)[0]

    def to(self, device: torch.device | str) -> Space:
        """The same on another device; itself where it is there."""
        if self.key_mean.device == torch.device(device):
            return self
        return Space(**{n: x.to(device) for n, x in self.tensors().items()})

    def without_key_mean(self) -> Space:
        """The same without means of keys, which a soft-cap does not let through."""
        return replace(self, key_mean=torch.zeros_like(self.key_mean))

    def heads(self, heads: slice) -> Space:
        """That of some of the kv heads."""
        return Space(**{n: x[heads] for n, x in self.tensors().items()})


@lru_cache
def plain_space(kv_heads: int, head_dim: int, device: torch.device) -> Space:
    """The space without means and scales; one for all layers of a shape.

    Args:
        kv_heads: K.
        head_dim: D.
        device: Where.
    """
    return Space.of(kv_heads, head_dim).to(device)
