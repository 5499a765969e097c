"""The constants of a layer, and the form in which ops take them."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from less._check import require_shape
from less.layer.kinds import ORDER, present
from less.layer.layout import PageLayout
from less.layer.maps import PackedMaps
from less.layer.pieces import in_one_piece
from less.layer.pool import Paged
from less.layer.space import SPACE, Space
from less.policies import Rule


@dataclass(frozen=True)
class Victim:
    """An action on an evicted token.

    Attributes:
        code: Its number, as in ``Victim`` of csrc/params.h.
        maps: It needs feature maps and a low-rank state.
        weighs: Slots stand for several tokens: they need log-weights, and scores to weigh by.
    """

    code: int
    maps: bool = False
    weighs: bool = False


#: The actions by name. ``"none"``: no token joins and none is evicted, so that a step computes
#: attention only.
VICTIMS = {
    "none": Victim(0),
    "forget": Victim(1),
    "fold": Victim(2, maps=True),
    "merge": Victim(3, weighs=True),
}
#: Those that a cache may have.
CHOICES = tuple(name for name in VICTIMS if name != "none")
_VERSION = 4


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
        victim: ``"forget"``, ``"fold"`` or ``"merge"``; ``"none"``: a step computes attention only.
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


def encode(
    spec: LayerSpec,
    layout: PageLayout,
    maps: PackedMaps | None = None,
    space: Space | None = None,
) -> Tensor:
    """The constants of a layer as the ops take them, on the CPU; made once.

    Args:
        spec: Its constants.
        layout: Its page.
        maps: Its feature maps; None: it has none.
        space: The space of its rows; None: they are stored as they come.

    Returns:
        int64 [R + 1, S, 29 + K]: the same 29 + K numbers for every R and S, in memory once.
        csrc/ops/layer.h reads them. The shape is for tracers, which see only shapes.
    """
    kind, w_dtype, hidden, rank, tensors = (-1, 0, 0, 0, 0) if maps is None else maps.described()
    if space is not None:
        tensors |= present(space.tensors())
    rule = spec.rule or Rule(recent=0, sinks=0, by_score=False, per_age=False)
    numbers = torch.tensor(
        [
            _VERSION,
            spec.q_heads,
            layout.kv_heads,
            layout.head_dim,
            layout.format.k.code,
            layout.format.v.code,
            layout.hot_type.code,
            layout.sinks,
            layout.hot,
            int(bool(layout.weights)),
            layout.rank,
            VICTIMS[spec.victim].code,
            int(spec.scores),
            int(spec.dependent),
            spec.null_page,
            int(spec.rule is not None),
            rule.recent,
            rule.sinks,
            int(rule.by_score),
            int(rule.per_age),
            rule.capacity,
            _bits(spec.scale),
            _bits(spec.softcap),
            _bits(spec.decay),
            kind,
            w_dtype,
            hidden,
            rank,
            tensors,
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
        space: The space in which its rows are stored; None: rows are stored as they come.
        memory: Space and maps in one piece, uint8 [bytes], as the ops take them; None: neither.
    """

    spec: LayerSpec
    layout: PageLayout
    maps: PackedMaps | None = None
    space: Space | None = None
    memory: Tensor | None = field(init=False, default=None)

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
        victim = VICTIMS[self.spec.victim]
        if victim.weighs and not self.layout.weights:
            raise ValueError(f"{op}: victim {self.spec.victim!r} needs a layout with weights")
        if victim.maps and self.maps is None:
            raise ValueError(f"{op}: victim {self.spec.victim!r} needs maps")
        if self.maps is not None:
            self.maps.check(op, Q, K, self.layout.head_dim)
            object.__setattr__(self, "memory", self.maps.memory)
        if self.space is not None:
            self._pack_space(op, self.space)
        if self.layout.format.packed and self.space is None:
            raise ValueError(f"{op}: rows of {self.layout.dtype} need a space")
        _ = self.encoded  # made now: a step makes nothing

    def _pack_space(self, op: str, space: Space) -> None:
        """Put space and maps into one piece of memory, of which both become views.

        Without maps it is the space's own, which layers of one space share.
        """
        shape = [self.layout.kv_heads, self.layout.head_dim]
        for label, x in space.tensors().items():
            require_shape(op, label, x, shape)
        if self.spec.softcap and bool((space.key_mean != 0).any()):
            raise ValueError(f"{op}: key_mean must be 0 under a soft-cap")
        if self.maps is None:
            object.__setattr__(self, "memory", space.memory)
            return
        device = self.maps.memory.device
        tensors = {n: x.to(device) for n, x in space.tensors().items()}
        memory, views = in_one_piece({**tensors, **self.maps.tensors}, ORDER, device)
        object.__setattr__(self, "space", Space(**{n: views.pop(n) for n in SPACE}))
        object.__setattr__(self, "maps", PackedMaps(self.maps.kind, views, memory))
        object.__setattr__(self, "memory", memory)

    @property
    def query_rotation(self) -> str:
        """How queries enter the space: those that meet packed rows are rounded."""
        return "rounded_query" if self.layout.format.packed else "query"

    @property
    def shifted(self) -> bool:
        """Whether what queries' logits lack in the space is added where they meet the state."""
        return self.space is not None and self.maps is not None and not self.maps.centred

    @cached_property
    def encoded(self) -> Tensor:
        """What the ops take of it, int64 on the CPU."""
        return encode(self.spec, self.layout, self.maps, self.space)

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
