"""``less-kv matrix``: every kind of model against everything that a cache must do for it."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from less.cli import checks

if TYPE_CHECKING:
    from less.evaluate.matrix import Row


def add_parser(subparsers: Any) -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser(
        "matrix",
        help="what works with which model, tried out",
        description=(
            "Builds a tiny random model of every kind that is known here, with the transformers "
            "that is installed, and tries everything that a bounded cache must do for it. "
            "Exit status 1 where something fails."
        ),
    )
    parser.add_argument(
        "--only", action="append", metavar="MODEL", help="this model alone; may be repeated"
    )
    parser.add_argument("--backend", choices=("native", "reference"), help="of the caches")
    parser.add_argument("--markdown", action="store_true", help="as in docs/transformers.md")


def run(args: argparse.Namespace) -> int:
    """Run the cells and print the table; 1 where one fails."""
    from less.evaluate.families import FAMILIES, REFUSED

    known = [*FAMILIES, *REFUSED]
    unknown = set(args.only or ()) - set(known)
    if unknown:
        raise ValueError(
            f"--only must be one of {', '.join(known)}, got {', '.join(sorted(unknown))}"
        )
    checks.check_packages("less-kv matrix", {"transformers": "transformers"}, "hf")
    import torch

    from less.evaluate import matrix

    names = args.only or known
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the models are too small for more
    try:
        rows = []
        if not args.markdown:
            print(_head(matrix.CELLS))
        for name in names:
            works = name in FAMILIES
            row = matrix.run_family(name, args.backend) if works else matrix.run_refused(name)
            rows.append(row)
            if not args.markdown:
                print(_line(row, matrix.CELLS), flush=True)
    finally:
        torch.set_num_threads(threads)
    if args.markdown:
        print(matrix.as_markdown(rows))
    else:
        print(_summary(rows))
    return 0 if all(row.holds for row in rows) else 1


_NAME = 30  # columns of a model's name


def _head(cells: Any) -> str:
    return " " * _NAME + "  ".join(cells)


def _line(row: Row, cells: Any) -> str:
    if not row.cells:
        return f"{row.name:<{_NAME}}" + (
            f"refused: {row.refused}" if row.refused else "NOT REFUSED"
        )
    shown = (("pass" if row.cells[c] == "pass" else "FAILS").ljust(len(c)) for c in cells)
    return f"{row.name:<{_NAME}}" + "  ".join(shown)


def _summary(rows: list[Row]) -> str:
    lines = [
        f"{row.name}, {cell}: {text}"
        for row in rows
        for cell, text in row.cells.items()
        if text != "pass"
    ]
    works = sum(row.holds and bool(row.cells) for row in rows)
    refused = sum(row.holds and not row.cells for row in rows)
    fails = len(rows) - works - refused
    lines.append(
        f"{works} model{'s pass' if works != 1 else ' passes'} every cell, "
        f"{refused} {'are' if refused != 1 else 'is'} refused by name"
        + (f", {fails} FAIL" if fails else "")
    )
    return "\n".join(lines)
