"""The space in which rows are stored: rotated by a signed Hadamard matrix, centred and scaled.

    k' = U (c_k * (k - m_k))    q' = U (q / c_k)    v' = U (c_v * (v - m_v))

U, orthogonal and blockwise where D is no power of two, spreads a row's few large channels over all,
so that codes of few bits fit them; m and c are the channels' means and scales. scale q.k is
scale q'.k' plus scale q.m_k, the same for every key of a query. The output comes back by
(U^T out') / c_v + m_v. With m = 0 and c = 1, the defaults, only the rotation is left.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from less._check import require_shape

#: The tensors of a space, in the order in which they lie in memory.
SPACE = (
    "key_mean",
    "key_in",
    "query_in",
    "value_mean",
    "value_in",
    "value_out",
)


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
    """A layer's space: float32 [K, D] each, signs and U's factor included.

    Attributes:
        key_mean: m_k.
        key_in: c_k times signs over the root of the block.
        query_in: 1 / c_k, likewise.
        value_mean: m_v.
        value_in: c_v, likewise.
        value_out: 1 / c_v, likewise.
    """

    key_mean: Tensor
    key_in: Tensor
    query_in: Tensor
    value_mean: Tensor
    value_in: Tensor
    value_out: Tensor

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
        """The space of these means and scales.

        Args:
            kv_heads: K.
            head_dim: D.
            key_mean: m_k [K, D]; None: 0.
            key_scale: c_k [K, D], above 0; None: 1.
            value_mean: m_v; None: 0.
            value_scale: c_v; None: 1.

        Raises:
            ValueError: A shape is another, or a number is not finite, or a scale not above 0.
        """
        shape = [kv_heads, head_dim]
        factor = signs(head_dim) * block_size(head_dim) ** -0.5

        def tensor(label: str, x: Tensor | None, default: float) -> Tensor:
            if x is None:
                return torch.full(shape, default)
            require_shape("Space", label, x, shape)
            x = x.detach().to("cpu", torch.float32)
            if not bool(x.isfinite().all()) or (default and not bool((x > 0).all())):
                raise ValueError(f"Space: {label} must be finite{' and above 0' * bool(default)}")
            return x

        mean_k, mean_v = tensor("key_mean", key_mean, 0.0), tensor("value_mean", value_mean, 0.0)
        scale_k = tensor("key_scale", key_scale, 1.0)
        scale_v = tensor("value_scale", value_scale, 1.0)
        key_in = scale_k * factor
        return cls(
            key_mean=mean_k,
            key_in=key_in,
            query_in=factor / scale_k,
            value_mean=mean_v,
            value_in=scale_v * factor,
            value_out=factor / scale_v,
        )

    def tensors(self) -> dict[str, Tensor]:
        """By name, in the order of ``SPACE``."""
        return {n: getattr(self, n) for n in SPACE}

    def to(self, device: torch.device | str) -> Space:
        """The same on another device."""
        return Space(**{n: x.to(device) for n, x in self.tensors().items()})

    def without_key_mean(self) -> Space:
        """The same without means of keys, which a soft-cap does not let through."""
        return replace(self, key_mean=torch.zeros_like(self.key_mean))

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(x.nbytes for x in self.tensors().values())

    def heads(self, heads: slice) -> Space:
        """That of some of the kv heads."""
        return Space(**{n: x[heads] for n, x in self.tensors().items()})
