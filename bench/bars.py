"""The figures that decide: each bar, what was measured against it, and the verdict."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

Record = dict[str, Any]


@dataclass(frozen=True)
class Bar:
    """One row of the table.

    Attributes:
        number: Of the bar.
        what: Is measured.
        wanted: The limit, in words.
        got: The figure, in words; empty where it was not measured.
        met: Whether it is within the limit; None where it was not measured.
        note: What the figure is made of.
    """

    number: int
    what: str
    wanted: str
    got: str = ""
    met: bool | None = None
    note: str = ""


class Records:
    """Finds figures among records."""

    def __init__(self, records: Iterable[Record]) -> None:
        """Take all records of a run."""
        self.records = list(records)

    def one(self, contender: str, part: str = "compare", **wanted: object) -> Record | None:
        """The last record of a contender that has all of these values."""
        if part == "compare":
            wanted = {"B": 1, "C": 205, "threads": 1, **wanted}
        for record in reversed(self.records):
            if record.get("part") != part or record.get("contender") != contender:
                continue
            if all(record.get(key) == value for key, value in wanted.items()):
                return record
        return None

    def ratio(self, slow: str, fast: str, slow_at: Record, fast_at: Record) -> float | None:
        """How many times faster, by minima; None where one was not measured."""
        a = self.one(slow, "compare", **slow_at)
        b = self.one(fast, "compare", **fast_at)
        return a["best"] / b["best"] if a and b else None


def _at_least(
    number: int, what: str, limit: float, got: float | None, unit: str = "x", note: str = ""
) -> Bar:
    wanted = f"≥ {limit:g}{unit}"
    if got is None:
        return Bar(number, what, wanted)
    return Bar(number, what, wanted, f"{got:.3g}{unit}", got >= limit, note)


def bars(records: Iterable[Record]) -> list[Bar]:
    """All bars, in order. Minima throughout."""
    r = Records(records)
    seven, eight = "llama-2-7b", "llama-3-8b"
    rows: list[Bar] = []

    def share(record: Record | None) -> tuple[float | None, str]:
        if record is None:
            return None, ""
        rate, roof = record["bytes"] / record["best"], record["read"]
        note = f"{record['bytes'] / 1e6:.2f} MB in {record['best'] * 1e6:.0f} µs: "
        return 100 * rate / roof, note + f"{rate / 1e9:.1f} of {roof / 1e9:.1f} GB/s"

    got, note = share(r.one("step", shape=seven, dtype="float16"))
    rows.append(_at_least(1, "7B, C=205, fp16 slots: read rate of core's", 85, got, " %", note))
    for dtype, limit in (
        ("float16", 150), ("bfloat16", 120), ("float32", 27), ("float16 slots, float32 model", 50),
    ):  # fmt: skip
        at = {"shape": seven, "dtype": dtype}
        what = f"the same against SDPA over 4,096, {dtype}"
        rows.append(_at_least(2, what, limit, r.ratio("sdpa 4096", "step", at, at)))
    at = {"shape": seven, "dtype": "float16"}
    got = r.ratio("sdpa 4096", "step, float16 maps", at, at)
    rows.append(_at_least(3, "the same with fp16 maps, E=64", 120, got))
    for dtype, limit in (("float16", 10), ("float32", 3.5)):
        at = {"shape": seven, "dtype": dtype}
        got = r.ratio("reference", "attend", at, at)
        rows.append(_at_least(4, f"against the plain-torch reference, {dtype}", limit, got))
    at = {"shape": seven, "dtype": "float16"}
    got = r.ratio("step", "attention alone", at, at)
    rows.append(_at_most(5, "whole step against attention alone", 1.12, got, "x"))
    got, note = share(r.one("attention alone", shape=eight, dtype="float16"))
    rows.append(_at_least(6, "8B (G=4), attention alone: read rate of core's", 70, got, " %", note))
    grouped = r.one("attention_alone", "kernels")
    for name, text in (
        ("online_attention", "key by key with an online softmax"),
        ("head_at_a_time", "with decode_step's own loops"),
    ):
        single = r.one(name, "kernels")
        got = single["best"] / grouped["best"] if single and grouped else None
        rows.append(_at_least(6, f"8B: against one query head at a time, {text}", 3, got))
    got = r.ratio("step", "step", at, {**at, "dtype": "int8"})
    rows.append(_at_least(7, "int8 slots against fp16 slots, 7B", 1.6, got))
    empty = next((x for x in reversed(r.records) if x.get("part") == "overhead"), None)
    micros = empty["best"] * 1e6 if empty else None
    rows.append(_at_most(8, "the op on an empty problem, from Python", 15, micros, " µs"))
    made = empty["allocations"] if empty else None
    rows.append(_at_most(8, "allocations of ten steps", 0, made, ""))
    at = {"shape": seven, "dtype": "float16", "C": 820}
    got = r.ratio("step", "step", at, {**at, "threads": 2})
    rows.append(_at_least(9, "two threads against one, 7B, C=820", 1.7, got))
    rows.append(Bar(10, "instructions of every kernel", "gated at +3 %", "make instructions", True))
    less, full = r.one("less", "model"), r.one("full", "model")
    if less and full:
        got = full["best"] / less["best"]
        note = (
            f"{less['best'] * 1e3:.1f} ms a token, {100 * less['attention']:.0f} % of it attention "
            f"and cache; {full['best'] * 1e3:.1f} ms and {100 * full['attention']:.0f} % with the "
            f"full cache; {less['threads']} thread(s)"
        )
        rows.append(Bar(11, _MODEL, "faster", f"{got:.2f}x", got > 1, note))
    else:
        rows.append(Bar(11, _MODEL, "faster"))
    return rows


_MODEL = "SmolLM2 decode after 4,096 tokens, LESS at 5 % against DynamicCache with SDPA"


def _at_most(number: int, what: str, limit: float, got: float | None, unit: str) -> Bar:
    wanted = f"≤ {limit:g}{unit}"
    if got is None:
        return Bar(number, what, wanted)
    return Bar(number, what, wanted, f"{got:.3g}{unit}", got <= limit)


def _verdict(bar: Bar) -> str:
    return "not measured" if bar.met is None else "met" if bar.met else "**missed**"


def bars_table(rows: Sequence[Bar]) -> str:
    """The bars in Markdown."""
    lines = ["| # | figure | bar | measured | | |", "|---:|---|---:|---:|---|---|"]
    lines += [
        f"| {b.number} | {b.what} | {b.wanted} | {b.got} | {_verdict(b)} | {b.note} |" for b in rows
    ]
    return "\n".join(lines)


def times_table(records: Iterable[Record]) -> str:
    """Every group's contenders in Markdown: microseconds a layer, and how much slower than step."""
    seen: dict[tuple[object, ...], dict[str, Record]] = {}
    for x in records:
        if x.get("part") == "compare":
            key = (x["shape"], x["C"], x["B"], x["threads"], x["dtype"])
            seen.setdefault(key, {})[x["contender"]] = x
    names = list(dict.fromkeys(name for group in seen.values() for name in group))
    head = ["model", "C", "batch", "threads", "dtype", "GB/s", *names]
    lines = ["| " + " | ".join(head) + " |", "|---|---:|---:|---:|---|---:|" + "---:|" * len(names)]
    for key, group in seen.items():
        step = group.get("step")
        rate = f"{step['bytes'] / step['best'] / 1e9:.1f}" if step else ""
        cells = [_cell(group.get(name), step) for name in names]
        lines.append("| " + " | ".join([*map(str, key), rate, *cells]) + " |")
    return "\n".join(lines)


def _cell(record: Record | None, step: Record | None) -> str:
    if record is None:
        return ""
    text = f"{record['best'] * 1e6:,.0f}"
    if step is None or record is step:
        return text
    return f"{text} ({record['best'] / step['best']:.3g}x)"


def report(records: Sequence[Record], facts: Record, command: str) -> str:
    """Bars and times, with where they were measured, for docs/results.md."""
    roof = max((x.get("read", 0.0) for x in records if x.get("threads") == 1), default=0.0)
    where = (
        f"{facts['cpu']}, torch {facts['torch']}, less {facts['less']} ({facts['commit']}), SIMD "
        f"level {facts['simd']}; one core reads {roof / 1e9:.1f} GB/s. Command: `{command}`."
    )
    return f"""\
{where}

{bars_table(bars(records))}

Microseconds a layer and step, the fastest of turns over layers that no cache holds together; in
brackets against `step`, which is without maps: eviction alone. GB/s: k and v of the slots that
`step` reads. `sdpa N`: torch's attention over a full cache of N tokens, `sdpa kept`: over C;
`attend` and `reference`: `LessKVCache.attend` with float32 maps, native and in plain torch.

{times_table(records)}"""
