"""The text that training and calibration run on, and the device that they use."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_WIKIPEDIA = "wikipedia"


def add_text(parser: argparse.ArgumentParser) -> None:
    """Add ``--text``."""
    parser.add_argument(
        "--text", nargs="+", default=[_WIKIPEDIA], metavar="FILE",
        help="text files, folders of them, or 'wikipedia': the training articles of the package "
        "gensim (default)",
    )  # fmt: skip


def named_device(name: str) -> torch.device:
    """The device of that name.

    Raises:
        ValueError: It is none, or not there.
    """
    import torch

    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        raise ValueError(f"--device {name}: {str(error).splitlines()[0]}") from error


def check_texts(names: list[str]) -> None:
    """Refuse texts that are not there or must not be read; UTF-8 is looked at as they are read.

    Raises:
        OSError, AssetError: The message names the file, or what to install.
    """
    from less.evaluate import sources
    from less.files import text_files

    if names == [_WIKIPEDIA]:
        sources.check_wikipedia()
        return
    for name in names:
        for file in text_files(name):
            file.open("rb").close()


def read_named_texts(names: list[str]) -> tuple[Iterable[str], str]:
    """The texts of --text, and their names for the record (no paths)."""
    from less.evaluate import assets
    from less.fit import read_stream

    if names == [_WIKIPEDIA]:
        return assets.wikipedia_articles("train"), "wikipedia (training articles)"
    return read_stream(names), ", ".join(Path(name).name for name in names)
