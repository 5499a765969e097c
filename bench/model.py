"""A real model's decode step end to end: LESS at 5 % of a 4,096-token context, and a full cache."""

from __future__ import annotations

import time
from typing import Any

import torch

from bench.interleave import Contender, interleave

CONTEXT = 4096
KEPT = 205
# What attention and cache are made of, by the profiler's names; the rest of a step is the model.
ATTENTION = {
    "full": ("aten::scaled_dot_product_attention", "aten::cat"),
    "less": ("less::decode_step",),
}


def measure(context: int = CONTEXT, kept: int = KEPT, turns: int = 12) -> list[dict[str, Any]]:
    """Decode with SmolLM2-135M-Instruct, the caches taking turns.

    Args:
        context: Tokens of the prompt, a real text.
        kept: Tokens that LESS keeps per head.
        turns: Decode steps of each cache.

    Returns:
        A record per cache: seconds a step, and the share of it in attention and cache.

    Raises:
        AssetError: Model or text are not installed.
    """
    from transformers import DynamicCache

    from less import H2O, Sidekick
    from less.evaluate.assets import chunks, load_model, wikipedia_articles
    from less.hf import attach, cache_for
    from less.sidekick import shipped

    model, tokenizer = load_model()
    prompt = chunks(tokenizer, wikipedia_articles(), context, 1)
    sidekick = Sidekick.from_pretrained(shipped("smollm2-135m-instruct")).to(torch.float16)
    policy = H2O(heavy=kept - kept // 2, recent=kept // 2, decay=0.98)
    bounded = cache_for(model, policy, sidekick, dtype=torch.float16)
    full = DynamicCache()
    token = prompt[:, :1]

    def with_less(_: int) -> None:
        with attach(model, bounded):
            model(token, past_key_values=bounded)

    def with_full(_: int) -> None:
        model(token, past_key_values=full)

    with torch.inference_mode():
        for part in prompt.split(512, 1):
            model(part, past_key_values=full, logits_to_keep=1)
            with attach(model, bounded):
                model(part, past_key_values=bounded, logits_to_keep=1)
        contenders = [Contender("less", with_less, 1), Contender("full", with_full, 1)]
        interleave(contenders, 0.0, least=turns)
        shares = {each.name: _attention_share(each) for each in contenders}
    return [
        {
            "part": "model", "contender": each.name, "context": context, "kept": kept,
            "threads": torch.get_num_threads(), "best": each.best, "median": each.median,
            "attention": shares[each.name],
        }
        for each in contenders
    ]  # fmt: skip


def _attention_share(contender: Contender, steps: int = 4) -> float:
    """Part of a step's time that the profiler finds in attention and cache."""
    with torch.profiler.profile() as profile:
        start = time.perf_counter()
        for i in range(steps):
            contender.run(i)
        passed = time.perf_counter() - start
    names = ATTENTION[contender.name]
    inside = sum(e.cpu_time_total for e in profile.key_averages() if e.key in names)
    return inside * 1e-6 / passed
