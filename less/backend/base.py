"""The interface of a backend, which computes the steps of a layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor

from less.layer import Call, LayerPlan, Paged, Rows
from less.reference import Attended


class HalfWrittenError(RuntimeError):
    """A call stopped while it wrote pages, which are no longer whole and must be cleared."""


class Backend(Protocol):
    """The two halves of a call, and a decode step whole; shapes as in ``less.reference``."""

    name: str

    @property
    def workspace(self) -> int:
        """Bytes of scratch that the backend has allocated."""

    def dtypes(self, device: torch.device) -> tuple[torch.dtype | str, ...]:
        """Dtypes and packed formats that slots may have on this device."""

    def reserve(self, plan: LayerPlan, at: Paged, B: int) -> None:
        """Allocate scratch for decode steps of B rows of this layer; layers share it."""

    def rounded(self, k: Tensor, v: Tensor, plan: LayerPlan) -> Rows:
        """A call's keys and values in the layer's space, in the dtype of its (hot) slots."""

    def attend(self, call: Call, new: Rows, at: Paged, plan: LayerPlan) -> Attended:
        """Attend over slots, state and the call's tokens; writes ``call.out`` where it is given.

        Pages that begin are reset.

        Args:
            call: Whose q, valid and out are used.
            new: Its keys and values, as ``rounded`` makes them.
            at: The layer's pages.
            plan: The layer.
        """

    def compact(
        self,
        new: Rows,
        valid: Tensor | None,
        step: Attended,
        at: Paged,
        plan: LayerPlan,
        rank: Tensor | None,
    ) -> None:
        """Insert the call's tokens, evict and fold: writes the pages.

        Args:
            new: The call's keys and values, as ``rounded`` makes them.
            valid: bool [B, T] or None.
            step: What ``attend`` returned.
            at: The layer's pages; none of them begins.
            plan: The layer.
            rank: The policy's ranks [B, K, S + T], where the layer has no rule.

        Raises:
            HalfWrittenError: It stopped while it wrote. Of other errors, nothing is written.
        """

    def decode_step(self, call: Call, at: Paged, plan: LayerPlan) -> Tensor:
        """Attend and compact for one token, under a policy that has a rule; returns the output."""


@contextmanager
def writing() -> Iterator[None]:
    """What is raised within says that pages are half written."""
    try:
        yield
    except Exception as error:
        raise HalfWrittenError(
            f"attend: it stopped while it wrote pages, which are no longer whole: {error}"
        ) from error


def added_share(step: Attended, at: Paged, plan: LayerPlan) -> Callable[[], None]:
    """The share of a call's attention mass that the low-rank state took; returns what adds it.

    All that allocates is done before it returns.
    """
    if plan.maps is None:
        return lambda: None
    K = plan.layout.kv_heads
    index, there = at.index(step.share.shape[0], plan.spec.null_page)
    added = step.share.unflatten(1, (K, -1)).sum((2, 3), dtype=torch.float64)
    if at.pool.device.type == "cpu":
        index, added = index[there], added[there]
    else:  # which rows have a page would have to come back from the device: the rest adds nothing
        added = torch.where(there.unsqueeze(1), added, 0.0)

    def add() -> None:
        for views in plan.layout.views(at.pool):
            first, count = views.heads.start, views.heads.stop - views.heads.start
            views.share.index_add_(0, index, added.narrow(1, first, count))

    return add
