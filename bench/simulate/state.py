"""A sidekick's state in simulated caches: its features, and what it takes of the bytes."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from bench.simulate.model import SidekickFeatures
from bench.simulate.native import Features
from bench.simulate.space import Moments
from less import Sidekick, reference
from less.layer import Maps, PackedMaps
from less.layer.kinds import KEY_MEAN
from less.layer.layout import placed


def features_of(sidekick: Sidekick, known: Mapping[int, Moments]) -> SidekickFeatures:
    """What makes the state of centred maps, for rows whose means of keys are others.

    Args:
        sidekick: Of kind centroid; a layer without maps forgets.
        known: Whose means of keys the simulated rows are without.
    """
    if sidekick.kind != "centroid":
        raise ValueError(f"--sidekick: maps must be of kind 'centroid', got {sidekick.kind!r}")
    sidekick = sidekick.to(torch.float32)

    def features(layer: int, q: Tensor, k: Tensor, scale: float) -> Features | None:
        tensors = sidekick[layer]
        if not tensors:
            return None
        off = known[layer].k_mean.float()
        if (mean := tensors.pop(KEY_MEAN, None)) is not None:
            off = off - mean
        maps = Maps("centroid", tensors)
        # phi z stands beside e^(scale q.(k - mean)) of the maps' mean, and is to stand beside that
        # of the rows' own.
        shift = scale * (q.unflatten(0, (len(k), -1)) * off[:, None, None]).sum(-1)
        phi = reference.phi(q[None], maps)[0] * shift.flatten(0, 1).neg().exp()[..., None]
        return Features(phi, reference.psi((k + off[:, None])[None], maps)[0])

    return features


def state_bytes(sidekick: Sidekick, half: bool = False) -> int:
    """Bytes of a head: H, z, and its part of the maps of a cache.

    Args:
        sidekick: As it is held.
        half: H has 16 bits.
    """
    R, D = sidekick.rank, sidekick.head_dim
    held = [{n: x for n, x in maps.items() if n != KEY_MEAN} for maps in sidekick]
    maps = sum(PackedMaps.pack(m, sidekick.kind).memory.numel() for m in held if m)
    heads = sidekick.layers * sidekick.kv_heads
    return placed({"z": (R, 4), "H": (R, D * (2 if half else 4))})[1] + -(-maps // heads)
