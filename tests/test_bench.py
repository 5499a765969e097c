from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("less._C")

from bench import run
from bench.cases import CASES, SMALL


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", run.TOLERANCE, ids=str)
def test_every_case_is_correct(name: str, dtype: torch.dtype) -> None:
    case = CASES[name](SMALL, dtype)
    assert case.error() <= run.TOLERANCE[dtype]
    assert case.bytes > 0


def test_a_bench_prints_a_row_and_writes_a_json_line_per_case(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "bench.jsonl"
    words = ["--small", "--only", "fold", "--dtype", "float32", "--seconds", "0.001"]
    threads = str(torch.get_num_threads())
    assert run.main([*words, "--json", str(path), "--threads", threads]) == 0
    header, _, row = capsys.readouterr().out.splitlines()
    assert header.startswith("# cpu ")
    assert row.startswith("fold ")
    record = json.loads(path.read_text())
    assert record["case"] == "fold"
    assert record["bytes"] == 2 * (8 * 3 * 16 + 12 * 3 + 16 * 4)


def test_a_bench_refuses_to_time_what_is_not_correct() -> None:
    case = dataclasses.replace(CASES["fold"](SMALL, torch.float32), error=lambda: float("nan"))
    with pytest.raises(ValueError, match="not timed"):
        run.measure(case, 1e-3, 0.001)
