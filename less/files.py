"""Files: texts, read or refused by what is wrong with them; writing them whole; what is shipped.

torch is not imported.
"""

from __future__ import annotations

import os
from pathlib import Path

SHIPPED = Path(__file__).parent / "sidekicks"  # a folder for each sidekick, by its name
CALIBRATION_FILE = "rows.json"  # that a folder with a calibration has


def shipped_calibrations() -> list[str]:
    """Names of the calibrations that come with this package, ascending."""
    return sorted(p.parent.name for p in SHIPPED.glob(f"*/{CALIBRATION_FILE}"))


def text_files(source: str | os.PathLike[str]) -> list[Path]:
    """The file of that name, or a folder's .txt and .md files in order of name.

    Raises:
        FileNotFoundError: There is none.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.suffix in (".txt", ".md") and p.is_file())
        if not files:
            raise FileNotFoundError(f"text: {path} is a folder without .txt or .md files")
        return files
    if not path.exists():
        raise FileNotFoundError(f"text: {path} does not exist")
    return [path]


def read_text(path: Path) -> str:
    """The text of a UTF-8 file.

    Raises:
        OSError: It does not exist, is a folder, or must not be read; the message says which.
        ValueError: It is not UTF-8; the message says from which byte on.
    """
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise FileNotFoundError(f"text: {path} does not exist") from None
    except IsADirectoryError:
        raise IsADirectoryError(f"text: {path} is a folder, not a text file") from None
    except UnicodeDecodeError as error:
        raise ValueError(
            f"text: {path} is not UTF-8: byte {error.start} is {error.object[error.start]:#04x} "
            f"({error.reason})"
        ) from None
    except OSError as error:
        raise type(error)(f"text: {path} cannot be read: {error.strerror}") from None


def read_texts(source: str | os.PathLike[str]) -> list[str]:
    """Texts of a file, or of a folder's .txt and .md files in order of name; not the empty ones.

    Raises:
        OSError, ValueError: As ``text_files`` and ``read_text``.
    """
    texts = [read_text(file) for file in text_files(source)]
    return [text for text in texts if text.strip()]


def around_section(path: Path, name: str) -> tuple[str, str]:
    """What stands before and behind a section of a file, its begin and end lines included.

    Raises:
        ValueError: the file has no such pair of lines.
        OSError: as ``read_text``.
    """
    begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
    head, found, rest = read_text(path).partition(begin)
    _, closed, tail = rest.partition(end)
    if not (found and closed):
        raise ValueError(f"{path} has no lines {begin} … {end}")
    return head + begin, end + tail


def write_whole(path: Path, content: bytes) -> None:
    """Write a file so that a reader finds the old one or the new one, never a part.

    Raises:
        OSError: It cannot be written; the old file is as it was.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with part.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
