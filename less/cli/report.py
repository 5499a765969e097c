"""``less-kv report``: what a bounded cache costs on a model, task by task, on one page."""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from less.cli import checks, measuring, threads
from less.files import write_whole

if TYPE_CHECKING:
    from rich.console import Console

    from less.evaluate.cells import Cell, Cells
    from less.evaluate.harness import Left, Model
    from less.evaluate.named import Budget, NamedMethod
    from less.evaluate.tasks.base import Given, Task

_NEEDED = {"transformers": "transformers", "rich": "rich", "plotly": "plotly"}
_METHODS = "full,sinks,h2o,less-paper,less,decayed-h2o,i8,k4v4,merge,best"


def add_parser(subparsers: Any) -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser(
        "report",
        help="tasks x methods x budgets x models: tables, plots, one page",
        description="Measure every task for every method at every budget on every model, and write "
        "results.jsonl, report.md and report.html. What is there already is never computed again, "
        "so a run that was killed goes on where it was. Needs pip install 'less-kv[report]'.",
    )
    add_common(parser, _METHODS, [1024], [1, 4], "less-report")
    parser.set_defaults(title="less-kv report")
    add = parser.add_argument
    add("--tasks", type=_names, metavar="NAME,…", help="of --list (default: all)")
    add(
        "--examples", type=measuring.positive, default=8, metavar="N",
        help="of each task at each length (default: %(default)s)",
    )  # fmt: skip
    add(
        "--together", type=measuring.positive, default=4, metavar="N",
        help="examples that are measured at once, whose scores a kill loses (default: %(default)s)",
    )  # fmt: skip
    add(
        "--steps", type=measuring.positive, default=256, metavar="N",
        help="tokens of the long generation (default: %(default)s)",
    )  # fmt: skip
    add(
        "--data", action="append", default=[], metavar="NAME=PATH",
        help="a text or data set of yours, or a local copy of a known one; may be repeated",
    )  # fmt: skip
    add(
        "--peers", action="append", default=[], type=Path, metavar="FILE",
        help="JSON lines of other implementations on the same examples, as python -m bench.peers "
        "writes them, for the tables; wants --together 1; may be repeated",
    )  # fmt: skip
    add("--list", action="store_true", help="list tasks and methods, and leave")


def add_common(
    parser: argparse.ArgumentParser,
    methods: str,
    lengths: Sequence[int],
    batches: Sequence[int],
    out: str,
) -> None:
    """Add the arguments that ``report`` and ``bench`` have, with a command's own defaults."""
    add = parser.add_argument
    add(
        "--model", action="append", metavar="NAME",
        help="'smollm2' (default), a local folder, or a name on the hub; may be repeated",
    )  # fmt: skip
    add(
        "--methods", type=_names, default=methods.split(","), metavar="NAME,…",
        help=f"of less-kv report --list (default: {methods})",
    )  # fmt: skip
    add(
        "--method", action="append", default=[], metavar="NAME=CONFIG",
        help="a method of your own: a folder with a less_config.json, or settings of LessConfig "
        "as JSON, without a budget; may be repeated",
    )  # fmt: skip
    add(
        "--budgets", type=_names, default=["5%", "12.5%"], metavar="C,…",
        help="bytes of so many 16-bit tokens per head, or a share of the text's: 64 or 5%% "
        "(default: 5%%,12.5%%)",
    )  # fmt: skip
    add(
        "--lengths", type=_numbers, default=list(lengths), metavar="N,…",
        help=f"tokens of an example (default: {','.join(map(str, lengths))})",
    )  # fmt: skip
    add(
        "--batches", type=_numbers, default=list(batches), metavar="B,…",
        help=f"batch sizes of the speed (default: {','.join(map(str, batches))})",
    )  # fmt: skip
    add(
        "--minutes", type=_minutes, metavar="N",
        help="stop in time, and say what is left out; 0 writes the report of what is there",
    )  # fmt: skip
    add(
        "--sidekick", metavar="PATH",
        help="of the method less (default: the shipped one that fits the model)",
    )  # fmt: skip
    add(
        "--calibration", action="append", default=[], metavar="FOLDER",
        help="of less-kv calibrate, for the method best; may be repeated, one for each model",
    )  # fmt: skip
    add("--out", type=Path, default=Path(out), help="default: ./%(default)s")
    measuring.add_model_dtype(parser)
    add("--threads", type=measuring.positive, help=threads.DEFAULT)


def _names(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _numbers(text: str) -> list[int]:
    return sorted({measuring.positive(part) for part in text.split(",")})


def _minutes(text: str) -> float:
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be 0 or more, got {value}")
    return value


def run(args: argparse.Namespace) -> int:
    """Measure and write; 1 where a task failed."""
    checks.check_packages(args.title, _NEEDED, "report")
    checks.check_folder("--out", args.out)
    data = _data(args.data)
    for folder in args.calibration:
        checks.check_calibration(folder)
    from less.evaluate.cells import Cells
    from less.evaluate.harness import Left
    from less.evaluate.machine import machine
    from less.evaluate.named import Budget, built_in, own_method
    from less.evaluate.tasks import all_tasks, chosen
    from less.evaluate.tasks.base import Given

    given = Given(None, args.lengths, args.examples, data, args.steps, args.batches, args.together)
    known = all_tasks(given)
    if args.list:
        _list(known, built_in())
        return 0
    tasks = chosen(known, args.tasks) if args.tasks else known
    budgets = [Budget(text) for text in args.budgets]
    own = dict(own_method(text) for text in args.method)
    console = measuring.console_for()
    threads.set_threads(args, console)
    others = [cell for file in _peers(args) for cell in Cells(file).known.values()]
    args.out.mkdir(parents=True, exist_ok=True)
    cells = Cells(args.out / "results.jsonl")
    facts = {**machine(), "model_dtype": args.model_dtype}
    cells.add([{"kind": "run", "command": _command(args), **facts}])
    report = _Report(args, console, cells, others, tasks, facts)
    end = None if args.minutes is None else time.monotonic() + 60 * args.minutes
    names = args.model or ["smollm2"]
    try:
        for i, name in enumerate(names):
            left = Left()
            seconds = None if end is None else (end - time.monotonic()) / (len(names) - i)
            report.measure(name, given, budgets, own, left, seconds)
    finally:  # a run that is interrupted leaves a report of what it has
        report.write()
    return 1 if report.failed else 0


def _peers(args: argparse.Namespace) -> list[Path]:
    files = [file.expanduser() for file in getattr(args, "peers", ())]
    for file in files:
        if not file.is_file():
            raise ValueError(f"--peers {file}: there is no such file")
    return files


def _data(named: Sequence[str]) -> dict[str, Path]:
    found = {}
    for text in named:
        name, _, path = text.partition("=")
        if not name or not path:
            raise ValueError(f"--data must be NAME=PATH, got {text!r}")
        found[name] = Path(path).expanduser()
        if not found[name].exists():
            raise ValueError(f"--data {text}: {path} does not exist")
    return found


def _list(tasks: Sequence[Task], methods: dict[str, str]) -> None:
    for title, rows in (("tasks", {t.name: t.about for t in tasks}), ("methods", methods)):
        print(f"{title}:")
        for name, about in rows.items():
            print(f"  {name:<28}{about}")


def _command(args: argparse.Namespace) -> str:
    """What was asked for, without paths."""
    shown = [f"--model {Path(name).name}" for name in args.model or ()]
    shown += [f"--{name} {','.join(args_of)}" for name, args_of in (
        ("tasks", args.tasks or ()), ("budgets", args.budgets), ("lengths", map(str, args.lengths)),
    ) if args_of]  # fmt: skip
    shown.append(f"--examples {args.examples} --model-dtype {args.model_dtype}")
    if args.minutes is not None:
        shown.append(f"--minutes {args.minutes:g}")
    return " ".join([args.title, *shown])


class _Report:
    """The report as it grows, model by model."""

    def __init__(
        self,
        args: argparse.Namespace,
        console: Console,
        cells: Cells,
        others: Sequence[Cell],
        tasks: Sequence[Task],
        facts: dict[str, Any],
    ) -> None:
        self.args, self.console, self.cells, self.others = args, console, cells, others
        self.tasks, self.facts = tasks, facts
        self.keys: set[str] = set()
        self.left: list[tuple[str, Left, dict[str, str]]] = []

    @property
    def failed(self) -> bool:
        """Whether a task met an error that nobody expected."""
        return any(left.failed for _, left, _ in self.left)

    def measure(
        self,
        name: str,
        given: Given,
        budgets: Sequence[Budget],
        own: dict[str, Any],
        left: Left,
        seconds: float | None,
    ) -> None:
        """Measure one model; one that cannot be had is noted, and the next one's turn comes."""
        from dataclasses import replace

        from less.evaluate import harness
        from less.evaluate.sources import AssetError

        begin = time.monotonic()
        missing: dict[str, str] = {}
        self.left.append((name, left, missing))
        try:
            model, tokenizer, methods, without = self._found(name, own)
        except AssetError as error:
            left.tasks[f"model {Path(name).name}"] = str(error)
            self.console.print(f"  {error}", markup=False)
            return
        missing |= without
        given = replace(given, tokenizer=tokenizer)
        units = harness.plan(model, self.tasks, given, methods, budgets, left)
        self.keys |= {key for unit in units for key in unit.keys.values()}
        todo = sum(len(harness.pending(unit, self.cells)) for unit in units)
        total = sum(len(unit.keys) for unit in units)
        self.console.print(
            f"  {model.name}: {len(units)} units, {total} cells, {total - todo} of them known"
        )
        spent = time.monotonic() - begin
        clock = harness.Clock(None if seconds is None else max(0.0, seconds - spent))

        def say(words: str, done: int, of: int, rest: float | None) -> None:
            time_left = "" if rest is None else f", about {max(1, round(rest / 60))} min left"
            self.console.print(f"  [{done + 1}/{of}] {words}{time_left}", markup=False)

        if self.args.minutes == 0:
            for unit in units:
                if harness.pending(unit, self.cells):
                    left.units[unit.task.name] = left.units.get(unit.task.name, 0) + 1
            return
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always", UserWarning)
            try:
                harness.measure(model, units, self.cells, left, clock, say)
            finally:
                left.warned += dict.fromkeys(str(one.message) for one in said)

    def _found(
        self, name: str, own: dict[str, Any]
    ) -> tuple[Model, Any, list[NamedMethod], dict[str, str]]:
        """A model with its weights, its tokenizer, and the methods that there are for it."""
        import torch

        from less.cli import rows
        from less.evaluate import assets, sources
        from less.evaluate.harness import Model
        from less.evaluate.named import methods_for

        found = assets.find_model(name)
        sidekick, paper = measuring.sidekicks_for(self.args.sidekick, found.config)
        calibration = None
        for folder in self.args.calibration:
            try:
                calibration = rows.read_calibration(folder, found.config)
            except ValueError:
                if len(self.args.calibration) == 1 == len(self.args.model or [name]):
                    raise
        names = [*self.args.methods, *(n for n in own if n not in self.args.methods)]
        methods, without = methods_for(names, sidekick, paper, calibration, own)
        loaded = found.load(getattr(torch, self.args.model_dtype))
        text = found.config.get_text_config()
        shown = sources.shown(name)
        longest = getattr(text, "max_position_embeddings", None)
        return Model(shown, loaded, longest), found.tokenizer, methods, without

    def write(self) -> None:
        """``report.md`` and ``report.html`` of all cells that were asked for and are there."""
        from less.evaluate import html_report, sections
        from less.evaluate.machine import in_words
        from less.evaluate.outcome import joined, tables

        mine = [c for k, c in self.cells.known.items() if k in self.keys]
        whole = joined(mine, self.others)
        if self.others and len(whole) == len(mine):
            print(
                f"{self.args.title}: --peers: no line is of an example of this report; measure "
                "the same model, tasks and lengths, one example at once (--together 1)",
                file=sys.stderr,
            )
        found = tables(whole, self.tasks)
        parts = [sections.section(table) for table in found]
        claims = sections.claims(found)
        parts += [claims] if claims else []
        for name, left, missing in self.left:
            gone = sections.left_out(left, missing)
            if gone is not None:
                parts.append(_titled(gone, f"{gone.title}, {Path(name).name}"))
        lines = [
            f"Model in {self.args.model_dtype}; {in_words(self.facts)}. `{_command(self.args)}`.",
            "Every bounded method gets the bytes of the same number of 16-bit tokens per head "
            "(budget): slots, state and headers, and means and scales as if for one sequence; "
            "a sidekick's maps come on top. What sequences share is in shared. ± is one standard "
            "error over examples; losses are paired. recovered: the share of H2O's loss at the "
            "same budget that is won back, of the first figure, in nats where it is a perplexity.",
        ]
        title = self.args.title
        markdown = sections.markdown(title, [*lines], parts)
        write_whole(self.args.out / "report.md", markdown)
        page = html_report.page(title, lines, parts, html_report.figures(found))
        write_whole(self.args.out / "report.html", page)
        self.console.print(f"written: {self.args.out}/report.md, report.html, results.jsonl")
        for _, left, _ in self.left:
            for task, why in left.failed.items():
                print(f"{self.args.title}: {task} failed: {why}", file=sys.stderr)


def _titled(section: Any, title: str) -> Any:
    from dataclasses import replace

    return replace(section, title=title)
