"""What vLLM loads of less before it is asked for: two names, and nothing of the package ``less``.

vLLM calls ``register`` in every process that it starts (entry point ``vllm.general_plugins``), also
where nobody asks for a bounded cache. So this module imports neither less nor torch.
"""

from __future__ import annotations

from typing import Any


def register() -> None:
    """Tell vLLM where the attention backend CUSTOM is; may run more than once in a process."""
    try:
        from vllm.platforms import current_platform
        from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
    except ImportError:  # another vLLM; less.integrations.vllm says which one is wanted
        return
    register_backend(AttentionBackendEnum.CUSTOM, "less.integrations.vllm.backend.LessBackend")
    if current_platform.is_cpu():
        # On CPUs, vLLM resolves the name CPU_ATTN whatever backend was asked for.
        register_backend(AttentionBackendEnum.CPU_ATTN, "less_vllm.CPUBackend")


def __getattr__(name: str) -> Any:
    if name != "CPUBackend":
        raise AttributeError(f"module 'less_vllm' has no attribute {name!r}")
    from vllm.config import get_current_vllm_config_or_none
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    config = get_current_vllm_config_or_none()
    asked = config.attention_config if config is not None else None
    custom = AttentionBackendEnum.CUSTOM
    if asked is not None and asked.backend == custom:
        from less.integrations.vllm.backend import LessBackend

        return LessBackend
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    return CPUAttentionBackend
