"""The native ops, under their Python names.

Each op is ``torch.ops.less.<name>``, registered by ``csrc/ops/<name>.cpp`` when the library
``less._C`` is loaded, which importing this module does. Beside each stands its fake kernel, by
which torch traces through the op without running it. ``less.reference`` says in plain torch what
each computes.
"""

from __future__ import annotations

import importlib.util
import re

import torch
from torch import Tensor

from less.backend.tracing import fake
from less.dtypes import FLOATS, FORMATS
from less.layer import Call, LayerPlan, Paged, Rows
from less.reference import Attended
from less.reference.codec import ROTATIONS

# Absent where less was installed with LESS_NATIVE=off. A library that is there but fails to load
# stays an error.
_native = importlib.util.find_spec("less._C") is not None
if _native:
    from less import _C

_cuda_built = _native and bool(_C.build_facts()["cuda"])
if _cuda_built and torch.cuda.is_available():
    from less import _cuda  # noqa: F401


def missing(device: torch.device) -> str | None:
    """Why the native ops cannot run on this device, or None where they can."""
    if not _native:
        return "the native kernels were not built (LESS_NATIVE=off, or an unbuilt source tree)"
    if device.type == "cpu":
        return None
    if device.type != "cuda":
        return f"there are no native kernels for {device.type}"
    if not torch.backends.cuda.is_built():
        return f"this torch, {torch.__version__}, was built without CUDA"
    if not torch.cuda.is_available():
        return "torch finds no GPU (torch.cuda.is_available() is false)"
    if not _cuda_built:
        return (
            "less was built without CUDA (LESS_CUDA=off, or no GPU or no nvcc was seen); build it "
            "with LESS_CUDA=on"
        )
    return _unserved(_C.build_facts()["cuda_archs"], torch.cuda.get_device_capability(device))


def _unserved(architectures: list[str], capability: tuple[int, int]) -> str | None:
    """Why a GPU of this capability cannot run code built for these architectures, or None."""
    major, minor = capability
    for name in architectures:
        match = re.fullmatch(r"(?:sm_)?(\d+)(\d)([af]?)(\+PTX)?", name)
        if match is None:
            continue
        at_major, at_minor = int(match[1]), int(match[2])
        same = major == at_major and minor >= at_minor
        if (minor == at_minor and same) if match[3] == "a" else same:
            return None
        if match[4] and (major, minor) >= (at_major, at_minor):
            return None
    return (
        f"less was built for the GPU architectures {', '.join(architectures)}, and this GPU is "
        f"{major}{minor}; build with LESS_CUDA_ARCHS={major}{minor}"
    )


def slot_dtypes(device: torch.device) -> tuple[torch.dtype | str, ...]:
    """Dtypes and packed formats of slots that the native ops support on this device."""
    everywhere: list[torch.dtype | str] = [*FLOATS, torch.int8, *FORMATS]
    return (*everywhere, *(() if device.type == "cpu" else (torch.float8_e4m3fn,)))


def fold(H: Tensor, z: Tensor, psi_k: Tensor, v: Tensor, keep: Tensor | None = None) -> None:
    """Fold evicted tokens into the low-rank state, in place, in the order given.

    Args:
        H: Running sum of psi(k) v^T, float32 [B, K, R, D]. Written.
        z: Running sum of psi(k), float32 [B, K, R]. Written.
        psi_k: Features of the evicted keys, float32 [B, K, N, R].
        v: Their values, float32, bfloat16 or float16 [B, K, N, D].
        keep: Bool [B, K, N]; where False the token is neither folded nor read.

    Raises:
        RuntimeError: A shape, dtype, layout or device differs from the above.

    Source: arXiv:2402.09398, eq. 5.
    """
    torch.ops.less.fold(H, z, psi_k, v, keep)


def quantize(x: Tensor, dtype: torch.dtype = torch.int8) -> tuple[Tensor, Tensor]:
    """Round rows to 8 bits with a scale each; ``less.reference.quantize`` defines it, bit for bit.

    Args:
        x: Keys or values, float32, bfloat16 or float16 [B, K, T, D].
        dtype: int8, or on a GPU float8_e4m3fn.

    Returns:
        [B, K, T, D] of that dtype and the scales, float32 [B, K, T].

    Raises:
        RuntimeError: The shape or dtype differs from the above.
        ValueError: ``dtype`` is another one.
    """
    if dtype not in (torch.int8, torch.float8_e4m3fn):
        raise ValueError(f"quantize: dtype must be torch.int8 or torch.float8_e4m3fn, got {dtype}")
    result: tuple[Tensor, Tensor] = torch.ops.less.quantize(_rows(x), dtype == torch.float8_e4m3fn)
    return result


def _rows(x: Tensor) -> Tensor:
    """Rows of numbers that lie together; heads and tokens lie as they may."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _scales(rows: Rows) -> Tensor | None:
    """The scales of a call's rows as the ops take them, float32 [2, B, K, T]."""
    if rows.k_scale is None or rows.v_scale is None:
        return None
    return torch.stack([rows.k_scale, rows.v_scale])


def _packed(at: Paged) -> Tensor | None:
    return None if at.rows is None else at.rows.packed


def feature_map(x: Tensor, plan: LayerPlan, query: bool) -> Tensor:
    """Evaluate phi or psi of a layer; ``less.reference.feature_map`` defines it.

    Args:
        x: Queries [B, Q, T, D] or keys [B, K, T, D], float32, bfloat16 or float16.
        plan: The layer, which has maps.
        query: True for phi of queries, False for psi of keys.

    Returns:
        Float32 [B, heads, T, R], all >= 0.

    Raises:
        RuntimeError: A shape or dtype differs from the above.
        ValueError: The layer has no maps.
    """
    if plan.maps is None:
        raise ValueError("feature_map: the layer has no maps")
    y: Tensor = torch.ops.less.feature_map(_rows(x), plan.memory, plan.encoded, query)
    return y


def phi(q: Tensor, plan: LayerPlan) -> Tensor:
    """Features of queries [B, Q, T, D] -> float32 [B, Q, T, R]."""
    return feature_map(q, plan, query=True)


def psi(k: Tensor, plan: LayerPlan) -> Tensor:
    """Features of keys [B, K, T, D] -> float32 [B, K, T, R]."""
    return feature_map(k, plan, query=False)


def rotate(x: Tensor, plan: LayerPlan, rotation: str, valid: Tensor | None = None) -> Tensor:
    """Take rows into a layer's space, or out of it; ``less.reference.rotate`` defines it.

    Args:
        x: Queries or output [B, Q, T, D], keys or values [B, K, T, D]; float32, bfloat16 or
            float16.
        plan: The layer, which has a space.
        rotation: One of ``less.reference.codec.ROTATIONS``.
        valid: bool [B, T]; where False the result is 0. None: all valid.

    Returns:
        float32 of x's shape, contiguous; keys and values with the reference's bits.

    Raises:
        RuntimeError: A shape or dtype differs from the above, or the layer has no space.
    """
    y: Tensor = torch.ops.less.rotate(
        _rows(x),
        valid if valid is None else valid.contiguous(),
        plan.memory,
        plan.encoded,
        ROTATIONS.index(rotation),
    )
    return y


def chunk_attention(
    q: Tensor,
    new: Rows,
    valid: Tensor | None,
    at: Paged,
    plan: LayerPlan,
    *,
    out: Tensor | None = None,
    phi_q: Tensor | None = None,
) -> Attended:
    """Attend over slots, state and the call's tokens; see ``less.reference.chunk_attention``.

    Args:
        q: [B, Q, T, D], float32, bfloat16 or float16.
        new: The call's tokens in the dtype of the (hot) slots, [B, K, T, D].
        valid: bool [B, T] or None.
        at: The layer's pages. Written only where one begins.
        plan: The layer.
        out: [B, Q, T, D] of q's dtype: where to write; None: a new tensor that lies as q does.
        phi_q: float32 [B, Q, T, R], of a layer with a space [B, Q, T, R + 1], the last number
            being ``query_shift``; None: the state is left out.

    Returns:
        What ``less.reference.Attended`` says; scores are [B, K, S + T] with S the slots of the
        head that has most, and 0 for slots that a head has not.

    Raises:
        RuntimeError: A shape, dtype or layout differs from the above, or a page is none of the
            pool's or stands twice.
    """
    q = _rows(q)
    out = torch.empty_like(q) if out is None else out
    score, share = torch.ops.less.chunk_attention(
        q,
        _rows(new.k),
        _rows(new.v),
        _scales(new),
        valid if valid is None else valid.contiguous(),
        out,
        at.pool,
        _packed(at),
        plan.encoded,
        phi_q,
    )
    return Attended(out, score, share)


def prompt_scores(
    q: Tensor,
    k: Tensor,
    valid: Tensor | None = None,
    lse: Tensor | None = None,
    *,
    k_scale: Tensor | None = None,
    workspace: Tensor | None = None,
    scale: float,
    softcap: float = 0.0,
    decay: float = 1.0,
) -> Tensor:
    """Scores of a prompt's tokens, for attention that was computed elsewhere.

    ``less.reference.prompt_scores`` defines it.

    Args:
        q: [B, Q, T, D], float32, bfloat16 or float16.
        k: [B, K, T, D], float32, bfloat16, float16, int8 or, on a GPU, float8_e4m3fn.
        valid: bool [B, T], False for padding, or None.
        lse: float32 [B, Q, T], the logarithm of each query's sum of e^l, if it is known.
        k_scale: float32 [B, K, T], of each row of a k of 8 bits.
        workspace: uint8 [bytes], a GPU's scratch, zero; None: made for the call.
        scale: Factor of q.k.
        softcap: 0: none; else logits become softcap * tanh(scale q.k / softcap).
        decay: What a score keeps per token.

    Returns:
        float32 [B, K, T], 0 for padding.

    Raises:
        RuntimeError: A shape, dtype or layout differs from the above.
    """
    score: Tensor = torch.ops.less.prompt_scores(
        q.contiguous(),
        k.contiguous(),
        k_scale,
        valid if valid is None else valid.contiguous(),
        lse,
        workspace,
        scale,
        softcap,
        decay,
    )
    return score


def compact(
    new: Rows,
    valid: Tensor | None,
    score: Tensor,
    at: Paged,
    plan: LayerPlan,
    *,
    rank: Tensor | None = None,
) -> None:
    """Let a call's tokens join the slots, fold or forget the rest, in place.

    ``less.reference.compact`` defines it.

    Args:
        new: The call's tokens in the dtype of the (hot) slots, [B, K, T, D].
        valid: bool [B, T] or None.
        score: Scores after the call, of slots and tokens, float32 [B, K, S + T], S the slots of
            the head that has most.
        at: The layer's pages. Written.
        plan: The layer.
        rank: The policy's ranks, float32 [B, K, S + T]; None: by the layer's rule.

    Raises:
        RuntimeError: A shape, dtype or layout differs from the above, or a page is none of the
            pool's or stands twice; nothing is written.
        ValueError: Neither the layer has a rule nor is ``rank`` given.
    """
    if plan.spec.rule is None and rank is None:
        raise ValueError("compact: rank must be given where the layer has no rule")
    torch.ops.less.compact(
        _rows(new.k),
        _rows(new.v),
        _scales(new),
        valid if valid is None else valid.contiguous(),
        score,
        rank,
        at.pool,
        _packed(at),
        plan.encoded,
        plan.memory,
    )


def decode_step(call: Call, at: Paged, plan: LayerPlan, workspace: Tensor | None = None) -> Tensor:
    """Do a layer's whole step for one token of every row, in place, in one fork-join or launch.

    ``less.reference.decode_step`` defines it. A GPU resets pages that begin by a launch before.

    Args:
        call: One token a row. With ``out`` nothing is allocated.
        at: The layer's pages. Written.
        plan: The layer, which has a rule.
        workspace: uint8, of ``decode_step_workspace`` bytes, zero before its first use; None: made
            for the call.

    Returns:
        [B, Q, 1, D] of q's dtype; ``call.out`` where it is given.

    Raises:
        RuntimeError: A shape, dtype or layout is wrong, or a page is none of the pool's or stands
            twice; nothing is written.
        ValueError: The layer has no rule.
    """
    if plan.spec.rule is None:
        raise ValueError("decode_step: the layer must have a rule")
    q = _rows(call.q)
    out = torch.empty_like(q) if call.out is None else call.out
    torch.ops.less.decode_step(
        q,
        _rows(call.k),
        _rows(call.v),
        call.valid if call.valid is None else call.valid.contiguous(),
        out,
        at.pool,
        _packed(at),
        plan.encoded,
        plan.memory,
        workspace,
    )
    return out


def decode_step_workspace(pool: Tensor, plan: LayerPlan, B: int) -> int:
    """Bytes of scratch that ``decode_step`` takes, on the device of its pool; 0 on a CPU.

    Args:
        pool: The layer's pool.
        plan: The layer.
        B: Rows of a call.
    """
    return int(torch.ops.less.decode_step_workspace(pool, plan.encoded, B))


if _native:

    @fake("decode_step")
    def _decode_step_fake(*args: object) -> None:
        return None

    @fake("fold")
    def _fold_fake(
        H: Tensor, z: Tensor, psi_k: Tensor, v: Tensor, keep: Tensor | None = None
    ) -> None:
        return None

    @fake("quantize")
    def _quantize_fake(x: Tensor, fp8: bool = False) -> tuple[Tensor, Tensor]:
        scale = x.new_empty(x.shape[:-1], dtype=torch.float32)
        return torch.empty_like(x, dtype=torch.float8_e4m3fn if fp8 else torch.int8), scale

    @fake("rotate")
    def _rotate_fake(
        x: Tensor, valid: Tensor | None, maps: Tensor, layer: Tensor, rotation: int
    ) -> Tensor:
        return x.new_empty(x.shape, dtype=torch.float32)

    @fake("feature_map")
    def _feature_map_fake(x: Tensor, maps: Tensor, layer: Tensor, query: bool) -> Tensor:
        return x.new_empty((*x.shape[:3], layer.shape[0] - 1), dtype=torch.float32)

    @fake("chunk_attention")
    def _chunk_attention_fake(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scales: Tensor | None,
        valid: Tensor | None,
        out: Tensor,
        pool: Tensor,
        rows: Tensor | None,
        layer: Tensor,
        phi_q: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        B, Q, T, _ = q.shape
        f32 = torch.float32
        return (
            q.new_empty((B, k.shape[1], layer.shape[1] + T), dtype=f32),
            q.new_empty((B, Q, T), dtype=f32),
        )

    @fake("prompt_scores")
    def _prompt_scores_fake(q: Tensor, k: Tensor, *rest: object) -> Tensor:
        return q.new_empty(k.shape[:3], dtype=torch.float32)

    @fake("compact")
    def _compact_fake(*args: object) -> None:
        return None
