"""What a cache says of itself: in snapshots, and in print."""

from __future__ import annotations

from typing import Any

import torch

from less.cache.checks import policy_text
from less.calibration import Calibration
from less.layer import PageLayout
from less.policies import Policy
from less.sidekick import Sidekick


class Described:
    """Mixin: a cache's settings as plain values; the cache brings the attributes."""

    layers: int
    q_heads: int
    kv_heads: int
    head_dim: int
    batch: int
    part: tuple[int, int]
    dtype: torch.dtype | str
    device: torch.device
    scale: float
    softcap: float | None
    backend: str
    policies: tuple[Policy | None, ...]
    sidekick: Sidekick | None
    victim: str
    calibration: Calibration | None

    @property
    def layouts(self) -> tuple[PageLayout | None, ...]:
        """What a page of each layer holds."""
        raise NotImplementedError

    def _settings(self) -> dict[str, Any]:
        """What a cache must share to load a snapshot."""
        return {
            "layers": self.layers,
            "q_heads": self.q_heads,
            "kv_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "part": list(self.part),  # a list, as JSON gives it back
            "batch": self.batch,
            "dtype": str(self.dtype),
            "hot": [[x.sinks, x.hot, str(x.hot_dtype)] for x in self.layouts if x is not None][:1],
            "calibration": None if self.calibration is None else self.calibration.digest,
            "scale": self.scale,
            "softcap": self.softcap,
            "policy": self.policy_text(),
            "kind": self.kind,
            "rank": self.sidekick.rank if self.sidekick is not None else 0,
            "victim": self.victim,
            "capacities": [None if x is None else list(x.capacities) for x in self.layouts],
            **self._centred_maps(),
        }

    def _centred_maps(self) -> dict[str, Any]:
        """Which layers have no maps, and the means of keys, where the sidekick has such."""
        absent = () if self.sidekick is None else self.sidekick.absent
        means = None if self.sidekick is None else self.sidekick.key_mean_digest
        return {
            **({"layers_without_maps": list(absent)} if absent else {}),
            **({"key_mean": means} if means is not None else {}),
        }

    @property
    def kind(self) -> str:
        """The kind of the sidekick's maps; "" without one."""
        return "" if self.sidekick is None else self.sidekick.kind

    @property
    def at_once(self) -> int:
        """Tokens that an empty cache may be fed at once as if one by one.

        Until then nothing is evicted, and no row of a packed format is encoded: those tokens see
        each other as single steps would.
        """
        held = [x for x in self.layouts if x is not None]
        return min(x.hot_slots or min(x.capacities) for x in held)

    def policy_text(self) -> str:
        """The policy, or the runs of layers that share one: ``0-1 Full(...); 2-29 H2O(...)``."""
        return policy_text(self.policies)

    def __repr__(self) -> str:
        """Shape, policy and backend."""
        return (
            f"LessKVCache(layers={self.layers}, q_heads={self.q_heads}, kv_heads={self.kv_heads}, "
            f"head_dim={self.head_dim}, batch={self.batch}, policy={self.policy_text()}, "
            f"sidekick={self.kind or None}, dtype={self.dtype}, device={self.device}, "
            f"backend={self.backend})"
        )
