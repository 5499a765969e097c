"""``less-kv info``: the facts of ``less-kv doctor``, without its self-test and measurements."""

from __future__ import annotations

import argparse
from typing import Any

from less.cli.doctor import gather, show


def add_parser(subparsers: Any) -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser("info", help="what was built, versions, what is shipped")
    parser.add_argument("--json", action="store_true", help="as one JSON object")


def run(args: argparse.Namespace) -> int:
    """Print the facts."""
    import json

    facts = gather()
    if args.json:
        print(json.dumps(facts, indent=2, default=str))
    else:
        show(facts)
    return 0
