"""A storm: requests of random lengths on few pages, some cancelled, some clients gone.

Every answer that ends is compared with what the same server gives its prompt alone; pages and the
server's memory are counted before and after.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import time
from pathlib import Path
from typing import Any

import torch

from bench.serving.server import NAME, flags, metrics, serving
from less.config import LessConfig
from less.integrations.vllm.settings import Settings
from less.integrations.vllm.shape import facts_of, request_cache

LONGEST, NEW = 300, 24
PROMPTS = 40  # different ones
SEATS = 16


def run(args: argparse.Namespace) -> None:
    """Print what became of the requests; an error where a page is lost or a text is wrong."""
    given = [
        *("--dtype", args.dtype),
        *("--max-model-len", str(LONGEST + NEW)),
        *("--max-num-seqs", str(SEATS)),
        *("--max-num-batched-tokens", "1024"),
        *("--kv-cache-memory-bytes", str(pool_bytes(args))),
        "--no-enable-chunked-prefill",
        *flags(json.loads(args.less)),
    ]
    with serving(args.model, given, args.threads) as url:
        asyncio.run(storm(args, url))


async def storm(args: argparse.Namespace, url: str) -> None:
    """All requests, on one server."""
    import aiohttp
    from transformers import AutoConfig

    draw = random.Random(args.seed)
    vocabulary = AutoConfig.from_pretrained(args.model).vocab_size
    texts = [
        [draw.randrange(vocabulary) for _ in range(draw.choice((1, draw.randint(2, LONGEST))))]
        for _ in range(PROMPTS)
    ]
    counts = {"whole": 0, "cancelled": 0, "gone": 0, "wrong": 0}
    limits = {
        "connector": aiohttp.TCPConnector(limit=0),
        "timeout": aiohttp.ClientTimeout(total=3600),
    }
    async with aiohttp.ClientSession(**limits) as session:

        def ask(i: int, **more: Any) -> Any:
            asked = {"model": NAME, "prompt": texts[i], "max_tokens": NEW, "temperature": 0}
            asked |= {"ignore_eos": True, "return_token_ids": True, **more}
            return session.post(f"{url}/v1/completions", json=asked)

        async def whole(i: int) -> list[int]:
            async with ask(i) as reply:
                tokens: list[int] = (await reply.json())["choices"][0]["token_ids"]
                return tokens

        alone = [await whole(i) for i in range(PROMPTS)]
        resident, begun = [memory(url)], time.monotonic()

        async def one(n: int) -> None:
            i, fate = draw.randrange(PROMPTS), draw.random()
            await asyncio.sleep(draw.random() * args.requests * args.apart)
            if fate < 0.7:
                counts["whole"] += 1
                counts["wrong"] += await whole(i) != alone[i]
            elif fate < 0.85:  # waiting or not, it is cancelled
                counts["cancelled"] += 1
                task = asyncio.ensure_future(whole(i))
                await asyncio.wait([task], timeout=draw.random() * 2)
                task.cancel()
            else:  # the one who reads leaves
                counts["gone"] += 1
                left = draw.randint(1, NEW - 1)
                async with ask(i, stream=True) as reply:
                    async for line in reply.content:
                        left -= line.startswith(b"data:")
                        if left <= 0:
                            break
            if n % (args.requests // 5) == 0:
                resident.append(memory(url))

        await asyncio.gather(*(one(n) for n in range(args.requests)))
        for _ in range(100):
            seen = metrics(url)
            used = seen["vllm:kv_cache_usage_perc"]
            if used == seen["vllm:num_requests_running"] == seen["vllm:num_requests_waiting"] == 0:
                break
            await asyncio.sleep(0.1)
        counts["wrong"] += sum([await whole(i) != alone[i] for i in range(PROMPTS)])
        resident.append(memory(url))
    line = {"part": "storm", "requests": args.requests, "pages": args.pages, **counts}
    line |= {"pool_used_after": used, "preemptions": seen["vllm:num_preemptions_total"]}
    line |= {"resident_mib": resident, "seconds": round(time.monotonic() - begun, 1)}
    print(json.dumps(line), flush=True)
    if counts["wrong"] or used:
        raise SystemExit("bench.serving: a wrong text, or pages that were not given back")


def pool_bytes(args: argparse.Namespace) -> int:
    """Of a pool of ``args.pages`` pages and the one for padding."""
    from transformers import AutoConfig

    dtype = getattr(torch, args.dtype)
    facts = facts_of(AutoConfig.from_pretrained(args.model), dtype, torch.device("cpu"), (0, 1))
    cache = request_cache(facts, Settings(LessConfig.from_settings(json.loads(args.less))))
    return int((args.pages + 1) * sum(x.layout.nbytes for x in cache.held))


def memory(url: str) -> int:
    """MiB that the processes of a server have resident: those that share its session."""
    port = f":{url.rpartition(':')[2]}"
    total, session = 0, None
    processes = [p for p in Path("/proc").iterdir() if p.name.isdigit()]
    for process in processes:
        command = _read(process / "cmdline").replace("\0", " ")
        if f"--port {port[1:]}" in command:
            session = _read(process / "stat").rpartition(")")[2].split()[3]
    for process in processes:
        fields = _read(process / "stat").rpartition(")")[2].split()
        if fields and fields[3] == session:
            for line in _read(process / "status").splitlines():
                if line.startswith("VmRSS:"):
                    total += int(line.split()[1]) >> 10
    return total


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="ignore")
    except OSError:  # it has ended
        return ""
