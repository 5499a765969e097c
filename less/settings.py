"""Checks of ``LessConfig``'s settings: each by itself, and those that go together."""

from __future__ import annotations

import math
import os
from typing import TYPE_CHECKING

import torch

from less.budget import least_tokens, parse_bytes, pyramid
from less.dtypes import FORMATS, HOT_DTYPES, ROW_TYPES, name

if TYPE_CHECKING:
    from less.config import LessConfig

DTYPES = tuple(name(d) for d in ROW_TYPES if d != torch.float64)


def check_budget(config: LessConfig) -> None:
    """Refuse a budget that is none, or several.

    Raises:
        ValueError: One is wrong, or contradicts another; the message names it.
    """
    given = [n for n in ("tokens", "share", "bytes") if getattr(config, n) is not None]
    if len(given) != 1:
        raise ValueError(
            "LessConfig: one of tokens, share and bytes must be given, got "
            + (" and ".join(given) or "none")
        )
    if config.bytes is not None:
        parse_bytes("LessConfig", config.bytes)
    if config.share is not None:
        check_number("share", config.share)
        if not 0 < config.share <= 1:
            raise ValueError(f"LessConfig: share must be in (0, 1], got {config.share}")
    if config.tokens is not None:
        counts = config.tokens if isinstance(config.tokens, tuple) else (config.tokens,)
        for count in counts:
            if isinstance(count, bool) or not isinstance(count, int) or count < 1:
                raise ValueError(
                    "LessConfig: tokens must be a whole number >= 1, or a list of them, got "
                    f"{config.tokens!r}"
                )


def check_shape(config: LessConfig) -> None:
    """Refuse a shape that deals nothing out.

    Raises:
        ValueError: One is wrong, or contradicts another; the message names it.
    """
    check_number("beta", config.beta)
    if config.shape == "pyramid":
        pyramid(2, config.beta)
    if isinstance(config.tokens, tuple) and config.shape != "uniform":
        raise ValueError("LessConfig: a list of tokens is a shape already; leave shape alone")
    if isinstance(config.shape, str):
        if config.shape not in ("uniform", "pyramid"):
            raise ValueError(
                "LessConfig: shape must be 'uniform', 'pyramid' or a list of one weight per "
                f"layer, got {config.shape!r}"
            )
        return
    for weight in config.shape:
        check_number("shape", weight)
        if weight <= 0:
            raise ValueError(f"LessConfig: weights of shape must be above 0, got {weight}")


def check_rows(config: LessConfig) -> None:
    """Refuse formats that do not exist, and settings that are not theirs.

    Raises:
        ValueError: One is wrong, or contradicts another; the message names it.
    """
    if isinstance(config.rows, torch.dtype):
        object.__setattr__(config, "rows", name(config.rows))
    if isinstance(config.hot_dtype, torch.dtype):
        object.__setattr__(config, "hot_dtype", name(config.hot_dtype))
    if config.rows is not None:
        if config.dtype is not None:
            raise ValueError("LessConfig: dtype and rows say the same; give one of them")
        known = (*DTYPES, *FORMATS)
        if config.rows not in known:
            raise ValueError(
                f"LessConfig: rows must be one of {', '.join(known)}, got {config.rows!r}"
            )
    finer = [name(d) for d in HOT_DTYPES]
    if config.hot_dtype not in finer:
        raise ValueError(
            f"LessConfig: hot_dtype must be one of {', '.join(finer)}, got {config.hot_dtype!r}"
        )
    if isinstance(config.calibration, os.PathLike):
        object.__setattr__(config, "calibration", os.fspath(config.calibration))
    if not (config.calibration is None or isinstance(config.calibration, str)):
        raise ValueError(
            "LessConfig: calibration must be a folder, got "
            f"{type(config.calibration).__name__}; an object goes to cache(model, calibration=...)"
        )
    stored = config.rows or config.dtype or "float16"
    of_slots = stored if stored in FORMATS else getattr(torch, stored)
    least_tokens(of_slots, config.sinks, config.hot)  # refuses what is wrong


def check_number(name: str, value: object) -> None:
    """Refuse what is no finite number.

    Raises:
        ValueError: One is wrong, or contradicts another; the message names it.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"LessConfig: {name} must be a number, got {value!r}")
