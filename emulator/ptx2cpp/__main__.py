"""Command: ``python -m ptx2cpp kernel.ptx -o kernel.cpp``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from . import PtxError, translate


def main() -> int:
    """Translate a file; 1 and a message where it cannot be done."""
    parser = argparse.ArgumentParser(prog="ptx2cpp")
    parser.add_argument("ptx", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--timed", action="store_true", help="threads keep clocks")
    args = parser.parse_args()
    try:
        text = translate(args.ptx.read_text(), args.ptx.name, args.timed)
    except PtxError as error:
        print(f"ptx2cpp: {args.ptx}: {error}", file=sys.stderr)
        return 1
    args.output.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
