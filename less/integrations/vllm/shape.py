"""A model as the cache sees it, from its config alone: vLLM's own model has no facts to read."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from less.cache import LessKVCache, PagedLayer
from less.hf.attaching import cache_of
from less.hf.models import ModelFacts, describe
from less.integrations.vllm.settings import Settings
from less.sidekick.parts import check_part


def facts_of(
    config: Any, dtype: torch.dtype, device: torch.device, part: tuple[int, int]
) -> ModelFacts:
    """What ``less.hf`` knows of a model, of the heads of one process.

    Args:
        config: Its transformers config.
        dtype: Of its activations, and so of slots unless the settings say otherwise.
        device: Where its layers run.
        part: Rank and world of tensor parallelism.

    Raises:
        UnsupportedModelError: The model cannot run on a bounded cache; the message says why.
        ValueError: Its heads cannot be dealt out evenly.
    """
    from transformers import AutoModelForCausalLM

    with _plain(torch.device("meta")):
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
        facts = describe(model.eval(), "less")
    rank, world = part
    check_part("less: tensor parallel", rank, world, facts.q_heads, facts.kv_heads)
    return dataclasses.replace(
        facts,
        q_heads=facts.q_heads // world,
        kv_heads=facts.kv_heads // world,
        dtype=dtype,
        device=device,
        part=part,
    )


def request_cache(facts: ModelFacts, settings: Settings) -> LessKVCache:
    """A cache of one row, whose layers are those of an engine: a request's page is its row's.

    Raises:
        ValueError: Settings and model do not go together, or a policy has no rule.
    """
    arguments = settings.config.arguments(facts)
    for policy in arguments["policy"]:
        if policy is not None and policy.rule is None:
            raise ValueError(
                f"less: policy {type(policy).__name__} has no rule that the kernels compute, and "
                "an engine's step waits for no Python; use H2O, SinkRecent or a policy with a rule"
            )
    with _plain(torch.device("cpu")):
        return cache_of(facts, backend=settings.backend, **arguments)


def layers_of(facts: ModelFacts, cache: LessKVCache) -> tuple[PagedLayer | None, ...]:
    """A cache's layers, as many as the model has. None: the layer slides."""
    held = iter(cache.held)
    return tuple(None if i in facts.windows else next(held) for i in range(facts.layers))


@contextmanager
def _plain(device: torch.device) -> Iterator[None]:
    """Undo what an engine sets while it builds its model: default dtype and device."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with device:
            yield
    finally:
        torch.set_default_dtype(before)
