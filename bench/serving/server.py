"""A server of vLLM in a process of its own, and vLLM's own benchmark client."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NAME = "served"
_CLIENT = (
    "import json, sys\n"
    "from vllm.benchmarks.serve import add_cli_args, main\n"
    "from vllm.utils.argparse_utils import FlexibleArgumentParser\n"
    "parser = FlexibleArgumentParser()\n"
    "add_cli_args(parser)\n"
    "main(parser.parse_args(sys.argv[1:]))\n"
)


def environment(threads: int) -> dict[str, str]:
    """Of a server on a CPU that is not its own."""
    return {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
    }


def flags(less: Mapping[str, Any] | None) -> list[str]:
    """What asks for a bounded cache; nothing without settings."""
    if less is None:
        return []
    given = json.dumps({"less": dict(less)})
    return ["--attention-backend", "CUSTOM", "--additional-config", given]


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


@contextmanager
def serving(model: str, arguments: list[str], threads: int = 2, wait: int = 600) -> Iterator[str]:
    """A server that answers; yields its address.

    Raises:
        RuntimeError: It ended, or did not answer in ``wait`` seconds; the message has its log.
    """
    port = free_port()
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model]
    command += ["--served-model-name", NAME, "--port", str(port), *arguments]
    url = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryFile("w+") as log:
        server = subprocess.Popen(
            command,
            env=environment(threads),
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            end = time.monotonic() + wait
            while not _answers(url):
                if server.poll() is not None or time.monotonic() > end:
                    log.seek(0)
                    raise RuntimeError(f"bench.serving: no server: {log.read()[-4000:]}")
                time.sleep(1)
            yield url
        finally:
            os.killpg(server.pid, signal.SIGTERM)
            try:
                server.wait(60)
            except subprocess.TimeoutExpired:
                os.killpg(server.pid, signal.SIGKILL)
                server.wait()


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5) as reply:
            return int(reply.status) == 200
    except OSError:
        return False


def metrics(url: str) -> dict[str, float]:
    """The server's counters, by name without labels."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=60) as reply:
        lines = reply.read().decode().splitlines()
    found = {}
    for line in lines:
        if line.startswith("vllm:"):
            name, _, value = line.rpartition(" ")
            found[name.partition("{")[0]] = float(value)
    return found


def client(url: str, model: str, *, requests: int, prompt: int, new: int, seed: int) -> Any:
    """One run of vLLM's benchmark client, all requests at once; returns what it saves.

    Args:
        url: The server.
        model: Folder, whose tokenizer makes the prompts.
        requests: Their number.
        prompt: Tokens of each prompt, random.
        new: Tokens of each answer.
        seed: Of the prompts.

    Raises:
        RuntimeError: The client failed, or not every request was answered.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "result.json"
        arguments = {
            "backend": "openai",
            "base-url": url,
            "model": NAME,
            "tokenizer": model,
            "dataset-name": "random",
            "random-input-len": prompt,
            "random-output-len": new,
            "num-prompts": requests,
            "max-concurrency": requests,
            "seed": seed,
            "result-dir": folder,
            "result-filename": file.name,
            "percentile-metrics": "ttft,tpot",
        }
        command = [sys.executable, "-c", _CLIENT, "--ignore-eos", "--save-result", "--disable-tqdm"]
        command += [x for name, value in arguments.items() for x in (f"--{name}", str(value))]
        done = subprocess.run(
            command, env=environment(1), capture_output=True, text=True, check=False
        )
        if not file.exists():
            raise RuntimeError(f"bench.serving: the client failed: {done.stderr[-2000:]}")
        result = json.loads(file.read_text())
    if result["completed"] != requests or result["total_output_tokens"] != requests * new:
        raise RuntimeError(
            f"bench.serving: {result['completed']} of {requests} requests were answered, with "
            f"{result['total_output_tokens']} tokens"
        )
    return result
