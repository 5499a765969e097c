"""``less-kv lm-eval``: tasks of lm-evaluation-harness under full cache, eviction and LESS."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from less.cli import measuring, threads

if TYPE_CHECKING:
    from less.evaluate.methods import Method


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
    measuring.add_model(parser)
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
    measuring.check_packages("less-kv lm-eval", needed, "eval")
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    from less.evaluate.assets import load_model

    console = measuring.console_for()
    threads.set_threads(args, console)
    model, tokenizer = load_model(args.model)
    methods = _methods(args, model)
    tasks = TaskManager(
        include_path=None if args.include_path is None else str(args.include_path),
        include_defaults=args.include_path is None,
    )
    results = {}
    for method in methods:
        start = time.monotonic()
        done = simple_evaluate(
            _language_model(method, args, model, tokenizer),
            tasks=args.tasks.split(","),
            task_manager=tasks,
            limit=args.limit,
            log_samples=False,
        )
        results[method.name] = done["results"]
        console.print(f"  {method.name}: done in {time.monotonic() - start:.0f} s")
    console.print(_table(results, f"{args.budget} tokens kept per head"))
    if args.out is not None:
        args.out.write_text(json.dumps(results, indent=2, default=str) + "\n", encoding="utf-8")
    return 0


def _methods(args: argparse.Namespace, model: Any) -> list[Method]:
    """Full cache, H2O and, where a sidekick fits, its policy without it and with it."""
    from less import H2O
    from less.config import trained_policy
    from less.evaluate.methods import BASELINE, FULL, Method, rule_name

    recent = args.budget // 2
    plain = H2O(heavy=args.budget - recent, recent=recent)
    methods = [FULL, Method(BASELINE, plain)]
    sidekick, _ = measuring.sidekicks_for(args.sidekick, model)
    if sidekick is None:
        return methods
    rule = trained_policy(sidekick, args.budget) or plain
    if rule != plain:
        methods.append(Method(rule_name(rule), rule))
    return [*methods, Method("LESS", rule, sidekick)]


def _language_model(method: Method, args: argparse.Namespace, model: Any, tokenizer: Any) -> Any:
    from lm_eval.models.huggingface import HFLM

    from less.config import LessConfig
    from less.integrations.lm_eval import LessLM

    common = {"tokenizer": tokenizer, "batch_size": args.batch_size}
    if method.policy is None:
        return HFLM(model, **common)
    config = LessConfig(tokens=args.budget, policy=method.policy, dtype=args.dtype)
    return LessLM(model, config=config, sidekick=method.sidekick, chunk=args.chunk, **common)


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
