"""transformers: a bounded cache under any model that is known to work, three lines, no patching.

    cache = less.hf.cache_for(model, policy=H2O(heavy=128, recent=128), sidekick=sidekick)
    with less.hf.attach(model, cache):
        model.generate(**inputs, past_key_values=cache)

Importing this package imports nothing of transformers; ``attach`` does.
"""

from less.cache.protocol import CacheProtocol
from less.hf.attaching import attach, cache_for
from less.hf.models import SUPPORTED, UnsupportedModelError

__all__ = ["SUPPORTED", "CacheProtocol", "UnsupportedModelError", "attach", "cache_for"]
