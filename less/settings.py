"""Checks of ``LessConfig``'s settings: each by itself, and those that go together."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch

from less.budget import least_tokens, parse_bytes, pyramid
from less.dtypes import FORMATS, HOT_DTYPES, ROW_TYPES, name
from less.layer.spec import CHOICES, VICTIMS

DTYPES = tuple(name(d) for d in ROW_TYPES if d != torch.float64)


def check_budget(
    tokens: int | Sequence[int] | None, share: float | None, nbytes: int | str | None
) -> None:
    """Refuse a budget that is none, or several.

    Raises:
        ValueError: One is wrong, or contradicts another; the message names it.
    """
    budgets = {"tokens": tokens, "share": share, "bytes": nbytes}
    given = [n for n, value in budgets.items() if value is not None]
    if len(given) != 1:
        raise ValueError(
            "LessConfig: one of tokens, share and bytes must be given, got "
            + (" and ".join(given) or "none")
        )
    if nbytes is not None:
        parse_bytes("LessConfig", nbytes)
    if share is not None:
        check_number("share", share)
        if not 0 < share <= 1:
            raise ValueError(f"LessConfig: share must be in (0, 1], got {share}")
    if tokens is not None:
        for count in tokens if isinstance(tokens, tuple) else (tokens,):
            if isinstance(count, bool) or not isinstance(count, int) or count < 1:
                raise ValueError(
                    "LessConfig: tokens must be a whole number >= 1, or a list of them, got "
                    f"{tokens!r}"
                )


def check_shape(
    shape: str | Sequence[float] | None, beta: float, tokens: int | Sequence[int] | None
) -> None:
    """Refuse a shape that deals nothing out.

    Raises:
        ValueError: One is wrong, or contradicts another; the message names it.
    """
    check_number("beta", beta)
    if shape == "pyramid":
        pyramid(2, beta)
    if shape is None:
        return
    if isinstance(tokens, tuple) and shape != "uniform":
        raise ValueError("LessConfig: a list of tokens is a shape already; leave shape alone")
    if isinstance(shape, str):
        if shape not in ("uniform", "pyramid", "calibrated"):
            raise ValueError(
                "LessConfig: shape must be 'uniform', 'pyramid', 'calibrated' or a list of one "
                f"weight per layer, got {shape!r}"
            )
        return
    for weight in shape:
        check_number("shape", weight)
        if weight <= 0:
            raise ValueError(f"LessConfig: weights of shape must be above 0, got {weight}")


def check_rows(
    dtype: str | None, rows: str | None, sinks: int | None, hot: int | None, hot_dtype: str
) -> None:
    """Refuse formats that do not exist, and settings that are not theirs.

    Raises:
        ValueError: One is wrong, or contradicts another; the message names it.
    """
    finer = [name(d) for d in HOT_DTYPES]
    for label, value, known in (
        ("dtype", dtype, DTYPES),
        ("rows", rows, (*DTYPES, *FORMATS)),
        ("hot_dtype", hot_dtype, finer),
    ):
        if value not in known and not (value is None and label != "hot_dtype"):
            raise ValueError(
                f"LessConfig: {label} must be one of {', '.join(known)}, got {value!r}"
            )
    if dtype is not None and rows is not None:
        raise ValueError("LessConfig: dtype and rows say the same; give one of them")
    stored = rows or dtype or "float16"
    of_slots = stored if stored in FORMATS else getattr(torch, stored)
    least_tokens(of_slots, sinks, hot)  # refuses what is wrong


def check_actions(
    victim: str | None, preset: str | None, others: Mapping[str, object], sidekick: str | None
) -> None:
    """Refuse an unknown victim or preset, and what contradicts a preset.

    Args:
        victim: The setting.
        preset: The setting.
        others: Settings that a preset brings along, by name.
        sidekick: The setting.

    Raises:
        ValueError: One is wrong, or contradicts another; the message names it.
    """
    if victim is not None and victim not in CHOICES:
        raise ValueError(f"LessConfig: victim must be one of {', '.join(CHOICES)}, got {victim!r}")
    if victim is not None and VICTIMS[victim].weighs and sidekick is not None:
        raise ValueError(
            f"LessConfig: victim {victim!r} and a sidekick exclude each other: what is merged is "
            "not folded into a state"
        )
    if preset not in (None, "paper"):
        raise ValueError(f"LessConfig: preset must be 'paper' or None, got {preset!r}")
    given = [n for n, value in others.items() if value is not None]
    if preset is not None and given:
        raise ValueError(
            f"LessConfig: preset {preset!r} brings its own {' and '.join(given)}; leave them alone"
        )


def check_folder(label: str, value: object, wanted: str) -> None:
    """Refuse what names no folder.

    Raises:
        ValueError: It does not; the message names it.
    """
    if not (value is None or isinstance(value, str)):
        raise ValueError(
            f"LessConfig: {label} must be {wanted}, got {type(value).__name__}; an object goes to "
            f"cache(model, {label}=...)"
        )


def check_number(name: str, value: object) -> None:
    """Refuse what is no finite number.

    Raises:
        ValueError: One is wrong, or contradicts another; the message names it.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"LessConfig: {name} must be a number, got {value!r}")
