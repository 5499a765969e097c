"""``less-kv bench``: speed and memory of a user's own model on a user's own machine."""

from __future__ import annotations

import argparse
from typing import Any

from less.cli import report


def add_parser(subparsers: Any) -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser(
        "bench",
        help="speed and memory of your model on this machine, plotted",
        description="Tokens per second, seconds until the first token and peak memory against "
        "context length and batch, full cache against bounded ones that take turns; tables and "
        "plots as of less-kv report, whose task 'speed' this is.",
    )
    report.add_common(parser, "full,h2o,merge,best", [1024, 4096], [1, 4, 16], "less-bench")
    parser.set_defaults(
        title="less-kv bench", tasks=["speed"], examples=1, together=1, steps=1, data=[], list=False
    )


def run(args: argparse.Namespace) -> int:
    """Measure and write; 1 where a size failed."""
    return report.run(args)
