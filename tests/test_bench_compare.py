from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("less._C")

from bench import __main__ as command
from bench import bars, compare, native
from bench.interleave import CACHE_BYTES, Contender, interleave, layers_for

TINY = compare.Shape("tiny", Q=4, K=2, D=16, S=12, R=3, E=8)


class NoRoof:
    """Stands in for the read loop, which is compiled."""

    best = 1e9

    def __init__(self, *_: object) -> None:
        """Take what ReadRate takes."""

    def run(self, _: int = 0) -> None:
        """Do nothing."""


@pytest.mark.parametrize("dtype", compare.DTYPES)
@pytest.mark.parametrize("maps", [None, *compare.MAPS])
def test_layers_step_as_the_reference_does(dtype: str, maps: str | None) -> None:
    layers = compare.Layers(compare.Group(TINY, dtype), 1, maps)
    assert layers.check() >= 0


def test_a_step_that_is_not_correct_is_not_timed() -> None:
    layers = compare.Layers(compare.Group(TINY, "float32"), 1)
    layers.run = lambda i, victim=None: layers.out.fill_(9.0)  # type: ignore[method-assign]
    with pytest.raises(compare.NotCorrectError, match="off by"):
        layers.check()


def test_contenders_take_turns() -> None:
    order: list[str] = []
    pair = [Contender(name, lambda _, name=name: order.append(name), 1) for name in "ab"]
    interleave(pair, 0.0, least=3)
    assert order == list("abab") * 2
    assert [len(each.seconds) for each in pair] == [3, 3]


def test_layers_exceed_every_cache_together() -> None:
    assert layers_for(4 << 20) * (4 << 20) >= CACHE_BYTES
    assert layers_for(64 << 20) == 16
    assert layers_for(2 << 30) == 1


def test_an_op_call_on_an_empty_problem_allocates_nothing() -> None:
    assert compare.overhead()["allocations"] == 0


def test_the_command_writes_a_line_per_contender_and_the_bars(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(compare.MODELS, "smollm2", replace(TINY, name="smollm2"))
    monkeypatch.setattr(compare, "layers_for", lambda *_: 1)
    monkeypatch.setattr(command, "ReadRate", NoRoof)
    monkeypatch.setattr(native, "build", lambda target: Path(target))
    path, page = tmp_path / "lines.jsonl", tmp_path / "page.md"
    page.write_text("before\n<!-- begin speed -->\nstale figures\n<!-- end speed -->\nafter\n")
    threads = str(torch.get_num_threads())
    words = ["--parts", "compare", "--models", "smollm2", "--kept", "12", "--batch", "2"]
    words += ["--dtypes", "float32", "--full", "32", "--seconds", "0", "--threads", threads]
    assert command.main([*words, "--json", str(path), "--update", str(page)]) == 0
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert [x["contender"] for x in records][:2] == ["step", "attention alone"]
    assert {x["B"] for x in records} == {2}
    assert all(x["best"] <= x["median"] for x in records)
    assert "| smollm2 | 12 | 2 |" in page.read_text()
    assert "stale" not in page.read_text()
    assert "not measured" in capsys.readouterr().out


def record(contender: str, best: float, **more: object) -> bars.Record:
    base = {"part": "compare", "shape": "llama-2-7b", "B": 1, "C": 205, "threads": 1}
    return base | {"dtype": "float16", "contender": contender, "best": best} | more


def test_bars_say_met_missed_or_not_measured() -> None:
    rows = bars.bars(
        [
            record("step", 1.0, bytes=80, read=100.0),
            record("sdpa 4096", 150.0),
            record("attention alone", 0.5),
        ]
    )
    by = {(b.number, b.what): b for b in rows}
    first = next(b for b in rows if b.number == 1)
    assert (first.got, first.met) == ("80 %", False)
    assert next(b for b in rows if b.number == 2).met is True
    assert next(b for b in rows if b.number == 5).met is False
    assert next(b for b in rows if b.number == 7).met is None
    assert {b.number for b in rows} == set(range(1, 12))
    assert len(by) == len(rows)


def test_a_library_that_is_not_installed_is_named_with_its_package(tmp_path: Path) -> None:
    absent = ["-DCMAKE_DISABLE_FIND_PACKAGE_benchmark=ON"]
    with pytest.raises(native.MissingError, match="apt-get install libbenchmark-dev"):
        native.build("less_kernels", tmp_path, absent)


def test_a_bench_goes_on_without_a_part_and_names_it_at_the_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def lacking(target: str) -> Path:
        raise native.MissingError(f"bench: {target} needs a library")

    monkeypatch.setattr(native, "build", lacking)
    words = ["--parts", "kernels", "overhead", "--json", str(tmp_path / "rows.jsonl")]
    assert command.main(words) == 0
    shown = capsys.readouterr().out
    assert "empty problem: " in shown
    assert shown.endswith("\nLEFT OUT: kernels (bench: less_kernels needs a library)\n")
