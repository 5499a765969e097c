"""A report's parts, ready to be written as markdown or HTML: tables of texts with their numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from less.evaluate.harness import Left
from less.evaluate.named import BASELINE, FULL
from less.evaluate.outcome import Estimate, Row, Table, share_shown, shown
from less.evaluate.report import size, with_error
from less.evaluate.tasks.base import Metric

PAPER = "arXiv:2402.09398"


@dataclass(frozen=True)
class Shown:
    """A cell of a table: a text, and the number that it is sorted by (None: by the text)."""

    text: str
    number: float | None = None


@dataclass(frozen=True)
class Section:
    """A table with its heading.

    Attributes:
        title: Heading.
        about: Sentences below it.
        headers: Of the columns.
        rows: Of ``Shown``, as many as headers.
    """

    title: str
    about: Sequence[str]
    headers: Sequence[str]
    rows: Sequence[Sequence[Shown]]


def section(table: Table) -> Section:
    """A task's table."""
    first = table.task.metrics[0]
    headers = ["method", "budget", "bytes a row", "shared"]
    headers += [metric.title for metric in table.task.metrics]
    loses = any(row.losses for row in table.rows) and not table.task.timed
    won = any(row.recovered for row in table.rows)
    unit = "nats" if first.scale == "exp" else first.title
    headers += [f"worse than full, {unit}"] * loses + ["recovered"] * won
    rows: list[list[Shown]] = []
    for row in table.rows:
        cells = [
            Shown(row.method),
            Shown(row.budget and f"{row.budget} ({row.tokens:,})", row.tokens),
            Shown(size(row.row_bytes), row.row_bytes),
            Shown(size(row.shared_bytes) if row.shared_bytes else "", row.shared_bytes),
        ]
        for metric in table.task.metrics:
            one = row.means[metric.name]
            cells.append(Shown(shown(metric, one), one.value))
        if loses:
            cells.append(_loss(row, first))
        if won:
            cells.append(_won(row.recovered.get(first.name)))
        rows.append(cells)
    about = [table.task.about, f"{table.examples} example{'s' * (table.examples != 1)}."]
    if table.incomplete:
        about.append(f"Not yet measured on all of them: {', '.join(table.incomplete)}.")
    return Section(
        f"{table.task.name}, {table.length:,} tokens, {table.model}", about, headers, rows
    )


def _loss(row: Row, metric: Metric) -> Shown:
    loss = row.losses.get(metric.name)
    if loss is None:
        return Shown("", 0.0)
    factor = 100 if metric.scale == "percent" else 1
    digits = 3 if metric.scale == "exp" else metric.digits  # of nats
    return Shown(with_error(factor * loss.value, factor * loss.error, digits), loss.value)


def _won(share: Estimate | None) -> Shown:
    if share is None or math.isnan(share.value):
        return Shown("", -math.inf)
    return Shown(share_shown(share), share.value)


def claims(tables: Sequence[Table]) -> Section | None:
    """What the paper says of its method, and what was measured here of the same kind."""
    rows: list[list[Shown]] = []

    def row(claim: str, theirs: str, where: str, value: float, text: str) -> None:
        rows.append([Shown(claim), Shown(theirs), Shown(where), Shown(text, value)])

    for table in tables:
        kind = table.task.name.partition(":")[0]
        by = {(x.method, x.budget): x for x in table.rows}
        for one in table.rows:
            who = f"{one.method} at {one.budget}, {table.task.name}, {table.length:,} tokens"
            who += f", {table.model}"
            base, full = by.get((BASELINE, one.budget)), by.get((FULL, ""))
            if one.method not in ("less-paper", "less", "best", "merge") or base is None:
                continue
            if kind == "summaries" and "rouge1" in one.recovered:
                share = one.recovered["rouge1"]
                theirs = "41 % (Falcon 7B, CNN/DailyMail)"
                text = share_shown(share) or "H2O loses nothing"
                row("ROUGE-1 lost by H2O, won back", theirs, who, share.value, text)
            if kind == "perplexity":
                lower = 1 - math.exp(one.means["nats"].value - base.means["nats"].value)
                theirs = "more than 20 % (WikiText)"
                row("perplexity below H2O's", theirs, who, lower, f"{100 * lower:.1f} %")
            if kind == "speed" and full is not None:
                speeds = (x.means["tokens_per_second"].value for x in (one, full))
                ratio = next(speeds) / next(speeds)
                theirs = "up to 1.7 (Llama 2, GPU)"
                row("throughput against the full cache", theirs, who, ratio, f"{ratio:.2f}")
    if not rows:
        return None
    about = [
        f"The paper's figures ({PAPER}) are its own, of its models at its budgets, on GPUs; ours "
        "are those of this report's tables. H2O has the same bytes as the method beside it.",
    ]
    return Section("The paper's claims", about, ["claim", "paper", "here", "measured"], rows)


def left_out(left: Left, methods: Mapping[str, str]) -> Section | None:
    """What was not measured, and what caches warned of, a sentence each."""
    rows = [[Shown(name), Shown(why)] for name, why in methods.items()]
    rows += [[Shown(name), Shown(why)] for name, why in left.tasks.items()]
    rows += [[Shown(name), Shown(why)] for name, why in left.methods.items()]
    rows += [
        [Shown(name), Shown(f"{n} block{'s' * (n != 1)} left out: the time was up")]
        for name, n in left.units.items()
    ]
    rows += [[Shown(name), Shown(f"failed: {why}")] for name, why in left.failed.items()]
    rows += [[Shown("warning"), Shown(text)] for text in left.warned]
    if not rows:
        return None
    return Section("Left out, and warnings", [], ["what", "why"], rows)


def markdown(title: str, lines: Sequence[str], sections: Sequence[Section]) -> str:
    """The report as GitHub's markdown."""
    out = [f"# {title}", "", *lines]
    for one in sections:
        out += ["", f"## {one.title}", "", *one.about, ""]
        out.append("| " + " | ".join(one.headers) + " |")
        first = one.rows[0]
        out.append("|" + "|".join("---" if c.number is None else "---:" for c in first) + "|")
        for row in one.rows:
            out.append("| " + " | ".join(c.text.replace("|", "\\|") for c in row) + " |")
    return "\n".join(out) + "\n"
