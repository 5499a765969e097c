"""Pools of pages: their memory, and which page each row of a call uses."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from less._check import require_tensor, shape_text
from less.layer.layout import PAGE_ALIGN, PageLayout

_HUGE = 2 << 20
_MADV_HUGEPAGE = 14


def _huge_pages(memory: Tensor) -> None:
    """Ask Linux for huge pages where the memory covers whole ones; it may decline."""
    if not sys.platform.startswith("linux"):
        return
    first = -(-memory.data_ptr() // _HUGE) * _HUGE
    last = (memory.data_ptr() + memory.nbytes) // _HUGE * _HUGE
    if last > first:
        ctypes.CDLL(None).madvise(
            ctypes.c_void_p(first), ctypes.c_size_t(last - first), ctypes.c_int(_MADV_HUGEPAGE)
        )


def allocate(
    layouts: Sequence[PageLayout], pages: int, device: torch.device | str = "cpu"
) -> list[Tensor]:
    """Pools of empty pages for several layers, in one piece of memory.

    On a CPU the memory begins at a multiple of 2 MiB and asks for huge pages, so that a step that
    streams through it misses the TLB less often.

    Args:
        layouts: Of each layer.
        pages: Pages of each pool.
        device: Where.

    Returns:
        uint8 [pages, page] of each layer, contiguous.
    """
    device = torch.device(device)
    sizes = [layout.nbytes * pages for layout in layouts]
    if device.type == "cpu":
        begin = _HUGE if sum(sizes) >= _HUGE else PAGE_ALIGN
        memory = torch.empty(sum(sizes) + begin, dtype=torch.uint8)
        memory = memory[-memory.data_ptr() % begin :]
        _huge_pages(memory)
    else:
        memory = torch.empty(sum(sizes), dtype=torch.uint8, device=device)
    pools, at = [], 0
    for layout, size in zip(layouts, sizes, strict=True):
        pool = memory.narrow(0, at, size).view(pages, layout.nbytes)
        layout.clear(pool)
        pools.append(pool)
        at += size
    return pools


class PageRows:
    """Which page each row of a call uses, and which of those pages begin.

    Args:
        pages: int32 [B], the page of each row. A row with a negative number or the layer's null
            page reads and writes nothing, and its output is 0.
        fresh: bool [B]: True clears the row's page before it is used. None: no page is cleared.
        check: Refuse a page that two rows share, where the numbers are on the host.
        null_page: A page number that means no page, besides negative numbers.

    Attributes:
        packed: int32 [1 or 2, B]: pages, then fresh as 0 and 1; what the ops take.

    Raises:
        ValueError: A shape or dtype is wrong, or two rows share a page.
    """

    def __init__(
        self, pages: Tensor, fresh: Tensor | None = None, check: bool = True, null_page: int = -1
    ) -> None:
        pages = require_tensor("PageRows", "pages", pages)
        if pages.dim() != 1 or pages.dtype != torch.int32:
            raise ValueError(
                f"PageRows: pages must be int32 [B], got {pages.dtype} {shape_text(pages.shape)}"
            )
        rows = [pages]
        if fresh is not None:
            fresh = require_tensor("PageRows", "fresh", fresh)
            if fresh.shape != pages.shape or fresh.dtype != torch.bool:
                raise ValueError(
                    f"PageRows: fresh must be bool {shape_text(pages.shape)}, got {fresh.dtype} "
                    f"{shape_text(fresh.shape)}"
                )
            if fresh.device != pages.device:
                raise ValueError(
                    f"PageRows: fresh must be on {pages.device} as pages is, got {fresh.device}"
                )
            rows.append(fresh.to(torch.int32))
        if check and pages.device.type == "cpu":
            used = pages[(pages >= 0) & (pages != null_page)]
            if used.unique().numel() != used.numel():
                raise ValueError(f"PageRows: pages must differ, got {pages.tolist()}")
        self.packed = torch.stack(rows)

    @property
    def pages(self) -> Tensor:
        """int32 [B]."""
        return self.packed[0]

    @property
    def fresh(self) -> Tensor | None:
        """Whether each row's page is cleared before use, bool [B]; None: no page is."""
        return self.packed[1].bool() if self.packed.shape[0] == 2 else None

    @classmethod
    def of(cls, packed: Tensor) -> PageRows:
        """Rows that lie in memory already, which is read at each call; nothing is checked.

        Args:
            packed: int32 [1 or 2, B], contiguous: pages, then fresh as 0 and 1.
        """
        rows = cls.__new__(cls)
        rows.packed = packed
        return rows

    def used(self) -> PageRows:
        """The same pages, without ``fresh``: for the second half of a call."""
        return PageRows.of(self.packed[:1])


@dataclass(frozen=True)
class Paged:
    """The memory that a call of a layer works on.

    Attributes:
        pool: uint8 [N, page], as ``PageLayout.check_pool`` returns it.
        rows: Which page each row of the call uses. None: row b has page b.
    """

    pool: Tensor
    rows: PageRows | None = None

    def index(self, B: int, null_page: int) -> tuple[Tensor, Tensor]:
        """The page of each of B rows, int64 [B], and whether the row has one, bool [B].

        A row without a page has the number 0.

        Args:
            B: Rows.
            null_page: The number that means no page, besides those outside the pool.
        """
        if self.rows is None:
            every = torch.arange(B, device=self.pool.device)
            return every, torch.ones(B, dtype=torch.bool, device=self.pool.device)
        pages = self.rows.pages.long()
        there = (pages >= 0) & (pages < self.pool.shape[0]) & (pages != null_page)
        return torch.where(there, pages, 0), there
