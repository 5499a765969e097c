"""The stages of make: what they show, and what a failure shows."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))
try:
    import stage
finally:
    sys.path.pop(0)


def run(*words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, ROOT / "tools" / "stage.py", *map(str, words)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_commands_run_side_by_side_and_their_output_stays_away(tmp_path: Path) -> None:
    # Each waits for what the other makes.
    waits = "while ! test -e {}/{}; do sleep 0.02; done"
    lines = [
        f"touch {tmp_path}/{a}; {waits.format(tmp_path, b)}; echo noise" for a, b in ("ab", "ba")
    ]
    done = run("1/2 things", 70, *lines)
    assert done.returncode == 0, done.stderr
    first, last = done.stdout.splitlines()
    assert first == "1/2 things: about 1 min 10 s left"
    assert last.startswith("1/2 things: done in ")


def test_what_less_says_of_its_build_is_passed_on() -> None:
    done = run("things", 5, "echo '   -- less: CUDA off (no reason)'; echo '-- Found Python'")
    assert "  less: CUDA off (no reason)\n" in done.stdout
    assert "Python" not in done.stdout


def test_a_failure_shows_what_was_said_and_ends_the_others(tmp_path: Path) -> None:
    start = time.monotonic()
    done = run("things", 5, "echo why; exit 7", f"sleep 30; touch {tmp_path}/late")
    assert done.returncode == 7
    assert time.monotonic() - start < 15
    assert "`echo why; exit 7` failed; it said:\n\nwhy\n" in done.stderr


def test_the_time_left_is_the_usual_one_until_steps_are_counted() -> None:
    assert stage.seconds_left(0.0, 30.0, 100.0) == 70.0
    assert stage.seconds_left(0.0, 130.0, 100.0) == 0.0
    # On a machine that is four times as slow, the count of steps tells.
    assert stage.seconds_left(0.9, 360.0, 100.0) == pytest.approx(40.0)
    assert 90.0 < stage.seconds_left(0.01, 10.0, 100.0) < 150.0
    assert stage.seconds_left(1.0, 360.0, 100.0) == 0.0


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.0, "a few seconds left, or longer than usual"),
        (42.0, "about 40 s left"),
        (58.0, "about 1 min left"),
        (131.0, "about 2 min 10 s left"),
    ],
)
def test_times_are_said_in_minutes_and_steps_of_five_seconds(seconds: float, words: str) -> None:
    assert stage.in_words(seconds) == words


@pytest.mark.parametrize(
    ("line", "doing"),
    [
        ("[3/40] Building CXX object x.o", "step 3 of 40 of the build"),
        ("Collecting torch==2.13.0 (from -r requirements.txt (line 3))", "fetching torch"),
        ("Installing collected packages: mpmath, torch", "installing packages"),
        ("Converting and de-quantizing GGUF tensors...:  9%|", "converting the model"),
    ],
)
def test_a_line_of_progress_is_understood(line: str, doing: str) -> None:
    command = stage.Command(f"echo '{line}'; echo other words")
    assert command.wait(10)
    assert command.doing == doing
