"""Attention over slots, low-rank state and a call's own tokens; scores."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from less.layer import LayerSpec, Rows, Slots, State
from less.reference.codec import slot_floats
from less.reference.numbers import accumulator, floats


def capped(logits: Tensor, softcap: float) -> Tensor:
    """Logits held within +-softcap: softcap * tanh(logits / softcap); as they are for 0."""
    return softcap * torch.tanh(logits / softcap) if softcap else logits


@dataclass(frozen=True)
class Attended:
    """What one call of ``chunk_attention`` computes.

    Attributes:
        out: [B, Q, T, D], zero where the token is padding.
        score: Scores after the call, of the slots and then of its own tokens [B, K, S + T].
        share: Part of each query's attention mass taken by the low-rank state [B, Q, T].
    """

    out: Tensor
    score: Tensor
    share: Tensor


def chunk_attention(
    q: Tensor,
    new: Rows,
    valid: Tensor | None,
    slots: Slots,
    spec: LayerSpec,
    *,
    phi_q: Tensor | None = None,
    state: State | None = None,
    shift: Tensor | None = None,
) -> Attended:
    """Attend over the kept slots, the low-rank state and, causally, the call's own tokens.

    out = (phi H + sum e^l v) / (phi z + sum e^l), l = scale q.k + weight, as a merge of two
    softmax parts: the low-rank part has log-mass log(phi z) and value phi H / phi z. A part with
    no mass counts nothing. NaN in the features, in z or in H is NaN in the output. Scores take the
    softmax over slots and call alone, summed over the group. With a soft-cap,
    l = softcap tanh(scale q.k / softcap) + weight. Rows of 8 bits are attended to as the numbers
    that they stand for.

    Args:
        q: [B, Q, T, D].
        new: The call's tokens, T of them.
        valid: bool [B, T], False for padding, or None.
        slots: What is kept.
        spec: Scale, soft-cap, decay, and whether there are scores.
        phi_q: Features of the queries [B, Q, T, R], or None for eviction alone.
        state: With ``phi_q``.
        shift: What the logits of each query lack [B, Q, T] (``query_shift``), of rows in a space of
            their own; None: nothing.

    Source: arXiv:2402.09398, eq. 4.
    """
    B, Q, T, D = q.shape
    K, S = slots.position.shape[1], slots.position.shape[2]
    G = Q // K
    (k, v), (slot_k, slot_v) = floats(new), slot_floats(slots)
    position, weight, score = slots.position, slots.log_weight, slots.scores
    dtype = torch.promote_types(accumulator(q), accumulator(k))
    if valid is None:
        valid = torch.ones(B, T, dtype=torch.bool, device=q.device)
    keys = torch.cat([slot_k, k], 2).to(dtype)
    values = torch.cat([slot_v, v], 2).to(dtype)

    causal = torch.ones(T, T, dtype=torch.bool, device=q.device).tril()
    to_chunk = causal & valid[:, None, :] & valid[:, :, None]
    to_slots = (position >= 0)[:, :, None, :] & valid[:, None, :, None]
    mask = torch.cat([to_slots, to_chunk[:, None].expand(B, K, T, T)], 3)

    query = q.to(dtype).view(B, K, G, T, D)
    logits = capped(torch.einsum("bkgtd,bknd->bkgtn", query, keys) * spec.scale, spec.softcap)
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
        if state is None:
            raise ValueError("chunk_attention: phi_q and state must be given together")
        features = phi_q.to(dtype).view(B, K, G, T, -1)
        low = torch.einsum("bkgtr,bkr->bkgt", features, state.z.to(dtype))[..., None]
        low_value = torch.einsum("bkgtr,bkrd->bkgtd", features, state.H.to(dtype))
        has_mass = ~(low <= 0)  # NaN too
        log_low = torch.where(has_mass, low.clamp(min=torch.finfo(dtype).tiny).log(), -torch.inf)
        if shift is not None:
            log_low = log_low - shift.to(dtype).view(B, K, G, T, 1)
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

    if spec.scores:
        received = torch.einsum("bkgtn,bt->bkn", p, _fade(valid, spec.decay, dtype))
        count = valid.sum(1).to(dtype)
        left = torch.pow(torch.tensor(spec.decay, dtype=dtype), count).view(B, 1, 1)
        held = torch.where(position >= 0, score.to(dtype) * left + received[..., :S], 0.0)
        after = torch.cat([held, received[..., S:]], 2)
    else:
        after = torch.cat([score.to(dtype), score.new_zeros(B, K, T, dtype=dtype)], 2)
    return Attended(
        out=out.reshape(B, Q, T, D).to(q.dtype),
        score=after.to(score.dtype),
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
    dtype = torch.promote_types(accumulator(q), accumulator(k))
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
