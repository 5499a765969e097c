"""Merging: a token that leaves becomes part of the nearest token that stays."""

from __future__ import annotations

import torch
from torch import Tensor

from less.layer.rows import COUNT

#: Added to a score, so that tokens without attention have a weight.
LEAST = 1e-6


def merged_weight(a: Tensor, b: Tensor) -> Tensor:
    """The weight of two tokens that become one: of log-weights, or of counts up to the most."""
    if a.is_floating_point():
        return torch.logaddexp(a, b)
    return (a + b).clamp(max=torch.iinfo(COUNT).max)


def nearest(k: Tensor, score: Tensor, position: Tensor, leaves: Tensor, target: Tensor) -> Tensor:
    """For each token of a head that leaves: whom it is merged into.

    That is the target j of least w_i w_j / (w_i + w_j) |k_i - k_j|^2, w = score + 1e-6: what the
    means of both move by, as attention weighs it. Of equal costs the older token; a cost of NaN
    counts as none.

    Args:
        k: Keys as slots hold them [N, D].
        score: [N].
        position: int32 [N].
        leaves: bool [N].
        target: bool [N], who may take others in; none of those who leave.

    Returns:
        int64 [N]: an index for each that leaves, -1 where there is no target and for the others.
    """
    found = torch.full_like(position, -1, dtype=torch.int64)
    i = leaves.nonzero()[:, 0]
    j = target.nonzero()[:, 0]
    j = j[position[j].argsort(stable=True)]  # the first of equals is the older
    if len(i) == 0 or len(j) == 0:
        return found
    weight = score.double() + LEAST
    both = weight[i, None] * weight[None, j] / (weight[i, None] + weight[None, j])
    far = (k[i, None].double() - k[None, j].double()).square().sum(-1)
    cost = both * far
    cost = torch.where(cost.isnan(), torch.inf, cost)
    least = cost.amin(1)
    first = (cost == least[:, None]).long().argmax(1)
    found[i] = torch.where(least < torch.inf, j[first], -1)
    return found


def merged(
    k: Tensor,
    v: Tensor,
    score: Tensor,
    weight: Tensor,
    position: Tensor,
    into: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The tokens of a head after means were taken.

    Those who leave come in ascending position. With w = score + 1e-6 and a = w_i / (w_i + w_j):
    k_j and v_j move by a of the way to k_i and v_i; scores add up, as the tokens that a log-weight
    stands for do; the later position stays.

    Args:
        k: [N, D].
        v: [N, D].
        score: [N].
        weight: Log-weights [N], or counts of the tokens that each stands for, int32.
        position: int32 [N].
        into: int64 [N], of ``nearest``.

    Returns:
        k, v, score, weight and position of all, those who left as they were.
    """
    k, v, score = k.clone(), v.clone(), score.clone()
    weight, position = weight.clone(), position.clone()
    mass = score + LEAST
    leaves = (into >= 0).nonzero()[:, 0]
    for i in leaves[position[leaves].argsort()].tolist():
        j = int(into[i])
        part = mass[i] / (mass[i] + mass[j])
        k[j] += part * (k[i] - k[j])
        v[j] += part * (v[i] - v[j])
        mass[j] = mass[j] + mass[i]
        score[j] = score[j] + score[i]
        weight[j] = merged_weight(weight[j], weight[i])
        position[j] = torch.maximum(position[j], position[i])
    return k, v, score, weight, position
