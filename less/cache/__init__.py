"""The cache: ``LessKVCache``, and ``PagedLayer``, one layer over pages that an engine owns."""

from less.cache.cache import LessKVCache
from less.cache.paged import PagedLayer

__all__ = ["LessKVCache", "PagedLayer"]
