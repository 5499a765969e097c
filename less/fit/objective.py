"""The objective: attention under a policy's mask plus the low-rank state, against full attention.

The parallel form of the recurrence, for sampled queries only: [rows, T] instead of [T, T]. What
does not depend on the maps (the kept tokens' part) is computed without gradient. For the reference
it is held to, see ``less.reference.parallel``.

Source: arXiv:2402.09398, section 3.3 (l2 loss after the output projection, layer by layer).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from less import layer, reference

Maps = Mapping[str, Tensor]


@dataclass(frozen=True)
class Rows:
    """Sampled queries of some chunks, with everything about them that no map changes.

    G = Q / K query heads share a kv head; M = G * n rows stand under each kv head.

    Attributes:
        q: [B, Q, n, D].
        k: Keys as the state takes them [B, K, T, D].
        v: Values likewise.
        gone: 1.0 where a token had left before the row's step, else 0.0; [B, K, 1, n, T].
        log_mass: log of the kept tokens' sum of e^l [B, K, M, 1].
        value: Attention's output over the kept tokens alone [B, K, M, D].
        target: Full attention's output [B, Q, n, D].
        gone_log_mass: log of the evicted tokens' sum of e^l [B, K, M], -inf where there are none:
            the mass that the low-rank part has to meet. None unless asked for.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    gone: Tensor
    log_mass: Tensor
    value: Tensor
    target: Tensor
    gone_log_mass: Tensor | None = None


@torch.no_grad()
def prepare(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    left: Tensor,
    rows: Tensor,
    scale: float,
    softcap: float = 0.0,
    *,
    taken: tuple[Tensor, Tensor] | None = None,
    gone_mass: bool = False,
) -> Rows:
    """Attend over the kept tokens at the sampled rows.

    Args:
        q: [B, Q, T, D].
        k: [B, K, T, D].
        v: [B, K, T, D].
        out: Full attention's output [B, Q, T, D].
        left: From `schedule`, int64 [B, K, T].
        rows: Query positions, int64 [B, n].
        scale: Factor of q.k.
        softcap: What scale q.k is held within; 0: nothing.
        taken: Keys and values as the state takes them, where it does not take k and v.
        gone_mass: Whether to compute `gone_log_mass`.
    """
    B, K, T, D = k.shape
    Q, n = q.shape[1], rows.shape[1]
    index = rows[:, None, :, None].expand(B, Q, n, D)
    query = q.gather(2, index).float()
    target = out.gather(2, index).float()
    k, v = k.float(), v.float()
    step = rows[:, None, :, None]
    gone = left[:, :, None, :] <= step  # [B, K, n, T]
    hidden = gone | (torch.arange(T, device=k.device) > step)
    logits = reference.capped(query.view(B, K, -1, D) @ k.transpose(2, 3) * scale, softcap)
    logits = logits.view(B, K, Q // K, n, T)
    evicted = None
    if gone_mass:
        evicted = logits.masked_fill(~gone[:, :, None], -torch.inf).view(B, K, -1, T).logsumexp(-1)
    kept = logits.masked_fill_(hidden[:, :, None], -torch.inf).view(B, K, -1, T)
    # torch's softmax is many times faster than its exp; the largest weight is e^(max - log mass).
    weight = kept.softmax(-1)
    own_k, own_v = (k, v) if taken is None else taken
    return Rows(
        q=query,
        k=own_k,
        v=own_v,
        gone=gone[:, :, None].float(),
        log_mass=kept.amax(-1, keepdim=True) - weight.amax(-1, keepdim=True).log(),
        value=weight @ v,
        target=target,
        gone_log_mass=evicted,
    )


def low_rank(rows: Rows, maps: Maps, kind: str) -> tuple[Tensor, Tensor]:
    """The low-rank part at each row: its mass phi z [B, K, M, 1] and phi H [B, K, M, D]."""
    B, K, T, _ = rows.k.shape
    of_kind = layer.Maps(kind, maps)
    phi_q = reference.phi(rows.q, of_kind).reshape(B, K, -1, of_kind.rank)
    psi_k = reference.psi(rows.k, of_kind)
    n = rows.q.shape[2]
    weight = (phi_q @ psi_k.transpose(2, 3)).view(B, K, -1, n, T) * rows.gone
    weight = weight.view(B, K, -1, T)
    return weight.sum(-1, keepdim=True), weight @ rows.v


def attend(rows: Rows, maps: Maps | None = None, kind: str = "exp") -> Tensor:
    """LESS's output at the sampled rows [B, Q, n, D]; eviction alone without maps.

    The two parts merge under one common maximum of their log-masses, so that nothing overflows. A
    low-rank part with no mass is left out rather than scaled: its factor could be infinite.
    """
    if maps is None:
        return rows.value.view_as(rows.target)
    mass, value = low_rank(rows, maps, kind)
    tiny = torch.finfo(mass.dtype).tiny
    there = mass.detach() >= tiny
    log_mass = torch.where(there, mass.detach().clamp(min=tiny).log(), -torch.inf)
    top = torch.maximum(rows.log_mass, log_mass)
    kept, low = (rows.log_mass - top).exp(), torch.where(there, (-top).exp(), 0.0)
    out = (rows.value * kept + value * low) / (kept + mass * low)
    return out.view_as(rows.target)


def l2(out: Tensor, target: Tensor, o_weight: Tensor) -> Tensor:
    """Mean squared difference after the output projection (whose bias cancels).

    Args:
        out: [B, Q, n, D].
        target: [B, Q, n, D].
        o_weight: [hidden size, Q * D].
    """
    difference = (out - target).transpose(1, 2).flatten(2)
    return torch.nn.functional.linear(difference, o_weight).square().mean()


def norm(out: Tensor, target: Tensor, o_weight: Tensor) -> Tensor:
    """Mean l2 norm of the difference after the output projection, over queries; as ``l2``.

    Not squared, so the few queries that no state of this size can help do not outweigh the rest.
    """
    difference = (out - target).transpose(1, 2).flatten(2)
    projected = torch.nn.functional.linear(difference, o_weight)
    return projected.square().sum(-1).clamp(min=1e-30).sqrt().mean()  # no gradient of sqrt at 0


LOSSES = {"norm": norm, "squared": l2}
