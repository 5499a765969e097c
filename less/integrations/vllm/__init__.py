"""vLLM: an attention backend whose memory per request is constant; docs/serving.md.

    vllm serve MODEL --attention-backend CUSTOM --additional-config '{"less": {"tokens": 256}}'

The plug-in's entry point is the module ``less_vllm``, which imports nothing from here until the
backend is asked for. ``settings``, ``shape`` and ``steps`` need no vLLM; ``backend`` and
``scheduler`` do.
"""

from __future__ import annotations

#: The minor version of vLLM whose interfaces ``backend`` is written against.
WANTED = "0.32"


def check_version(version: str) -> None:
    """Refuse another vLLM than the one that the backend was written for.

    Args:
        version: ``vllm.__version__``.

    Raises:
        RuntimeError: It is another minor version.
    """
    if version.split(".")[:2] != WANTED.split("."):
        raise RuntimeError(
            f"less: vllm must be {WANTED}.x, whose attention interface this backend is written "
            f"against, got {version}; pip install 'less-kv[vllm]' pins it"
        )
