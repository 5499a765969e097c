"""Random inputs and the one table of tolerances."""

from dataclasses import dataclass

import torch

from less import Candidates, Policy

# Relative to the largest entry, by the dtype of slots and output.
TOLERANCE = {
    torch.float64: 1e-10,
    torch.float32: 1e-5,
    torch.float16: 2e-3,
    torch.bfloat16: 1.6e-2,
}


@dataclass(frozen=True)
class HeavyValues(Policy):
    """Ranks by what a token gave to the output so far: its score times the norm of its value."""

    budget: int

    @property
    def capacity(self):
        return self.budget

    def rank(self, tokens: Candidates):
        return tokens.score * tokens.v.float().norm(dim=-1)


def random_qkv(B, Q, K, T, D, seed=0, dtype=torch.float32):
    """Queries, keys and values with logits that make softmax neither flat nor one-hot."""
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(B, Q, T, D, generator=g, dtype=torch.float64) * 1.5
    k = torch.randn(B, K, T, D, generator=g, dtype=torch.float64) * 1.5
    v = torch.randn(B, K, T, D, generator=g, dtype=torch.float64)
    return q.to(dtype), k.to(dtype), v.to(dtype)


def random_maps(Q, K, D, E, R, kind, seed=0, dtype=torch.float32):
    """A layer's feature maps whose features are of order one."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape, scale=1.0):
        return (torch.randn(*shape, generator=g, dtype=torch.float64) * scale).to(dtype)

    if kind == "centroid":
        return {
            "centroids": normal(K, D, R, scale=D**-0.5),
            "q_factor": 1 + normal(Q, scale=0.2),
            "q_bias": normal(Q, R),
            "k_factor": 1 + normal(K, scale=0.2),
            "k_bias": normal(K, R),
            "k_weight": normal(K, D, scale=D**-0.5),
            "k_offset": normal(K),
        }
    maps = {
        "q_w1": normal(Q, D, E, scale=D**-0.5),
        "q_w2": normal(Q, E, R, scale=E**-0.5),
        "k_w1": normal(K, D, E, scale=D**-0.5),
        "k_w2": normal(K, E, R, scale=E**-0.5),
    }
    if kind == "exp":
        return maps | {"q_bias": normal(Q, R), "k_bias": normal(K, R)}
    return maps | {
        "k_mix": normal(K, R, R, scale=R**-0.5),
        "k_scale": normal(K, R),
        "k_mix_scale": normal(K, R),
    }


def held(cache, layer):
    """What a layer of a cache holds, by the names of a page's fields: views [B, K, ...]."""
    (views,) = cache.layouts[layer].views(cache.pools[layer])
    return views.tensors()


def misplaced(x):
    """The same numbers, one element off where memory was allocated."""
    return x.new_empty(x.numel() + 1)[1:].view_as(x).copy_(x)


def assert_close(got, want, dtype, factor=1.0):
    """Equal within the dtype's tolerance, relative to the largest entry."""
    bound = TOLERANCE[dtype] * factor * max(1e-30, want.abs().max().item())
    error = (got.double() - want.double()).abs().max().item()
    assert error <= bound, f"error {error:.3g} above {bound:.3g}"
