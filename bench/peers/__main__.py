"""kvpress on the blocks of ``less-kv report``: ``python -m bench.peers --out FOLDER``.

kvpress pins transformers below 5.3, so it has an environment of its own, made in ``--venv`` where
there is none. This process writes the blocks of tasks that have a context and a question into
``--out``; ``kvpress_lines.py`` runs there, on the same tokens at the same shares, and writes cells
as ``less-kv report`` does into ``kvpress.jsonl``, which its ``--peers`` puts into its tables.

A press compresses the context once, before the question is known; question and answer then come
token by token, and nothing leaves any more. Bytes are those of the keys and values that are left.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import venv
from collections.abc import Sequence
from pathlib import Path

from less.evaluate.assets import find_model
from less.evaluate.sources import shown
from less.evaluate.tasks import all_tasks, chosen
from less.evaluate.tasks.asking import Asking
from less.evaluate.tasks.base import Given

PINS = ("torch==2.13.0", "kvpress==0.5.5")
PRESSES = ["StreamingLLMPress", "SnapKVPress", "ExpectedAttentionPress"]
RUNNER = Path(__file__).with_name("kvpress_lines.py")


def options(words: Sequence[str] | None) -> argparse.Namespace:
    """What the command line asks for."""
    parser = argparse.ArgumentParser(prog="python -m bench.peers", description=__doc__)
    add = parser.add_argument
    add("--model", default="smollm2", help="smollm2, or a folder")
    add("--tasks", default="needle,multikey,variables,passkey")
    add("--lengths", type=int, nargs="+", default=[1024])
    add("--examples", type=int, default=8)
    add("--shares", type=float, nargs="+", default=[0.05, 0.125], help="of the context, kept")
    add(
        "--presses",
        nargs="+",
        default=PRESSES,
    )
    add("--data", action="append", default=[], metavar="NAME=PATH")
    add("--out", type=Path, required=True)
    add("--venv", type=Path, default=Path("build/kvpress"))
    return parser.parse_args(words)


def blocks(args: argparse.Namespace, tokenizer: object) -> list[dict[str, object]]:
    """The tasks' examples one by one, as plain numbers."""
    data = {name: Path(path) for name, _, path in (x.partition("=") for x in args.data)}
    given = Given(tokenizer, args.lengths, args.examples, data, together=1)
    found: list[dict[str, object]] = []
    for task in chosen(all_tasks(given), args.tasks.split(",")):
        if not isinstance(task, Asking):
            raise ValueError(f"--tasks must have a context and a question, {task.name} has none")
        for length in args.lengths:
            for index, block in enumerate(task.blocks(given, length)):
                found.append(
                    {
                        "task": task.name,
                        "length": length,
                        "index": index,
                        "block": block.digest,
                        "ids": block.content["ids"][0].tolist(),
                        "asked": block.content["asked"][0].tolist(),
                        "context": block.content["context"],
                    }
                )
    return found


def environment(folder: Path) -> Path:
    """The interpreter of the environment that has kvpress; made where there is none."""
    python = folder / "bin" / "python"
    if not (folder / "made").exists():
        venv.create(folder, with_pip=True)
        subprocess.run([python, "-m", "pip", "install", "-q", *PINS], check=True)
        (folder / "made").touch()
    return python


def main(words: Sequence[str] | None = None) -> int:
    """Write the blocks, and run the presses on them."""
    args = options(words)
    found = find_model(args.model)
    args.out.mkdir(parents=True, exist_ok=True)
    work = {"blocks": blocks(args, found.tokenizer), "shares": args.shares, "presses": args.presses}
    (args.out / "blocks.json").write_text(json.dumps(work), encoding="utf-8")
    python = environment(args.venv)
    name = shown(args.model)
    return subprocess.run([python, RUNNER, found.source, args.out, name]).returncode


if __name__ == "__main__":
    sys.exit(main())
