"""Bugs planted in the kernels are found, by name, by the tests that the kernels pass."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests import emulated

pytestmark = [
    pytest.mark.proof,
    pytest.mark.skipif(not emulated.supported(), reason="NO EMULATOR: wants Linux on x86-64"),
]
ROOT = emulated.ROOT
PLANTED = [
    line.split()
    for line in (ROOT / "tests" / "planted.txt").read_text().splitlines()
    if line and not line.startswith("#")
]


def run(library: Path, scenario: str) -> str:
    command = [sys.executable, "-m", "tests.ops.planted", str(library), scenario]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def conflicts(profile: dict[str, Any]) -> int:
    shared = profile["shared"]
    return int(shared["wavefronts"]) - int(shared["ideal_wavefronts"])


@cache
def sound(scenario: str) -> dict[str, Any]:
    """The profile of the kernel as it is, in which nothing may be found."""
    profile: dict[str, Any] = json.loads(run(emulated.build("track"), scenario))
    return profile


@pytest.mark.parametrize("planted", PLANTED, ids=[planted[1] for planted in PLANTED])
def test_a_planted_bug_is_found_by_its_name(planted: list[str]) -> None:
    file, bug, kind, *named = planted
    scenario = named[0] if named else file
    before = sound(scenario)
    name = f"less_planted_ops_{bug}"
    said = run(emulated.make("track", name) / f"lib{name}.so", scenario)
    if kind == "conflicts":
        assert conflicts(json.loads(said)) > conflicts(before)
    elif kind == "bits":
        assert json.loads(said)["digest"] != before["digest"]
    elif kind == "unwritten":
        assert "never written" in said
    else:
        assert f'"kind":"{kind}"' in said
