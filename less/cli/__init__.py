"""The command ``less-kv``: one file per subcommand, imported only when it is called.

Each module has ``add_parser(subparsers)`` and ``run(args) -> int``.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

# name -> (module, what it does)
COMMANDS = {
    "demo": ("less.cli.demo", "a real model under a bounded cache: text, one table, one plot"),
    "train": ("less.cli.train", "train a sidekick for a model"),
    "calibrate": ("less.cli.calibrate", "measure a model's channels, for rows of few bits"),
    "evaluate": ("less.cli.evaluate", "the full measurement: several budgets, more text"),
    "report": ("less.cli.report", "tasks x methods x budgets x models: tables, plots, one page"),
    "bench": ("less.cli.bench", "speed and memory of your model on this machine, plotted"),
    "view": ("less.cli.view", "a text, each token coloured by where the cache has it, over time"),
    "lm-eval": ("less.cli.lm_eval", "tasks of lm-evaluation-harness, full cache against bounded"),
    "matrix": ("less.cli.matrix", "what works with which model, tried out"),
    "chat": ("less.cli.chat", "talk with a model on one bounded cache"),
    "doctor": ("less.cli.doctor", "what this installation can do here, and what to change"),
    "info": ("less.cli.info", "what was built, versions, what is shipped"),
}


# Commands whose work is worth a start of the program anew, to set how threads wait.
_COMPUTE = ("demo", "train", "calibrate", "evaluate", "report", "bench", "view", "lm-eval", "chat")
_IMPORT = "--import"


def command() -> int:
    """The program ``less-kv``: ``main`` with threads that sleep while they wait."""
    from less.cli.threads import wait_passively

    if _chosen(sys.argv[1:]) in _COMPUTE:
        wait_passively()
    return main()


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``less-kv``; returns the exit status: 0, 2 for a bad call, 130 when interrupted."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    chosen = _chosen(arguments)
    parser = argparse.ArgumentParser(
        prog="less-kv",
        description="A bounded KV cache that remembers what it evicts. (The pager is `less`.)",
        allow_abbrev=False,  # _chosen knows options by their whole names
    )
    parser.add_argument("--version", action="store_true", help="print the version and leave")
    parser.add_argument(
        _IMPORT, dest="imports", action="append", default=[], metavar="MODULE_OR_FILE.py",
        help="import policies of your own first; may be given several times, before the command",
    )  # fmt: skip
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND")
    for name, (module_name, summary) in COMMANDS.items():
        if name == chosen:
            module = importlib.import_module(module_name)
            module.add_parser(subparsers)
        else:
            subparsers.add_parser(name, help=summary)
    args = parser.parse_args(arguments)
    if args.version:
        from less._version import __version__

        print(f"less-kv {__version__}")
        return 0
    if args.command is None:
        parser.print_help()
        return 2
    return _run(args)


def _chosen(arguments: Sequence[str]) -> str | None:
    """The command among the arguments: the first that is neither an option nor its value."""
    words = iter(arguments)
    for word in words:
        if word == _IMPORT:
            next(words, None)
        elif not word.startswith("-"):
            return word
    return None


def _run(args: argparse.Namespace) -> int:
    module = importlib.import_module(COMMANDS[args.command][0])
    try:
        for name in args.imports:
            from less.policies import import_policies

            import_policies(_IMPORT, name)
        status: int = module.run(args)
    except KeyboardInterrupt:
        print(f"\nless-kv {args.command}: interrupted", file=sys.stderr)
        return 130
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        if os.environ.get("LESS_DEBUG"):
            raise
        print(f"less-kv {args.command}: error: {error}", file=sys.stderr)
        print("  (LESS_DEBUG=1 shows where)", file=sys.stderr)
        return 2
    return status
