"""Who computes a cache's step: the compiled kernels or the plain-torch reference."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from less import ops, reference
from less.policies import Rule

Maps = Mapping[str, Tensor]
Step = reference.Attended
Rows = reference.Rows

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@dataclass
class Layer:
    """Everything that one layer of a cache holds; allocated once, written in place."""

    slot_k: Tensor  # [B, K, S, D]
    slot_v: Tensor  # [B, K, S, D]
    position: Tensor  # [B, K, S] int32, -1 empty
    score: Tensor  # [B, K, S] float32
    weight: Tensor  # [B, K, S] float32, log
    seen: Tensor  # [B] int64
    H: Tensor | None  # [B, K, R, D] float32
    z: Tensor | None  # [B, K, R] float32
    share: Tensor  # [B, K] float64: sum over a head's queries of the low-rank part's mass
    k_scale: Tensor | None = None  # [B, K, S] float32: of each row of slots of 8 bits
    v_scale: Tensor | None = None  # [B, K, S] float32

    @property
    def rows(self) -> Rows:
        """Keys and values of the slots."""
        return Rows(self.slot_k, self.slot_v, self.k_scale, self.v_scale)

    def add_share(self, step: Step) -> None:
        """Count what the low-rank part took of a call's attention."""
        if self.H is not None:
            K = self.share.shape[1]
            self.share += step.share.unflatten(1, (K, -1)).sum((2, 3), dtype=torch.float64)

    def tensors(self) -> dict[str, Tensor]:
        """Name -> tensor, of those that exist."""
        return {n: t for n, t in vars(self).items() if t is not None}


class Backend(Protocol):
    """The two halves of ``LessKVCache.attend``; shapes as in ``less.reference``."""

    name: str

    @property
    def workspace(self) -> int:
        """Bytes of scratch held."""

    def dtypes(self, device: torch.device) -> tuple[torch.dtype, ...]:
        """What slots may be held in."""

    def reserve(self, layers: Sequence[Layer], q_heads: int, maps: Sequence[Maps | None]) -> None:
        """Allocate the scratch that the decode steps of these layers want, which they share."""

    def rounded(self, k: Tensor, v: Tensor, dtype: torch.dtype) -> Rows:
        """A call's keys and values in the slots' dtype, contiguous or not."""

    def attend(
        self,
        layer: Layer,
        q: Tensor,
        new: Rows,
        valid: Tensor | None,
        *,
        maps: Maps | None,
        kind: str,
        scale: float,
        softcap: float,
        decay: float,
        scores: bool,
    ) -> Step:
        """Attend over slots, state and the call's tokens; writes nothing but its result.

        Without maps the state is left out: there is none, or nothing is in it yet.
        """

    def compact(
        self,
        layer: Layer,
        step: Step,
        new: Rows,
        valid: Tensor | None,
        *,
        maps: Maps | None,
        kind: str,
        rule: Rule | None,
        rank: Tensor | None,
    ) -> None:
        """Insert the call's tokens, evict and fold: writes the layer's tensors in place."""

    def decode_step(
        self,
        layer: Layer,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        valid: Tensor | None,
        *,
        maps: Maps | None,
        kind: str,
        scale: float,
        softcap: float,
        decay: float,
        scores: bool,
        rule: Rule,
        out: Tensor | None,
    ) -> Tensor:
        """Do both for one token, under a policy that has a rule; k and v as the caller has them.

        Writes ``out`` and returns it where it is given.
        """


class ReferenceBackend:
    """``less.reference``, written back into the layer."""

    name = "reference"
    workspace = 0

    def dtypes(self, device: torch.device) -> tuple[torch.dtype, ...]:
        """All."""
        return (*FLOATS, *reference.EIGHT_BITS, torch.float64)

    def reserve(self, layers: Sequence[Layer], q_heads: int, maps: Sequence[Maps | None]) -> None:
        """Nothing."""

    def rounded(self, k: Tensor, v: Tensor, dtype: torch.dtype) -> Rows:
        """Keys and values in the slots' dtype."""
        return Rows.rounded(k, v, dtype)

    def attend(
        self,
        layer: Layer,
        q: Tensor,
        new: Rows,
        valid: Tensor | None,
        *,
        maps: Maps | None,
        kind: str,
        scale: float,
        softcap: float,
        decay: float,
        scores: bool,
    ) -> Step:
        """Attend; scores stay as they are where the policy has no use for them."""
        step = reference.chunk_attention(
            q,
            *new.floats(),
            valid,
            *layer.rows.floats(),
            layer.position,
            layer.score,
            layer.weight,
            phi_q=reference.phi(q, maps, kind) if maps is not None else None,
            H=layer.H,
            z=layer.z,
            scale=scale,
            softcap=softcap,
            decay=decay,
        )
        chunk_score = step.chunk_score.to(layer.score.dtype)
        if not scores:
            return Step(step.out, layer.score, torch.zeros_like(chunk_score), step.share)
        return Step(step.out, step.slot_score, chunk_score, step.share)

    def compact(
        self,
        layer: Layer,
        step: Step,
        new: Rows,
        valid: Tensor | None,
        *,
        maps: Maps | None,
        kind: str,
        rule: Rule | None,
        rank: Tensor | None,
    ) -> None:
        """Insert, evict, fold."""
        after = reference.compact(
            new.k,
            new.v,
            step.chunk_score,
            valid,
            layer.slot_k,
            layer.slot_v,
            layer.position,
            step.slot_score,
            layer.weight,
            layer.seen,
            chunk_k_scale=new.k_scale,
            chunk_v_scale=new.v_scale,
            k_scale=layer.k_scale,
            v_scale=layer.v_scale,
            rule=rule,
            rank=rank,
            H=layer.H,
            z=layer.z,
            maps=maps,
            kind=kind,
        )
        for name, mine in layer.tensors().items():
            if name != "share":
                mine.copy_(getattr(after, name))

    def decode_step(
        self,
        layer: Layer,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        valid: Tensor | None,
        *,
        maps: Maps | None,
        kind: str,
        scale: float,
        softcap: float,
        decay: float,
        scores: bool,
        rule: Rule,
        out: Tensor | None,
    ) -> Tensor:
        """Attend, then compact."""
        new = self.rounded(k, v, layer.slot_k.dtype)
        step = self.attend(
            layer,
            q,
            new,
            valid,
            maps=maps,
            kind=kind,
            scale=scale,
            softcap=softcap,
            decay=decay,
            scores=scores,
        )
        self.compact(layer, step, new, valid, maps=maps, kind=kind, rule=rule, rank=None)
        layer.add_share(step)
        return step.out if out is None else out.copy_(step.out)


class Scratch:
    """An op's scratch on a GPU, which its calls share: as large as the largest wanted.

    But what a long prompt wants is not held: above 64 MiB, and more than a layer's slots have.
    """

    HELD = 64 << 20

    def __init__(self) -> None:
        """Of no bytes."""
        self.held: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return 0 if self.held is None else self.held.nbytes

    def of(self, ask: Callable[[], int], slot_k: Tensor) -> Tensor | None:
        """For a call over these slots; None: the op makes its own, or wants none.

        Args:
            ask: Returns the bytes that the call wants.
            slot_k: The slots.
        """
        if torch.compiler.is_compiling():  # what is held may grow, which a graph cannot express
            return None
        wanted = ask()
        if wanted > max(self.HELD, 2 * slot_k.nbytes):
            return None
        if wanted > self.nbytes:
            self.held = torch.zeros(wanted, dtype=torch.uint8, device=slot_k.device)
        return self.held


class NativeBackend:
    """The compiled ops."""

    name = "native"

    def __init__(self) -> None:
        """Without scratch."""
        self._scratch: Tensor | None = None
        self._attend_scratch = Scratch()
        self._compact_scratch = Scratch()

    @property
    def workspace(self) -> int:
        """Bytes of the scratch that a GPU's kernels share."""
        step = 0 if self._scratch is None else self._scratch.nbytes
        return step + self._attend_scratch.nbytes + self._compact_scratch.nbytes

    def dtypes(self, device: torch.device) -> tuple[torch.dtype, ...]:
        """Those of the kernels."""
        return ops.slot_dtypes(device)

    def reserve(self, layers: Sequence[Layer], q_heads: int, maps: Sequence[Maps | None]) -> None:
        """Allocate it for the layer that wants most; layers run one after the other."""
        wanted = max(
            ops.decode_step_workspace(at.slot_k, q_heads, m)
            for at, m in zip(layers, maps, strict=True)
        )
        if wanted:
            self._scratch = torch.zeros(wanted, dtype=torch.uint8, device=layers[0].slot_k.device)

    def rounded(self, k: Tensor, v: Tensor, dtype: torch.dtype) -> Rows:
        """Keys and values in the slots' dtype."""
        if dtype not in reference.EIGHT_BITS:
            return Rows.rounded(k, v, dtype)
        (eight_k, k_scale), (eight_v, v_scale) = ops.quantize(k, dtype), ops.quantize(v, dtype)
        return Rows(eight_k, eight_v, k_scale, v_scale)

    def attend(
        self,
        layer: Layer,
        q: Tensor,
        new: Rows,
        valid: Tensor | None,
        *,
        maps: Maps | None,
        kind: str,
        scale: float,
        softcap: float,
        decay: float,
        scores: bool,
    ) -> Step:
        """Attend."""
        scratch = self._attend_scratch.of(
            lambda: ops.chunk_attention_workspace(q, layer.slot_k, valid is not None), layer.slot_k
        )
        return Step(
            *ops.chunk_attention(
                q,
                new.k,
                new.v,
                valid,
                layer.slot_k,
                layer.slot_v,
                layer.position,
                layer.score,
                layer.weight,
                chunk_k_scale=new.k_scale,
                chunk_v_scale=new.v_scale,
                k_scale=layer.k_scale,
                v_scale=layer.v_scale,
                phi_q=ops.phi(q, maps, kind) if maps is not None else None,
                H=layer.H if maps is not None else None,
                z=layer.z if maps is not None else None,
                workspace=scratch,
                scale=scale,
                softcap=softcap,
                decay=decay,
                scores=scores,
            )
        )

    def compact(
        self,
        layer: Layer,
        step: Step,
        new: Rows,
        valid: Tensor | None,
        *,
        maps: Maps | None,
        kind: str,
        rule: Rule | None,
        rank: Tensor | None,
    ) -> None:
        """Insert, evict, fold."""
        scratch = self._compact_scratch.of(
            lambda: ops.compact_workspace(new.k, layer.slot_k, maps), layer.slot_k
        )
        ops.compact(
            new.k,
            new.v,
            step.chunk_score,
            step.slot_score,
            valid,
            layer.slot_k,
            layer.slot_v,
            layer.position,
            layer.score,
            layer.weight,
            layer.seen,
            chunk_k_scale=new.k_scale,
            chunk_v_scale=new.v_scale,
            k_scale=layer.k_scale,
            v_scale=layer.v_scale,
            H=layer.H,
            z=layer.z,
            workspace=scratch,
            maps=maps,
            kind=kind or "exp",
            rule=rule,
            rank=rank,
        )

    def decode_step(
        self,
        layer: Layer,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        valid: Tensor | None,
        *,
        maps: Maps | None,
        kind: str,
        scale: float,
        softcap: float,
        decay: float,
        scores: bool,
        rule: Rule,
        out: Tensor | None,
    ) -> Tensor:
        """One fused op, which allocates nothing but its output."""
        q = q.contiguous()
        out = torch.empty_like(q) if out is None else out
        ops.decode_step(
            q,
            k.contiguous(),
            v.contiguous(),
            valid if valid is None else valid.contiguous(),
            out,
            layer.slot_k,
            layer.slot_v,
            layer.position,
            layer.score,
            layer.weight,
            layer.seen,
            k_scale=layer.k_scale,
            v_scale=layer.v_scale,
            H=layer.H,
            z=layer.z,
            share=layer.share if maps is not None else None,
            workspace=self._scratch,
            maps=maps,
            kind=kind or "exp",
            scale=scale,
            softcap=softcap,
            decay=decay,
            scores=scores,
            rule=rule,
        )
        return out


def choose(backend: str | None, device: torch.device) -> Backend:
    """Pick the backend for a device.

    Raises:
        ValueError: The name is unknown, or the native kernels were asked for and are not there;
            the message says what is missing.
    """
    if backend not in (None, "native", "reference"):
        raise ValueError(
            f"LessKVCache: backend must be 'native', 'reference' or None, got {backend!r}"
        )
    if backend == "reference":
        return ReferenceBackend()
    missing = ops.missing(device)
    if missing is None:
        return NativeBackend()
    if backend == "native":
        raise ValueError(f"LessKVCache: backend 'native' is not available on {device}: {missing}")
    warnings.warn(
        f"less: {missing}; using the plain-torch reference, which is slow. "
        "Pass backend='reference' to choose it without this warning.",
        RuntimeWarning,
        stacklevel=3,
    )
    return ReferenceBackend()
