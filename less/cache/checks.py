"""Checks of a cache's arguments and of its calls."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import NoReturn

import torch

from less._check import require_int, require_shape, require_tensor
from less.backend import Backend
from less.calibration import Calibration
from less.dtypes import FLOATS
from less.layer import Call, LayerPlan, Space
from less.layer.kinds import KEY_MEAN, KINDS
from less.layer.spec import CHOICES, VICTIMS
from less.policies import Policy
from less.sidekick import Sidekick


def positive(op: str, name: str, value: object) -> float:
    """Return ``value`` if it is a finite number above 0.

    Raises:
        ValueError: It is not.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{op}: {name} must be a number, got {value!r}")
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{op}: {name} must be finite and positive, got {value}")
    return float(value)


def layer_policies(
    op: str, policy: Policy | Sequence[Policy | None], layers: int, sliding: Sequence[int]
) -> tuple[Policy | None, ...]:
    """``policy`` as one per layer, checked; None for layers that slide."""
    if isinstance(policy, Policy):
        listed, name = [policy] * layers, "policy"
    elif isinstance(policy, (list, tuple)):
        listed, name = list(policy), "policy[{}]"
    else:
        raise ValueError(
            f"{op}: policy must be a Policy or a list of them, got {type(policy).__name__}"
        )
    if len(listed) != layers:
        raise ValueError(
            f"{op}: policy must list {layers} policies, one per layer, got {len(listed)}"
        )
    for i, one in enumerate(listed):
        if i not in sliding:
            if not isinstance(one, Policy):
                raise ValueError(
                    f"{op}: {name.format(i)} must be a Policy, got {type(one).__name__}"
                )
            require_int(op, f"{name.format(i)}.capacity", one.capacity, 1)
    return tuple(None if i in sliding else one for i, one in enumerate(listed))


def sliding_layers(op: str, given: Sequence[int], layers: int) -> tuple[int, ...]:
    """The indices that the argument ``native`` names, checked and sorted."""
    indices = sorted({require_int(op, "native", i, 0) for i in given})
    if indices and indices[-1] >= layers:
        raise ValueError(f"{op}: native must be in 0 .. {layers - 1}, got {indices[-1]}")
    if len(indices) == layers:
        raise ValueError(
            f"{op}: native names every one of the {layers} layers, so there is nothing to bound"
        )
    return tuple(indices)


def policy_text(policies: Sequence[Policy | None]) -> str:
    """The policy, or the runs of layers that share one: ``0-1 Full(...); 2-29 H2O(...)``."""
    runs: list[tuple[int, int, str]] = []
    for i, policy in enumerate(policies):
        if policy is None:
            continue
        text = repr(policy)
        if runs and runs[-1][2] == text:
            runs[-1] = (runs[-1][0], i, text)
        else:
            runs.append((i, i, text))
    if len(runs) == 1:
        return runs[0][2]
    return "; ".join(
        f"{first}-{last} {text}" if last > first else f"{first} {text}"
        for first, last, text in runs
    )


def check_dtype(
    op: str, name: str, dtype: torch.dtype | str, backend: Backend, device: torch.device
) -> None:
    """Refuse a dtype of the slots, by its argument's name, that a backend has not on a device.

    Raises:
        ValueError: It is one.
    """
    wanted = backend.dtypes(device)
    if dtype not in wanted:
        names = ", ".join(str(d) for d in wanted)
        raise ValueError(
            f"{op}: {name} must be one of {names} with the {backend.name} backend on "
            f"{device.type}, got {dtype}"
        )


def checked_victim(op: str, victim: str | None, sidekick: Sidekick | None) -> str:
    """What becomes of a token that leaves: as said, else folded where there is a sidekick.

    Raises:
        ValueError: It is unknown, or does not go with the sidekick.
    """
    if victim is None:
        return "forget" if sidekick is None else "fold"
    if victim not in CHOICES:
        raise ValueError(f"{op}: victim must be one of {', '.join(CHOICES)}, got {victim!r}")
    if VICTIMS[victim].maps != (sidekick is not None):
        folding = " or ".join(repr(name) for name in CHOICES if VICTIMS[name].maps)
        raise ValueError(
            f"{op}: victim {folding} and a sidekick belong together, got victim {victim!r} and "
            f"sidekick {sidekick!r}"
        )
    return victim


def check_weighing(op: str, victim: str, *policies: Policy | None) -> None:
    """Refuse policies whose tokens have no scores, where a victim's action weighs by them.

    Raises:
        ValueError: One of them is such.
    """
    if not VICTIMS[victim].weighs:
        return
    for policy in policies:
        if policy is not None and policy.evicts and not policy.needs_scores:
            raise ValueError(
                f"{op}: victim {victim!r} weighs tokens by their scores, which policy "
                f"{type(policy).__name__} does not keep; use H2O, or victim 'forget'"
            )


def warn_of_weighing(op: str, victim: str, policies: Sequence[Policy | None]) -> None:
    """Warn of scores that never decay, where a victim's action weighs by them.

    Old tokens then move every mean, and a cache that merges loses more than one that forgets.
    """
    if not VICTIMS[victim].weighs:
        return
    policy = next((p for p in policies if p is not None and p.evicts and p.decay == 1.0), None)
    if policy is not None:
        warnings.warn(
            f"{op}: victim {victim!r} weighs means by scores, and those of {policy!r} never decay: "
            "this does harm (docs/merging.md); give it a decay, such as 0.98",
            stacklevel=3,
        )


def layer_capacities(
    op: str,
    given: Sequence[int | Sequence[int] | None] | None,
    policies: Sequence[Policy | None],
    kv_heads: int,
) -> tuple[int | tuple[int, ...] | None, ...]:
    """Slots of each layer's heads: as given, else what the layer's policy keeps.

    Args:
        op: Who asks, for messages.
        given: The argument ``capacities``: for each layer K numbers, or None.
        policies: Of each layer; None where it slides.
        kv_heads: K.

    Raises:
        ValueError: There is not one entry per layer, or one does not fit its layer.
    """
    kept: list[int | tuple[int, ...] | None] = [None if p is None else p.capacity for p in policies]
    if given is None:
        return tuple(kept)
    if not isinstance(given, (list, tuple)) or len(given) != len(policies):
        what = len(given) if isinstance(given, (list, tuple)) else type(given).__name__
        raise ValueError(
            f"{op}: capacities must list {len(policies)} entries, one per layer, got {what}"
        )
    for i, (slots, policy) in enumerate(zip(given, policies, strict=True)):
        if slots is None:
            continue
        if policy is None or not policy.evicts:
            raise ValueError(
                f"{op}: capacities[{i}] must be None for a layer that "
                f"{'slides' if policy is None else 'keeps every token'}, got {slots}"
            )
        if not isinstance(slots, (list, tuple)) or len(slots) != kv_heads:
            raise ValueError(
                f"{op}: capacities[{i}] must list {kv_heads} numbers of slots, one per kv head, "
                f"got {slots}"
            )
        kept[i] = tuple(require_int(op, f"capacities[{i}][{h}]", s, 1) for h, s in enumerate(slots))
    return tuple(kept)


def check_sidekick(
    op: str, sidekick: Sidekick, layers: int, q_heads: int, kv_heads: int, head_dim: int
) -> None:
    """Refuse a sidekick of another shape than the cache's.

    Raises:
        ValueError: The message names what differs.
    """
    if not isinstance(sidekick, Sidekick):
        raise ValueError(f"{op}: sidekick must be a Sidekick, got {type(sidekick).__name__}")
    for name, wanted, got in (
        ("layers", layers, len(sidekick)),
        ("q_heads", q_heads, sidekick.q_heads),
        ("kv_heads", kv_heads, sidekick.kv_heads),
        ("head_dim", head_dim, sidekick.head_dim),
    ):
        if wanted != got:
            raise ValueError(f"{op}: sidekick must have {name}={wanted}, got {name}={got}")


def check_calibration(
    op: str,
    calibration: Calibration,
    shape: tuple[int, int, int],
    sidekick: Sidekick | None,
    softcap: float | None,
) -> None:
    """Refuse a calibration of another shape, or of other means than the sidekick's maps have.

    Args:
        op: Who asks, for the message.
        calibration: What is looked at.
        shape: Layers, kv heads, head dim.
        sidekick: The cache's.
        softcap: Under one, a cache has no means of keys.

    Raises:
        ValueError: It is one.
    """
    if not isinstance(calibration, Calibration):
        raise ValueError(
            f"{op}: calibration must be a Calibration, got {type(calibration).__name__}"
        )
    calibration.check(op, *shape)
    if sidekick is not None and softcap is None:
        check_key_means(op, sidekick, calibration)


def no_state(layer: int, sidekick: Sidekick | None) -> NoReturn:
    """Say why a layer has no low-rank state.

    Raises:
        ValueError: Always.
    """
    if sidekick is None:
        raise ValueError("state: this cache has no sidekick, hence no low-rank state")
    why = "has no maps in the sidekick" if layer in sidekick.absent else "keeps every token"
    raise ValueError(f"state: layer {layer} {why}, hence no low-rank state")


def check_key_means(op: str, sidekick: Sidekick, calibration: Calibration) -> None:
    """Refuse means of keys other than those that centred maps were trained with.

    Raises:
        ValueError: The message names the first layer that differs.
    """
    if not KINDS[sidekick.kind].centred:
        return
    for i, maps in enumerate(sidekick):
        space = calibration.space(i)
        if maps and space is not None and not same_key_mean(space, maps.get(KEY_MEAN)):
            raise ValueError(
                f"{op}: calibration must have the key_mean that the sidekick {sidekick.name!r} was "
                f"trained with, and has another in layer {i}; train it with this calibration, or "
                "leave the calibration out"
            )


def same_key_mean(space: Space, mean: torch.Tensor | None) -> bool:
    """Whether a space has this mean of keys [K, D], rounded as the space rounds it; None: 0."""
    if mean is None:
        return not bool(space.key_mean.any())
    return torch.equal(space.key_mean, mean.to(space.key_mean))


def named_device(op: str, device: torch.device | str) -> torch.device:
    """The device that an argument names, whether it is here or not.

    Raises:
        ValueError: It names none.
    """
    try:
        return torch.device(device)
    except (RuntimeError, TypeError) as e:
        raise ValueError(f"{op}: device must name a torch device, got {device!r}") from e


def real_device(op: str, device: torch.device | str) -> torch.device:
    """A device that is here and holds values, with its index: "cuda" is the current one.

    Raises:
        ValueError: It is none.
    """
    try:
        found = torch.empty(0, device=device).device
    except (AssertionError, RuntimeError, TypeError) as e:
        reason = str(e).splitlines()[0]
        raise ValueError(f"{op}: device must be one that is here, got {device!r}: {reason}") from e
    if found.type == "meta":
        raise ValueError(f"{op}: device must hold values, got 'meta'")
    return found


def check_call(op: str, call: Call, plan: LayerPlan, B: int, device: torch.device) -> None:
    """Refuse a call whose tensors do not fit a layer, by name.

    Args:
        op: Who asks, for the message.
        call: The call.
        plan: The layer.
        B: Its batch rows.
        device: Where the layer's memory lies.

    Raises:
        TypeError: Something is no tensor.
        ValueError: A shape, dtype or device is wrong.
    """
    Q, K, D = plan.spec.q_heads, plan.layout.kv_heads, plan.layout.head_dim
    q = require_tensor(op, "q", call.q)
    require_shape(op, "q", q, [B, Q, "T", D])
    T = q.shape[2]
    for name, x in (("k", call.k), ("v", call.v)):
        x = require_tensor(op, name, x)
        if x.shape != (B, K, T, D):
            # k's T is the caller's to choose, so a message about heads says T, not a number.
            require_shape(op, name, x, [B, K, "T", D])
            require_shape(op, name, x, [B, K, T, D])
    double = plan.layout.dtype == torch.float64
    wanted = FLOATS + ((torch.float64,) if double else ())

    def check_device(name: str, x: torch.Tensor) -> None:
        if x.device != device:
            raise ValueError(f"{op}: {name} must be on {device}, got {x.device}")

    for name, x in (("q", q), ("k", call.k), ("v", call.v)):
        if x.dtype not in wanted:
            raise ValueError(
                f"{op}: {name} must have dtype {', '.join(map(str, wanted))}, got {x.dtype}"
            )
        check_device(name, x)
        if x.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"{op}: {name} requires grad, but the cache has no backward; "
                "call it under torch.no_grad()"
            )
    if call.k.dtype != call.v.dtype:
        raise ValueError(f"{op}: v must have k's dtype {call.k.dtype}, got {call.v.dtype}")
    if call.valid is not None:
        valid = require_tensor(op, "valid", call.valid)
        require_shape(op, "valid", valid, [B, T])
        if valid.dtype != torch.bool:
            raise ValueError(f"{op}: valid must have dtype torch.bool, got {valid.dtype}")
        check_device("valid", valid)
    if call.out is not None:
        out = require_tensor(op, "out", call.out)
        require_shape(op, "out", out, list(q.shape))
        if out.dtype != q.dtype or (D > 1 and out.stride(3) != 1):
            raise ValueError(f"{op}: out must have contiguous rows of q's dtype {q.dtype}")
        check_device("out", out)
        _check_apart(op, out, {"q": q, "k": call.k, "v": call.v})


def _check_apart(op: str, out: torch.Tensor, read: Mapping[str, torch.Tensor]) -> None:
    """Refuse an ``out`` whose rows lie in one another, or in what the call reads.

    Raises:
        ValueError: It is one.
    """
    end = 0
    for stride, size in sorted(zip(out.stride(), out.shape, strict=True)):
        if size > 1:
            if stride <= end:
                raise ValueError(f"{op}: out must not overlap itself, got strides {out.stride()}")
            end += (size - 1) * stride
    begin, end = _span(out)
    for name, x in read.items():
        first, last = _span(x)
        if _memory(x) == _memory(out) and first < end and begin < last:
            raise ValueError(f"{op}: out must not overlap {name}, which the call reads")


def _memory(x: torch.Tensor) -> int:
    """What tensors have in common that lie in one piece of memory, those without values too."""
    return int(x.untyped_storage()._cdata)


def _span(x: torch.Tensor) -> tuple[int, int]:
    """Where a tensor begins and ends in its memory, in bytes."""
    numbers = 1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))
    begin = int(x.storage_offset()) * x.element_size()
    return begin, begin + numbers * x.element_size()
