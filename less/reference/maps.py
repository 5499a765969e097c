"""Feature maps, and the low-rank state that they feed."""

from __future__ import annotations

import torch
from torch import Tensor

from less.layer import Maps, State
from less.reference.numbers import accumulator, dequantize

EXP_CLAMP = 15.0  # exp maps: features stay within e^-15 .. e^15


def _gelu(x: Tensor) -> Tensor:
    return torch.nn.functional.gelu(x, approximate="none")


def feature_map(
    x: Tensor,
    w1: Tensor,
    w2: Tensor,
    kind: str,
    *,
    w1_scale: Tensor | None = None,
    w2_scale: Tensor | None = None,
    bias: Tensor | None = None,
    mix: Tensor | None = None,
    scale: Tensor | None = None,
    mix_scale: Tensor | None = None,
) -> Tensor:
    """Evaluate a feature map, head by head.

    ``paper``: phi(x) = |gelu(gelu(x W1) W2)|; with ``mix``, ``scale`` and ``mix_scale`` given,
    psi(x) = |h + (h A) * s2| with h = |s1| * gelu(gelu(x W1) W2).
    ``exp``: exp(clamp(gelu(x W1) W2 + bias, +-15)).

    Args:
        x: Queries or keys after the rotary embedding, unscaled, [B, N, T, D].
        w1: [N, D, E].
        w2: [N, E, R].
        kind: ``"paper"`` or ``"exp"``.
        w1_scale: [N, E], of each column of an int8 w1.
        w2_scale: [N, R], of each column of an int8 w2.
        bias: [N, R], ``exp`` only.
        mix: A [N, R, R], ``paper`` psi only.
        scale: s1 [N, R], ``paper`` psi only.
        mix_scale: s2 [N, R], ``paper`` psi only.

    Returns:
        Features [B, N, T, R], all >= 0, float32 (float64 for float64 x).

    Source: arXiv:2402.09398, section 3.2, for ``paper``.
    """
    dtype = accumulator(x)
    if w1_scale is not None:
        w1 = dequantize(w1, w1_scale.to(dtype), -2)
    if w2_scale is not None:
        w2 = dequantize(w2, w2_scale.to(dtype), -2)
    hidden = _gelu(torch.einsum("bntd,nde->bnte", x.to(dtype), w1.to(dtype)))
    y = torch.einsum("bnte,ner->bntr", hidden, w2.to(dtype))
    if kind == "exp":
        if bias is not None:
            y = y + bias.to(dtype)[:, None, :]
        return y.clamp(-EXP_CLAMP, EXP_CLAMP).exp()
    if kind != "paper":
        raise ValueError(f"feature_map: kind must be 'paper' or 'exp', got {kind!r}")
    y = _gelu(y)
    if mix is None or scale is None or mix_scale is None:
        return y.abs()
    h = scale.to(dtype).abs()[:, None, :] * y
    mixed = torch.einsum("bntr,nrs->bnts", h, mix.to(dtype))
    return (h + mixed * mix_scale.to(dtype)[:, None, :]).abs()


def centroid_map(
    x: Tensor,
    centroids: Tensor,
    *,
    factor: Tensor,
    bias: Tensor,
    centroids_scale: Tensor | None = None,
    weight: Tensor | None = None,
    offset: Tensor | None = None,
) -> Tensor:
    """Evaluate a map of learned keys c_r, head by head.

    With l_r = factor x.c_r + bias_r: phi_r(x) = exp(clamp(l_r, +-15)); with ``weight`` and
    ``offset`` given, psi_r(x) = softmax_r(l) exp(clamp(x.weight + offset, +-15)). So the state is R
    slots more, whose keys are learned.

    Args:
        x: Queries, or keys without the mean of their space, [B, N, T, D].
        centroids: c [K, D, R], shared by the N / K heads of a group.
        factor: [N].
        bias: [N, R].
        centroids_scale: [K, R], of each column of int8 centroids.
        weight: [K, D], psi only.
        offset: [K], psi only.

    Returns:
        Features [B, N, T, R], all >= 0, float32 (float64 for float64 x).
    """
    dtype = accumulator(x)
    x = x.to(dtype)
    if centroids_scale is not None:
        centroids = dequantize(centroids, centroids_scale.to(dtype), -2)
    own = centroids.to(dtype).repeat_interleave(x.shape[1] // centroids.shape[0], 0)
    logits = torch.einsum("bntd,ndr->bntr", x, own) * factor.to(dtype)[:, None, None]
    logits = logits + bias.to(dtype)[:, None, :]
    if weight is None or offset is None:
        return logits.clamp(-EXP_CLAMP, EXP_CLAMP).exp()
    mass = torch.einsum("bntd,nd->bnt", x, weight.to(dtype)) + offset.to(dtype)[:, None]
    return logits.softmax(-1) * mass.clamp(-EXP_CLAMP, EXP_CLAMP).exp()[..., None]


def phi(q: Tensor, maps: Maps) -> Tensor:
    """Features of queries [B, Q, T, D] -> [B, Q, T, R], from a layer's maps."""
    get = maps.tensors.get
    if maps.kind == "centroid":
        return centroid_map(
            q,
            maps.tensors["centroids"],
            factor=maps.tensors["q_factor"],
            bias=maps.tensors["q_bias"],
            centroids_scale=get("centroids_scale"),
        )
    return feature_map(
        q,
        maps.tensors["q_w1"],
        maps.tensors["q_w2"],
        maps.kind,
        w1_scale=get("q_w1_scale"),
        w2_scale=get("q_w2_scale"),
        bias=get("q_bias"),
    )


def psi(k: Tensor, maps: Maps) -> Tensor:
    """Features of keys [B, K, T, D] -> [B, K, T, R], from a layer's maps.

    Those of a centred kind take keys without the mean of their space.
    """
    get = maps.tensors.get
    if maps.kind == "centroid":
        return centroid_map(
            k,
            maps.tensors["centroids"],
            factor=maps.tensors["k_factor"],
            bias=maps.tensors["k_bias"],
            centroids_scale=get("centroids_scale"),
            weight=maps.tensors["k_weight"],
            offset=maps.tensors["k_offset"],
        )
    return feature_map(
        k,
        maps.tensors["k_w1"],
        maps.tensors["k_w2"],
        maps.kind,
        w1_scale=get("k_w1_scale"),
        w2_scale=get("k_w2_scale"),
        bias=get("k_bias"),
        mix=get("k_mix"),
        scale=get("k_scale"),
        mix_scale=get("k_mix_scale"),
    )


def fold(state: State, psi_k: Tensor, v: Tensor, keep: Tensor | None = None) -> State:
    """Fold tokens into the low-rank state: H + psi(k)^T v, z + psi(k).

    Args:
        state: H [B, K, R, D] and z [B, K, R].
        psi_k: Features of the tokens' keys [B, K, N, R].
        v: Their values [B, K, N, D].
        keep: bool [B, K, N]; tokens that are False are left out.

    Source: arXiv:2402.09398, eq. 5.
    """
    psi_k = psi_k.to(state.H.dtype)
    v = v.to(state.H.dtype)
    if keep is not None:
        psi_k = psi_k.masked_fill(~keep[..., None], 0.0)
        v = v.masked_fill(~keep[..., None], 0.0)
    return State(state.H + torch.einsum("bknr,bknd->bkrd", psi_k, v), state.z + psi_k.sum(2))
