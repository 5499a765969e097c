"""The page: where in memory each field of a layer lies.

Everything that one layer stores for one sequence is one page. A page begins with a header,

    seen int64, 8 unused bytes, share float64 [K]

and goes on with the kv heads one after the other, each with a number of slots S of its own and its
fields in the order in which a step reads them:

    position int32 [S]    hot_k [W, D]    hot_k_scale float32 [W]    k [S - W, D]    k_scale [S - W]
    weight [S]    hot_v [W, D]    hot_v_scale float32 [W]    v [S - W, D]    v_scale [S - W]
    z float32 [R]    H float32 [R, D]    score [S]

The first W slots are hot: those of the first ``sinks`` tokens, then a ring of the last ``hot``.
Only packed formats have them (W = 0 otherwise). Scores and log-weights are float32, but for packed
formats: those have float16 scores and, only where the layout asks for it, an int16 count of the
tokens that a slot stands for in place of its logarithm, the log-weight.
Scales are float32 for rows of 8 bits, float16 for packed rows, and exist for no others; z and H
exist only where R > 0. A field begins at a multiple of the largest power of two that divides its
rows' bytes, of 16 at least and 128 at most; heads and pages begin at multiples of 128.
csrc/common/layout.h is the same in C++.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from less._check import require_int
from less.dtypes import HOT_DTYPES, ROW_TYPES, RowFormat, RowType, name, row_format, state_dtype
from less.layer.rows import COUNT, Slots, State

LEAST_ALIGN = 16  # of a field
PAGE_ALIGN = 128  # of a page, and of its heads
MAX_KV_HEADS = 128
_SHARE = 16  # where the header's share begins


def aligned(nbytes: int, to: int) -> int:
    """The next multiple of ``to``."""
    return -(-nbytes // to) * to


def alignment(row: int) -> int:
    """What a field begins at a multiple of whose rows have so many bytes."""
    return min(max(row & -row, LEAST_ALIGN), PAGE_ALIGN)


def placed(fields: Mapping[str, tuple[int, int]]) -> tuple[dict[str, int], int]:
    """Where the fields of a head begin, in bytes from its own beginning, and the head's bytes.

    Args:
        fields: By name, in the order in which they lie: how many rows, and the bytes of a row. A
            field of rows without bytes takes none.
    """
    at, offsets = 0, {}
    for label, (rows, row) in fields.items():
        offsets[label] = aligned(at, alignment(row))
        at = offsets[label] + rows * row
    return offsets, aligned(at, PAGE_ALIGN)


@dataclass(frozen=True)
class Field:
    """One field of one head.

    Attributes:
        offset: Bytes from the beginning of the page.
        shape: Of one head.
        dtype: Of its numbers.
    """

    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of its numbers."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


#: A field in its head: its name, its first byte and bytes, its dtype and its shape.
_View = tuple[str, int, int, torch.dtype, tuple[int, ...]]


@dataclass(frozen=True)
class PageViews:
    """Heads of a layer's pages that have equally many slots, as views of the pool.

    Attributes:
        heads: Which kv heads of the layer these are.
        slots: k, v [N, heads, S, D] and so on.
        state: H [N, heads, R, D] and z, or None where there is none.
        share: float64 [N, heads].
        seen: int64 [N].
    """

    heads: slice
    slots: Slots
    state: State | None
    share: Tensor
    seen: Tensor

    def tensors(self) -> dict[str, Tensor]:
        """Name -> view, of the fields that exist."""
        views = self.slots.tensors()
        if self.state is not None:
            views |= vars(self.state)
        return views | {"share": self.share, "seen": self.seen}


@dataclass(frozen=True)
class PageLayout:
    """How the pages of a layer are laid out.

    Args:
        kv_heads: Kv heads K, at most 128.
        head_dim: Head dim D.
        capacity: Slots of every head, at least 1; or a tuple with one number per kv head.
        dtype: Of the slots' keys and values: float32, bfloat16, float16, int8 or float8_e4m3fn
            (float64 only with the reference); or a packed format by name, such as ``"k4v4"``
            (``less.dtypes.FORMATS``): bits of keys and of values.
        rank: Rank R of the low-rank state; 0: no state.
        sinks: First tokens that stay for good in hot rows, of a packed format; 4 by default.
        hot: Last tokens that lie in hot rows, of a packed format; at least 1, 16 by default.
        hot_dtype: Of hot rows: int8, float16 or float32.
        weights: Whether slots have log-weights. Formats that are not packed always have them; None:
            packed ones have none.

    Raises:
        ValueError: A number is out of range, the number of capacities is not K, the dtype is
            none of the above, or a head has no slot beside its hot ones.
    """

    kv_heads: int
    head_dim: int
    capacity: int | tuple[int, ...]
    dtype: torch.dtype | str = torch.float16
    rank: int = 0
    sinks: int | None = None
    hot: int | None = None
    hot_dtype: torch.dtype = torch.int8
    weights: bool | None = None
    #: Whether ``capacity`` was given per head; what a policy keeps then says nothing of it.
    per_head: bool = dataclasses.field(default=False, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Refuse what is no layout, by name."""
        op = "PageLayout"
        require_int(op, "kv_heads", self.kv_heads, 1)
        require_int(op, "head_dim", self.head_dim, 1)
        require_int(op, "rank", self.rank, 0)
        if self.kv_heads > MAX_KV_HEADS:
            raise ValueError(f"{op}: kv_heads must be at most {MAX_KV_HEADS}, got {self.kv_heads}")
        packed = row_format(op, self.dtype).packed
        object.__setattr__(self, "per_head", isinstance(self.capacity, Sequence))
        if isinstance(self.capacity, Sequence):
            if len(self.capacity) != self.kv_heads:
                raise ValueError(
                    f"{op}: capacity must list {self.kv_heads} numbers of slots, one per kv head, "
                    f"got {len(self.capacity)}"
                )
            listed = tuple(
                require_int(op, f"capacity[{h}]", s, 1) for h, s in enumerate(self.capacity)
            )
            # One way to say one thing: layouts that are the same compare equal.
            same = len(set(listed)) == 1
            object.__setattr__(self, "capacity", listed[0] if same else listed)
        else:
            require_int(op, "capacity", self.capacity, 1)
        self._check_hot(op, packed)
        if self.weights is None:
            object.__setattr__(self, "weights", not packed)
        elif not isinstance(self.weights, bool) or not (self.weights or packed):
            wanted = "True, False or None" if packed else f"True or None for {self.dtype}"
            raise ValueError(f"{op}: weights must be {wanted}, got {self.weights!r}")

    def _check_hot(self, op: str, packed: bool) -> None:
        for field, least, default in (("sinks", 0, 4), ("hot", 1, 16)):
            given = getattr(self, field)
            if not packed and given:
                raise ValueError(
                    f"{op}: {field} belongs to packed formats, not to {self.dtype}, got {given}"
                )
            value = default if given is None else given
            if packed:
                require_int(op, field, value, least)
            object.__setattr__(self, field, value if packed else 0)
        if self.hot_dtype not in HOT_DTYPES:
            known = ", ".join(map(name, HOT_DTYPES))
            raise ValueError(f"{op}: hot_dtype must be one of {known}, got {self.hot_dtype}")
        if packed and self.head_dim % 8:
            raise ValueError(
                f"{op}: head_dim must be a multiple of 8 for {self.dtype}, got {self.head_dim}"
            )
        if min(self.capacities) <= self.hot_slots:
            raise ValueError(
                f"{op}: capacity must be above {self.hot_slots}, the hot slots of {self.dtype} "
                f"(sinks {self.sinks}, hot {self.hot}), got {min(self.capacities)}"
            )

    @property
    def format(self) -> RowFormat:
        """How keys and values of slots that are not hot are stored."""
        return row_format("PageLayout", self.dtype)

    @property
    def hot_type(self) -> RowType:
        """How hot rows are stored, and a call's own rows: those of the slots without hot ones."""
        return ROW_TYPES[self.hot_dtype] if self.hot_slots else self.format.k

    @property
    def hot_slots(self) -> int:
        """Hot slots W of each head."""
        return (self.sinks or 0) + (self.hot or 0)

    @property
    def capacities(self) -> tuple[int, ...]:
        """Slots of each kv head."""
        if isinstance(self.capacity, int):
            return (self.capacity,) * self.kv_heads
        return self.capacity

    @property
    def slots(self) -> int:
        """Slots of the head with the most."""
        return max(self.capacities)

    @property
    def header_bytes(self) -> int:
        """Bytes before the first head: ``seen`` and ``share``."""
        return aligned(_SHARE + 8 * self.kv_heads, PAGE_ALIGN)

    def _head(self, S: int) -> tuple[dict[str, Field], int]:
        """The fields of a head of S slots, from its own beginning, and its bytes."""
        numbers, W, D = state_dtype(self.dtype), self.hot_slots, self.head_dim
        hot, cold = self.hot_type, self.format
        score = torch.float16 if cold.packed else numbers
        weight = COUNT if cold.packed else numbers
        every: dict[str, tuple[tuple[int, ...], torch.dtype | None]] = {
            "position": ((S,), torch.int32),
            "hot_k": ((W, D), hot.stored if W else None),
            "hot_k_scale": ((W,), hot.scale if W else None),
            "k": ((S - W, cold.k.width(D)), cold.k.stored),
            "k_scale": ((S - W,), cold.k.scale),
            "weight": ((S,), weight if self.weights else None),
            "hot_v": ((W, D), hot.stored if W else None),
            "hot_v_scale": ((W,), hot.scale if W else None),
            "v": ((S - W, cold.v.width(D)), cold.v.stored),
            "v_scale": ((S - W,), cold.v.scale),
            "z": ((self.rank,), numbers if self.rank else None),
            "H": ((self.rank, D), numbers if self.rank else None),
            "score": ((S,), score),
        }
        fields = {label: (shape, dtype) for label, (shape, dtype) in every.items() if dtype}
        offsets, nbytes = placed(
            {
                label: (shape[0], dtype.itemsize * math.prod(shape[1:]))
                for label, (shape, dtype) in fields.items()
            }
        )
        return {label: Field(offsets[label], *fields[label]) for label in fields}, nbytes

    @cached_property
    def _heads(self) -> tuple[tuple[dict[str, Field], ...], tuple[int, ...]]:
        """The fields of each head, and where each begins; after the last, where the page ends."""
        begins, heads = [self.header_bytes], []
        for S in self.capacities:
            at = begins[-1]
            head, nbytes = self._head(S)
            heads.append({label: replace(f, offset=at + f.offset) for label, f in head.items()})
            begins.append(at + nbytes)
        return tuple(heads), tuple(begins)

    @property
    def heads(self) -> tuple[dict[str, Field], ...]:
        """The fields of each head, by name, in the order in which they lie."""
        return self._heads[0]

    @property
    def nbytes(self) -> int:
        """Bytes of a page: up to where its last head ends."""
        return self._heads[1][-1]

    def bytes_of(self, *fields: str) -> int:
        """Bytes of some fields in one page, with the padding that follows them."""
        total = 0
        for head, end in zip(self.heads, self._heads[1][1:], strict=True):
            ends = [*(field.offset for field in head.values()), end][1:]
            total += sum(
                end - head[label].offset
                for label, end in zip(head, ends, strict=True)
                if label in fields
            )
        return total

    def check_pool(self, op: str, pool: Tensor) -> Tensor:
        """A pool of such pages, as uint8 [N, page].

        Other shapes of bytes are accepted too, such as an engine's int8 [N, 1, 1, page].

        Args:
            op: The caller's name, for messages.
            pool: Bytes, N pages; the first stride is a multiple of 128 and at least a page.

        Raises:
            TypeError: It is no tensor.
            ValueError: It does not hold such pages.
        """
        if not isinstance(pool, Tensor):
            raise TypeError(f"{op}: pool must be a torch.Tensor, got {type(pool).__name__}")
        if pool.dtype not in (torch.uint8, torch.int8):
            raise ValueError(f"{op}: pool must be bytes (uint8 or int8), got {pool.dtype}")
        pool = pool.view(torch.uint8)
        if pool.dim() > 2:
            flat = pool.flatten(1)
            if flat.data_ptr() != pool.data_ptr():  # a copy, which would take what is written
                raise ValueError(
                    f"{op}: pool's pages must be contiguous and apart, got strides {pool.stride()}"
                )
            pool = flat
        if pool.dim() != 2 or pool.shape[1] != self.nbytes:
            raise ValueError(
                f"{op}: pool must have shape [N, {self.nbytes}], got {list(pool.shape)}"
            )
        N = pool.shape[0]
        if pool.stride(1) != 1 or (N > 1 and pool.stride(0) < self.nbytes):
            raise ValueError(
                f"{op}: pool's pages must be contiguous and apart, got strides {pool.stride()}"
            )
        if N > 1 and pool.stride(0) % PAGE_ALIGN:
            raise ValueError(
                f"{op}: pool's pages must begin at multiples of {PAGE_ALIGN} bytes, got a stride "
                f"of {pool.stride(0)}"
            )
        if pool.device.type != "meta" and pool.data_ptr() % 16:
            raise ValueError(f"{op}: pool must begin at a multiple of 16 bytes")
        return pool

    def runs(self) -> Iterator[slice]:
        """Neighbouring heads with equally many slots; one run where all have."""
        first = 0
        for h in range(1, self.kv_heads + 1):
            if h == self.kv_heads or self.capacities[h] != self.capacities[first]:
                yield slice(first, h)
                first = h

    @cached_property
    def _runs(self) -> tuple[tuple[slice, int, int, tuple[_View, ...]], ...]:
        """Of each run: its heads, where the first begins, bytes of a head, its fields."""
        heads, begins = self._heads
        return tuple(
            (
                run,
                begins[run.start],
                begins[run.start + 1] - begins[run.start],
                tuple(
                    (label, f.offset - begins[run.start], f.nbytes, f.dtype, f.shape)
                    for label, f in heads[run.start].items()
                ),
            )
            for run in self.runs()
        )

    def views(self, pool: Tensor) -> list[PageViews]:
        """The fields of a pool's pages, a list over runs of heads with equally many slots.

        Args:
            pool: uint8 [N, page], as ``check_pool`` returns it.
        """
        # narrow, not slices: those look at the device, which tensors without values do not have.
        numbers = pool.view(torch.int64)
        seen = self.seen(pool)
        share = numbers.narrow(1, _SHARE // 8, self.kv_heads).view(torch.float64)
        views = []
        N = pool.shape[0]
        for run, first, nbytes, fields in self._runs:
            count = run.stop - run.start
            heads = pool.narrow(1, first, count * nbytes).view(N, count, nbytes)
            of: dict[str, Tensor] = {}
            for label, offset, length, dtype, shape in fields:
                of[label] = heads.narrow(2, offset, length).view(dtype).view(N, count, *shape)
            state = State(of.pop("H"), of.pop("z")) if self.rank else None
            own = share.narrow(1, run.start, count)
            weight = of.pop("weight", None)
            slots = Slots(weight=weight, format=self.format, **of)
            views.append(PageViews(run, slots, state, own, seen))
        return views

    def seen(self, pool: Tensor) -> Tensor:
        """Tokens that each page has seen, int64 [N]: a view of the pool."""
        return pool.view(torch.int64).select(1, 0)

    def clear(self, pool: Tensor) -> None:
        """Make every page of a pool that of an empty sequence, in place."""
        pool.zero_()
        for views in self.views(pool):
            views.slots.position.fill_(-1)
