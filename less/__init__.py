"""less: bounded KV caches that remember what they evict.

``LessKVCache`` keeps a fixed number of tokens per head and folds every evicted one into a small
low-rank state (LESS, arXiv:2402.09398). Importing ``less`` patches nothing; the transformers
integration is ``less.hf``.
"""

from less._version import __version__
from less.cache import LessKVCache, PagedLayer
from less.config import LessConfig
from less.layer import PageLayout
from less.policies import H2O, Candidates, Full, Policy, SinkRecent
from less.sidekick import Sidekick

__all__ = [
    "H2O",
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
