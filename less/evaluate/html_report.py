"""A report as one HTML file that opens without a server: sortable tables, interactive plots."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from typing import Any

from less.evaluate.named import FULL
from less.evaluate.outcome import Table
from less.evaluate.sections import Section, Shown
from less.evaluate.tasks.base import Metric

_STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 76rem; padding: 0 1rem;
  color: #1b1f24; background: #fff; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .3rem; }
p { margin: .3rem 0; max-width: 60rem; } .about { color: #57606a; }
.table { overflow-x: auto; }
table { border-collapse: collapse; margin: .6rem 0; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .7rem; border-bottom: 1px solid #d8dee4; text-align: left; }
td.number, th.number { text-align: right; white-space: nowrap; }
th { cursor: pointer; user-select: none; border-bottom: 2px solid #8c959f; vertical-align: bottom; }
th[aria-sort=ascending]::after { content: " \\25B2"; font-size: .7em; }
th[aria-sort=descending]::after { content: " \\25BC"; font-size: .7em; }
tbody tr:hover { background: #f6f8fa; }
.plot { margin: .6rem 0 1.2rem; }
"""

_SORT = """
for (const head of document.querySelectorAll("th")) head.addEventListener("click", () => {
  const column = head.cellIndex, body = head.closest("table").tBodies[0];
  const down = head.getAttribute("aria-sort") === "ascending";
  for (const other of head.parentNode.cells) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", down ? "descending" : "ascending");
  const key = row => row.cells[column].dataset.sort ?? row.cells[column].textContent;
  const numeric = head.classList.contains("number");
  const rows = [...body.rows].sort((a, b) => numeric
    ? Number(key(a)) - Number(key(b)) : key(a).localeCompare(key(b)));
  body.append(...(down ? rows.reverse() : rows));
});
"""


def page(
    title: str, lines: Sequence[str], sections: Sequence[Section], figures: Sequence[Any]
) -> str:
    """The whole file.

    Args:
        title: Heading.
        lines: Sentences below it.
        sections: Tables.
        figures: Of plotly.
    """
    from plotly.offline import get_plotlyjs

    plots = [
        figure.to_html(full_html=False, include_plotlyjs=False, div_id=f"plot-{i}")
        for i, figure in enumerate(figures)
    ]
    body = [f"<h1>{html.escape(title)}</h1>", *(f"<p>{html.escape(line)}</p>" for line in lines)]
    body += [f'<div class="plot">{plot}</div>' for plot in plots]
    body += [_table(one) for one in sections]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">'
        '<link rel="icon" href="data:,">'
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style>"
        f"<script>{get_plotlyjs()}</script></head>\n<body>\n"
        + "\n".join(body)
        + f"\n<script>{_SORT}</script></body></html>\n"
    )


def _table(one: Section) -> str:
    numeric = [any(row[i].number is not None for row in one.rows) for i in range(len(one.headers))]

    def css(i: int) -> str:
        return ' class="number"' if numeric[i] else ""

    def cell(i: int, shown: Shown) -> str:
        number = shown.number
        if numeric[i] and (number is None or math.isnan(number)):
            number = -math.inf
        sort = "" if number is None else f' data-sort="{_js(number)}"'
        return f"<td{css(i)}{sort}>{html.escape(shown.text)}</td>"

    head = "".join(f"<th{css(i)}>{html.escape(h)}</th>" for i, h in enumerate(one.headers))
    body = "\n".join(
        "<tr>" + "".join(cell(i, shown) for i, shown in enumerate(row)) + "</tr>"
        for row in one.rows
    )
    about = "".join(f'<p class="about">{html.escape(line)}</p>' for line in one.about)
    return (
        f'<h2>{html.escape(one.title)}</h2>{about}<div class="table"><table>'
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>"
    )


def _js(number: float) -> str:
    if math.isinf(number):
        return "-Infinity" if number < 0 else "Infinity"
    return repr(float(number))


def figures(tables: Sequence[Table]) -> list[Any]:
    """Perplexity against bytes, memory and time against tokens, recovered by task."""
    made = [_against_bytes(table) for table in tables if table.task.metrics[0].scale == "exp"]
    made += [_recovered(model, tables) for model in dict.fromkeys(t.model for t in tables)]
    made += [_memory(model, tables) for model in dict.fromkeys(t.model for t in tables)]
    timed = dict.fromkeys((t.model, t.task.name) for t in tables if t.task.timed)
    for who in timed:
        mine = [table for table in tables if (table.model, table.task.name) == who]
        made += [_against_tokens(mine, metric) for metric in mine[0].task.metrics]
    return [figure for figure in made if figure.data]


def _figure(title: str, x: str, y: str, **layout: Any) -> Any:
    import plotly.graph_objects as go

    figure = go.Figure()
    figure.update_layout(
        title=title, xaxis_title=x, yaxis_title=y, template="plotly_white", height=440,
        margin={"l": 70, "r": 20, "t": 50, "b": 60}, **layout,
    )  # fmt: skip
    return figure


def _colour(method: str, methods: Sequence[str]) -> str:
    from plotly.colors import qualitative

    palette = qualitative.D3
    return str(palette[methods.index(method) % len(palette)])


def _methods(tables: Sequence[Table]) -> list[str]:
    return list(dict.fromkeys(row.method for table in tables for row in table.rows))


def _against_bytes(table: Table) -> Any:
    title = f"{table.task.name}, {table.length:,} tokens, {table.model}"
    figure = _figure(title, "bytes of a sequence", "perplexity")
    figure.update_xaxes(type="log")
    figure.update_yaxes(type="log")
    metric = table.task.metrics[0].name
    methods = _methods([table])
    for method in methods:
        rows = sorted(
            (row for row in table.rows if row.method == method), key=lambda row: row.row_bytes
        )
        values = [math.exp(min(row.means[metric].value, 700)) for row in rows]
        if method == FULL:
            least = min(row.row_bytes for row in table.rows)
            figure.add_scatter(
                x=[least, rows[0].row_bytes], y=values * 2, name="full cache",
                mode="lines+markers", line={"dash": "dash", "color": "black"},
            )  # fmt: skip
            continue
        # The error that matters is of the difference to the full cache, on the same texts.
        errors = [row.losses[metric].error if metric in row.losses else math.nan for row in rows]
        bars = [v * e if math.isfinite(e) else 0.0 for v, e in zip(values, errors, strict=True)]
        figure.add_scatter(
            x=[row.row_bytes for row in rows], y=values, name=method, mode="lines+markers",
            error_y={"type": "data", "array": bars}, line_color=_colour(method, methods),
        )  # fmt: skip
    return figure


def _recovered(model: str, tables: Sequence[Table]) -> Any:
    title = f"Share of H2O's loss that is won back, {model}"
    figure = _figure(title, "", "recovered, %", barmode="group")
    mine = [t for t in tables if t.model == model and t.task.metrics[0].recovers]
    budgets = list(dict.fromkeys(row.budget for t in mine for row in t.rows if row.budget))
    methods = _methods(mine)
    for method in methods:
        for budget in budgets:
            x, y, bars = [], [], []
            for table in mine:
                for row in table.rows:
                    share = row.recovered.get(table.task.metrics[0].name)
                    if (row.method, row.budget) != (method, budget) or share is None:
                        continue
                    if math.isfinite(share.value):
                        x.append(f"{table.task.name}, {table.length:,}")
                        y.append(100 * share.value)
                        bars.append(100 * share.error if math.isfinite(share.error) else 0.0)
            if x:
                figure.add_bar(
                    x=x, y=y, name=f"{method} at {budget}", marker_color=_colour(method, methods),
                    opacity=1.0 - 0.45 * budgets.index(budget) / len(budgets),
                    error_y={"type": "data", "array": bars, "thickness": 1},
                )  # fmt: skip
    figure.update_yaxes(range=[-60, 110])
    return figure


def _memory(model: str, tables: Sequence[Table]) -> Any:
    """The full cache grows; the bounded ones of a budget, all of about the same bytes, do not."""
    figure = _figure(f"Memory against tokens, {model}", "tokens", "bytes of a sequence")
    rows = [row for table in tables if table.model == model for row in table.rows]
    full = next((row for row in rows if row.method == FULL), None)
    if full is None:
        return figure
    x = [0, 8 * max(row.tokens for row in rows if row.method == FULL)]
    figure.add_scatter(
        x=x, y=[full.row_bytes / full.tokens * t for t in x], name="full cache", mode="lines",
        line={"dash": "dash", "color": "black"},
    )  # fmt: skip
    for budget in dict.fromkeys(row.budget for row in rows if row.budget):
        mine = [row for row in rows if row.budget == budget]
        one = max(mine, key=lambda row: row.row_bytes / row.tokens)
        share = budget.endswith("%")
        slope = one.row_bytes / one.tokens * float(budget[:-1]) / 100 if share else 0.0
        y = [slope * t if share else one.row_bytes for t in x]
        figure.add_scatter(x=x, y=y, name=f"bounded, {budget}", mode="lines")
    return figure


def _against_tokens(tables: Sequence[Table], metric: Metric) -> Any:
    first = tables[0]
    title = f"{first.task.name}: {metric.title} against tokens, {first.model}"
    figure = _figure(title, "tokens seen", metric.title)
    figure.update_xaxes(type="log")
    figure.update_yaxes(rangemode="tozero")
    methods = _methods(tables)
    points: dict[tuple[str, str], list[tuple[int, float]]] = {}
    for table in tables:
        for row in table.rows:
            value = row.means[metric.name].value
            points.setdefault((row.method, row.budget), []).append((table.length, value))
    for (method, budget), at in points.items():
        figure.add_scatter(
            x=[tokens for tokens, _ in at], y=[value for _, value in at],
            name=f"{method} at {budget}" if budget else method, mode="lines+markers",
            line_color=_colour(method, methods),
        )  # fmt: skip
    return figure
