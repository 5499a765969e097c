"""What every command looks at before a model is loaded: files, folders, packages."""

from __future__ import annotations

import importlib.util
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

from less.files import shipped_calibrations

_DEMO = {"transformers": "transformers", "rich": "rich", "matplotlib": "matplotlib"}


def check_packages(command: str, needed: Mapping[str, str] = _DEMO, extra: str = "demo") -> None:
    """Refuse to start without the packages that would be missed minutes later.

    Args:
        command: For the message.
        needed: Module name -> what pip installs.
        extra: The extra of this package that has them all.

    Raises:
        RuntimeError: naming them and the pip command.
    """
    missing = [pip for module, pip in needed.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise RuntimeError(
            f"{command} needs {', '.join(missing)}: pip install 'less-kv[{extra}]' (or: "
            f"pip install {' '.join(missing)})"
        )


def check_folder(option: str, folder: Path) -> None:
    """Refuse a folder that cannot be made or written to; nothing stays behind.

    Raises:
        ValueError: naming the option and what is in the way.
    """
    there = folder.absolute()
    while not there.exists() and not there.is_symlink():
        there = there.parent
    if not there.is_dir():
        raise ValueError(f"{option} {folder}: {there} is not a folder")
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise ValueError(f"{option} {folder}: {there} is not writable: {error.strerror}") from None


def check_file(option: str, file: Path) -> None:
    """Refuse a file that cannot be written; writes nothing.

    Raises:
        ValueError: naming the option and what is in the way.
    """
    if file.is_dir():
        raise ValueError(f"{option} {file} is a folder, not a file")
    if not file.parent.is_dir():
        raise ValueError(f"{option} {file}: {file.parent} is not a folder")
    check_folder(option, file.parent)
    if file.exists() and not os.access(file, os.W_OK):
        raise ValueError(f"{option} {file} is not writable")


def check_calibration(wanted: str) -> None:
    """Refuse a calibration of which nothing is there; its content is looked at when it is read.

    Raises:
        ValueError: naming the shipped ones.
    """
    if Path(wanted).expanduser().is_dir():
        return
    if wanted not in shipped_calibrations():
        shipped = ", ".join(shipped_calibrations()) or "none"
        raise ValueError(
            f"--calibration {wanted} is neither a folder nor shipped (shipped: {shipped})"
        )


def check_sidekick(wanted: str | None) -> None:
    """Refuse a sidekick of which nothing is there; its content is looked at when it is read.

    Raises:
        ValueError: naming the shipped ones.
    """
    if wanted in (None, "none") or Path(wanted).is_dir():
        return
    from less.sidekick import shipped_names  # imports torch

    if wanted not in shipped_names():
        shipped = ", ".join(shipped_names()) or "none"
        raise ValueError(
            f"--sidekick {wanted} is neither a folder, nor 'none', nor shipped (shipped: {shipped})"
        )
