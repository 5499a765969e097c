"""Measurements on real models: perplexity, copying, speed, bytes; and the report they end in."""
