"""A policy of your own: keep every eighth token, and the recent ones."""

from dataclasses import dataclass

import torch

from less import Candidates, LessKVCache, Policy


@dataclass(frozen=True)
class Sparse(Policy):
    """Keep the `recent` last tokens; of the others, multiples of `every` stay longest."""

    budget: int
    every: int = 8
    recent: int = 16

    needs_scores = False  # the ranking reads no attention scores, so none are computed

    @property
    def capacity(self) -> int:
        """Tokens kept per kv head."""
        return self.budget

    def rank(self, tokens: Candidates) -> torch.Tensor:
        """float32 [B, K, N]: the `capacity` highest stay."""
        newest = tokens.position >= tokens.seen.view(-1, 1, 1) - self.recent
        rank = (tokens.position % self.every == 0).float()
        return torch.where(newest, torch.inf, rank)


cache = LessKVCache(layers=1, q_heads=4, kv_heads=2, head_dim=64, batch=1, policy=Sparse(32))
for T in (100, 1, 1):
    q, k, v = (torch.randn(1, heads, T, 64) for heads in (4, 2, 2))
    cache.attend(0, q, k, v)
print(cache.positions(0)[0, 0].sort().values.tolist())
