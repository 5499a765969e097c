"""When a layer's cache lets go of each token: the mask under which a sidekick is trained.

A policy sees nothing of the low-rank state, so a layer's whole run over captured q, k, v is known
before training. It is run here through the cache itself, token by token, all chunks at once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from less.cache import PagedLayer
from less.fit.eviction import Eviction
from less.layer import PageLayout
from less.policies import Policy


@torch.no_grad()
def schedule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    eviction: Policy | Eviction,
    scale: float | None = None,
    softcap: float = 0.0,
) -> Tensor:
    """The number of tokens seen when each token had just left, decoding from the first token on.

    Args:
        q: [B, Q, T, D].
        k: [B, K, T, D].
        v: [B, K, T, D].
        eviction: How the layer evicts; of a policy alone, from float32 rows.
        scale: Factor of q.k, 1/sqrt(D) by default.
        softcap: What scale q.k is held within; 0: nothing.

    Returns:
        int64 [B, K, T]; T + 1 where the token is kept to the end.

    Raises:
        TypeError: What the policy's `rank` gives is no tensor.
        ValueError: It is not floating point, or not one number per candidate.
    """
    if isinstance(eviction, Policy):
        eviction = Eviction(eviction)
    B, K, T, D = k.shape
    layer = PagedLayer(
        eviction.policy,
        eviction.layout or PageLayout(K, D, eviction.policy.capacity, torch.float32),
        q.shape[1],
        space=eviction.space,
        scale=scale,
        softcap=softcap or None,
        device=k.device,
    )
    pool = layer.new_pool(B)
    q, k, v = q.float(), k.float(), v.float()
    out = torch.empty_like(q[:, :, :1])
    left = torch.full((B, K, T + 1), T + 1, dtype=torch.int64, device=k.device)
    held = [(x.heads, x.slots.position) for x in layer.layout.views(pool)]
    before = torch.cat([x.sum(2) for _, x in held], 1)
    for t in range(T):
        layer.attend(pool, *(x[:, :, t : t + 1] for x in (q, k, v)), out=out)
        after = torch.cat([x.sum(2) for _, x in held], 1)
        # Empty slots hold -1: who comes into one changes the sum by as much as if -1 had left.
        gone = before + t - after
        left.scatter_(2, gone.where(gone >= 0, T).unsqueeze(2), t + 1)
        before = after
    return left[:, :, :T]
