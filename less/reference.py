"""The whole method in plain torch: the executable specification.

Any device, any floating dtype. Accumulation is float32, or float64 where the input is float64;
float64 runs of this file are the ground truth of every other test. Nothing here is fast.

Letters: B batch rows, Q query heads, K kv heads, G = Q/K, T tokens of a call, S slots, N = S + T,
D head dim, R rank, E hidden width of the feature maps.

Source: Dong et al., "Get More with LESS: Synthesizing Recurrence with KV Cache Compression for
Efficient LLM Inference", ICML 2024, arXiv:2402.09398.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from less.policies.base import Candidates, Policy, Rule, checked_rank, rank_by_rule

Maps = Mapping[str, Tensor]

# Dtypes whose rows have a scale each: the largest number of each.
EIGHT_BITS = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}

EXP_CLAMP = 15.0  # exp maps: features stay within e^-15 .. e^15


def _accumulator(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _gelu(x: Tensor) -> Tensor:
    return torch.nn.functional.gelu(x, approximate="none")


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
    x = x.to(_accumulator(x))
    largest = EIGHT_BITS[dtype]
    scale = x.abs().amax(dim) / largest
    steps = (x / scale.unsqueeze(dim)).nan_to_num(0.0).clamp(-largest, largest)
    if dtype == torch.int8:
        steps = steps.round()
    return torch.where(scale.unsqueeze(dim) > 0, steps, 0.0).to(dtype), scale


def dequantize(x: Tensor, scale: Tensor, dim: int = -1) -> Tensor:
    """Scale * x in scale's dtype: what ``quantize`` rounded to."""
    return x.to(scale.dtype) * scale.unsqueeze(dim)


@dataclass(frozen=True)
class Rows:
    """Keys and values as slots hold them.

    Attributes:
        k: [B, K, N, D].
        v: [B, K, N, D].
        k_scale: [B, K, N], of each row of k; None unless k and v are of 8 bits.
        v_scale: [B, K, N], likewise.
    """

    k: Tensor
    v: Tensor
    k_scale: Tensor | None = None
    v_scale: Tensor | None = None

    @classmethod
    def rounded(cls, k: Tensor, v: Tensor, dtype: torch.dtype) -> Rows:
        """Keys and values of any floating dtype, rounded to the slots' dtype."""
        if dtype not in EIGHT_BITS:
            return cls(k.to(dtype), v.to(dtype))
        eight_k, k_scale = quantize(k, dtype=dtype)
        eight_v, v_scale = quantize(v, dtype=dtype)
        return cls(eight_k, eight_v, k_scale, v_scale)

    def floats(self) -> tuple[Tensor, Tensor]:
        """K and v as numbers: rows of 8 bits times their scales, others as they are."""
        if self.k_scale is None or self.v_scale is None:
            return self.k, self.v
        return dequantize(self.k, self.k_scale), dequantize(self.v, self.v_scale)


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
    dtype = _accumulator(x)
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


def phi(q: Tensor, maps: Maps, kind: str) -> Tensor:
    """Features of queries [B, Q, T, D] -> [B, Q, T, R], from a layer of a ``Sidekick``."""
    return feature_map(
        q,
        maps["q_w1"],
        maps["q_w2"],
        kind,
        w1_scale=maps.get("q_w1_scale"),
        w2_scale=maps.get("q_w2_scale"),
        bias=maps.get("q_bias"),
    )


def psi(k: Tensor, maps: Maps, kind: str) -> Tensor:
    """Features of keys [B, K, T, D] -> [B, K, T, R], from a layer of a ``Sidekick``."""
    return feature_map(
        k,
        maps["k_w1"],
        maps["k_w2"],
        kind,
        w1_scale=maps.get("k_w1_scale"),
        w2_scale=maps.get("k_w2_scale"),
        bias=maps.get("k_bias"),
        mix=maps.get("k_mix"),
        scale=maps.get("k_scale"),
        mix_scale=maps.get("k_mix_scale"),
    )


def fold(
    H: Tensor, z: Tensor, psi_k: Tensor, v: Tensor, keep: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Fold tokens into the low-rank state: H + psi(k)^T v, z + psi(k).

    Args:
        H: [B, K, R, D].
        z: [B, K, R].
        psi_k: Features of the tokens' keys [B, K, N, R].
        v: Their values [B, K, N, D].
        keep: bool [B, K, N]; tokens that are False are left out.

    Returns:
        The new H and z.

    Source: arXiv:2402.09398, eq. 5.
    """
    psi_k = psi_k.to(H.dtype)
    v = v.to(H.dtype)
    if keep is not None:
        psi_k = psi_k.masked_fill(~keep[..., None], 0.0)
        v = v.masked_fill(~keep[..., None], 0.0)
    return H + torch.einsum("bknr,bknd->bkrd", psi_k, v), z + psi_k.sum(2)


def capped(logits: Tensor, softcap: float) -> Tensor:
    """Logits held within +-softcap: softcap * tanh(logits / softcap); as they are for 0."""
    return softcap * torch.tanh(logits / softcap) if softcap else logits


@dataclass(frozen=True)
class Attended:
    """What one call of ``chunk_attention`` computes.

    Attributes:
        out: [B, Q, T, D], zero where the token is padding.
        slot_score: The slots' scores after the call [B, K, S].
        chunk_score: The scores of the call's own tokens [B, K, T].
        share: Part of each query's attention mass taken by the low-rank state [B, Q, T].
    """

    out: Tensor
    slot_score: Tensor
    chunk_score: Tensor
    share: Tensor


def chunk_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    valid: Tensor | None,
    slot_k: Tensor,
    slot_v: Tensor,
    position: Tensor,
    score: Tensor,
    weight: Tensor,
    *,
    phi_q: Tensor | None = None,
    H: Tensor | None = None,
    z: Tensor | None = None,
    scale: float,
    softcap: float = 0.0,
    decay: float = 1.0,
) -> Attended:
    """Attend over the kept slots, the low-rank state and, causally, the call's own tokens.

    out = (phi H + sum e^l v) / (phi z + sum e^l), l = scale q.k + weight, as a merge of two
    softmax parts: the low-rank part has log-mass log(phi z) and value phi H / phi z. A part with
    no mass counts nothing. NaN in the features, in z or in H is NaN in the output. Scores take the
    softmax over slots and call alone, summed over the group. With a soft-cap, l = softcap
    tanh(scale q.k / softcap) + weight. Rows of int8 come as the numbers that they stand for
    (``Rows.floats``).

    Args:
        q: [B, Q, T, D].
        k: [B, K, T, D].
        v: [B, K, T, D].
        valid: bool [B, T], False for padding, or None.
        slot_k: [B, K, S, D].
        slot_v: [B, K, S, D].
        position: int32 [B, K, S], -1 where the slot is empty.
        score: [B, K, S].
        weight: Log-weights [B, K, S].
        phi_q: Features of the queries [B, Q, T, R], or None for eviction alone.
        H: [B, K, R, D], with ``phi_q``.
        z: [B, K, R], with ``phi_q``.
        scale: Factor of q.k.
        softcap: What scale q.k is held within, before the log-weights; 0: nothing.
        decay: What a score keeps per token.

    Source: arXiv:2402.09398, eq. 4.
    """
    B, Q, T, D = q.shape
    K, S = slot_k.shape[1], slot_k.shape[2]
    G = Q // K
    dtype = torch.promote_types(_accumulator(q), _accumulator(k))
    if valid is None:
        valid = torch.ones(B, T, dtype=torch.bool, device=q.device)
    keys = torch.cat([slot_k, k], 2).to(dtype)
    values = torch.cat([slot_v, v], 2).to(dtype)

    causal = torch.ones(T, T, dtype=torch.bool, device=q.device).tril()
    to_chunk = causal & valid[:, None, :] & valid[:, :, None]
    to_slots = (position >= 0)[:, :, None, :] & valid[:, None, :, None]
    mask = torch.cat([to_slots, to_chunk[:, None].expand(B, K, T, T)], 3)

    query = q.to(dtype).view(B, K, G, T, D)
    logits = capped(torch.einsum("bkgtd,bknd->bkgtn", query, keys) * scale, softcap)
    logits[..., :S] += weight.to(dtype)[:, :, None, None, :]
    logits = logits.masked_fill(~mask[:, :, None], -torch.inf)
    top = logits.amax(-1, keepdim=True)
    top = torch.where(top == -torch.inf, 0.0, top)
    mass = (logits - top).exp()
    total = mass.sum(-1, keepdim=True)
    kept = torch.einsum("bkgtn,bknd->bkgtd", mass, values)
    p = mass / total.masked_fill(total == 0, 1.0)

    share = torch.zeros(B, K, G, T, dtype=dtype, device=q.device)
    out = kept / total.masked_fill(total == 0, 1.0)
    if phi_q is not None:
        if H is None or z is None:
            raise ValueError("chunk_attention: phi_q, H and z must be given together")
        features = phi_q.to(dtype).view(B, K, G, T, -1)
        low = torch.einsum("bkgtr,bkr->bkgt", features, z.to(dtype))[..., None]
        low_value = torch.einsum("bkgtr,bkrd->bkgtd", features, H.to(dtype))
        has_mass = ~(low <= 0)  # NaN too
        log_low = torch.where(has_mass, low.clamp(min=torch.finfo(dtype).tiny).log(), -torch.inf)
        both = torch.maximum(top, log_low)
        a = (top - both).exp()
        b = torch.where(has_mass, (log_low - both).exp(), 0.0)
        denominator = a * total + b
        merged = a * kept + b * low_value / low.masked_fill(~has_mass, 1.0)
        denominator = denominator.masked_fill(denominator == 0, 1.0)
        out, share = merged / denominator, (b / denominator)[..., 0]
    rows = valid[:, None, None, :]
    out = torch.where(rows[..., None], out, 0.0)
    share = torch.where(rows, share, 0.0)

    received = torch.einsum("bkgtn,bt->bkn", p, _fade(valid, decay, dtype))
    count = valid.sum(1).to(dtype)
    kept_part = torch.pow(torch.tensor(decay, dtype=dtype), count).view(B, 1, 1)
    return Attended(
        out=out.reshape(B, Q, T, D).to(q.dtype),
        slot_score=torch.where(
            position >= 0, score.to(dtype) * kept_part + received[..., :S], 0.0
        ).to(score.dtype),
        chunk_score=received[..., S:].to(score.dtype),
        share=share.reshape(B, Q, T),
    )


def _fade(valid: Tensor, decay: float, dtype: torch.dtype) -> Tensor:
    """What is left of a query's weights [B, T] once the call's later tokens have come."""
    after = valid.flip(1).cumsum(1).flip(1) - valid.long()
    faded = torch.pow(torch.tensor(decay, dtype=dtype), after.to(dtype))
    return torch.where(valid, faded, 0.0)


def prompt_scores(
    q: Tensor,
    k: Tensor,
    valid: Tensor | None = None,
    lse: Tensor | None = None,
    *,
    scale: float,
    softcap: float = 0.0,
    decay: float = 1.0,
) -> Tensor:
    """Sum the softmax weights that each token of a prompt receives, over queries and group.

    score_j = sum over the group's queries i >= j of e^(l_ij - lse_i) decay^(valid tokens after i),
    l = scale q.k: what ``chunk_attention`` gives a prompt's tokens where no slot is held, from
    the queries' log-masses where those are known. Rows of 8 bits come as the numbers that they
    stand for.

    Args:
        q: [B, Q, T, D].
        k: [B, K, T, D].
        valid: bool [B, T], False for padding, or None.
        lse: [B, Q, T], log sum e^l over what each query sees, or None: computed.
        scale: Factor of q.k.
        softcap: 0: none; else l = softcap tanh(scale q.k / softcap).
        decay: What a score keeps per token.

    Returns:
        [B, K, T], zero for padding.
    """
    B, Q, T, D = q.shape
    K = k.shape[1]
    dtype = torch.promote_types(_accumulator(q), _accumulator(k))
    if valid is None:
        valid = torch.ones(B, T, dtype=torch.bool, device=q.device)
    query = q.to(dtype).view(B, K, Q // K, T, D)
    logits = capped(torch.einsum("bkgtd,bknd->bkgtn", query, k.to(dtype)) * scale, softcap)
    causal = torch.ones(T, T, dtype=torch.bool, device=q.device).tril()
    mask = (causal & valid[:, None, :] & valid[:, :, None])[:, None, None]
    logits = logits.masked_fill(~mask, -torch.inf)
    mass = logits.logsumexp(-1) if lse is None else lse.to(dtype).view(B, K, Q // K, T)
    p = torch.where(mask, (logits - mass[..., None]).exp(), 0.0)
    return torch.einsum("bkgtn,bt->bkn", p, _fade(valid, decay, dtype))


def survivors(position: Tensor, rank: Tensor, capacity: int) -> Tensor:
    """Mark the ``capacity`` highest ranks of each head; of equals the older leaves first.

    Args:
        position: int32 [B, K, N], -1 where there is no token.
        rank: float32 [B, K, N]; NaN counts as the lowest.
        capacity: Tokens to keep.

    Returns:
        bool [B, K, N].
    """
    rank = torch.where(rank.isnan(), -torch.inf, rank)
    order = position.argsort(dim=2, stable=True)
    order = order.gather(2, rank.gather(2, order).argsort(dim=2, stable=True))
    order = order.gather(2, (position >= 0).gather(2, order).long().argsort(dim=2, stable=True))
    keep = torch.zeros_like(position, dtype=torch.bool)
    keep.scatter_(2, order[..., max(0, order.shape[2] - capacity) :], True)
    return keep & (position >= 0)


def chunk_position(seen: Tensor, valid: Tensor | None, B: int, T: int) -> tuple[Tensor, Tensor]:
    """Positions [B, T] int32 of a call's tokens, -1 for padding, and the tokens seen after it."""
    if valid is None:
        valid = torch.ones(B, T, dtype=torch.bool, device=seen.device)
    position = torch.where(valid, seen[:, None] + valid.cumsum(1) - 1, -1)
    return position.to(torch.int32), seen + valid.sum(1)


def candidates(
    position: Tensor,
    score: Tensor,
    weight: Tensor,
    seen: Tensor,
    held: tuple[Tensor, Tensor],
    new: tuple[Tensor, Tensor],
    chunk_score: Tensor,
    valid: Tensor | None = None,
) -> Candidates:
    """What a policy ranks: the slots, then the tokens of a call that was attended to.

    Args:
        position: int32 [B, K, S], -1 where the slot is empty.
        score: The slots' scores after the call [B, K, S].
        weight: Log-weights [B, K, S].
        seen: int64 [B], tokens seen before the call.
        held: Keys and values of the slots as numbers, [B, K, S, D] each.
        new: Keys and values of the call's tokens as the slots would hold them, [B, K, T, D] each.
        chunk_score: The scores of the call's tokens [B, K, T].
        valid: bool [B, T], False for padding, or None.
    """
    B, K, T = chunk_score.shape
    chunk_pos, seen_after = chunk_position(seen, valid, B, T)
    return Candidates(
        position=torch.cat([position, chunk_pos[:, None].expand(B, K, T)], 2),
        score=torch.cat([score, chunk_score], 2),
        weight=torch.cat([weight, torch.zeros_like(chunk_score)], 2),
        seen=seen_after,
        k=torch.cat([held[0], new[0]], 2),
        v=torch.cat([held[1], new[1]], 2),
    )


@dataclass(frozen=True)
class Compacted:
    """The slots and the state of a layer after an eviction; shapes as in ``compact``."""

    slot_k: Tensor
    slot_v: Tensor
    position: Tensor
    score: Tensor
    weight: Tensor
    seen: Tensor
    H: Tensor | None
    z: Tensor | None
    k_scale: Tensor | None = None
    v_scale: Tensor | None = None


def compact(
    k: Tensor,
    v: Tensor,
    chunk_score: Tensor,
    valid: Tensor | None,
    slot_k: Tensor,
    slot_v: Tensor,
    position: Tensor,
    score: Tensor,
    weight: Tensor,
    seen: Tensor,
    *,
    chunk_k_scale: Tensor | None = None,
    chunk_v_scale: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    rule: Rule | None = None,
    rank: Tensor | None = None,
    H: Tensor | None = None,
    z: Tensor | None = None,
    maps: Maps | None = None,
    kind: str = "exp",
) -> Compacted:
    """Let a call's tokens join the slots; fold and forget what no longer fits.

    Capacity is S. Kept slots stay where they are; kept tokens of the call take the free slots in
    ascending order, the older token the lower slot.

    Args:
        k: [B, K, T, D].
        v: [B, K, T, D].
        chunk_score: [B, K, T].
        valid: bool [B, T] or None.
        slot_k: [B, K, S, D].
        slot_v: [B, K, S, D].
        position: int32 [B, K, S].
        score: [B, K, S].
        weight: [B, K, S].
        seen: int64 [B], tokens seen before the call.
        chunk_k_scale: [B, K, T], of each row of k, where k, v and the slots are of 8 bits; as the
            three below.
        chunk_v_scale: [B, K, T], of each row of v.
        k_scale: [B, K, S], of each row of slot_k.
        v_scale: [B, K, S], of each row of slot_v.
        rule: The policy's native ranking, or
        rank: its ranks [B, K, S + T] themselves.
        H: [B, K, R, D] or None for eviction alone.
        z: [B, K, R].
        maps: The layer's feature maps.
        kind: Their kind.
    """
    B, K, T, _ = k.shape
    S = slot_k.shape[2]
    chunk_pos, seen_after = chunk_position(seen, valid, B, T)
    all_pos = torch.cat([position, chunk_pos[:, None].expand(B, K, T)], 2)
    all_score = torch.cat([score, chunk_score], 2)
    if rank is None:
        if rule is None:
            raise ValueError("compact: exactly one of rule and rank must be given")
        rank = rank_by_rule(rule, all_pos, all_score, seen_after)
    keep = survivors(all_pos, rank, S)
    leaves = (all_pos >= 0) & ~keep
    if H is not None and z is not None and maps is not None:
        old_k, old_v = Rows(slot_k, slot_v, k_scale, v_scale).floats()
        new_k, new_v = Rows(k, v, chunk_k_scale, chunk_v_scale).floats()
        features = psi(torch.cat([old_k, new_k], 2), maps, kind)
        H, z = fold(H, z, features, torch.cat([old_v, new_v], 2), leaves)

    stays = keep[..., :S]
    slot_k, slot_v = slot_k.clone(), slot_v.clone()
    if k_scale is not None and v_scale is not None:
        k_scale, v_scale = k_scale.clone(), v_scale.clone()
    position = torch.where(stays, position, -1)
    score = torch.where(stays, score, 0.0)
    weight = torch.where(stays, weight, 0.0)
    for b in range(B):
        for h in range(K):
            new = keep[b, h, S:].nonzero()[:, 0]
            free = (~stays[b, h]).nonzero()[: len(new), 0]
            slot_k[b, h, free] = k[b, h, new].to(slot_k.dtype)
            slot_v[b, h, free] = v[b, h, new].to(slot_v.dtype)
            position[b, h, free] = chunk_pos[b, new]
            score[b, h, free] = chunk_score[b, h, new]
            if k_scale is not None and chunk_k_scale is not None:
                k_scale[b, h, free] = chunk_k_scale[b, h, new]
            if v_scale is not None and chunk_v_scale is not None:
                v_scale[b, h, free] = chunk_v_scale[b, h, new]
    return Compacted(slot_k, slot_v, position, score, weight, seen_after, H, z, k_scale, v_scale)


@dataclass(frozen=True)
class Trajectory:
    """A layer's run over T tokens, call by call.

    Attributes:
        out: [B, Q, T, D].
        positions: Positions held after each call, a list of int32 [B, K, S].
        scores: Scores after each call, a list of [B, K, S].
        H: Final state [B, K, R, D], or None.
        z: Final state [B, K, R], or None.
        left: int64 [B, K, T]: tokens seen when the token had just left; T + 1 if it never did.
    """

    out: Tensor
    positions: list[Tensor]
    scores: list[Tensor]
    H: Tensor | None
    z: Tensor | None
    left: Tensor


def decode_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    valid: Tensor | None,
    slot_k: Tensor,
    slot_v: Tensor,
    position: Tensor,
    score: Tensor,
    weight: Tensor,
    seen: Tensor,
    *,
    H: Tensor | None = None,
    z: Tensor | None = None,
    maps: Maps | None = None,
    kind: str = "exp",
    scale: float,
    softcap: float = 0.0,
    decay: float = 1.0,
    rule: Rule,
) -> tuple[Attended, Compacted]:
    """One token of every row through a layer: attend, score, evict, fold.

    ``chunk_attention`` and then ``compact``, whose arguments these are, for T = 1.
    """
    attended = chunk_attention(
        q,
        k,
        v,
        valid,
        slot_k,
        slot_v,
        position,
        score,
        weight,
        phi_q=phi(q, maps, kind) if maps is not None else None,
        H=H,
        z=z,
        scale=scale,
        softcap=softcap,
        decay=decay,
    )
    after = compact(
        k,
        v,
        attended.chunk_score,
        valid,
        slot_k,
        slot_v,
        position,
        attended.slot_score,
        weight,
        seen,
        rule=rule,
        H=H,
        z=z,
        maps=maps,
        kind=kind,
    )
    return attended, after


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    policy: Policy,
    maps: Maps | None = None,
    kind: str = "exp",
    *,
    prompt: int = 1,
    chunk: int = 1,
    scale: float | None = None,
    softcap: float = 0.0,
) -> Trajectory:
    """Run a layer from an empty cache: a prompt, then chunks (single tokens by default).

    Args:
        q: [B, Q, T, D].
        k: [B, K, T, D].
        v: [B, K, T, D].
        policy: Who stays.
        maps: Feature maps of the layer; None is eviction alone.
        kind: Their kind.
        prompt: Tokens of the first call.
        chunk: Tokens of each later call.
        scale: Factor of q.k, 1/sqrt(D) by default.
        softcap: As in ``chunk_attention``.
    """
    B, K, T, D = k.shape
    S = policy.capacity
    dtype = _accumulator(k)
    scale = 1.0 / math.sqrt(D) if scale is None else scale
    at = k.device
    slot_k = torch.zeros(B, K, S, D, dtype=k.dtype, device=at)
    slot_v = torch.zeros_like(slot_k)
    position = torch.full((B, K, S), -1, dtype=torch.int32, device=at)
    score = torch.zeros(B, K, S, dtype=dtype, device=at)
    weight = torch.zeros_like(score)
    seen = torch.zeros(B, dtype=torch.int64, device=at)
    H = z = None
    if maps is not None:
        R = maps["q_w2"].shape[-1]
        H = torch.zeros(B, K, R, D, dtype=dtype, device=at)
        z = torch.zeros(B, K, R, dtype=dtype, device=at)
    left = torch.full((B, K, T), T + 1, dtype=torch.int64, device=at)
    outs, positions, scores = [], [], []
    start = 0
    while start < T:
        stop = min(T, prompt if start == 0 else start + chunk)
        qc, kc, vc = q[:, :, start:stop], k[:, :, start:stop], v[:, :, start:stop]
        features = phi(qc, maps, kind) if maps is not None else None
        step = chunk_attention(
            qc,
            kc,
            vc,
            None,
            slot_k,
            slot_v,
            position,
            score,
            weight,
            phi_q=features,
            H=H,
            z=z,
            scale=scale,
            softcap=softcap,
            decay=policy.decay,
        )
        tokens = candidates(
            position, step.slot_score, weight, seen, (slot_k, slot_v), (kc, vc), step.chunk_score
        )
        after = compact(
            kc,
            vc,
            step.chunk_score,
            None,
            slot_k,
            slot_v,
            position,
            step.slot_score,
            weight,
            seen,
            rank=checked_rank(policy, tokens),
            H=H,
            z=z,
            maps=maps,
            kind=kind,
        )
        slot_k, slot_v, position, score = after.slot_k, after.slot_v, after.position, after.score
        weight, seen, H, z = after.weight, after.seen, after.H, after.z
        held = torch.zeros(B, K, T + 1, dtype=torch.bool, device=at)
        held.scatter_(2, torch.where(position >= 0, position, T).long(), True)
        gone = ~held[..., :T] & (torch.arange(T, device=at) < stop) & (left > T)
        left = torch.where(gone, stop, left)
        outs.append(step.out)
        positions.append(position)
        scores.append(score)
        start = stop
    return Trajectory(torch.cat(outs, 2), positions, scores, H, z, left)


def evict_schedule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    policy: Policy,
    *,
    prompt: int = 1,
    scale: float | None = None,
    softcap: float = 0.0,
) -> Tensor:
    """The steps at which a policy lets go of each token, without a low-rank state.

    Valid because a policy sees nothing of the state, and scores never depend on it.

    Returns:
        ``Trajectory.left``, int64 [B, K, T].
    """
    return run(q, k, v, policy, prompt=prompt, scale=scale, softcap=softcap).left


def parallel(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    left: Tensor,
    maps: Maps | None = None,
    kind: str = "exp",
    *,
    scale: float | None = None,
    softcap: float = 0.0,
    rows: Tensor | None = None,
) -> Tensor:
    """The recurrence of ``run`` as masks over [T, T]: differentiable, all queries at once.

    A query at position t sees a token at p <= t exactly while t < left[p], and through the
    low-rank state from then on.

    Args:
        q: [B, Q, T, D].
        k: [B, K, T, D].
        v: [B, K, T, D].
        left: int64 [B, K, T] from ``run`` or ``evict_schedule``.
        maps: Feature maps of the layer; None is eviction alone.
        kind: Their kind.
        scale: Factor of q.k, 1/sqrt(D) by default.
        softcap: As in ``chunk_attention``.
        rows: int64 [M]: the query positions to compute; all by default.

    Returns:
        [B, Q, T, D], or [B, Q, M, D].
    """
    B, K, T, D = k.shape
    Q = q.shape[1]
    dtype = _accumulator(k)
    scale = 1.0 / math.sqrt(D) if scale is None else scale
    t = torch.arange(T, device=k.device) if rows is None else rows
    query = q.index_select(2, t).to(dtype).view(B, K, Q // K, len(t), D)
    token = torch.arange(T, device=k.device)
    gone = left[:, :, None, :] <= t[:, None]
    seen = token[None, :] <= t[:, None]
    kept = seen & ~gone
    logits = capped(torch.einsum("bkgtd,bknd->bkgtn", query, k.to(dtype)) * scale, softcap)
    logits = logits.masked_fill(~kept[:, :, None], -torch.inf)
    top = logits.amax(-1, keepdim=True)
    if maps is None:
        p = (logits - top).exp()
        out = torch.einsum("bkgtn,bknd->bkgtd", p / p.sum(-1, keepdim=True), v.to(dtype))
        return out.reshape(B, Q, len(t), D).to(q.dtype)
    phi_q = phi(query.reshape(B, Q, len(t), D), maps, kind).view(B, K, Q // K, len(t), -1)
    low = torch.einsum("bkgtr,bknr->bkgtn", phi_q, psi(k, maps, kind))
    low = low * (seen & gone)[:, :, None].to(dtype)
    # One common maximum for both parts: every exponent is <= 0. A low-rank part without mass
    # is left out: its factor could be infinite.
    tiny = torch.finfo(dtype).tiny
    total = low.detach().sum(-1, keepdim=True)
    there = total > tiny
    log_low = torch.where(there, total.clamp(min=tiny).log(), -torch.inf)
    top = torch.maximum(top, log_low).detach()
    mass = (logits - top).exp() + low * torch.where(there, (-top).exp(), 0.0)
    out = torch.einsum("bkgtn,bknd->bkgtd", mass, v.to(dtype)) / mass.sum(-1, keepdim=True)
    return out.reshape(B, Q, len(t), D).to(q.dtype)
