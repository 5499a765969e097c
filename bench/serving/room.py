"""Room: how many sequences of 8,192 tokens an engine holds at once in the same memory."""

from __future__ import annotations

import argparse
import gc
import json
import os
from typing import Any

TOKENS = 8192


def run(args: argparse.Namespace) -> None:
    """Print what vLLM's own cache manager says, with us and without."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    held = {}
    for name, less in (("vLLM", None), ("vLLM, less", json.loads(args.less))):
        held[name] = sequences(args, less)
        line = {"part": "room", "method": name, "memory_mib": args.memory, "tokens": TOKENS}
        print(json.dumps(line | held[name]), flush=True)
    ours, plain = held["vLLM, less"], held["vLLM"]
    print(
        f"{args.memory} MiB hold {plain['sequences']:.2f} sequences of {TOKENS} tokens, and "
        f"{ours['sequences']:.2f} with {args.less}: {ours['sequences'] / plain['sequences']:.1f}x; "
        f"{ours['bytes_each']:,} bytes each in place of {plain['bytes_each']:,}"
    )


def sequences(args: argparse.Namespace, less: Any) -> dict[str, Any]:
    """Sequences at once: the blocks of the engine, by those that one sequence takes."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    given: dict[str, Any] = {}
    if less is not None:
        given = {"attention_backend": "CUSTOM", "additional_config": {"less": less}}
    llm = LLM(
        args.model,
        dtype=args.dtype,
        enforce_eager=True,
        max_model_len=TOKENS,
        max_num_batched_tokens=TOKENS,
        enable_chunked_prefill=False,
        kv_cache_memory_bytes=args.memory << 20,
        **given,
    )
    core = llm.llm_engine.engine_core.engine_core
    cache, config = core.scheduler.kv_cache_config, llm.llm_engine.vllm_config
    each = sum(
        g.kv_cache_spec.max_num_blocks_per_req(config, TOKENS) for g in cache.kv_cache_groups
    )
    blocks = cache.num_blocks - 1  # one is for padding
    bytes_each = each * (args.memory << 20) // cache.num_blocks
    found = {"sequences": blocks / each, "bytes_each": bytes_each}
    llm.llm_engine.engine_core.shutdown()
    del llm, core, cache
    gc.collect()
    cleanup_dist_env_and_memory()
    return found
