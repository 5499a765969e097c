"""Serving under load: vLLM with bounded caches beside vLLM without; `python -m bench.serving`."""
