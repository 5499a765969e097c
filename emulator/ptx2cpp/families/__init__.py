"""The translation of each instruction: base name to a function that writes its C++."""

from __future__ import annotations

from . import arithmetic, control, convert, memory, synchronise, warp
from .registry import FAMILIES

__all__ = ["FAMILIES", "arithmetic", "control", "convert", "memory", "synchronise", "warp"]
