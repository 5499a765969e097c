"""``less-kv lm-eval``: tasks of lm-evaluation-harness under full cache, eviction and LESS."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from less.cli import checks, measuring, rows, threads
from less.files import write_whole

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

    from less import Calibration, LessConfig
    from less.evaluate.methods import Method
    from less.policies import Policy

_TRAINED = "trained"


def add_parser(subparsers: Any) -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser(
        "lm-eval",
        help="tasks of lm-evaluation-harness: full cache, eviction and LESS in one table",
        description="Run tasks of lm-evaluation-harness three times: under a full cache, under "
        "H2O, and under LESS, each request through the real cache, token by token. Needs pip "
        "install 'less-kv[eval]'. The harness's own command line, for every other setting: python "
        "-m less.integrations.lm_eval run --model less-kv ...",
    )
    measuring.add_model(parser, rows.one)
    parser.add_argument("--tasks", required=True, metavar="NAME,…", help="the harness's names")
    parser.add_argument(
        "--include-path", type=Path, metavar="FOLDER",
        help="folder of task files; then the harness's own tasks are left out",
    )  # fmt: skip
    parser.add_argument(
        "--budget", type=measuring.positive, default=64, metavar="C",
        help="tokens kept per head (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--policy", default=_TRAINED, metavar="NAME_OR_JSON",
        help="of LESS: h2o, sinks, trained (the sidekick's own), or any policy's name and settings "
        "as JSON, which is brought to the budget (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--chunk", type=measuring.positive, default=1, metavar="T",
        help="tokens per step once something is evicted; 1 is exact, more is faster "
        "(default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--batch-size", type=measuring.positive, default=8, metavar="B")
    parser.add_argument("--limit", type=measuring.positive, metavar="N", help="documents per task")
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write the results as JSON")


def run(args: argparse.Namespace) -> int:
    """Evaluate and print the table."""
    needed = {"lm_eval": "lm_eval==0.4.13", "rich": "rich"}
    checks.check_packages("less-kv lm-eval", needed, "eval")
    from less.evaluate import sources

    if args.out is not None:
        checks.check_file("--out", args.out)
    sources.check_model_name(args.model)
    rows.check(args)
    policy = _policy(args.policy, args.budget)
    names = args.tasks.split(",")
    tasks = _tasks(names, args.include_path)
    checks.check_sidekick(args.sidekick)
    import torch
    from lm_eval import simple_evaluate

    from less.evaluate import assets
    from less.hf.models import describe

    console = measuring.console_for()
    threads.set_threads(args, console)
    found = assets.find_model(args.model)
    skeleton = found.skeleton()
    describe(skeleton, f"--model {args.model}")
    methods = _methods(args, found.config, policy)
    calibration = rows.read_calibration(args.calibration, found.config)
    for method in methods:
        if method.policy is not None:
            _config(method, args).policies(skeleton, sidekick=method.sidekick)
    model, tokenizer = found.load(getattr(torch, args.model_dtype)), found.tokenizer
    results = {}
    for method in methods:
        start = time.monotonic()
        done = simple_evaluate(
            _language_model(method, args, model, tokenizer, calibration),
            tasks=names,
            task_manager=tasks,
            limit=args.limit,
            log_samples=False,
        )
        results[method.name] = done["results"]
        console.print(f"  {method.name}: done in {time.monotonic() - start:.0f} s")
    stored = args.rows or args.dtype
    title = f"{args.budget} tokens kept per head in {stored}, model in {args.model_dtype}"
    console.print(_table(results, title))
    if args.out is not None:
        write_whole(args.out, json.dumps(results, indent=2, default=str) + "\n")
    return 0


def _tasks(names: list[str], include_path: Path | None) -> TaskManager:
    """The harness's tasks, among which are all of `names`.

    Raises:
        ValueError: One is not; or the folder of task files is none.
    """
    if include_path is not None and not include_path.is_dir():
        raise ValueError(f"--include-path {include_path} is not a folder")
    folder = include_path
    if folder is None:
        spec = importlib.util.find_spec("lm_eval")
        assert spec is not None
        assert spec.origin is not None
        folder = Path(spec.origin).parent / "tasks"
    where = "in its tasks" if include_path is None else f"in {include_path}"
    _refuse(_not_named(names, folder), where)  # in a second; the harness's index takes ten

    from lm_eval.tasks import TaskManager

    tasks = TaskManager(
        include_path=None if include_path is None else str(include_path),
        include_defaults=include_path is None,
    )
    _refuse([name for name in names if not _is_path(name) and not tasks.match_tasks([name])], where)
    return tasks


def _refuse(unknown: list[str], where: str) -> None:
    if unknown:
        raise ValueError(f"--tasks: the harness knows no {', '.join(map(repr, unknown))} {where}")


def _not_named(names: list[str], folder: Path) -> list[str]:
    """The names that stand in no file of a folder as a word of its own; no patterns, no paths."""
    wanted = {
        name: re.compile(rb"(?<![\w-])" + re.escape(name.encode()) + rb"(?![\w-])")
        for name in names
        if not (_is_path(name) or set(name) & set("*?["))
    }
    for here, _, files in os.walk(folder):
        for file in files:
            if wanted and file.endswith((".yaml", ".py")):
                content = Path(here, file).read_bytes()
                wanted = {n: word for n, word in wanted.items() if not word.search(content)}
    return sorted(wanted)


def _is_path(name: str) -> bool:
    return name.endswith(".yaml") or "/" in name


def _policy(given: str, budget: int) -> Policy | None:
    """The policy of ``--policy`` at the budget; None for the sidekick's own.

    Raises:
        ValueError: no policy is named so, or it has no place in the budget.
    """
    if given == _TRAINED:
        return None
    from less.policies import policy_from_text
    from less.policies.base import checked_at_capacity

    policy = policy_from_text("--policy", given, [_TRAINED])
    if not policy.evicts:
        raise ValueError(f"--policy {given}: it keeps every token, as the full cache does")
    return checked_at_capacity(policy, budget)


def _methods(args: argparse.Namespace, model: Any, policy: Policy | None) -> list[Method]:
    """Full cache, H2O and, where a sidekick fits, a policy without it and with it.

    The policy is the one that is given, else the sidekick's; without a sidekick, the default.
    """
    from less import H2O
    from less.config import default_policy, trained_policy
    from less.evaluate.methods import BASELINE, FULL, Method, rule_name

    recent = args.budget // 2
    plain = H2O(heavy=args.budget - recent, recent=recent)
    methods = [FULL, Method(BASELINE, plain)]
    sidekick, _ = measuring.sidekicks_for(args.sidekick, model)
    if sidekick is None:
        rule = policy or default_policy(args.budget)
    else:
        rule = policy or trained_policy(sidekick, args.budget) or plain
    if rule != plain:
        name = rule_name(rule)
        taken = ("LESS", *(method.name for method in methods))
        methods.append(Method(str(rule) if name in taken else name, rule))
    return methods if sidekick is None else [*methods, Method("LESS", rule, sidekick)]


def _config(method: Method, args: argparse.Namespace) -> LessConfig:
    """Of a bounded method's cache."""
    from less.config import LessConfig

    return LessConfig(tokens=args.budget, policy=method.policy, **rows.settings(args))


def _language_model(
    method: Method,
    args: argparse.Namespace,
    model: Any,
    tokenizer: Any,
    calibration: Calibration | None,
) -> Any:
    from lm_eval.models.huggingface import HFLM

    from less.integrations.lm_eval import LessLM

    common = {"tokenizer": tokenizer, "batch_size": args.batch_size}
    if method.policy is None:
        return HFLM(model, **common)
    return LessLM(
        model,
        config=_config(method, args),
        sidekick=method.sidekick,
        calibration=calibration,
        chunk=args.chunk,
        **common,
    )


def _table(results: dict[str, dict[str, dict[str, Any]]], title: str) -> Any:
    """A row for each task and metric, a column for each method."""
    from rich.table import Table

    table = Table("task", "metric", title=title, title_justify="left")
    for name in results:
        table.add_column(name, justify="right")
    first = next(iter(results.values()))
    for task, figures in first.items():
        for key, value in figures.items():
            metric, _, kind = key.partition(",")
            if not kind or metric.endswith("_stderr") or not isinstance(value, (int, float)):
                continue
            cells = []
            for of_method in results.values():
                error = of_method[task].get(f"{metric}_stderr,{kind}")
                text = f"{of_method[task][key]:.4g}"
                cells.append(f"{text} ± {error:.2g}" if isinstance(error, float) else text)
            table.add_row(task, metric, *cells)
    return table
