"""The constants of a layer, and the form in which ops take them."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from less.dtypes import CODES
from less.layer.layout import PageLayout
from less.layer.maps import PackedMaps
from less.layer.pool import Paged
from less.policies import Rule

#: The actions on an evicted token, as in ``Victim`` of csrc/params.h. ``"none"``: no token joins
#: and none is evicted, so that a step computes attention only.
VICTIMS = {"none": 0, "forget": 1, "fold": 2}
_VERSION = 1


@dataclass(frozen=True)
class LayerSpec:
    """What is the same in every call of a layer.

    Attributes:
        q_heads: Query heads Q, a multiple of the kv heads.
        scale: Factor of q.k.
        softcap: 0: none; else logits become softcap * tanh(scale q.k / softcap) + log-weight.
        decay: Factor of a score per token.
        scores: False leaves the scores as they are, and those of new tokens at 0.
        rule: The policy's native ranking; None: the caller passes ranks to ``compact``.
        victim: ``"forget"`` or ``"fold"``; ``"none"``: a step computes attention only.
        null_page: A page number that means no page, besides numbers outside the pool.
        dependent: A GPU's launch may begin before the previous kernel has finished.
    """

    q_heads: int
    scale: float
    softcap: float = 0.0
    decay: float = 1.0
    scores: bool = True
    rule: Rule | None = None
    victim: str = "forget"
    null_page: int = -1
    dependent: bool = False

    def __post_init__(self) -> None:
        """Refuse an unknown victim."""
        if self.victim not in VICTIMS:
            raise ValueError(
                f"LayerSpec: victim must be one of {', '.join(VICTIMS)}, got {self.victim!r}"
            )


def _bits(x: float) -> int:
    return int(struct.unpack("<q", struct.pack("<d", x))[0])


def encode(spec: LayerSpec, layout: PageLayout, maps: PackedMaps | None = None) -> Tensor:
    """The constants of a layer as the ops take them, on the CPU; made once.

    Args:
        spec: Its constants.
        layout: Its page.
        maps: Its feature maps; None: it has none.

    Returns:
        int64 [R + 1, S, 24 + K]: the same 24 + K numbers for every R and S, in memory once.
        csrc/ops/layer.h reads them. The shape is for tracers, which see only shapes.
    """
    rule = spec.rule or Rule(recent=0, sinks=0, by_score=False, per_age=False)
    numbers = torch.tensor(
        [
            _VERSION,
            spec.q_heads,
            layout.kv_heads,
            layout.head_dim,
            CODES[layout.dtype],
            layout.rank,
            VICTIMS[spec.victim],
            int(spec.scores),
            int(spec.dependent),
            spec.null_page,
            int(spec.rule is not None),
            rule.recent,
            rule.sinks,
            int(rule.by_score),
            int(rule.per_age),
            _bits(spec.scale),
            _bits(spec.softcap),
            _bits(spec.decay),
            *((-1, 0, 0, 0, 0) if maps is None else maps.described()),
            0,
            *layout.capacities,
        ],
        dtype=torch.int64,
    )
    return numbers.expand(layout.rank + 1, layout.slots, -1)


@dataclass(frozen=True)
class LayerPlan:
    """A layer's constants, page and maps: everything that is known before its first call.

    Attributes:
        spec: Its constants.
        layout: Its page.
        maps: Its feature maps; None: it has none.
    """

    spec: LayerSpec
    layout: PageLayout
    maps: PackedMaps | None = None

    def __post_init__(self) -> None:
        """Refuse parts that do not belong together."""
        op = "LayerPlan"
        Q, K = self.spec.q_heads, self.layout.kv_heads
        if Q % K:
            raise ValueError(f"{op}: q_heads must be a multiple of kv_heads, got {Q} and {K}")
        rank = self.maps.rank if self.maps is not None else 0
        if rank != self.layout.rank:
            raise ValueError(
                f"{op}: the layout's rank must be that of the maps, {rank}, got {self.layout.rank}"
            )
        if self.spec.victim == "fold" and self.maps is None:
            raise ValueError(f"{op}: victim 'fold' needs maps")
        if self.maps is not None:
            self.maps.check(op, Q, K, self.layout.head_dim)
        _ = self.encoded  # made now: a step makes nothing

    @cached_property
    def encoded(self) -> Tensor:
        """What the ops take of it, int64 on the CPU."""
        return encode(self.spec, self.layout, self.maps)

    def seen(self, at: Paged, B: int) -> Tensor:
        """Tokens that the sequence of each row has seen, int64 [B].

        0 for a row without a page, or whose page begins with this call.

        Args:
            at: The layer's pages.
            B: Rows.
        """
        index, there = at.index(B, self.spec.null_page)
        if at.rows is not None and at.rows.fresh is not None:
            there = there & ~at.rows.fresh
        seen = self.layout.views(at.pool)[0].seen.index_select(0, index)
        return torch.where(there, seen, 0)
