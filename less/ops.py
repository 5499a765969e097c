"""The native ops, under their Python names.

Each op is ``torch.ops.less.<name>``, registered by ``csrc/ops/<name>.cpp`` when the library
``less._C`` is loaded, which importing this module does. Beside each stands its fake kernel, by
which torch traces through the op without running it. ``less.reference`` says in plain torch what
each computes.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Mapping

import torch
from torch import Tensor

from less.policies import Rule

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


def slot_dtypes(device: torch.device) -> tuple[torch.dtype, ...]:
    """What the native ops can hold slots in on this device."""
    everywhere = (torch.float32, torch.bfloat16, torch.float16, torch.int8)
    return everywhere if device.type == "cpu" else (*everywhere, torch.float8_e4m3fn)


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
    result: tuple[Tensor, Tensor] = torch.ops.less.quantize(
        x.contiguous(), dtype == torch.float8_e4m3fn
    )
    return result


_KINDS = {"paper": 0, "exp": 1}


def _kind(op: str, kind: str) -> int:
    if kind not in _KINDS:
        raise ValueError(f"{op}: kind must be 'paper' or 'exp', got {kind!r}")
    return _KINDS[kind]


def feature_map(
    x: Tensor,
    w1: Tensor,
    w2: Tensor,
    kind: str,
    *,
    bias: Tensor | None = None,
    mix: Tensor | None = None,
    scale: Tensor | None = None,
    mix_scale: Tensor | None = None,
    w1_scale: Tensor | None = None,
    w2_scale: Tensor | None = None,
) -> Tensor:
    """Evaluate a feature map, head by head; ``less.reference.feature_map`` defines it.

    Args:
        x: Queries or keys, float32, bfloat16 or float16 [B, N, T, D].
        w1: float32, bfloat16, float16 or int8 [N, D, E].
        w2: [N, E, R], likewise.
        kind: ``"paper"`` or ``"exp"``.
        bias: float32 [N, R], ``exp`` only.
        mix: float32 [N, R, R], ``paper`` psi only.
        scale: float32 [N, R], with ``mix``.
        mix_scale: float32 [N, R], with ``mix``.
        w1_scale: float32 [N, E], of each column of an int8 w1.
        w2_scale: float32 [N, R], of each column of an int8 w2.

    Returns:
        float32 [B, N, T, R], all >= 0.

    Raises:
        RuntimeError: A shape, dtype or layout differs from the above.
    """
    op = _kind("feature_map", kind)
    y: Tensor = torch.ops.less.feature_map(
        x.contiguous(), w1, w2, w1_scale, w2_scale, bias, mix, scale, mix_scale, op
    )
    return y


def phi(q: Tensor, maps: Mapping[str, Tensor], kind: str) -> Tensor:
    """Features of queries [B, Q, T, D] -> float32 [B, Q, T, R], from a layer of a sidekick."""
    return feature_map(
        q,
        maps["q_w1"],
        maps["q_w2"],
        kind,
        bias=maps.get("q_bias"),
        w1_scale=maps.get("q_w1_scale"),
        w2_scale=maps.get("q_w2_scale"),
    )


def psi(k: Tensor, maps: Mapping[str, Tensor], kind: str) -> Tensor:
    """Features of keys [B, K, T, D] -> float32 [B, K, T, R], from a layer of a sidekick."""
    return feature_map(
        k,
        maps["k_w1"],
        maps["k_w2"],
        kind,
        bias=maps.get("k_bias"),
        mix=maps.get("k_mix"),
        scale=maps.get("k_scale"),
        mix_scale=maps.get("k_mix_scale"),
        w1_scale=maps.get("k_w1_scale"),
        w2_scale=maps.get("k_w2_scale"),
    )


def chunk_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    valid: Tensor | None,
    slot_k: Tensor,
    slot_v: Tensor,
    position: Tensor,
    score: Tensor,
    weight: Tensor,
    *,
    chunk_k_scale: Tensor | None = None,
    chunk_v_scale: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    phi_q: Tensor | None = None,
    H: Tensor | None = None,
    z: Tensor | None = None,
    workspace: Tensor | None = None,
    scale: float,
    softcap: float = 0.0,
    decay: float = 1.0,
    scores: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Attend over slots, state and the call's tokens; see ``less.reference.chunk_attention``.

    Args:
        q: [B, Q, T, D], float32, bfloat16 or float16.
        k: [B, K, T, D] in the slots' dtype.
        v: [B, K, T, D] in the slots' dtype.
        valid: bool [B, T] or None.
        slot_k: [B, K, S, D], float32, bfloat16, float16, int8, or on a GPU float8_e4m3fn.
        slot_v: [B, K, S, D], likewise.
        position: int32 [B, K, S], -1 where empty.
        score: float32 [B, K, S].
        weight: float32 [B, K, S].
        chunk_k_scale: float32 [B, K, T], of each row of a k of 8 bits, as the three below.
        chunk_v_scale: float32 [B, K, T].
        k_scale: float32 [B, K, S], of the slots.
        v_scale: float32 [B, K, S].
        phi_q: float32 [B, Q, T, R], with H and z.
        H: float32 [B, K, R, D].
        z: float32 [B, K, R].
        workspace: uint8 [bytes], a GPU's scratch, zero; None: made for the call.
        scale: Factor of q.k.
        softcap: 0: none; else logits become softcap * tanh(scale q.k / softcap) + weight.
        decay: What a score keeps per token.
        scores: False leaves the scores as they are, and those of the call at 0.

    Returns:
        out [B, Q, T, D] in q's dtype; the slots' new scores [B, K, S]; the scores of the call's
        tokens [B, K, T]; the state's share of each query's mass [B, Q, T].

    Raises:
        RuntimeError: A shape, dtype or layout differs from the above.
    """
    result: tuple[Tensor, Tensor, Tensor, Tensor] = torch.ops.less.chunk_attention(
        q.contiguous(),
        k.contiguous(),
        v.contiguous(),
        chunk_k_scale,
        chunk_v_scale,
        valid if valid is None else valid.contiguous(),
        slot_k,
        slot_v,
        k_scale,
        v_scale,
        position,
        score,
        weight,
        phi_q,
        H,
        z,
        workspace,
        scale,
        softcap,
        decay,
        scores,
    )
    return result


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
    k: Tensor,
    v: Tensor,
    chunk_score: Tensor,
    slot_score: Tensor,
    valid: Tensor | None,
    slot_k: Tensor,
    slot_v: Tensor,
    position: Tensor,
    score: Tensor,
    weight: Tensor,
    seen: Tensor,
    *,
    chunk_k_scale: Tensor | None = None,
    chunk_v_scale: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    H: Tensor | None = None,
    z: Tensor | None = None,
    workspace: Tensor | None = None,
    maps: Mapping[str, Tensor] | None = None,
    kind: str = "exp",
    rule: Rule | None = None,
    rank: Tensor | None = None,
) -> None:
    """Let a call's tokens join the slots, fold and forget the rest, in place.

    ``less.reference.compact`` defines it.

    Args:
        k: [B, K, T, D] in the slots' dtype.
        v: [B, K, T, D] in the slots' dtype.
        chunk_score: float32 [B, K, T].
        slot_score: float32 [B, K, S], the slots' scores after the call.
        valid: bool [B, T] or None.
        slot_k: [B, K, S, D], float32, bfloat16, float16, int8, or on a GPU float8_e4m3fn. Written.
        slot_v: [B, K, S, D], likewise. Written.
        position: int32 [B, K, S]. Written.
        score: float32 [B, K, S]. Written.
        weight: float32 [B, K, S]. Written.
        seen: int64 [B]: tokens seen before the call. Written: after it.
        chunk_k_scale: float32 [B, K, T], of each row of a k of 8 bits, as the three below.
        chunk_v_scale: float32 [B, K, T].
        k_scale: float32 [B, K, S], of the slots. Written.
        v_scale: float32 [B, K, S]. Written.
        H: float32 [B, K, R, D], with z and maps. Written.
        z: float32 [B, K, R]. Written.
        workspace: uint8 [bytes], a GPU's scratch, zero; None: made for the call.
        maps: The layer's feature maps.
        kind: Their kind.
        rule: The policy's native ranking, or
        rank: its ranks themselves, float32 [B, K, S + T].

    Raises:
        RuntimeError: A shape, dtype or layout differs from the above; nothing is written.
        ValueError: Neither ``rule`` nor ``rank`` is given, or both are.
    """
    if (rule is None) == (rank is None):
        raise ValueError("compact: exactly one of rule and rank must be given")
    weights = maps or {}
    by = rule or Rule(recent=0, sinks=0, by_score=False, per_age=False)
    torch.ops.less.compact(
        k.contiguous(),
        v.contiguous(),
        chunk_k_scale,
        chunk_v_scale,
        chunk_score,
        slot_score,
        valid if valid is None else valid.contiguous(),
        rank,
        slot_k,
        slot_v,
        k_scale,
        v_scale,
        position,
        score,
        weight,
        seen,
        H,
        z,
        workspace,
        weights.get("k_w1"),
        weights.get("k_w2"),
        weights.get("k_w1_scale"),
        weights.get("k_w2_scale"),
        weights.get("k_bias"),
        weights.get("k_mix"),
        weights.get("k_scale"),
        weights.get("k_mix_scale"),
        _kind("compact", kind),
        by.recent,
        by.sinks,
        by.by_score,
        by.per_age,
    )


_EMPTY: Mapping[str, Tensor] = {}
_VICTIMS = {"none": 0, "forget": 1, "fold": 2}


def decode_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    valid: Tensor | None,
    out: Tensor,
    slot_k: Tensor,
    slot_v: Tensor,
    position: Tensor,
    score: Tensor,
    weight: Tensor,
    seen: Tensor,
    *,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    H: Tensor | None = None,
    z: Tensor | None = None,
    share: Tensor | None = None,
    workspace: Tensor | None = None,
    maps: Mapping[str, Tensor] | None = None,
    kind: str = "exp",
    scale: float,
    softcap: float = 0.0,
    decay: float = 1.0,
    scores: bool = True,
    rule: Rule,
    victim: str = "fold",
    dependent: bool = False,
) -> None:
    """Do a layer's whole step for one token of every row, in place, in one fork-join or launch.

    ``less.reference.decode_step`` defines it: ``chunk_attention``, then ``compact``.

    Args:
        q: [B, Q, 1, D], float32, bfloat16 or float16.
        k: [B, K, 1, D], likewise; rounded to the slots' dtype on entry.
        v: [B, K, 1, D], of k's dtype.
        valid: bool [B, 1], False for a row that has no token, or None.
        out: [B, Q, 1, D] of q's dtype. Written.
        slot_k: [B, K, S, D], float32, bfloat16, float16, int8, or on a GPU float8_e4m3fn. Written.
        slot_v: [B, K, S, D], likewise. Written.
        position: int32 [B, K, S], -1 where empty. Written.
        score: float32 [B, K, S]. Written.
        weight: float32 [B, K, S]. Written.
        seen: int64 [B]: tokens seen before the step. Written: after it.
        k_scale: float32 [B, K, S], of slots of 8 bits alone. Written.
        v_scale: float32 [B, K, S], likewise. Written.
        H: float32 [B, K, R, D], with z, share and maps. Written.
        z: float32 [B, K, R]. Written.
        share: float64 [B, K], to which the state's share of each query's mass is added. Written.
        workspace: uint8, of ``decode_step_workspace`` bytes, zero before its first use; None: made
            for the call.
        maps: The layer's feature maps.
        kind: Their kind.
        scale: Factor of q.k.
        softcap: 0: none; else logits become softcap * tanh(scale q.k / softcap) + weight.
        decay: What a score keeps per token.
        scores: False leaves the scores as they are.
        rule: Who stays.
        victim: What becomes of the token that leaves: ``"fold"`` or ``"forget"``. ``"none"``:
            nothing joins or leaves, which makes the step attention alone.
        dependent: The launch may begin before the kernel before it is over, and then waits for it
            on the device; before sm_90, and on a CPU, it changes nothing.

    Raises:
        RuntimeError: A shape, dtype or layout differs from the above; nothing is written.
        ValueError: ``kind`` or ``victim`` is unknown.
    """
    if victim not in _VICTIMS:
        raise ValueError(f"decode_step: victim must be 'fold', 'forget' or 'none', got {victim!r}")
    get = (_EMPTY if maps is None else maps).get
    torch.ops.less.decode_step(
        q,
        k,
        v,
        valid,
        out,
        slot_k,
        slot_v,
        k_scale,
        v_scale,
        position,
        score,
        weight,
        seen,
        H,
        z,
        share,
        workspace,
        get("q_w1"),
        get("q_w2"),
        get("q_w1_scale"),
        get("q_w2_scale"),
        get("q_bias"),
        get("k_w1"),
        get("k_w2"),
        get("k_w1_scale"),
        get("k_w2_scale"),
        get("k_bias"),
        get("k_mix"),
        get("k_scale"),
        get("k_mix_scale"),
        _kind("decode_step", kind),
        scale,
        softcap,
        decay,
        scores,
        rule.recent,
        rule.sinks,
        rule.by_score,
        rule.per_age,
        _VICTIMS[victim],
        dependent,
    )


def chunk_attention_workspace(q: Tensor, slot_k: Tensor, padded: bool) -> int:
    """Bytes of scratch that ``chunk_attention`` wants for a call, on its device; 0 on a CPU.

    Args:
        q: [B, Q, T, D].
        slot_k: [B, K, S, D].
        padded: Whether ``valid`` is given.
    """
    return int(torch.ops.less.chunk_attention_workspace(q, slot_k, padded))


def compact_workspace(k: Tensor, slot_k: Tensor, maps: Mapping[str, Tensor] | None) -> int:
    """Bytes of scratch that ``compact`` wants for a call, on its device; 0 on a CPU.

    Args:
        k: [B, K, T, D].
        slot_k: [B, K, S, D].
        maps: The layer's feature maps, or None for eviction alone.
    """
    R = 0 if maps is None else maps["k_w2"].shape[2]
    return int(torch.ops.less.compact_workspace(k, slot_k, R))


def decode_step_workspace(slot_k: Tensor, Q: int, maps: Mapping[str, Tensor] | None) -> int:
    """Bytes of scratch that ``decode_step`` wants for these slots, on their device; 0 on a CPU.

    Args:
        slot_k: [B, K, S, D].
        Q: Query heads.
        maps: The layer's feature maps, or None for eviction alone.
    """
    _, E, R = (0, 0, 0) if maps is None else maps["q_w2"].shape
    return int(torch.ops.less.decode_step_workspace(slot_k, Q, R, E))


if _native:

    @torch.library.register_fake("less::decode_step")
    def _decode_step_fake(*args: object) -> None:
        return None

    @torch.library.register_fake("less::fold")
    def _fold_fake(
        H: Tensor, z: Tensor, psi_k: Tensor, v: Tensor, keep: Tensor | None = None
    ) -> None:
        return None

    @torch.library.register_fake("less::quantize")
    def _quantize_fake(x: Tensor, fp8: bool = False) -> tuple[Tensor, Tensor]:
        scale = x.new_empty(x.shape[:-1], dtype=torch.float32)
        return torch.empty_like(x, dtype=torch.float8_e4m3fn if fp8 else torch.int8), scale

    @torch.library.register_fake("less::feature_map")
    def _feature_map_fake(x: Tensor, w1: Tensor, w2: Tensor, *rest: object) -> Tensor:
        return x.new_empty((*x.shape[:3], w2.shape[2]), dtype=torch.float32)

    @torch.library.register_fake("less::chunk_attention")
    def _chunk_attention_fake(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        chunk_k_scale: Tensor | None,
        chunk_v_scale: Tensor | None,
        valid: Tensor | None,
        slot_k: Tensor,
        *rest: object,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        B, Q, T, _ = q.shape
        _, K, S, _ = slot_k.shape
        f32 = torch.float32
        return (
            torch.empty_like(q),
            q.new_empty((B, K, S), dtype=f32),
            q.new_empty((B, K, T), dtype=f32),
            q.new_empty((B, Q, T), dtype=f32),
        )

    @torch.library.register_fake("less::prompt_scores")
    def _prompt_scores_fake(q: Tensor, k: Tensor, *rest: object) -> Tensor:
        return q.new_empty(k.shape[:3], dtype=torch.float32)

    @torch.library.register_fake("less::compact")
    def _compact_fake(*args: object) -> None:
        return None
