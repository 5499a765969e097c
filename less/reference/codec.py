"""Packed rows: how a row of floats becomes codes of few bits and a scale, and back.

A row x [D] is stored as codes of b = 4, 3 or 2 bits and one float16 scale: x = scale level[code].
The n = 2^b levels are uniform, (2 code + 1) 2/n - 2; what lies beyond the outermost is clipped to
it. Every step is one float32 rounding in a fixed order, so that kernels get the same bits:

1. code = the number of thresholds t with x > t (clip max|x|), halfway between levels that reach
   from -1 to 1;
2. scale = sum x level / sum level^2, the best for these codes, summed by ``ordered_sum``, rounded
   to float16, at most 65504.

docs/dtypes.md says how they were chosen.

Packing, little bits first: of 4 bits byte i holds the codes of dims i and i + D/2; of 2 bits those
of i, i + D/4, i + D/2, i + 3D/4. Of 3 bits, the lower two lie as a row of 2 bits, and then the
third: byte i holds those of i, i + D/8, ..., i + 7D/8.
"""

from __future__ import annotations

import torch
from torch import Tensor

from less.dtypes import RowFormat, RowType
from less.layer import Rows, Slots, Space
from less.layer.space import butterflies
from less.reference.numbers import dequantize, floats, quantize

#: The part of a row's largest number that rows of so many numbers are clipped to, of 4, 3 and 2
#: bits: that of least squared error for Gaussian numbers.
CLIP = {
    16: (0.98, 0.90, 0.70),
    32: (0.96, 0.86, 0.64),
    64: (0.92, 0.80, 0.58),
    128: (0.88, 0.74, 0.52),
    256: (0.84, 0.68, 0.48),
}
#: What ``rotate`` takes, by the numbers of ``Rotation`` in csrc/common/space.h.
ROTATIONS = ("query", "key", "value", "output", "rounded_query")
LARGEST_SCALE = 65504.0  # of float16


def levels(bits: int) -> Tensor:
    """The values of the codes 0, 1, ..., in units of a row's scale: float32 [2^bits], ascending."""
    count = 1 << bits
    return (2 * torch.arange(count) + 1) * (2.0 / count) - 2.0


def thresholds(bits: int) -> list[float]:
    """Where one code ends and the next begins, in units of the clip of a row, ascending."""
    last = (1 << bits) - 1
    return [(2 * i - last + 1) / last for i in range(last)]


def clip(bits: int, D: int) -> float:
    """What of its largest number a row of D numbers is clipped to: that of the nearest length."""
    nearest = next((length for length in CLIP if 3 * length > D * 2), 256)
    return CLIP[nearest][(4, 3, 2).index(bits)]


def ordered_sum(x: Tensor) -> Tensor:
    """Sum over the last dim in the order of all kernels.

    Of 16 lanes, lane j adds up the numbers j, j + 16, ...; then lanes j and j + 8 are added, j and
    j + 4, j and j + 2, and the last two.
    """
    D = x.shape[-1]
    lanes = torch.nn.functional.pad(x, (0, -D % 16)).unflatten(-1, (-1, 16))
    total = lanes[..., 0, :]
    for i in range(1, lanes.shape[-2]):
        total = total + lanes[..., i, :]
    for half in (8, 4, 2, 1):
        total = total[..., :half] + total[..., half : 2 * half]
    result: Tensor = total[..., 0]
    return result


def codes_and_scale(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """The codes of rows, uint8 [..., D], and their scales, float16 [...].

    Args:
        x: Rows, [..., D]; computed in float32.
        bits: 4, 3 or 2.
    """
    x = x.float()
    level = levels(bits)
    largest = x.abs().amax(-1) * clip(bits, x.shape[-1])
    code = torch.zeros(x.shape, dtype=torch.long)
    for t in thresholds(bits):
        code += x > largest.unsqueeze(-1) * t  # t becomes float32
    value = level[code]
    scale = ordered_sum(x * value) / ordered_sum(value * value)
    return code.to(torch.uint8), scale.clamp(max=LARGEST_SCALE).to(torch.float16)


def pack(code: Tensor, bits: int) -> Tensor:
    """Codes [..., D] as bytes [..., bits D / 8]."""

    def fields(x: Tensor, count: int) -> Tensor:
        parts = x.to(torch.int32).unflatten(-1, (count, -1))
        shift = torch.arange(count, dtype=torch.int32) * (8 // count)
        byte: Tensor = (parts << shift.unsqueeze(-1)).sum(-2).to(torch.uint8)
        return byte

    if bits == 3:
        return torch.cat([fields(code & 3, 4), fields(code >> 2, 8)], -1)
    return fields(code, 8 // bits)


def unpack(packed: Tensor, bits: int) -> Tensor:
    """Bytes [..., bits D / 8] as codes, int64 [..., D]."""

    def fields(x: Tensor, count: int) -> Tensor:
        width = 8 // count
        shift = torch.arange(count) * width
        code: Tensor = (x.long().unsqueeze(-2) >> shift.unsqueeze(-1)) & ((1 << width) - 1)
        return code.flatten(-2)

    if bits == 3:
        split = packed.shape[-1] * 2 // 3
        return fields(packed[..., :split], 4) | fields(packed[..., split:], 8) << 2
    return fields(packed, 8 // bits)


def encode(x: Tensor, kind: RowType) -> tuple[Tensor, Tensor | None]:
    """Rows of floats [..., D] as they are stored, and their scales [...] where they have any."""
    if kind.packed:
        code, scale = codes_and_scale(x, kind.bits)
        return pack(code, kind.bits), scale
    if kind.scale is not None:
        return quantize(x, dtype=kind.stored)
    return x.to(kind.stored), None


def decode(stored: Tensor, scale: Tensor | None, kind: RowType) -> Tensor:
    """The numbers [..., D] that stored rows stand for."""
    if scale is None:
        return stored
    if kind.packed:
        return levels(kind.bits)[unpack(stored, kind.bits)] * scale.float().unsqueeze(-1)
    return dequantize(stored, scale)


def slot_floats(slots: Slots) -> tuple[Tensor, Tensor]:
    """Keys and values [B, K, S, D] that slots stand for, hot ones first."""
    form: RowFormat = slots.rows
    k, v = decode(slots.k, slots.k_scale, form.k), decode(slots.v, slots.v_scale, form.v)
    if slots.hot_k is None or slots.hot_v is None:
        return k, v
    hot = floats(Rows(slots.hot_k, slots.hot_v, slots.hot_k_scale, slots.hot_v_scale))
    return torch.cat([hot[0].to(k.dtype), k], 2), torch.cat([hot[1].to(v.dtype), v], 2)


def rotate(x: Tensor, space: Space, rotation: str, valid: Tensor | None = None) -> Tensor:
    """Take rows into a layer's space, or attention's output back out of it.

    Args:
        x: Queries or output [B, Q, T, D], keys or values [B, K, T, D].
        space: The layer's.
        rotation: ``"query"``, ``"key"``, ``"value"`` or ``"output"``; or ``"rounded_query"``, the
            queries of packed formats: rounded to 8 bits with a scale each, so that products with
            codes are sums of integers. Rounding a key to 4 bits moves a logit ten times as far.
        valid: bool [B, T]; where False the result is 0. None: all valid.

    Returns:
        x's shape, float32, or float64 of float64 x.
    """
    x = x.double() if x.dtype == torch.float64 else x.float()
    if rotation in ("query", "rounded_query"):
        y = butterflies(x * _per_head(_divided(space.factor, _wide(space.key_scale, x)), x))
        if rotation == "rounded_query":
            y = dequantize(*quantize(y))
    elif rotation == "key":
        y = _into(x, space.key_mean, space.key_scale, space.factor)
    elif rotation == "value":
        y = _into(x, space.value_mean, space.value_scale, space.factor)
    elif rotation == "output":
        y = values_out_of_space(x, space)
    else:
        raise ValueError(f"rotate: rotation must be one of {ROTATIONS}, got {rotation!r}")
    return y if valid is None else torch.where(valid[:, None, :, None], y, 0.0)


def keys_out_of_space(k: Tensor, space: Space, mean: bool = True) -> Tensor:
    """Keys [B, K, N, D] back out of the space; without their mean, where ``mean`` is False."""
    x = _out_of(k, space.key_scale, space.factor)
    return x + _per_head(space.key_mean, x) if mean else x


def values_out_of_space(v: Tensor, space: Space) -> Tensor:
    """Values [B, K, N, D], or attention's output [B, Q, T, D], back out of the space."""
    x = _out_of(v, space.value_scale, space.factor)
    return x + _per_head(space.value_mean, x)


def query_shift(q: Tensor, space: Space, scale: float) -> Tensor:
    """Scale q.m_k of queries as they come [B, Q, T, D] -> [B, Q, T].

    It is what the logits of all slots of a query lack. It counts only where they meet the low-rank
    state, whose mass is absolute.
    """
    q = q.double() if q.dtype == torch.float64 else q.float()
    return scale * (q * _per_head(space.key_mean, q)).sum(-1)


def _wide(x: Tensor, like: Tensor) -> Tensor:
    return x.to(like.dtype)


def _divided(factor: float, x: Tensor) -> Tensor:
    # Not factor / x: torch takes the reciprocal of x first, which rounds twice.
    return torch.full_like(x, factor) / x


def _into(x: Tensor, mean: Tensor, scale: Tensor, factor: float) -> Tensor:
    return butterflies((x - _per_head(mean, x)) * _per_head(_wide(scale, x) * factor, x))


def _out_of(x: Tensor, scale: Tensor, factor: float) -> Tensor:
    x = x.double() if x.dtype == torch.float64 else x.float()  # slots may be of 16 bits
    return butterflies(x) * _per_head(_divided(factor, _wide(scale, x)), x)


def _per_head(x: Tensor, like: Tensor) -> Tensor:
    """A kv head's numbers [K, D] for each head of [B, heads, T, D], [heads, 1, D]."""
    return x.to(like.dtype).repeat_interleave(like.shape[1] // x.shape[0], 0).unsqueeze(1)
