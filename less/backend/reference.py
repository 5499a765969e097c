"""``less.reference`` as a backend: pages are taken out of the pool, computed on, and put back."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from less import reference
from less.backend.base import added_share, writing
from less.dtypes import EIGHT_BITS, FLOATS, FORMATS
from less.layer import Call, LayerPlan, Maps, Paged, PageViews, Rows, Slots, Space, State, put_rows
from less.reference import Attended


@dataclass(frozen=True)
class _Run:
    """Heads with equally many slots: their pages, and what a call's rows find in them."""

    views: PageViews
    slots: Slots  # of the call's B rows, copies
    state: State | None
    seen: Tensor  # [B]
    maps: Maps | None
    space: Space | None
    queries: slice  # their query heads


class ReferenceBackend:
    """``less.reference`` on pages."""

    name = "reference"
    workspace = 0

    def dtypes(self, device: torch.device) -> tuple[torch.dtype | str, ...]:
        """All."""
        return (*FLOATS, *EIGHT_BITS, torch.float64, *FORMATS)

    def reserve(self, plan: LayerPlan, at: Paged, B: int) -> None:
        """Nothing."""

    def rounded(self, k: Tensor, v: Tensor, plan: LayerPlan) -> Rows:
        """Keys and values in the layer's space, in the dtype of its (hot) slots."""
        if plan.space is not None:
            k = reference.rotate(k, plan.space, "key")
            v = reference.rotate(v, plan.space, "value")
        return reference.rounded(k, v, plan.layout.hot_type.stored)

    def attend(self, call: Call, new: Rows, at: Paged, plan: LayerPlan) -> Attended:
        """Attend, heads with equally many slots at a time."""
        B, _, T, _ = call.q.shape
        index, there = _pages(at, plan, B)
        if at.rows is not None and at.rows.fresh is not None:
            for page in index[there & at.rows.fresh].tolist():
                plan.layout.clear(at.pool[page : page + 1])
        valid = _valid(call.valid, there, T)
        S = plan.layout.slots
        outs, scores, shares = [], [], []
        for run in _runs(at, plan, index, there):
            q = call.q[:, run.queries]
            query = q
            if run.space is not None:
                query = reference.rotate(q, run.space, plan.query_rotation)
            step = reference.chunk_attention(
                query,
                _of(new, run.views.heads),
                valid,
                run.slots,
                plan.spec,
                phi_q=None if run.maps is None else reference.phi(q, run.maps),
                state=run.state,
                shift=None
                if run.space is None or not plan.shifted
                else reference.query_shift(q, run.space, plan.spec.scale),
            )
            own = run.slots.position.shape[2]
            absent = step.score.new_zeros(*step.score.shape[:2], S - own)
            outs.append(_result(step.out, q.dtype, valid, run.space))
            shares.append(step.share)
            scores.append(torch.cat([step.score[..., :own], absent, step.score[..., own:]], 2))
        out = torch.cat(outs, 1)
        out = out if call.out is None else call.out.copy_(out)
        return Attended(out, torch.cat(scores, 1), torch.cat(shares, 1))

    def compact(
        self,
        new: Rows,
        valid: Tensor | None,
        step: Attended,
        at: Paged,
        plan: LayerPlan,
        rank: Tensor | None,
    ) -> None:
        """Insert, evict, fold."""
        B, _, T, _ = new.k.shape
        index, there = _pages(at, plan, B)
        valid = _valid(valid, there, T)
        S = plan.layout.slots
        afters = []
        for run in list(_runs(at, plan, index, there)):
            own = run.slots.position.shape[2]

            def here(x: Tensor, heads: slice = run.views.heads, own: int = own) -> Tensor:
                return torch.cat([x[:, heads, :own], x[:, heads, S:]], 2)

            after = reference.compact(
                _of(new, run.views.heads),
                valid,
                here(step.score),
                run.slots,
                run.seen,
                plan.spec,
                rank=None if rank is None else here(rank),
                state=run.state,
                maps=run.maps,
                sinks=plan.layout.sinks or 0,
                space=run.space,
            )
            afters.append((run.views, after))
        add = added_share(step, at, plan)
        with writing():
            for views, after in afters:
                _put(views.slots, after.slots, index, there)
                if views.state is not None and after.state is not None:
                    _put(views.state, after.state, index, there)
            for views, after in afters[-1:]:
                views.seen.index_copy_(0, index[there], after.seen[there])
            add()

    def decode_step(self, call: Call, at: Paged, plan: LayerPlan) -> Tensor:
        """Attend, then compact."""
        new = self.rounded(call.k, call.v, plan)
        step = self.attend(call, new, at, plan)
        if plan.spec.victim == "none":
            added_share(step, at, plan)()
        else:
            begun = at if at.rows is None else Paged(at.pool, at.rows.used())
            self.compact(new, call.valid, step, begun, plan, None)
        return step.out


def _result(out: Tensor, dtype: torch.dtype, valid: Tensor, space: Space | None) -> Tensor:
    """Attention's output outside of the space, 0 for padding."""
    if space is None:
        return out
    return reference.rotate(out, space, "output", valid).to(dtype)


def _pages(at: Paged, plan: LayerPlan, B: int) -> tuple[Tensor, Tensor]:
    """Page of each row and whether it has one; refuses what the ops refuse."""
    index, there = at.index(B, plan.spec.null_page)
    N = at.pool.shape[0]
    if at.rows is None:
        if N < B:
            raise ValueError(f"attend: pool must have a page for each of {B} rows, got {N}")
        return index, there
    pages = at.rows.pages
    beyond = (pages >= N) & (pages != plan.spec.null_page)
    if bool(beyond.any()):
        raise ValueError(
            f"attend: pages must be below {N}, the pages of the pool, got {pages.tolist()}"
        )
    if index[there].unique().numel() != int(there.sum()):
        raise ValueError(f"attend: pages must differ, got {pages.tolist()}")
    return index, there


def _valid(valid: Tensor | None, there: Tensor, T: int) -> Tensor:
    """A row without a page has no token."""
    every = there[:, None].expand(-1, T)
    return every if valid is None else valid & every


def _of(rows: Rows, heads: slice) -> Rows:
    return Rows(**{n: x[:, heads] for n, x in vars(rows).items() if x is not None})


def _runs(at: Paged, plan: LayerPlan, index: Tensor, there: Tensor) -> Iterator[_Run]:
    G = plan.spec.q_heads // plan.layout.kv_heads
    for views in plan.layout.views(at.pool):
        heads = views.heads
        queries = slice(heads.start * G, heads.stop * G)
        maps = None
        if plan.maps is not None:
            tensors = {
                n: x[queries if n.startswith("q_") else heads] for n, x in plan.maps.tensors.items()
            }
            maps = Maps(plan.maps.kind, tensors)
        slots = views.slots.select(index)
        slots.position.masked_fill_(~there[:, None, None], -1)
        yield _Run(
            views,
            slots,
            None if views.state is None else views.state.select(index),
            torch.where(there, views.seen.index_select(0, index), 0),
            maps,
            None if plan.space is None else plan.space.heads(heads),
            queries,
        )


def _put(views: Slots | State, after: Slots | State, index: Tensor, there: Tensor) -> None:
    for name, mine in (views.tensors() if isinstance(views, Slots) else vars(views)).items():
        put_rows(mine, index[there], getattr(after, name)[there].to(mine.dtype))
