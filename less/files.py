"""Files: texts and JSON, refused by what is wrong with them; writing whole; what is shipped.

torch is not imported.
"""

from __future__ import annotations

import itertools
import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

#: Bytes of the largest JSON file that is read; those of this library have less than a hundredth.
LARGEST_JSON = 64 << 20
_parts = itertools.count()

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
        ValueError: It is no regular file, which might never end, or not UTF-8; the message says
            from which byte on.
    """
    try:
        if path.exists() and not path.is_dir():
            require_regular(f"text: {path}", path)
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


def parse_json(at: str, text: str | bytes) -> Any:
    """JSON as the standard has it, without what Python's reader lets through.

    Args:
        at: Who reads which file, for the message.
        text: The JSON.

    Raises:
        ValueError: It is truncated or not JSON, names a key twice, or has NaN, an infinity or more
            levels than Python can follow.
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"the key {twice!r} stands twice")
        return found

    def refused(constant: str) -> NoReturn:
        raise ValueError(f"{constant} is no number")

    try:
        return json.loads(text, object_pairs_hook=once, parse_constant=refused)
    except RecursionError:
        raise ValueError(f"{at}: not JSON: too many levels") from None
    except ValueError as error:  # of its bytes too, where they are no UTF-8
        raise ValueError(f"{at}: truncated or not JSON ({error})") from None


def require_regular(at: str, path: Path) -> int:
    """Bytes of a regular file; another, such as a pipe or a device, might never end.

    Args:
        at: Who reads which file, for the message.
        path: The file.

    Raises:
        OSError: There is none.
        ValueError: It is another.
    """
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        raise ValueError(f"{at}: must be a regular file")
    return found.st_size


def read_json(at: str, path: Path, most: int = LARGEST_JSON) -> Any:
    """The JSON of a regular file.

    Args:
        at: Who reads which file, for the message.
        path: The file.
        most: Bytes that it may have.

    Raises:
        OSError: It cannot be read.
        ValueError: It is no regular file, is larger, or as ``parse_json`` says.
    """
    size = require_regular(at, path)
    if size > most:
        raise ValueError(f"{at}: must have at most {most} bytes, got {size}")
    return parse_json(at, path.read_bytes())


def write_whole(path: Path, content: bytes | str | Callable[[Path], object]) -> None:
    """Write a file so that a reader finds the old one or the new one, never a part.

    A link stays one, and what it names is written. A device or a pipe, which has no old content,
    is written directly.

    Args:
        path: The file.
        content: What is written, a text as UTF-8; or a function that writes the file that it is
            given, for libraries that write files themselves.

    Raises:
        OSError: It cannot be written; the old file is as it was.
    """
    path = path.resolve()
    if path.exists() and not path.is_file() and not path.is_dir():
        part = path
    else:
        # No name that is there: somebody else's link would be followed.
        part = path.with_name(f".{path.name}.{os.getpid()}.{next(_parts)}{path.suffix}")
        part.touch(exist_ok=False)
    try:
        if callable(content):
            content(part)
        else:
            part.write_bytes(content.encode() if isinstance(content, str) else content)
        if part is path:
            return
        _to_disk(part)
        os.replace(part, path)
    finally:
        if part is not path:
            part.unlink(missing_ok=True)
    _to_disk(path.parent)


def _to_disk(path: Path) -> None:
    """Wait until a file, or the names in a folder, would outlive a power cut."""
    at = os.open(path, os.O_RDONLY)
    try:
        os.fsync(at)
    finally:
        os.close(at)
