"""Bugs planted in the kernels are found, by name, by the tests that the kernels pass."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests import emulated
from tests.ops.planted import SCENARIOS
from tests.planted import CSRC, Bug, PatchError, hunks, load

ROOT = emulated.ROOT
BUGS = load()
EVERY_BUG = pytest.mark.parametrize("bug", BUGS, ids=[bug.name for bug in BUGS])
# Findings that are no error of the emulator's.
COMPARED = {"conflicts", "wrong", "bits", "unwritten"}


@EVERY_BUG
def test_a_bug_can_be_planted_in_the_kernels_as_they_are(bug: Bug) -> None:
    planted = bug.plant()
    changed = {name for name, text in planted.items() if text != read(name)}
    assert changed == {hunk.file for hunk in bug.hunks}
    assert changed <= included(bug.unit)
    assert bug.scenario in SCENARIOS
    assert bug.finding in COMPARED | kinds()


def read(name: str) -> str:
    return (CSRC / "cuda" / name).read_text()


def included(name: str) -> set[str]:
    """The files of csrc/cuda that one of them compiles, by their includes."""
    found, left = set(), [name]
    while left:
        file = left.pop()
        if file not in found:
            found.add(file)
            left += re.findall(r'^#include "cuda/(.+)"', read(file), flags=re.M)
    return found


@cache
def kinds() -> set[str]:
    """The kinds of errors in the emulator's README."""
    text = (ROOT / "emulator" / "README.md").read_text()
    return set(re.findall(r"`([a-z-]+)`", text.split("## Kinds of errors")[1].split("##")[0]))


def test_bugs_have_names_of_their_own() -> None:
    assert len({bug.name for bug in BUGS}) == len(BUGS) > 0


def test_the_kernels_have_no_hooks_for_bugs() -> None:
    files = [path for path in CSRC.rglob("*") if path.is_file()]
    assert not [path.name for path in files if re.search(r"LESS_(BUG|PLANTED)", path.read_text())]


PATCH = """\
--- x.h
 a();
-b();
+c();
"""


@pytest.mark.parametrize(("text", "count"), [("b();\n", 0), ("a();\nb();\n" * 2, 2)])
def test_a_patch_whose_lines_do_not_stand_there_once_is_refused(
    tmp_path: Path, text: str, count: int
) -> None:
    folder = tmp_path / "cuda"
    folder.mkdir()
    (folder / "x.h").write_text(text)
    bug = Bug("wrong_line", "x.h", "compact", "race", hunks(PATCH))
    with pytest.raises(PatchError, match=rf"wrong_line: x\.h .* {count} times:\na\(\);\nb\(\);"):
        bug.plant(tmp_path)


def test_a_patch_changes_its_lines_and_no_others(tmp_path: Path) -> None:
    folder = tmp_path / "cuda"
    folder.mkdir()
    (folder / "x.h").write_text("a();\nb();\n  a();\nb();\n")
    bug = Bug("right_line", "x.h", "compact", "race", hunks(PATCH))
    assert bug.plant(tmp_path) == {"x.h": "a();\nc();\n  a();\nb();\n"}


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


@pytest.mark.proof
@pytest.mark.skipif(not emulated.supported(), reason="NO EMULATOR: wants Linux on x86-64")
@EVERY_BUG
def test_a_planted_bug_is_found_by_its_name(bug: Bug) -> None:
    before = sound(bug.scenario)
    bug.write(emulated.TREE / "planted" / bug.name)
    name = f"less_planted_ops_{bug.name}"
    said = run(emulated.make("track", name) / f"lib{name}.so", bug.scenario)
    if bug.finding == "conflicts":
        assert conflicts(json.loads(said)) > conflicts(before)
    elif bug.finding == "bits":
        assert json.loads(said)["digest"] != before["digest"]
    elif bug.finding == "unwritten":
        assert "never written" in said
    else:
        assert f'"kind":"{bug.finding}"' in said
