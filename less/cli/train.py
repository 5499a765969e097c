"""``less-kv train``: train a sidekick for a model; resumes where it was killed."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from less.cli import checks, corpus, measuring, rows, threads

if TYPE_CHECKING:
    from less import Calibration, LessConfig
    from less.fit import LayerRecord, Progress
    from less.hf.models import ModelFacts
    from less.policies import Policy

# What each named policy takes of the options that are policies' settings.
_SETTINGS = {"h2o": ("--decay", "--per-age", "--sinks"), "sinks": ("--sinks",)}
_BUDGETS = [32, 64, 128]
_LINE_EVERY = 30.0  # seconds between lines of progress, where there is no terminal


def add_parser(subparsers: Any) -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser(
        "train",
        help="train a sidekick for a model",
        description="Train the feature maps of every layer, one layer after the other. A run that "
        "is killed goes on where it was when the same command is given again. About a quarter "
        "of an hour for SmolLM2-135M on two cores.",
    )
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder of the sidekick")
    measuring.add_model_name(parser)
    add("--name", help="the model's name in the sidekick's record (default: its folder's)")
    corpus.add_text(parser)
    add(
        "--policy", default="h2o", metavar="NAME_OR_JSON",
        help="h2o, sinks, or any policy's name and settings as JSON, which is brought to each "
        "budget; less-kv --import makes one of your own known (default: %(default)s)",
    )  # fmt: skip
    add(
        "--budget", type=_budgets, metavar="C,C,...",
        help="tokens kept per head; several are trained for at once (default: 32,64,128)",
    )  # fmt: skip
    add(
        "--bytes-of", type=_budgets, metavar="C,C,...",
        help="in place of --budget: train for caches of the bytes of so many 16-bit tokens per "
        "head, in rows of --format",
    )  # fmt: skip
    add(
        "--format", choices=rows.FORMATS,
        help="with --bytes-of: packed format of the slots' rows (default: k4v4)",
    )  # fmt: skip
    add(
        "--calibration", type=Path, metavar="FOLDER",
        help="with --bytes-of: folder of less-kv calibrate, for means, scales and slots per head; "
        "the maps serve beside it alone",
    )  # fmt: skip
    add(
        "--decay", type=float,
        help="h2o: what a score keeps per token; 1 is the paper's sum (default: 0.98)",
    )  # fmt: skip
    add("--per-age", action="store_true", help="h2o: rank by score per token of age")
    add(
        "--sinks", type=int, metavar="N",
        help="first tokens always kept (default: 4 with --policy sinks, 0 with h2o, whose scores "
        "keep them)",
    )  # fmt: skip
    add(
        "--kind", choices=("exp", "centroid", "paper"), default="exp",
        help="of map; default: %(default)s",
    )  # fmt: skip
    add(
        "--loss", choices=("norm", "squared"),
        help="error of an attention output (default: squared, the paper's, with --kind paper; "
        "else norm)",
    )  # fmt: skip
    add("--rank", type=int, default=8, help="features R (default: %(default)s)")
    add(
        "--hidden", type=int, default=64,
        help="hidden width E, of exp and paper maps (default: %(default)s)",
    )  # fmt: skip
    add("--steps", type=int, default=1000, help="per layer (default: %(default)s)")
    add("--lr", type=float, default=0.01, help="peak learning rate (default: %(default)s)")
    add("--rows", type=int, default=32, help="queries per chunk and step (default: %(default)s)")
    add("--chunks", type=int, default=48, help="of text (default: %(default)s)")
    add("--length", type=int, default=1024, help="tokens per chunk (default: %(default)s)")
    add("--held", type=int, help="chunks kept for the reported losses (default: an eighth)")
    add(
        "--start", type=Path, metavar="FOLDER",
        help="a sidekick of the same kind to begin at, such as one trained on shorter chunks",
    )  # fmt: skip
    add(
        "--tune", type=int, metavar="STEPS",
        help="of end-to-end tuning against the model's own outputs, of centroid maps; 0: none "
        "(default: 60 of them with --kind centroid)",
    )  # fmt: skip
    add(
        "--window", type=int, default=768,
        help="tokens of a window of that tuning (default: %(default)s)",
    )  # fmt: skip
    add("--seed", type=int, default=0, help="default: %(default)s")
    add("--work", type=Path, help="folder of the unfinished run (default: OUT/unfinished)")
    add(
        "--dtype", choices=("float32", "bfloat16", "float16", "int8"),
        help="of the saved matrices (default: int8 with --kind centroid, else float16)",
    )  # fmt: skip
    measuring.add_model_dtype(parser)
    add("--device", default="cpu", help="default: %(default)s")
    add("--threads", type=measuring.positive, help=threads.DEFAULT)


def _budgets(text: str) -> list[int]:
    budgets = sorted({int(part) for part in text.split(",")})
    if budgets[0] < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more, got {budgets[0]}")
    return budgets


def policies(args: argparse.Namespace) -> list[Policy]:
    """The policies that the arguments name, one per budget.

    Half of H2O's budget is recent, a quarter with --bytes-of, as where it is a cache's default.

    Raises:
        ValueError: no policy is named so, a budget is too small for it, or an option is not its
            own.
    """
    from less import H2O, SinkRecent
    from less.fit.eviction import check_evicts
    from less.policies import policy_from_text
    from less.policies.base import checked_at_capacity
    from less.policies.default import DECAY

    given = {
        "--decay": args.decay is not None,
        "--per-age": args.per_age,
        "--sinks": args.sinks is not None,
    }
    for option in (option for option, is_given in given.items() if is_given):
        if option not in _SETTINGS.get(args.policy, ()):
            owners = " and ".join(name for name, own in _SETTINGS.items() if option in own)
            raise ValueError(f"{option} is a setting of --policy {owners}, not of {args.policy}")
    budgets = args.bytes_of or args.budget or _BUDGETS
    if args.policy not in _SETTINGS:
        policy = policy_from_text("--policy", args.policy)
        found = [checked_at_capacity(policy, budget) for budget in budgets]
        check_evicts(found)
        return found
    if args.policy == "sinks":
        sinks = 4 if args.sinks is None else args.sinks
        small = [budget for budget in budgets if budget <= sinks]
        if small:
            raise ValueError(f"--budget {small[0]} leaves no recent token beside {sinks} sinks")
        return [SinkRecent(sinks=sinks, recent=budget - sinks) for budget in budgets]
    part = 4 if args.bytes_of else 2
    return [
        H2O(
            heavy=budget - budget // part,
            recent=budget // part,
            sinks=args.sinks or 0,
            decay=DECAY if args.decay is None else args.decay,
            per_age=args.per_age,
        )
        for budget in budgets
    ]


def check_caches(args: argparse.Namespace) -> None:
    """Refuse settings of caches that do not go together; imports no torch.

    Raises:
        ValueError: The message names the option.
    """
    if args.bytes_of:
        if args.budget:
            raise ValueError("--bytes-of is in place of --budget, got both")
        return
    for option in ("format", "calibration"):
        if getattr(args, option) is not None:
            raise ValueError(f"--{option} goes with --bytes-of, got it without")


def caches(args: argparse.Namespace, facts: ModelFacts) -> list[Policy | LessConfig]:
    """What is trained for: the policies; or with --bytes-of the caches of so many bytes."""
    chosen = policies(args)
    if not args.bytes_of:
        return list(chosen)
    import torch

    from less import LessConfig
    from less.budget import page_bytes

    layers = facts.layers - len(facts.windows)
    return [
        LessConfig(
            bytes=layers * page_bytes(facts.kv_heads, facts.head_dim, torch.float16, tokens)
            + facts.kv_heads * facts.window_bytes,
            rows=args.format or "k4v4",
            policy=policy,
            shape=None if args.calibration is None else "calibrated",
        )
        for tokens, policy in zip(args.bytes_of, chosen, strict=True)
    ]


def run(args: argparse.Namespace) -> int:
    """Train, save, say what came of it."""
    from less.evaluate import sources

    work = args.work or args.out / "unfinished"
    checks.check_folder("--out", args.out)
    checks.check_folder("--work", work)
    sources.check_model_name(args.model)
    check_caches(args)
    corpus.check_texts(args.text)
    import torch
    from rich.console import Console

    from less import Calibration, Sidekick
    from less.evaluate import assets
    from less.fit import Recipe, Tuning, sample_chunks, train
    from less.fit.train import held_chunks
    from less.fit.tune import check_tuning
    from less.hf.models import describe

    chosen = policies(args)
    recipe = Recipe(
        kind=args.kind,
        loss=args.loss or ("squared" if args.kind == "paper" else "norm"),
        rank=args.rank,
        hidden=args.hidden,
        steps=args.steps,
        lr=args.lr,
        rows=args.rows,
        seed=args.seed,
    )
    steps = args.tune
    if steps is None:
        steps = 60 if args.kind == "centroid" else 0
    tuning = Tuning(steps=steps, window=args.window, seed=args.seed) if steps else None
    if tuning is not None and not args.bytes_of:
        check_tuning(args.kind, args.length, [p.capacity for p in chosen], tuning)
    start = None if args.start is None else Sidekick.from_pretrained(args.start)
    device = corpus.named_device(args.device)
    calibration: Calibration | None = None
    if args.calibration is not None:
        calibration = Calibration.from_pretrained(args.calibration)
    fewest = [1] if args.bytes_of else [p.capacity for p in chosen]
    held_chunks(fewest, args.chunks, args.length, args.held)
    texts, source = corpus.read_named_texts(args.text)
    console = Console(highlight=False)
    threads.set_threads(args, console)
    found = assets.find_model(args.model)
    facts = describe(found.skeleton(), f"--model {args.model}")
    served = caches(args, facts)
    measuring.check_length("--length", args.length, found.config)
    pool = sample_chunks(found.tokenizer, texts, args.length, args.chunks, recipe.seed)
    model = found.load(getattr(torch, args.model_dtype)).to(device)
    name = args.name or ("SmolLM2-135M-Instruct" if args.model == sources.SMOLLM2 else None)
    console.print(
        f"training {args.kind} maps, rank {args.rank}, "
        + ("" if args.kind == "centroid" else f"hidden {args.hidden}, ")
        + f"for {', '.join(map(str, served))}"
    )
    with _Shown(console) as show:
        sidekick = train(
            model,
            pool,
            served,
            calibration=calibration,
            recipe=recipe,
            held=args.held,
            work=work,
            source=source,
            name=name,
            start=start,
            tuning=tuning,
            show=show,
        )
    dtype = args.dtype or ("int8" if args.kind == "centroid" else "float16")
    sidekick.save_pretrained(args.out, dtype=getattr(torch, dtype))
    size = sum(file.stat().st_size for file in args.out.glob("*.safetensors"))
    console.print(f"{args.out}: {sidekick!r}, {size / 2**20:.1f} MiB on disk")
    return 0


def layer_line(record: LayerRecord, layers: int) -> str:
    """A layer's losses as the log has them: eviction alone beside the sidekick, per budget."""
    pairs = ", ".join(
        f"{e:.3g} -> {s:.3g}" for e, s in zip(record.eviction, record.sidekick, strict=True)
    )
    less = f"{100 * (1 - record.ratio):.0f} % less"
    return (
        f"layer {record.layer} of 0..{layers - 1}: loss of eviction alone -> with sidekick: "
        f"{pairs} ({less if record.helps else 'not less: left without maps'}), "
        f"{record.seconds:.0f} s"
    )


class _Shown:
    """A bar with the time left on a terminal, lines in a log; one line per finished layer."""

    def __init__(self, console: Any) -> None:
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        self.console = console
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:.0f} %"),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"),
        )
        self.bar = Progress(*columns, console=console, disable=not console.is_terminal)
        self.task = self.bar.add_task("starting", total=1.0, left="")
        self.begun = self.line = time.monotonic()
        self.skipped = 0.0  # part of the whole run that an earlier one had done

    def __enter__(self) -> Callable[[Progress], None]:
        self.bar.start()
        return self.show

    def __exit__(self, *error: object) -> None:
        self.bar.stop()

    def show(self, progress: Progress) -> None:
        """Take one event of the run."""
        done = (progress.layer + progress.fraction) / progress.layers
        if progress.resumed:
            self.skipped, self.begun = done, time.monotonic()
        spent = time.monotonic() - self.begun
        left = ""
        if done > self.skipped and done < 1:
            left = f"about {_minutes(spent * (1 - done) / (done - self.skipped))} left"
        label = f"layer {progress.layer} of 0..{progress.layers - 1} {progress.phase}"
        if progress.phase == "tune":
            done, label = progress.fraction, "all layers, tuned together"
        self.bar.update(self.task, completed=done, description=label, left=left)
        if progress.record is not None:
            note = ", from the earlier run" if progress.resumed else ""
            self.console.print(layer_line(progress.record, progress.layers) + note)
        elif not self.console.is_terminal and time.monotonic() - self.line > _LINE_EVERY:
            self.line = time.monotonic()
            self.console.print(f"  {label}, {100 * done:.0f} %, {left}")


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
