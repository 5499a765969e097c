from __future__ import annotations

import json
import subprocess
from typing import Any

import pytest

from bench import instructions, native

DUMP = """\
version: 1
desc: Trigger: Client Request: fold llama-2 float16 N=64
events: Ir
summary: 1234
"""


def test_a_dump_is_read_by_its_name() -> None:
    assert instructions.parse(DUMP) == ("fold llama-2 float16 N=64", 1234)


def test_the_dump_at_the_end_of_the_program_counts_nothing() -> None:
    assert instructions.parse(DUMP.replace("Client Request: ", "Program termination")) is None


def test_three_per_cent_more_is_let_through_and_what_is_above_is_not() -> None:
    rows, wrong = instructions.compare(
        {"a": 1030, "b": 1031, "c": 1}, {"a": 1000, "b": 1000, "c": 9}
    )
    assert len(rows) == 3
    assert [line.partition(":")[0] for line in wrong] == ["b"]


def test_a_case_that_is_on_one_side_only_is_refused() -> None:
    _, wrong = instructions.compare({"new": 1}, {"old": 1})
    assert wrong == ["new: not recorded yet", "old: not counted any more"]


def test_a_step_that_merges_is_held_against_the_same_step_that_forgets() -> None:
    rows = instructions.merging({"a forget": 100, "a merge": 112, "b merge": 5, "fold": 3})
    assert rows == ["a: merging takes 1.120 times what forgetting takes"]


def test_another_compiler_is_said_loudly(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(native, "require", lambda *_: None)
    monkeypatch.setattr(native, "build", lambda target: target)
    monkeypatch.setattr(instructions, "count", lambda *_: ("Odd 99", {"fold": 7}))
    assert instructions.main([]) == 0
    shown = capsys.readouterr()
    assert "fold" in shown.out
    assert "NOTHING WAS GATED" in shown.err
    assert "Odd 99" in shown.err


def test_a_failed_build_says_which_command_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    real = subprocess.run

    def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        if "--version" in command:
            return real(command, **options)
        return subprocess.CompletedProcess(command, 1, stdout="no rule", stderr="")

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(SystemExit, match="no rule"):
        native.build("less_instructions")


def test_what_is_recorded_can_be_read() -> None:
    record = json.loads(instructions.RECORD.read_text())
    for compiler, levels in record.items():
        assert compiler.rpartition(" ")[2].isdigit()
        for level, counts in levels.items():
            assert level in instructions.LEVELS
            assert all(isinstance(n, int) and n > 0 for n in counts.values())
