"""Bugs planted in the kernels are found, by name, by the tests that the kernels pass."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import cache
from pathlib import Path

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


def run(library: Path, op: str) -> str:
    command = [sys.executable, "-m", "tests.ops.planted", str(library), op]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def conflicts(profile: str) -> int:
    shared = json.loads(profile)["shared"]
    return int(shared["wavefronts"]) - int(shared["ideal_wavefronts"])


@cache
def sound(op: str) -> int:
    """The bank conflicts of the kernel as it is, in which nothing may be found."""
    return conflicts(run(emulated.build("track"), op))


@pytest.mark.parametrize(("op", "bug", "kind"), PLANTED, ids=[bug for _, bug, _ in PLANTED])
def test_a_planted_bug_is_found_by_its_name(op: str, bug: str, kind: str) -> None:
    before = sound(op)
    name = f"less_planted_ops_{bug}"
    said = run(emulated.make("track", name) / f"lib{name}.so", op)
    if kind == "conflicts":
        assert conflicts(said) > before
    elif kind == "unwritten":
        assert "never written" in said
    else:
        assert f'"kind":"{kind}"' in said
