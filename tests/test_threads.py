"""How many threads the command line computes with, and how they wait."""

from __future__ import annotations

import argparse
import io
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rich.console import Console

from less.cli import threads

ROOT = Path(__file__).resolve().parent.parent


def faked(seconds: dict[int, float]) -> Callable[[int], float]:
    return lambda n: seconds[n]


@pytest.mark.parametrize(
    ("seconds", "wanted"),
    [
        ({1: 10.0, 2: 6.0}, 2),
        ({1: 10.0, 2: 9.5}, 1),  # not worth a core
        ({1: 10.0, 2: 160.0}, 1),  # two that wait for each other
        ({1: 10.0, 2: 6.0, 4: 5.8, 8: 3.0}, 8),
        ({1: 10.0, 2: 6.0, 4: 5.8, 6: 5.7}, 2),
        ({1: 10.0, 2: 30.0, 4: 4.0}, 4),
    ],
)
def test_the_fastest_number_of_threads_is_chosen(seconds: dict[int, float], wanted: int) -> None:
    chosen = threads.choose(max(seconds), faked(seconds))
    assert chosen.threads == wanted
    for n, took in seconds.items():
        assert f"{took * 1e3:.1f} ms with {n}" in chosen.why


def test_a_busy_moment_decides_nothing() -> None:
    # In two of seven turns another program runs: two threads take twenty times as long.
    turns = {1: iter([1.0] * 7), 2: iter([0.6, 12.0, 0.6, 0.6, 12.0, 0.6, 0.6])}
    assert threads.choose(2, lambda n: next(turns[n])).threads == 2


def test_the_numbers_take_turns() -> None:
    asked: list[int] = []

    def timed(n: int) -> float:
        asked.append(n)
        return 1.0

    threads.choose(4, timed, rounds=3)
    assert asked == [1, 2, 4] * 3


@pytest.mark.parametrize(
    ("most", "tried"), [(1, [1]), (2, [1, 2]), (6, [1, 2, 4, 6]), (16, [1, 2, 4, 8, 16])]
)
def test_no_more_threads_are_tried_than_are_allowed(most: int, tried: list[int]) -> None:
    assert threads.counts(most) == tried


def test_one_thread_is_not_measured() -> None:
    def never(n: int) -> float:
        raise AssertionError("measured")

    assert threads.choose(1, never).threads == 1


def test_the_probe_takes_the_threads_that_it_is_asked_for(with_threads: object) -> None:
    probe = threads.Probe()
    for n in (1, 2):
        assert probe(n) > 0
        assert torch.get_num_threads() == n


def test_a_choice_is_said_in_one_line_and_threads_overrides_it(
    monkeypatch: pytest.MonkeyPatch, with_threads: Callable[[int], None]
) -> None:
    monkeypatch.setattr(threads, "Probe", lambda: faked({1: 0.004, 2: 0.003}))
    with_threads(2)
    console = Console(file=io.StringIO(), width=200)
    threads.set_threads(argparse.Namespace(threads=None), console)
    assert torch.get_num_threads() == 2
    said = console.file.getvalue()  # type: ignore[attr-defined]
    assert said.count("\n") == 1
    assert "threads   2: a small decode step takes 4.0 ms with 1, 3.0 ms with 2" in said

    monkeypatch.setattr(threads, "Probe", lambda: pytest.fail("measured"))
    threads.set_threads(argparse.Namespace(threads=1), console)
    assert torch.get_num_threads() == 1
    assert console.file.getvalue() == said  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", threads.WAITING)
def test_a_policy_of_waiting_that_is_set_is_kept(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "execve", lambda *_: pytest.fail("started anew"))
    environ = {name: "1"}
    threads.wait_passively(environ)
    assert environ == {name: "1"}


@pytest.mark.parametrize(("word", "waits"), [("demo", True), ("info", False)])
def test_commands_that_compute_run_with_threads_that_sleep(word: str, waits: bool) -> None:
    """Where torch, and so OpenMP, is loaded already, they start anew."""
    code = (
        "import os, sys, torch\n"
        "from less.cli import command\n"
        "print('waiting:', os.environ.get('OMP_WAIT_POLICY'))\n"
        f"sys.argv = ['less-kv', '{word}', '--help']\n"
        "command()\n"
    )
    env = {name: value for name, value in os.environ.items() if name not in threads.WAITING}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, check=True
    )
    said = [line for line in done.stdout.splitlines() if line.startswith("waiting:")]
    assert said == ["waiting: None", "waiting: passive"][: 1 + waits]
    assert done.stdout.count("usage: less-kv") == 1


def test_a_command_loads_no_torch_before_it_has_set_how_threads_wait() -> None:
    code = (
        "import os, sys\n"
        "import less.cli\n"
        "from less.cli import threads\n"
        "assert 'torch' not in sys.modules\n"
        "threads.wait_passively()\n"
        "print(os.environ['OMP_WAIT_POLICY'])\n"
    )
    env = {name: value for name, value in os.environ.items() if name not in threads.WAITING}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, check=True
    )
    assert done.stdout == "passive\n"
