"""Peers on the same work as ``less-kv report``, each in an environment of its own."""
