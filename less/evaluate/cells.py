"""Results that are measured once: JSON lines in a file, found again by a hash of their content."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from less import files

Cell = dict[str, Any]  # with "kind": "cell" and "key"


def key_of(content: Any) -> str:
    """sha256 of JSON-ready values: all that a result follows from."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


class Cells:
    """The cells of a file. A line is there whole or not at all.

    Args:
        path: Made when the first cell is added.

    Attributes:
        known: Key -> cell, in the order of the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.known: dict[str, Cell] = {}
        if not path.exists():
            return
        files.require_regular(str(path), path)
        lines = path.read_bytes().splitlines(keepends=True)
        if lines and not lines[-1].endswith(b"\n"):  # a kill came in the middle of a line
            lines.pop()
            files.write_whole(path, b"".join(lines))
        for number, line in enumerate(lines, 1):
            try:
                cell = files.parse_json(f"line {number}", line)
                if not isinstance(cell, dict):
                    raise ValueError(f"line {number}: must hold an object")
                if cell.get("kind") == "cell":
                    if not isinstance(cell.get("key"), str):
                        raise ValueError(f"line {number}: a cell must have a key")
                    self.known[cell["key"]] = cell
            except ValueError as error:
                raise ValueError(f"{path} is damaged: {error}") from None

    def add(self, lines: Iterable[dict[str, Any]]) -> None:
        """Append lines, and have them on the disk before this returns."""
        lines = list(lines)
        text = "".join(json.dumps(line, allow_nan=False) + "\n" for line in lines)
        with self.path.open("ab") as file:
            file.write(text.encode())
            file.flush()
            os.fsync(file.fileno())
        self.known.update({x["key"]: x for x in lines if x.get("kind") == "cell"})
