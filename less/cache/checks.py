"""Checks of a cache's arguments and of its calls."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from less._check import require_int, require_shape, require_tensor
from less.dtypes import FLOATS
from less.layer import Call, LayerPlan
from less.policies import Policy


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
    op: str, policy: Policy | Sequence[Policy | None], layers: int, native: Sequence[int]
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
        if i not in native:
            if not isinstance(one, Policy):
                raise ValueError(
                    f"{op}: {name.format(i)} must be a Policy, got {type(one).__name__}"
                )
            require_int(op, f"{name.format(i)}.capacity", one.capacity, 1)
    return tuple(None if i in native else one for i, one in enumerate(listed))


def sliding_layers(op: str, native: Sequence[int], layers: int) -> tuple[int, ...]:
    """``native``, checked and sorted."""
    indices = sorted({require_int(op, "native", i, 0) for i in native})
    if indices and indices[-1] >= layers:
        raise ValueError(f"{op}: native must be in 0 .. {layers - 1}, got {indices[-1]}")
    if len(indices) == layers:
        raise ValueError(
            f"{op}: native names every one of the {layers} layers, so there is nothing to bound"
        )
    return tuple(indices)


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
