"""The tensors of a layer and of a call, in the structs that the reference and the ops take."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from less.dtypes import ROW_TYPES, RowFormat

#: How packed slots count the tokens that they stand for, up to its largest number.
COUNT = torch.int16


def noted_score(score: Tensor, dtype: torch.dtype) -> Tensor:
    """Scores as slots note them that have scores of ``dtype``.

    In float16 that is the nearest number, of two the even one, and no more than the largest, 65504.
    """
    if dtype != torch.float16:
        return score
    return score.clamp(max=torch.finfo(dtype).max).to(dtype).to(score.dtype)


def of_rows(x: Tensor, rows: Tensor) -> Tensor:
    """Copies of some rows of the first dimension, int64 [M], of any dtype."""
    if x.dtype != torch.float8_e4m3fn:
        return x.index_select(0, rows)
    return x.view(torch.uint8).index_select(0, rows).view(x.dtype)  # torch selects no float8


def put_rows(x: Tensor, rows: Tensor, values: Tensor) -> None:
    """Write rows of the first dimension, int64 [M], of any dtype, in place."""
    if x.dtype == torch.float8_e4m3fn:
        x, values = x.view(torch.uint8), values.view(torch.uint8)
    x.index_copy_(0, rows, values)


@dataclass(frozen=True)
class Rows:
    """Keys and values in a dtype of slots: for a call, that of the hot ones where there are such.

    Attributes:
        k: [B, K, N, D].
        v: [B, K, N, D].
        k_scale: float32 [B, K, N], of each row of k; None unless k and v are of 8 bits.
        v_scale: float32 [B, K, N], likewise.
    """

    k: Tensor
    v: Tensor
    k_scale: Tensor | None = None
    v_scale: Tensor | None = None


@dataclass(frozen=True)
class Slots:
    """The kept tokens of heads with equally many slots S, of which the first W are hot.

    Attributes:
        position: int32 [B, K, S], -1 where the slot is empty.
        k: Keys after the rotary embedding [B, K, S - W, D], or their codes.
        v: Values [B, K, S - W, D], or their codes.
        weight: Log-weights, added to the logits, float32 [B, K, S]; of packed rows counts of the
            tokens that a slot stands for, int16, 0 in an empty slot. None: each stands for one.
        score: float32 [B, K, S]; float16 of packed rows.
        k_scale: [B, K, S - W], of each row of k: float32 of 8 bits, float16 of packed rows; None
            for others.
        v_scale: [B, K, S - W], likewise.
        hot_k: Keys of hot slots [B, K, W, D]; None where there are none.
        hot_v: Their values.
        hot_k_scale: float32 [B, K, W], of hot rows of 8 bits.
        hot_v_scale: float32 [B, K, W], likewise.
        format: How k and v are stored; None: as numbers of their dtype.
    """

    position: Tensor
    k: Tensor
    v: Tensor
    weight: Tensor | None
    score: Tensor
    k_scale: Tensor | None = None
    v_scale: Tensor | None = None
    hot_k: Tensor | None = None
    hot_v: Tensor | None = None
    hot_k_scale: Tensor | None = None
    hot_v_scale: Tensor | None = None
    format: RowFormat | None = None

    @property
    def rows(self) -> RowFormat:
        """How k and v are stored."""
        return self.format or RowFormat(ROW_TYPES[self.k.dtype], ROW_TYPES[self.v.dtype])

    @property
    def hot_slots(self) -> int:
        """Hot slots W."""
        return 0 if self.hot_k is None else self.hot_k.shape[2]

    @property
    def scores(self) -> Tensor:
        """Scores [B, K, S], of float32 at least."""
        return self.score.to(torch.promote_types(self.score.dtype, torch.float32))

    @property
    def counts(self) -> bool:
        """Whether ``weight`` counts tokens, and is no log-weight."""
        return self.weight is not None and self.weight.dtype == COUNT

    @property
    def log_weight(self) -> Tensor:
        """Log-weights [B, K, S], 0 where none are kept or nobody is."""
        if self.weight is None:
            return torch.zeros_like(self.scores)
        return self.weight.clamp(min=1).to(self.scores.dtype).log() if self.counts else self.weight

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that there are, by name."""
        return {n: x for n, x in vars(self).items() if isinstance(x, Tensor)}

    def select(self, rows: Tensor) -> Slots:
        """Copies of some batch rows, or pages: int64 [M]."""
        return self.holding({n: of_rows(x, rows) for n, x in self.tensors().items()})

    def holding(self, tensors: Mapping[str, Tensor]) -> Slots:
        """The same with other tensors, by name."""
        others: dict[str, Any] = dict(tensors)
        return replace(self, **others)

    @classmethod
    def empty(
        cls,
        B: int,
        K: int,
        S: int,
        D: int,
        dtype: torch.dtype,
        numbers: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> Slots:
        """S empty slots a head; for rows without scales.

        Args:
            B: Batch rows.
            K: Kv heads.
            S: Slots.
            D: Head dim.
            dtype: Of k and v.
            numbers: Of scores and log-weights.
            device: Where.
        """
        return cls(
            position=torch.full((B, K, S), -1, dtype=torch.int32, device=device),
            k=torch.zeros(B, K, S, D, dtype=dtype, device=device),
            v=torch.zeros(B, K, S, D, dtype=dtype, device=device),
            weight=torch.zeros(B, K, S, dtype=numbers, device=device),
            score=torch.zeros(B, K, S, dtype=numbers, device=device),
        )


@dataclass(frozen=True)
class State:
    """The low-rank state: what heads keep of evicted tokens.

    Attributes:
        H: Running sum of psi(k) v^T, float32 [B, K, R, D].
        z: Running sum of psi(k), float32 [B, K, R].
    """

    H: Tensor
    z: Tensor

    def select(self, rows: Tensor) -> State:
        """Copies of some batch rows, or pages: int64 [M]."""
        return State(self.H.index_select(0, rows), self.z.index_select(0, rows))


@dataclass(frozen=True)
class Call:
    """The tokens of one call.

    Attributes:
        q: [B, Q, T, D], float32, bfloat16 or float16.
        k: [B, K, T, D], likewise.
        v: [B, K, T, D], of k's dtype.
        valid: bool [B, T], False for padding, which never enters the slots and whose output is
            zero. None: all valid.
        out: [B, Q, T, D] of q's dtype: where to write. None: a new tensor.

    Rows of D numbers are contiguous; tokens may lie before heads.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    valid: Tensor | None = None
    out: Tensor | None = None
