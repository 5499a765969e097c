"""When a policy lets go of each token: the mask under which a sidekick is trained.

Scores never depend on the low-rank state or on values, so a policy's whole run over captured q, k
is known before training. It is run here token by token, all chunks at once, with the policy's own
`rank`; ``tests/test_fit.py`` holds it to ``less.reference.evict_schedule``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from less import reference
from less.policies import Candidates, Policy, SinkRecent


def schedule(
    q: Tensor, k: Tensor, policy: Policy, scale: float | None = None, softcap: float = 0.0
) -> Tensor:
    """The number of tokens seen when each token had just left, decoding from the first token on.

    Args:
        q: [B, Q, T, D].
        k: [B, K, T, D].
        policy: Who stays.
        scale: Factor of q.k, 1/sqrt(D) by default.
        softcap: What scale q.k is held within; 0: nothing.

    Returns:
        int64 [B, K, T]; T + 1 where the token is kept to the end.
    """
    B, K, T, D = k.shape
    if type(policy) is SinkRecent:
        return _sink_recent(policy, B, K, T, k.device)
    return _decode(q.float(), k.float(), policy, D**-0.5 if scale is None else scale, softcap)


def _sink_recent(policy: SinkRecent, B: int, K: int, T: int, device: torch.device) -> Tensor:
    """Token p outside the sinks leaves when it is `recent` tokens old."""
    token = torch.arange(T, device=device)
    # While fewer tokens than the capacity were seen, the slots of missing sinks stand empty.
    left = (token + 1 + policy.recent).clamp(max=T + 1)
    left = torch.where(token < policy.sinks, T + 1, left)
    return left.expand(B, K, T).clone()


@torch.no_grad()
def _decode(q: Tensor, k: Tensor, policy: Policy, scale: float, softcap: float) -> Tensor:
    """Slots 0..C-1 hold the kept tokens, slot C the newest, which then takes a victim's slot."""
    B, K, T, D = k.shape
    G, C = q.shape[1] // K, policy.capacity
    at = k.device
    left = torch.full((B, K, T), T + 1, dtype=torch.int64, device=at)
    position = torch.full((B, K, C + 1), -1, dtype=torch.int32, device=at)
    score = torch.zeros(B, K, C + 1, device=at)
    weight = torch.zeros(B, K, C + 1, device=at)
    slots = torch.zeros(B, K, C + 1, D, device=at)
    query = q.view(B, K, G, T, D)
    for t in range(T):
        new = min(t, C)
        held = new + 1
        slots[:, :, new] = k[:, :, t]
        position[:, :, new] = t
        score[:, :, new] = 0.0
        if policy.needs_scores:
            logits = query[:, :, :, t] @ slots[:, :, :held].transpose(2, 3) * scale
            received = reference.capped(logits, softcap).softmax(-1).sum(2)
            score[:, :, :held] = score[:, :, :held] * policy.decay + received
        if held <= C:
            continue
        rank = policy.rank(
            Candidates(
                position=position,
                score=score,
                weight=weight,
                seen=torch.full((B,), t + 1, dtype=torch.int64, device=at),
                k=slots,
                v=slots,
            )
        ).nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
        lowest = rank == rank.amin(2, keepdim=True)
        victim = position.masked_fill(~lowest, T).argmin(2, keepdim=True)  # of equals the oldest
        left.scatter_(2, position.gather(2, victim).long(), t + 1)
        position.scatter_(2, victim, position[:, :, C:].clone())
        score.scatter_(2, victim, score[:, :, C:].clone())
        slots.scatter_(2, victim[..., None].expand(B, K, 1, D), slots[:, :, C:].clone())
    return left
