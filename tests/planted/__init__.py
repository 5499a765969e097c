"""Bugs for copies of the CUDA kernels: ``make planted`` shows that the emulator finds each.

A file ``<op>.toml`` has a table for each bug, and above them what its bugs share:

``unit``
    The file of csrc/cuda that is compiled with the bug.
``scenario``
    What is run, a function of tests/ops/planted.py.
``finding``
    How the emulator's tier track names the error. Or ``conflicts``: no error, but more bank
    conflicts than without the bug. ``wrong``: the result differs from the reference's. ``bits``:
    it differs from the sound kernel's. ``unwritten``: a part of it was never written.
``patch``
    Hunks of a unified diff without positions. ``--- file``, below csrc/cuda, begins a hunk. Its
    lines without those with ``+`` must stand in the file exactly once; they become its lines
    without those with ``-``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import tomllib

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[1] / "csrc"


class PatchError(ValueError):
    """A patch does not fit the sources; the message names the bug, the file and the lines."""


@dataclass(frozen=True)
class Hunk:
    """Lines of a file, and what they become; both end with a newline, or are empty."""

    file: str
    old: str
    new: str


@dataclass(frozen=True)
class Bug:
    """A bug that can be planted; the module's docstring explains the fields."""

    name: str
    unit: str
    scenario: str
    finding: str
    hunks: tuple[Hunk, ...]

    def plant(self, csrc: Path = CSRC) -> dict[str, str]:
        """The text of each file with the bug in it, and of the unit, by path below csrc/cuda.

        Args:
            csrc: The sources, which stay as they are.

        Raises:
            PatchError: The lines of a hunk do not stand in its file exactly once.
        """
        names = {self.unit, *(hunk.file for hunk in self.hunks)}
        texts = {name: (csrc / "cuda" / name).read_text() for name in names}
        for hunk in self.hunks:
            before, *after = re.split(f"^{re.escape(hunk.old)}", texts[hunk.file], flags=re.M)
            if len(after) != 1:
                raise PatchError(
                    f"{self.name}: {hunk.file} must have these lines once, has them {len(after)} "
                    f"times:\n{hunk.old}"
                )
            texts[hunk.file] = before + hunk.new + after[0]
        return texts

    def write(self, folder: Path) -> None:
        """Write the files of `plant` into a folder, below csrc/cuda; equal ones stay untouched."""
        for name, text in self.plant().items():
            path = folder / "csrc" / "cuda" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if not path.exists() or path.read_text() != text:
                path.write_text(text)


def hunks(patch: str) -> tuple[Hunk, ...]:
    """The hunks of a bug's patch."""
    found = []
    for part in f"\n{patch}".split("\n--- ")[1:]:
        file, *lines = part.removesuffix("\n").split("\n")
        old = "".join(f"{line[1:]}\n" for line in lines if line[:1] != "+")
        new = "".join(f"{line[1:]}\n" for line in lines if line[:1] != "-")
        found.append(Hunk(file, old, new))
    return tuple(found)


def load() -> list[Bug]:
    """Every bug of the folder's files."""
    bugs = []
    for path in sorted(HERE.glob("*.toml")):
        table = tomllib.loads(path.read_text())
        shared = {key: value for key, value in table.items() if isinstance(value, str)}
        for name, own in table.items():
            if isinstance(own, dict):
                fields = {**shared, **own}
                patch = hunks(fields.pop("patch"))
                bugs.append(Bug(name, hunks=patch, **fields))
    return bugs
