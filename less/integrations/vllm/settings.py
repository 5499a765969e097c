"""What a user sets, and what of vLLM's own settings a bounded cache cannot go with.

Nothing here imports vLLM: its config is read by the names of its fields.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from less.config import LessConfig

_OWN = ("config", "backend", "any_chunks")
_COMMAND = '--additional-config \'{"less": {"tokens": 256}}\''


@dataclass(frozen=True)
class Settings:
    """The object ``less`` of vLLM's ``additional_config``, checked.

    Its names are those of ``LessConfig``, and::

        config       a folder with a less_config.json, in place of LessConfig's settings
        backend      "native" or "reference", as in LessKVCache
        any_chunks   true: accept that a prompt's chunks, and so texts, depend on traffic

    Attributes:
        config: The budget and the rest. ``bytes`` are those of one request, in this process.
        backend: As in ``LessKVCache``.
        chunk: Prompt tokens that are evicted from at once; 0: a step's.
    """

    config: LessConfig
    backend: str | None = None
    chunk: int = 0

    @classmethod
    def of(cls, vllm_config: Any) -> Settings:
        """Read and check them.

        Args:
            vllm_config: vLLM's ``VllmConfig``.

        Raises:
            ValueError: A setting is missing, unknown or wrong, or vLLM is set to do something
                that a bounded cache cannot; the message names it.
        """
        given = vllm_config.additional_config
        own = given.get("less") if isinstance(given, Mapping) else None
        if not isinstance(own, Mapping):
            raise ValueError(
                "less: additional_config must have 'less', an object with the settings of "
                f"LessConfig, as in {_COMMAND}; got {given!r}"
            )
        any_chunks = own.get("any_chunks", False)
        if not isinstance(any_chunks, bool):
            raise ValueError(f"less: any_chunks must be true or false, got {any_chunks!r}")
        config = _config(own, int(vllm_config.model_config.max_model_len))
        _check_engine(vllm_config)
        return cls(config, own.get("backend"), _chunk(vllm_config, any_chunks))


def _config(own: Mapping[str, Any], longest: int) -> LessConfig:
    """The ``LessConfig``, with room for vLLM's longest text in layers that keep every token."""
    rest = {name: value for name, value in own.items() if name not in _OWN}
    folder = own.get("config")
    if folder is not None:
        if rest or not isinstance(folder, str):
            raise ValueError(
                "less: config must be a folder, and then the settings are its; got "
                f"{folder!r} and {sorted(rest)}"
            )
        config = LessConfig.from_pretrained(folder)
    else:
        known = {f.name for f in dataclasses.fields(LessConfig)}
        unknown = sorted(rest.keys() - known)
        if unknown:
            raise ValueError(
                f"less: unknown settings {unknown}; there are {', '.join(sorted(known))} and "
                f"{', '.join(_OWN)}"
            )
        config = LessConfig.from_settings(rest)
    if config.share is not None:
        raise ValueError(
            "less: share is a part of one prompt, and pages are made before any; use tokens or "
            "bytes"
        )
    if config.full_layers and config.max_tokens is None:
        return dataclasses.replace(config, max_tokens=longest)
    if config.full_layers and (config.max_tokens or 0) < longest:
        raise ValueError(
            f"less: max_tokens must be {longest} or more, vLLM's max_model_len, for full_layers; "
            f"got {config.max_tokens}"
        )
    return config


def _check_engine(vllm_config: Any) -> None:
    """Refuse what a page per request cannot serve, by the name of vLLM's setting."""
    cache, parallel = vllm_config.cache_config, vllm_config.parallel_config
    refused = {
        "enable_prefix_caching": (
            cache.enable_prefix_caching and _on_command_line("--enable-prefix-caching"),
            "a page is one request's own, and no token of it is ever shared",
        ),
        "speculative_config": (
            vllm_config.speculative_config is not None,
            "a rejected draft has already evicted tokens",
        ),
        "kv_transfer_config": (
            vllm_config.kv_transfer_config is not None,
            "KV connectors move keys and values by token, and a page holds an evicted text",
        ),
        "kv_cache_dtype": (
            cache.cache_dtype != "auto",
            "the rows' format is a setting of less: rows",
        ),
        "kv_offloading_size": (
            cache.kv_offloading_size is not None,
            "pages have no blocks of tokens to offload",
        ),
        "kv_sharing_fast_prefill": (
            cache.kv_sharing_fast_prefill,
            "layers that share keys cannot evict each by itself",
        ),
        "pipeline_parallel_size": (
            parallel.pipeline_parallel_size > 1,
            "it is not tested; use tensor_parallel_size",
        ),
        "prefill_context_parallel_size": (
            parallel.prefill_context_parallel_size > 1,
            "the tokens of a text are evicted in one place",
        ),
        "decode_context_parallel_size": (
            parallel.decode_context_parallel_size > 1,
            "the tokens of a text are evicted in one place",
        ),
        "enable_dbo": (
            parallel.use_ubatching,
            "microbatches would build their steps in the same memory",
        ),
    }
    for name, (asked, why) in refused.items():
        if asked:
            raise ValueError(f"less: vLLM's {name} does not go with a bounded cache: {why}")


def _on_command_line(flag: str) -> bool:
    """Whether a server was started with a flag, whose value alone is as the default's.

    The processes that multiprocessing starts have their parent's command line. What a program asks
    of ``LLM`` cannot be seen.
    """
    return any(x.replace("_", "-") == flag for x in sys.argv[1:])


def _chunk(vllm_config: Any, any_chunks: bool) -> int:
    """Prompt tokens that are evicted from at once, where traffic does not decide it.

    What is evicted depends on where a prompt was cut, and vLLM cuts it where a step is full. Two
    settings leave a text to itself: prompts are never cut, or vLLM cuts at multiples of c alone,
    and what it passes at once is cut at each multiple of c here.
    """
    scheduler = vllm_config.scheduler_config
    c, requests = int(scheduler.long_prefill_token_threshold), int(scheduler.max_num_seqs)
    step = int(scheduler.max_num_batched_tokens)
    scheduled = scheduler.max_num_scheduled_tokens
    if scheduled is not None:
        step = min(step, int(scheduled))
    if not scheduler.enable_chunked_prefill and c == 0:
        return 0
    fixed = (
        scheduler.enable_chunked_prefill
        and c > 0
        and not scheduler.long_prefill_token_threshold_adaptive
        and step % c == 0
        and step >= requests * c
    )
    if fixed:
        return c
    if any_chunks:
        return 0
    c = c or 512
    raise ValueError(
        "less: a prompt is evicted from chunk by chunk, and with these settings of vLLM its chunks "
        "depend on traffic. Take --no-enable-chunked-prefill, which never cuts a prompt; or cut "
        f"all alike: --long-prefill-token-threshold {c} --max-num-seqs {requests} "
        f"--max-num-batched-tokens {requests * c} (a multiple of the first, and at least their "
        "product); or say any_chunks: true. Got enable_chunked_prefill="
        f"{scheduler.enable_chunked_prefill}, long_prefill_token_threshold="
        f"{scheduler.long_prefill_token_threshold}, max_num_seqs={requests}, "
        f"max_num_batched_tokens={step}"
    )
