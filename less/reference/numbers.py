"""Rows of 8 bits: how numbers are rounded to them, and what they stand for."""

from __future__ import annotations

import torch
from torch import Tensor

from less.dtypes import EIGHT_BITS
from less.layer import Rows


def accumulator(x: Tensor) -> torch.dtype:
    """What sums over ``x`` are held in: float64 for float64, else float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def quantize(x: Tensor, dim: int = -1, dtype: torch.dtype = torch.int8) -> tuple[Tensor, Tensor]:
    """Round to 8 bits with one scale along ``dim``: x = scale * eight, scale = max|x| / largest.

    ``int8``: the largest is 127 and the error at most scale / 2. ``float8_e4m3fn``: the largest is
    448 and the error at most 1/16 of the number, or scale / 1024 of the smallest. To the nearest,
    ties to even. Computed in float32 (float64 for float64 x). What underflows to a scale of 0
    becomes 0; NaN or infinity makes the scale so, and with it all that shares it.

    Args:
        x: Any floating tensor, of at least one dimension.
        dim: The dimension that shares a scale: the last one for rows of k and v, -2 (what an
            output column sums over) for weights [N, D, E].
        dtype: ``torch.int8`` or ``torch.float8_e4m3fn``.

    Returns:
        The rounded numbers in x's shape, none above the largest, and the scales: x's shape
        without ``dim``.
    """
    x = x.to(accumulator(x))
    largest = EIGHT_BITS[dtype]
    scale = x.abs().amax(dim) / largest
    steps = (x / scale.unsqueeze(dim)).nan_to_num(0.0).clamp(-largest, largest)
    if dtype == torch.int8:
        steps = steps.round()
    return torch.where(scale.unsqueeze(dim) > 0, steps, 0.0).to(dtype), scale


def dequantize(x: Tensor, scale: Tensor, dim: int = -1) -> Tensor:
    """Scale * x in scale's dtype: what ``quantize`` rounded to."""
    return x.to(scale.dtype) * scale.unsqueeze(dim)


def rounded(k: Tensor, v: Tensor, dtype: torch.dtype) -> Rows:
    """Keys and values [B, K, N, D] of any floating dtype, rounded to the slots' dtype."""
    if dtype not in EIGHT_BITS:
        return Rows(k.to(dtype), v.to(dtype))
    eight_k, k_scale = quantize(k, dtype=dtype)
    eight_v, v_scale = quantize(v, dtype=dtype)
    return Rows(eight_k, eight_v, k_scale, v_scale)


def floats(rows: Rows) -> tuple[Tensor, Tensor]:
    """K and v as numbers: rows of 8 bits times their scales, others as they are."""
    if rows.k_scale is None or rows.v_scale is None:
        return rows.k, rows.v
    return dequantize(rows.k, rows.k_scale), dequantize(rows.v, rows.v_scale)
