"""Snapshots: what a cache holds as plain values, and back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from less._check import require_int, require_shape, require_tensor
from less.cache.session import Session, loaded_sliding, sliding_tensors
from less.layer import PageLayout

FORMAT = 6


def identity(settings: Mapping[str, Any], session: Session) -> dict[str, Any]:
    """The settings that a cache must share to load a snapshot, and the windows of its layers."""
    windows = {
        # Names, not numbers: a snapshot may pass through JSON.
        str(i): None if at is None else at.sliding_window
        for i, at in session.sliding.items()
    }
    return {"format": FORMAT, **settings, "native": windows}


def save(
    settings: Mapping[str, Any], pools: Mapping[int, Tensor], session: Session
) -> dict[str, Any]:
    """``LessKVCache.state_dict``.

    Args:
        settings: Of the cache, values that JSON can hold.
        pools: Its pages.
        session: Its session.
    """
    tensors = {f"{i}.page": pool.detach().clone() for i, pool in pools.items()}
    for i, seen in session.sliding_seen.items():
        tensors[f"{i}.seen"] = seen.clone()
    for i, at in session.made():
        tensors |= {f"{i}.{n}": x.detach().clone() for n, x in sliding_tensors(at).items()}
    return {
        "cache": identity(settings, session),
        "columns": list(session.columns),
        "fed": session.fed_tokens().clone(),
        "tensors": tensors,
    }


def loaded(
    d: dict[str, Any],
    settings: Mapping[str, Any],
    pools: Mapping[int, Tensor],
    layouts: Sequence[PageLayout | None],
    session: Session,
) -> Callable[[], None]:
    """Check a snapshot for ``LessKVCache.load_state_dict``, and copy what is to be allocated.

    Args:
        d: The snapshot.
        settings: Of the cache, as in ``save``.
        pools: Its pages.
        layouts: What a page of each layer holds; None where it has none.
        session: Its session.

    Returns:
        What puts it in place: writes pages and session.

    Raises:
        ValueError: The snapshot is of another kind of cache, incomplete or damaged; the message
            names what differs and the cache is as it was.
    """
    op = "load_state_dict"
    if not isinstance(d, dict) or not {"cache", "columns", "fed", "tensors"} <= d.keys():
        raise ValueError(f"{op}: d must be a result of LessKVCache.state_dict")
    if None in session.sliding.values():
        raise ValueError(
            f"{op}: the layers that slide, {list(session.sliding)}, are made by "
            "less.hf.cache_for, or when the cache is attached; load the snapshot after that"
        )
    for name in ("cache", "tensors"):
        if not isinstance(d[name], dict):
            raise ValueError(f"{op}: {name} must be a dict, got {type(d[name]).__name__}")
    for name, want in identity(settings, session).items():
        got = d["cache"].get(name)
        if got != want:
            raise ValueError(f"{op}: {name} must be {want!r}, got {got!r}")
    columns = d["columns"]
    if not isinstance(columns, list) or len(columns) != len(session.columns):
        raise ValueError(f"{op}: columns must list {len(session.columns)} numbers, got {columns!r}")
    columns = [require_int(op, f"columns[{i}]", c, 0) for i, c in enumerate(columns)]
    B = settings["batch"]
    mine: dict[str, Tensor] = {f"{i}.page": pool for i, pool in pools.items()}
    mine |= {f"{i}.seen": seen for i, seen in session.sliding_seen.items()}
    sliding = {
        f"{i}.{name}": min(columns[i], at.sliding_window - 1)
        for i, at in session.made()
        for name in (("keys", "values") if columns[i] else ())
    }
    wanted = mine.keys() | sliding.keys()
    missing, unknown = wanted - d["tensors"].keys(), d["tensors"].keys() - wanted
    if missing or unknown:
        raise ValueError(
            f"{op}: tensors missing: {sorted(missing)}, unknown: {sorted(unknown, key=str)}"
        )
    for name, x in mine.items():
        got = _values(op, name, d["tensors"][name])
        require_shape(op, name, got, list(x.shape))
        if got.dtype != x.dtype:
            raise ValueError(f"{op}: {name} must have dtype {x.dtype}, got {got.dtype}")
        if name.endswith(".seen") and bool((got < 0).any()):
            raise ValueError(f"{op}: {name} must be 0 or more, got {got.tolist()}")
    for i, layout in enumerate(layouts):
        if layout is not None:
            _check_pages(op, f"{i}.page", layout, d["tensors"][f"{i}.page"])
    for name, length in sliding.items():
        got = _values(op, name, d["tensors"][name])
        require_shape(op, name, got, [B, settings["kv_heads"], length, settings["head_dim"]])
        if not got.dtype.is_floating_point:
            raise ValueError(f"{op}: {name} must be floating point, got {got.dtype}")
    fed = _values(op, "fed", d["fed"])
    require_shape(op, "fed", fed, [B, 2])
    if fed.dtype != torch.int64:
        raise ValueError(f"{op}: fed must have dtype torch.int64, got {fed.dtype}")
    layers = [
        loaded_sliding(at, d["tensors"], i, columns[i], session.sliding_seen[i].device)
        for i, at in session.made()
    ]
    session.fed_tokens()  # allocated now, where it never was

    def put() -> None:
        for name, x in mine.items():
            x.copy_(d["tensors"][name])
        for put_layer in layers:
            put_layer()
        session.columns = columns
        session.load_fed(fed)

    return put


def _values(op: str, name: str, x: object) -> Tensor:
    """A tensor with values that lie in memory one by one.

    Raises:
        TypeError: It is none.
        ValueError: It has no values, or is sparse.
    """
    x = require_tensor(op, name, x)
    if x.device.type == "meta" or x.layout != torch.strided:
        raise ValueError(
            f"{op}: {name} must be a dense tensor with values, got {x.device} {x.layout}"
        )
    return x


def _check_pages(op: str, name: str, layout: PageLayout, pages: Tensor) -> None:
    """Refuse pages whose counts contradict each other; numbers of keys and values may be any.

    Raises:
        ValueError: They do.
    """
    # Pages of a snapshot may lie as they like; views want them aligned.
    for view in layout.views(pages.contiguous().clone()):
        seen, position = view.seen, view.slots.position
        if bool((seen < 0).any()):
            raise ValueError(f"{op}: {name} is damaged: tokens seen are {seen.tolist()}")
        if bool((view.share < 0).any()):  # NaN is what a row has that NaN has spoiled
            raise ValueError(f"{op}: {name} is damaged: shares of mass must be 0 or more")
        listed = position.sort(-1).values
        twice = (listed[..., 1:] == listed[..., :-1]) & (listed[..., 1:] >= 0)
        if bool(((position < -1) | (position >= seen[:, None, None])).any()) or bool(twice.any()):
            raise ValueError(
                f"{op}: {name} is damaged: positions must differ and be below the tokens seen"
            )
