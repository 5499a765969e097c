"""``less-kv info``: what was built, what is installed, what is shipped."""

from __future__ import annotations

import argparse
import importlib
from typing import Any


def add_parser(subparsers: Any) -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser("info", help="what was built, versions, shipped sidekicks")
    parser.add_argument("--json", action="store_true", help="as one JSON object")


def run(args: argparse.Namespace) -> int:
    """Print the facts."""
    import json

    facts = gather()
    if args.json:
        print(json.dumps(facts, indent=2, default=str))
        return 0
    for group, fields in facts.items():
        print(group)
        for name, value in fields.items():
            shown = ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else value
            print(f"  {name:<14} {'none' if shown in (None, '') else shown}")
    return 0


def gather() -> dict[str, dict[str, Any]]:
    """All facts, by group."""
    import torch

    from less.backend import ops
    from less.evaluate.machine import machine
    from less.sidekick import Sidekick, shipped, shipped_names

    missing = ops.missing(torch.device("cpu"))
    native: dict[str, Any] = {"backend": "native" if missing is None else f"reference: {missing}"}
    try:
        native |= importlib.import_module("less._C").build_facts()
    except ImportError as error:
        native["less._C"] = f"not built ({error})"
    sidekicks = {}
    for name in shipped_names():
        sidekick = Sidekick.from_pretrained(shipped(name))
        sidekicks[name] = (
            f"{sidekick.kind} maps, rank {sidekick.rank}, hidden {sidekick.hidden}, "
            f"{sidekick.layers} layers, {str(sidekick.dtype).removeprefix('torch.')}, "
            f"{sidekick.nbytes / 2**20:.1f} MiB"
        )
    return {"machine": machine(), "native code": native, "sidekicks": sidekicks or {"shipped": ""}}
