"""Load: requests per second, time to first token and between tokens, with us and without."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from contextlib import ExitStack
from statistics import median
from typing import Any

from bench.serving.server import client, flags, serving

CHUNK = 512


def engine_flags(args: argparse.Namespace, less: Mapping[str, Any] | None) -> list[str]:
    """The same for both but for what a bounded cache asks for."""
    longest = max(args.prompts) + args.new + 16
    given = [
        *("--dtype", args.dtype),
        *("--max-model-len", str(longest)),
        *("--max-num-seqs", str(args.requests)),
        *("--max-num-batched-tokens", str(args.requests * CHUNK)),
        *("--kv-cache-memory-bytes", str(args.memory << 20)),
        "--no-enable-prefix-caching",
    ]
    if less is not None:
        given += ["--long-prefill-token-threshold", str(CHUNK)]
    return given + flags(less)


def run(args: argparse.Namespace) -> None:
    """Print a table, and a JSON line for each row."""
    methods = {"vLLM": None, "vLLM, less": json.loads(args.less)}
    rows: dict[tuple[int, str], list[dict[str, Any]]] = {}
    with ExitStack() as stack:
        urls = {}
        for name, less in methods.items():
            urls[name] = stack.enter_context(
                serving(args.model, engine_flags(args, less), args.threads)
            )
            client(urls[name], args.model, requests=2, prompt=256, new=8, seed=0)
        for prompt in args.prompts:
            for i in range(args.rounds):
                for name, url in urls.items():
                    got = client(
                        url,
                        args.model,
                        requests=args.requests,
                        prompt=prompt,
                        new=args.new,
                        seed=i + 1,
                    )
                    rows.setdefault((prompt, name), []).append(got)
                    line = {"part": "load", "prompt": prompt, "method": name, "round": i}
                    line |= {x: got[x] for x in FIELDS}
                    print(json.dumps(line), flush=True)
    print(f"\n{'prompt':>7} {'':12}", *(f"{label:>13}" for label in FIELDS.values()))
    for (prompt, name), got in rows.items():
        print(f"{prompt:>7} {name:12}", *(f"{median(g[x] for g in got):>13.2f}" for x in FIELDS))
    for prompt in args.prompts:
        pairs = zip(rows[prompt, "vLLM, less"], rows[prompt, "vLLM"], strict=True)
        ratios = sorted(a["output_throughput"] / b["output_throughput"] for a, b in pairs)
        print(
            f"{prompt:>7} tokens/s with us to without, of rounds side by side: "
            f"{median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
        )


FIELDS = {
    "request_throughput": "requests/s",
    "output_throughput": "tokens/s",
    "median_ttft_ms": "first, ms",
    "median_tpot_ms": "between, ms",
}
