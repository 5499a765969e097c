"""How slots are stored, on the command line: ``--dtype``, or ``--rows`` and what belongs to it."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from less.cli import checks

if TYPE_CHECKING:
    import torch

    from less import Calibration
    from less.evaluate.methods import Storage

DTYPES = ("float32", "bfloat16", "float16", "int8")
#: The names of ``less.dtypes.FORMATS``, known before torch is imported.
FORMATS = ("k8v4", "k4v4", "k4v3", "k4v2", "k3v3", "k3v2", "k2v2")
_HOT_DTYPES = ("int8", "float16", "float32")
_KNOWN = ", ".join((*FORMATS, *DTYPES))


def one(text: str) -> str:
    """A format of rows, for argparse."""
    if text not in (*FORMATS, *DTYPES):
        raise argparse.ArgumentTypeError(f"must be one of {_KNOWN}, got {text!r}")
    return text


def several(text: str) -> list[str]:
    """Formats of rows, for argparse; the same one twice counts once."""
    return list(dict.fromkeys(one(part) for part in text.split(",")))


def add_dtype(
    parser: argparse.ArgumentParser, rows: Callable[[str], str | list[str]] | None
) -> None:
    """Add ``--dtype``, and ``--rows`` in place of it with its settings.

    Args:
        parser: Of a command.
        rows: The type of ``--rows``: ``one`` or ``several``; None: the command has none.
    """
    stored = parser.add_mutually_exclusive_group()
    stored.add_argument(
        "--dtype", choices=DTYPES, default="float16", help="of the slots (default: %(default)s)"
    )
    if rows is None:
        return
    what, shown = "format of the slots' rows, in place of --dtype", "NAME"
    if rows is several:
        what = "formats of rows to compare, each with the tokens that the budget's bytes buy"
        shown = "NAME,NAME,…"
    stored.add_argument("--rows", type=rows, metavar=shown, help=f"{what}: {_KNOWN}")
    parser.add_argument(
        "--calibration", metavar="FOLDER",
        help="of less-kv calibrate: means and scales of the channels, for the rows of --rows",
    )  # fmt: skip
    parser.add_argument(
        "--sinks", type=int, metavar="N",
        help="first tokens in finer rows, of packed formats (default: 4)",
    )  # fmt: skip
    parser.add_argument(
        "--hot", type=int, metavar="N", help="last tokens in finer rows, likewise (default: 16)"
    )
    parser.add_argument(
        "--hot-dtype", choices=_HOT_DTYPES, help="of the finer rows (default: int8)"
    )


def check(args: argparse.Namespace) -> None:
    """Refuse settings of rows that do not go together; imports no torch.

    Raises:
        ValueError: The message names the option.
    """
    named = [args.rows] if isinstance(args.rows, str) else args.rows or []
    for name in ("calibration", "sinks", "hot", "hot_dtype"):
        value = getattr(args, name)
        option = f"--{name.replace('_', '-')} {value}"
        if value is None:
            continue
        if not named:
            raise ValueError(f"{option}: it is a setting of --rows, which is not given")
        if name != "calibration" and not set(named) & set(FORMATS):
            raise ValueError(
                f"{option}: it is a setting of the packed formats {', '.join(FORMATS)}; --rows "
                "names none of them"
            )
    for name, least in (("sinks", 0), ("hot", 1)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise ValueError(f"--{name} must be {least} or more, got {value}")
    if args.calibration is not None:
        checks.check_calibration(args.calibration)


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """``LessConfig``'s settings of rows, for a command whose ``--rows`` is ``one``."""
    if args.rows is None:
        return {"dtype": args.dtype}
    hot = {"sinks": args.sinks, "hot": args.hot, "hot_dtype": args.hot_dtype or "int8"}
    return {"rows": args.rows, "calibration": args.calibration, **hot}


def read_calibration(folder: str | None, config: Any) -> Calibration | None:
    """The calibration of a folder, checked against a model's config; None for None.

    Raises:
        ValueError: It is damaged, or another model's.
        FileNotFoundError: The folder has none.
    """
    if folder is None:
        return None
    from less import Calibration
    from less.sidekick.identity import model_identity

    calibration = Calibration.from_pretrained(folder)
    calibration.check_model(config)
    shape = (model_identity(config)[name] for name in ("layers", "kv_heads", "head_dim"))
    calibration.check(f"--calibration {folder}", *shape)
    return calibration


def storages(args: argparse.Namespace, config: Any) -> list[Storage]:
    """What ``--rows`` names, for a command whose ``--rows`` is ``several``.

    Args:
        args: With ``add_dtype``'s arguments.
        config: Of the model.

    Raises:
        ValueError: As of ``read_calibration``.
        FileNotFoundError: Likewise.
    """
    if not args.rows:
        return []
    import torch

    from less.evaluate.methods import Storage

    calibration = read_calibration(args.calibration, config)
    hot_dtype = getattr(torch, args.hot_dtype or "int8")
    return [
        Storage(name, args.sinks, args.hot, hot_dtype, calibration)
        if name in FORMATS
        else Storage(getattr(torch, name), calibration=calibration)
        for name in args.rows
    ]


def table_dtype(args: argparse.Namespace, model_dtype: torch.dtype) -> torch.dtype:
    """Dtype of the slots of methods that name no format, whose bytes the others match.

    With ``--rows`` the model's own, in 16 bits: what a full cache is held in.
    """
    import torch

    if getattr(args, "rows", None):
        return model_dtype if model_dtype.itemsize == 2 else torch.float16
    dtype: torch.dtype = getattr(torch, args.dtype)
    return dtype
