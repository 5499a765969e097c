"""less: bounded KV caches that remember what they evict.

``LessKVCache`` keeps a fixed number of tokens per head and folds every evicted one into a small
low-rank state (LESS, arXiv:2402.09398). Importing ``less`` patches nothing; the transformers
integration is ``less.hf``. What needs torch is imported when it is first asked for, so that the
command can refuse a bad call at once.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from less._version import __version__

if TYPE_CHECKING:
    from less.cache import LessKVCache, PagedLayer
    from less.calibration import Calibration
    from less.config import LessConfig
    from less.layer import PageLayout
    from less.policies import H2O, Candidates, Full, Policy, SinkRecent
    from less.sidekick import Sidekick

__all__ = [
    "H2O",
    "Calibration",
    "Candidates",
    "Full",
    "LessConfig",
    "LessKVCache",
    "PageLayout",
    "PagedLayer",
    "Policy",
    "Sidekick",
    "SinkRecent",
    "__version__",
]

_HOMES = {
    "LessKVCache": "less.cache",
    "PagedLayer": "less.cache",
    "Calibration": "less.calibration",
    "PageLayout": "less.layer",
    "LessConfig": "less.config",
    "H2O": "less.policies",
    "Candidates": "less.policies",
    "Full": "less.policies",
    "Policy": "less.policies",
    "SinkRecent": "less.policies",
    "Sidekick": "less.sidekick",
}
_MODULES = ("cache", "calibration", "config", "layer", "policies", "sidekick")  # and as attributes


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"less.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module 'less' has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_HOMES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES, *_MODULES})
