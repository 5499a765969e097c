"""Cells of a report put together: means with errors, losses to full attention, shares recovered."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

from less.evaluate.cells import Cell
from less.evaluate.named import BASELINE, FULL
from less.evaluate.report import with_error
from less.evaluate.tasks.base import Metric, Task


@dataclass(frozen=True)
class Estimate:
    """A mean with its standard error, NaN where there is one example."""

    value: float
    error: float


@dataclass(frozen=True)
class Row:
    """A method at a budget on a task, over the blocks that every row of its table has.

    Attributes:
        method: Its name.
        budget: As it was given; "" for the full cache.
        tokens: 16-bit tokens per kv head whose bytes it got; of the full cache, all.
        row_bytes: Of one row: slots and state; of the full cache, k and v in 16 bits.
        shared_bytes: Maps, means and scales.
        means: Metric -> mean over examples.
        losses: Metric -> how much worse than the full cache, paired over examples.
        recovered: Metric -> share of H2O's loss at the same budget that is won back.
    """

    method: str
    budget: str
    tokens: int
    row_bytes: int
    shared_bytes: int
    means: dict[str, Estimate]
    losses: dict[str, Estimate] = field(default_factory=dict)
    recovered: dict[str, Estimate] = field(default_factory=dict)


@dataclass(frozen=True)
class Table:
    """A task of a model at a length.

    Attributes:
        model: Its name.
        task: The task.
        length: Tokens of an example.
        examples: Behind every figure of the table.
        rows: The full cache first.
        incomplete: Methods that lack examples which the others have, and so have no row.
    """

    model: str
    task: Task
    length: int
    examples: int
    rows: list[Row]
    incomplete: list[str]


def joined(cells: Sequence[Cell], others: Sequence[Cell]) -> list[Cell]:
    """Cells, and those that another implementation measured on the same examples.

    Args:
        cells: Of a report.
        others: As ``python -m bench.peers`` writes them. What they say of the full cache is left
            out, because the report has its own.
    """

    def where(cell: Cell) -> tuple[str, str, int, str]:
        return cell["model"], cell["task"], cell["length"], cell["block"]

    known = {where(cell) for cell in cells}
    found = [cell for cell in others if cell["method"] != FULL and where(cell) in known]
    return [*cells, *found]


def tables(cells: Sequence[Cell], tasks: Sequence[Task]) -> list[Table]:
    """A table for every model, task and length of which there are cells, in order of tasks."""
    found: list[Table] = []
    models = list(dict.fromkeys(cell["model"] for cell in cells))
    for model in models:
        for task in tasks:
            mine = [c for c in cells if (c["model"], c["task"]) == (model, task.name)]
            for length in sorted({c["length"] for c in mine}):
                made = _table(model, task, length, [c for c in mine if c["length"] == length])
                if made is not None:
                    found.append(made)
    return found


def _table(model: str, task: Task, length: int, cells: Sequence[Cell]) -> Table | None:
    by_row: dict[tuple[str, str], dict[str, Cell]] = {}
    for cell in cells:
        by_row.setdefault((cell["method"], cell["budget"]), {})[cell["block"]] = cell
    most = max(len(blocks) for blocks in by_row.values())
    # A row that lacks a block that others have would be a mean over other examples.
    lacking = [" at ".join(filter(None, who)) for who, x in by_row.items() if len(x) < most]
    by_row = {who: blocks for who, blocks in by_row.items() if len(blocks) == most}
    shared = set.intersection(*(set(blocks) for blocks in by_row.values()))
    order = sorted(shared, key=lambda block: next(iter(by_row.values()))[block]["index"])
    if not order:
        return None

    def values(who: tuple[str, str], metric: Metric) -> list[float]:
        return [x for block in order for x in by_row[who][block]["scores"][metric.name]]

    rows: list[Row] = []
    for who, blocks in sorted(by_row.items(), key=lambda item: item[0][0] != FULL):
        method, budget = who
        first = blocks[order[0]]
        means, losses, recovered = {}, {}, {}
        for metric in task.metrics:
            mine = values(who, metric)
            means[metric.name] = mean(mine)
            if (FULL, "") not in by_row or method == FULL:
                continue
            full = values((FULL, ""), metric)
            sign = 1 if metric.lower else -1
            losses[metric.name] = mean([sign * (a - b) for a, b in zip(mine, full, strict=True)])
            if metric.recovers and (BASELINE, budget) in by_row and method != BASELINE:
                base = values((BASELINE, budget), metric)
                recovered[metric.name] = share_recovered(full, base, mine)
        bytes_ = first["bytes"]
        rows.append(
            Row(
                method, budget, first["tokens"], bytes_["row"], bytes_["shared"],
                means, losses, recovered,
            )
        )  # fmt: skip
    examples = len(values(next(iter(by_row)), task.metrics[0]))
    return Table(model, task, length, examples, rows, lacking)


def mean(values: Sequence[float]) -> Estimate:
    """The mean and its standard error."""
    if len(values) < 2:
        return Estimate(values[0], math.nan)
    return Estimate(statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values)))


def share_recovered(
    full: Sequence[float], base: Sequence[float], mine: Sequence[float]
) -> Estimate:
    """(base - mine) / (base - full) of means, with the jackknife's error over examples.

    NaN where the baseline loses nothing: there is nothing to recover.
    """

    def share(skip: int | None = None) -> float:
        kept = [i for i in range(len(full)) if i != skip]
        gap = sum(base[i] - full[i] for i in kept)
        return math.nan if gap == 0 else sum(base[i] - mine[i] for i in kept) / gap

    n = len(full)
    if n < 2:
        return Estimate(share(), math.nan)
    left_out = [share(i) for i in range(n)]
    middle = sum(left_out) / n
    spread = sum((x - middle) ** 2 for x in left_out)
    return Estimate(share(), math.sqrt(spread * (n - 1) / n))


def shown(metric: Metric, estimate: Estimate) -> str:
    """An estimate as tables have it."""
    if math.isnan(estimate.value):
        return ""
    if metric.scale == "exp":
        value = math.exp(min(estimate.value, 700))  # a float's end
        return with_error(value, value * estimate.error, metric.digits)
    factor = 100 if metric.scale == "percent" else 1
    return with_error(factor * estimate.value, factor * estimate.error, metric.digits)


def share_shown(estimate: Estimate) -> str:
    """A share as tables have it."""
    if math.isnan(estimate.value):
        return ""
    return with_error(100 * estimate.value, 100 * estimate.error, 0, " %")
