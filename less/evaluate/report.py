"""Results as a table (terminal, markdown), a plot and JSON lines."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from less.evaluate.compare import Result
from less.evaluate.methods import FULL
from less.files import around_section, write_whole

if TYPE_CHECKING:
    from rich.table import Table

HEADERS = (
    "method",
    "kept",
    "slots",
    "state",
    "maps",
    "perplexity",
    "loss, nats",
    "recovered",
    "copy",
    "tok/s",
)


def cells(result: Result) -> list[str]:
    """One row of the table as text, in the order of ``HEADERS``."""
    is_full = result.method == FULL.name
    return [
        result.method,
        "all" if is_full else str(result.kept),
        size(result.slots),
        size(result.state) if result.state else "",
        size(result.maps) if result.maps else "",
        f"{result.perplexity:.2f}",
        "" if is_full else with_error(result.loss, result.loss_error, 3),
        ""
        if is_full
        else with_error(100 * result.recovered, 100 * result.recovered_error, 0, " %"),
        _number(result.copy_perplexity, 1 if result.copy_perplexity >= 10 else 2),
        _number(result.tokens_per_second, 1),
    ]


def legend(results: Sequence[Result]) -> list[str]:
    """What the columns mean, one sentence per line."""
    first = results[0]
    maps = next((r.maps_dtype for r in results if r.maps_dtype), "")
    formats = any(r.dtype != first.dtype for r in results)
    named = " where the method names no other" if formats else ""
    weights = f"{maps} weights" if maps else "weights"
    if formats:
        weights += ", and means and scales of the channels of rows in a space of their own"
    lines = [
        f"kept: tokens per head. slots, state: bytes per sequence after {first.length:,} tokens, "
        f"{first.dtype} keys and values{named}. maps: {weights}, once for the whole batch.",
        f"perplexity, loss: positions {first.start} on of {first.chunks} chunks of "
        f"{first.length:,} tokens, teacher-forced through the real cache one token at a time; "
        "loss: nats per token above the full cache, ± one standard error over chunks.",
        "recovered: share of plain H2O's loss that is won back.",
    ]
    if formats:
        lines.insert(
            1,
            f"a method that names a format keeps as many tokens in it as the bytes of the budget's "
            f"tokens in {first.dtype} buy, a layer's whole page counted.",
        )
    if first.probes:
        quarter = first.length // 4
        others = first.length - 2 * quarter
        texts = "1 text" if first.probes == 1 else f"{first.probes} texts"
        lines.append(
            f"copy: perplexity of the second copy in {quarter} tokens, {others} others, "
            f"the same {quarter} again ({texts})."
        )
    if not math.isnan(first.tokens_per_second):
        lines.append(
            f"tok/s: decoding at batch 1 with {first.length:,} tokens seen, median of three turns."
        )
    return lines


def table(results: Sequence[Result], title: str = "", width: int = 132) -> Table:
    """The table for a terminal; a narrow one loses the nats, then the maps, and folds names."""
    from rich import box
    from rich.table import Table

    needs = {"loss, nats": 128, "maps": 100}
    shown = [i for i, name in enumerate(HEADERS) if width >= needs.get(name, 0)]
    made = Table(
        title=title or None, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0)
    )
    for i in shown:
        first = i == 0
        made.add_column(HEADERS[i], justify="left" if first else "right", no_wrap=not first)
    for result in results:
        row = cells(result)
        made.add_row(*(row[i] for i in shown), style="bold" if result.state else "")
    return made


def markdown(results: Sequence[Result]) -> str:
    """The table as GitHub's markdown, the rows with a low-rank state in bold."""
    rows = ["| " + " | ".join(HEADERS) + " |"]
    rows.append("|" + "|".join("---" if h == "method" else "---:" for h in HEADERS) + "|")
    for result in results:
        row = cells(result)
        if result.state:
            row[0] = f"**{row[0]}**"
        rows.append("| " + " | ".join(row) + " |")
    return "\n".join(rows) + "\n"


def json_lines(results: Sequence[Result], facts: dict[str, Any]) -> str:
    """One JSON object per line: the machine and settings first, then every row unrounded."""
    lines = [{"kind": "run", **facts}]
    lines += [{"kind": "result", **dataclasses.asdict(result)} for result in results]
    plain = [{k: _finite(v) for k, v in line.items()} for line in lines]
    return "".join(json.dumps(line, allow_nan=False) + "\n" for line in plain)


def read_json_lines(text: str) -> tuple[dict[str, Any], list[Result]]:
    """The inverse of ``json_lines``."""
    facts: dict[str, Any] = {}
    results: list[Result] = []
    fields: dict[str, Any]
    for line in text.splitlines():
        fields = json.loads(line)
        if fields.pop("kind") == "run":
            facts = fields
        else:
            missing: Any = math.nan
            fields = {k: missing if v is None else v for k, v in fields.items()}
            results.append(Result(**fields))
    return facts, results


def plot(results: Sequence[Result], path: Path) -> None:
    """Two panels: perplexity against bytes, memory against tokens.

    Results of several budgets are joined to one line per method.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, (quality, memory) = plt.subplots(1, 2, figsize=(11, 4.4), layout="constrained")
    _plot_quality(quality, results)
    _plot_memory(memory, results)
    write_whole(path, lambda part: figure.savefig(part, dpi=150))
    plt.close(figure)


def _plot_quality(axes: Any, results: Sequence[Result]) -> None:
    full = next((r for r in results if r.method == FULL.name), None)
    if full is not None:
        axes.axhline(full.perplexity, color="black", linestyle="--", linewidth=1)
        axes.annotate(
            f"full cache, {size(full.slots)}", (0.98, full.perplexity), fontsize=8,
            xycoords=("axes fraction", "data"), ha="right", va="bottom",
        )  # fmt: skip
    names = list(dict.fromkeys(r.method for r in results if r.method != FULL.name))
    colours = _colours(results)
    for name in names:
        rows = sorted((r for r in results if r.method == name), key=lambda r: r.held)
        style = {"color": colours[name], "markersize": 7 if rows[0].state else 5}
        marker = "o" if rows[0].state else "s"
        axes.plot(
            [r.held / 2**20 for r in rows], [r.perplexity for r in rows],
            marker=marker, label=name, **style,
        )  # fmt: skip
        if rows[0].maps:
            axes.plot(
                [(r.held + r.maps) / 2**20 for r in rows], [r.perplexity for r in rows],
                marker=marker, fillstyle="none", linestyle=":", label=f"{name}, with maps", **style,
            )  # fmt: skip
    axes.set_xscale("log")
    _plain_ticks(axes.xaxis)
    axes.set_xlabel("MiB per sequence: slots + state (hollow: maps too, batch 1)")
    axes.set_ylabel("perplexity")
    axes.set_title("Perplexity against bytes")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


def _colours(results: Sequence[Result]) -> dict[str, str]:
    """A colour per bounded method; those with a low-rank state are the red and orange ones."""
    names = list(dict.fromkeys(r.method for r in results if r.method != FULL.name))
    with_state = {r.method for r in results if r.state}
    warm, cool = iter(("C3", "C1", "C6", "C5")), iter(("C0", "C2", "C9", "C4", "C7", "C8"))
    order = sorted(names, key=lambda name: name != "LESS")  # LESS itself gets the first
    chosen = {name: next(warm if name in with_state else cool, "black") for name in order}
    return {name: chosen[name] for name in names}


def _plot_memory(axes: Any, results: Sequence[Result]) -> None:
    full = next((r for r in results if r.method == FULL.name), None)
    if full is None:
        return
    tokens = [0, 8 * full.length]
    per_token = full.slots / full.length
    mib = 2**20
    axes.plot(tokens, [t * per_token / mib for t in tokens], "k--", label="full cache")
    bounded = [r for r in results if r.method != FULL.name]
    for row in ([r for r in bounded if r.state] or bounded)[-1:]:
        colour = _colours(results)[row.method]
        label = f"{row.method}, {row.kept} tokens per head"
        axes.plot(tokens, [row.held / mib] * 2, color=colour, label=label)
        if row.maps:
            total = (row.held + row.maps) / mib
            axes.plot(tokens, [total] * 2, color=colour, linestyle=":", label="with maps, batch 1")
    axes.axvline(full.length, color="grey", linewidth=0.8)
    axes.annotate(
        " measured here", (full.length, 0.97), xycoords=("data", "axes fraction"),
        fontsize=8, va="top",
    )  # fmt: skip
    axes.set_xlim(0, tokens[1])
    axes.set_ylim(0)
    axes.set_xlabel("tokens seen")
    axes.set_ylabel("MiB per sequence")
    axes.set_title("Memory against tokens")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


def _plain_ticks(axis: Any) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(base=10, subs=(1, 2, 3, 5)))
    axis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axis.set_minor_formatter(NullFormatter())


def update_section(path: Path, name: str, text: str) -> None:
    """Replace what stands between ``<!-- begin NAME -->`` and ``<!-- end NAME -->`` in a file.

    Raises:
        ValueError: the file has no such pair of lines.
    """
    head, tail = around_section(path, name)
    write_whole(path, f"{head}\n{text.strip()}\n{tail}")


def size(count: int) -> str:
    """Bytes for people: ``1.5 MiB``."""
    if count < 1024:
        return f"{count} B"
    value, unit = count / 1024, "KiB"
    if value >= 1000:
        value, unit = value / 1024, "MiB"
    if value >= 1000:
        value, unit = value / 1024, "GiB"
    return f"{value:.0f} {unit}" if value >= 100 else f"{value:.3g} {unit}"


def with_error(value: float, error: float, digits: int, unit: str = "") -> str:
    """``0.123 ± 0.004``; without the error where there is none."""
    text = f"{round(value, digits) + 0.0:.{digits}f}"  # + 0.0: no "-0"
    if not math.isnan(error) and error > 0:
        text += f" ± {error:.{digits}f}"
    return text + unit


def _number(value: float, digits: int) -> str:
    return "" if math.isnan(value) else f"{value:.{digits}f}"


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
