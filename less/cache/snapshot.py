"""Snapshots: what a cache holds as plain values, and back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from less._check import require_shape, require_tensor
from less.cache.session import load_sliding, sliding_tensors

if TYPE_CHECKING:
    from less.cache.cache import LessKVCache

FORMAT = 3


def identity(cache: LessKVCache) -> dict[str, Any]:
    """The settings that a cache must share to load a snapshot."""
    return {
        "format": FORMAT,
        "layers": cache.layers,
        "q_heads": cache.q_heads,
        "kv_heads": cache.kv_heads,
        "head_dim": cache.head_dim,
        "part": list(cache.part),  # a list, as JSON gives it back
        "batch": cache.batch,
        "dtype": str(cache.dtype),
        "scale": cache.scale,
        "softcap": cache.softcap,
        "policy": cache.policy_text(),
        "native": {
            # Names, not numbers: a snapshot may pass through JSON.
            str(i): None if at is None else at.sliding_window
            for i, at in cache.session.sliding.items()
        },
        "kind": cache.kind,
        "rank": cache.sidekick.rank if cache.sidekick is not None else 0,
    }


def save(cache: LessKVCache) -> dict[str, Any]:
    """``LessKVCache.state_dict``."""
    tensors = {f"{i}.page": pool.detach().clone() for i, pool in cache.pools.items()}
    for i, seen in cache.session.sliding_seen.items():
        tensors[f"{i}.seen"] = seen.clone()
    for i, at in cache.session.made():
        tensors |= {f"{i}.{n}": x.detach().clone() for n, x in sliding_tensors(at).items()}
    return {
        "cache": identity(cache),
        "columns": list(cache.session.columns),
        "fed": cache.session.fed_tokens().clone(),
        "tensors": tensors,
    }


def load(cache: LessKVCache, d: dict[str, Any]) -> None:
    """``LessKVCache.load_state_dict``.

    Raises:
        ValueError: The snapshot is of another kind of cache, incomplete or damaged; the message
            names what differs and the cache is as it was.
    """
    op = "load_state_dict"
    if not isinstance(d, dict) or not {"cache", "columns", "fed", "tensors"} <= d.keys():
        raise ValueError(f"{op}: d must be a result of LessKVCache.state_dict")
    session = cache.session
    if None in session.sliding.values():
        raise ValueError(
            f"{op}: the native layers {list(cache.native)} are made by less.hf.cache_for, or "
            "when the cache is attached; load the snapshot after that"
        )
    for name, want in identity(cache).items():
        got = d["cache"].get(name)
        if got != want:
            raise ValueError(f"{op}: {name} must be {want!r}, got {got!r}")
    columns = d["columns"]
    if not isinstance(columns, list) or len(columns) != cache.layers:
        raise ValueError(f"{op}: columns must list {cache.layers} numbers, got {columns!r}")
    columns = [int(c) for c in columns]
    mine: dict[str, Tensor] = {f"{i}.page": pool for i, pool in cache.pools.items()}
    mine |= {f"{i}.seen": seen for i, seen in session.sliding_seen.items()}
    sliding = {
        f"{i}.{name}": min(columns[i], at.sliding_window - 1)
        for i, at in session.made()
        for name in (("keys", "values") if columns[i] else ())
    }
    wanted = mine.keys() | sliding.keys()
    missing, unknown = wanted - d["tensors"].keys(), d["tensors"].keys() - wanted
    if missing or unknown:
        raise ValueError(f"{op}: tensors missing: {sorted(missing)}, unknown: {sorted(unknown)}")
    for name, x in mine.items():
        got = require_tensor(op, name, d["tensors"][name])
        require_shape(op, name, got, list(x.shape))
        if got.dtype != x.dtype:
            raise ValueError(f"{op}: {name} must have dtype {x.dtype}, got {got.dtype}")
    for name, length in sliding.items():
        got = require_tensor(op, name, d["tensors"][name])
        require_shape(op, name, got, [cache.batch, cache.kv_heads, length, cache.head_dim])
    fed = require_tensor(op, "fed", d["fed"])
    require_shape(op, "fed", fed, [cache.batch, 2])
    if fed.dtype != torch.int64:
        raise ValueError(f"{op}: fed must have dtype torch.int64, got {fed.dtype}")
    for name, x in mine.items():
        x.copy_(d["tensors"][name])
    for i, at in session.made():
        load_sliding(at, d["tensors"], i, columns[i], cache.device)
    session.columns = columns
    session.load_fed(fed)
