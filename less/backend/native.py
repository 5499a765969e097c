"""The compiled ops as a backend."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from less.backend import ops
from less.backend.base import HalfWrittenError, added_share, writing
from less.dtypes import has_scale
from less.layer import Call, LayerPlan, Paged, Rows
from less.reference import Attended, query_shift, rounded


class NativeBackend:
    """The compiled ops."""

    name = "native"

    def __init__(self) -> None:
        """Without scratch."""
        self._scratch: Tensor | None = None

    @property
    def workspace(self) -> int:
        """Bytes of the scratch that a GPU's decode steps share."""
        return 0 if self._scratch is None else self._scratch.nbytes

    def dtypes(self, device: torch.device) -> tuple[torch.dtype | str, ...]:
        """Those of the kernels."""
        return ops.slot_dtypes(device)

    def reserve(self, plan: LayerPlan, at: Paged, B: int) -> None:
        """As large as the layer that takes most; layers run one after the other."""
        wanted = ops.decode_step_workspace(at.pool, plan, B)
        if wanted > self.workspace:
            self._scratch = torch.zeros(wanted, dtype=torch.uint8, device=at.pool.device)

    def rounded(self, k: Tensor, v: Tensor, plan: LayerPlan) -> Rows:
        """Keys and values in the layer's space, in the dtype of its (hot) slots."""
        dtype = plan.layout.hot_type.stored
        if plan.space is not None:
            k, v = ops.rotate(k, plan, "key"), ops.rotate(v, plan, "value")
        if not has_scale(dtype):
            return rounded(k, v, dtype)
        (eight_k, k_scale), (eight_v, v_scale) = ops.quantize(k, dtype), ops.quantize(v, dtype)
        return Rows(eight_k, eight_v, k_scale, v_scale)

    def attend(self, call: Call, new: Rows, at: Paged, plan: LayerPlan) -> Attended:
        """Attend."""
        phi_q = ops.phi(call.q, plan) if self._something_left(call, at, plan) else None
        if plan.space is None:
            return ops.chunk_attention(call.q, new, call.valid, at, plan, out=call.out, phi_q=phi_q)
        query = ops.rotate(call.q, plan, plan.query_rotation)
        if phi_q is not None and plan.shifted:
            shift = query_shift(call.q, plan.space, plan.spec.scale)
            phi_q = torch.cat([phi_q, shift.unsqueeze(-1)], -1)
        step = ops.chunk_attention(query, new, call.valid, at, plan, phi_q=phi_q)
        out = ops.rotate(step.out, plan, "output", self._has_output(call, at, plan))
        out = out.to(call.q.dtype) if call.out is None else call.out.copy_(out)
        return replace(step, out=out)

    @staticmethod
    def _has_output(call: Call, at: Paged, plan: LayerPlan) -> Tensor | None:
        """Which tokens are not padding, of a row with a page: bool [B, T]; None: all."""
        if at.rows is None:
            return call.valid
        there = at.index(call.q.shape[0], plan.spec.null_page)[1].unsqueeze(1)
        return there.expand(-1, call.q.shape[2]) if call.valid is None else call.valid & there

    @staticmethod
    def _something_left(call: Call, at: Paged, plan: LayerPlan) -> bool:
        """Whether a state can hold anything; a GPU is not asked, because that would wait for it."""
        if plan.maps is None:
            return False
        if at.pool.device.type != "cpu" or torch.compiler.is_compiling():
            return True
        return bool((plan.seen(at, call.q.shape[0]) > min(plan.layout.capacities)).any())

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
        add = added_share(step, at, plan)
        try:
            ops.compact(new, valid, step.score, at, plan, rank=rank)
        except RuntimeError as error:
            raise _told(error) from error
        with writing():
            add()

    def decode_step(self, call: Call, at: Paged, plan: LayerPlan) -> Tensor:
        """One fused op, which allocates nothing but its output."""
        try:
            return ops.decode_step(call, at, plan, self._scratch)
        except RuntimeError as error:
            raise _told(error) from error


#: In the messages of ops that stopped while they wrote: csrc/ops/library.h, csrc/ops/launch.h.
_HALF = ("pages are no longer whole", "the launch failed")


def _told(error: RuntimeError) -> RuntimeError:
    """The error itself, or where pages are half written, one that says so by its type."""
    return HalfWrittenError(str(error)) if any(text in str(error) for text in _HALF) else error
