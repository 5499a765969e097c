"""Parts of the heads, where a model's heads are dealt out to several processes."""

from __future__ import annotations

from typing import Any


def check_part(op: str, rank: int, world: int, q_heads: Any, kv_heads: Any) -> None:
    """Refuse a part that does not exist, or heads that cannot be dealt out evenly.

    Raises:
        ValueError: the message says which.
    """
    for name, x in (("rank", rank), ("world", world)):
        if isinstance(x, bool) or not isinstance(x, int):
            raise ValueError(f"{op}: {name} must be a whole number, got {x!r}")
    if not 0 <= rank < world:
        raise ValueError(f"{op}: rank must be in 0 .. world - 1, got rank {rank} of world {world}")
    for name, heads in (("q_heads", q_heads), ("kv_heads", kv_heads)):
        if world > 1 and (not isinstance(heads, int) or heads % world):
            raise ValueError(f"{op}: {name} must be a multiple of world = {world}, got {heads!r}")


def part_slice(heads: int, rank: int, world: int) -> slice:
    """Which of a tensor's first dim, the heads, are of a part."""
    return slice(rank * heads // world, (rank + 1) * heads // world)
