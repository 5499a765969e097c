"""Count every kernel's instructions under callgrind, and hold them against those committed.

Instructions do not depend on how busy the machine is, so a few per cent show that no timing would.
They do depend on the compiler: ``instructions.json`` holds counts for each compiler (by name and
major version) and SIMD level. ``make instructions`` runs this; ``--record`` writes the counts of
today's compiler, to be committed with the change that moved them.

Needs CMake, a C++ compiler and valgrind; neither torch nor the package.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from bench import native

RECORD = Path(__file__).resolve().parent / "instructions.json"
LEVELS = ("portable", "avx2")  # what callgrind can run
LIMIT = 3  # per cent
MERGING, FORGETTING = " merge", " forget"  # how names of cases end that are the same but for that

Counts = dict[str, int]
Record = dict[str, dict[str, Counts]]


class GateError(SystemExit):
    """Nothing could be counted; the message says why."""


def count(program: Path, level: str) -> tuple[str, Counts]:
    """Run the program under callgrind.

    Args:
        program: ``less_instructions``.
        level: SIMD level of the kernels.

    Returns:
        The compiler ("GNU 12"), and instructions by case, in the program's order.

    Raises:
        GateError: It failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        command = ["valgrind", "--tool=callgrind", "--collect-atstart=no"]
        command += [f"--callgrind-out-file={out}", str(program), level]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise GateError(
                f"instructions: valgrind failed:\n{(done.stdout + done.stderr)[-2000:]}"
            )
        compiler = re.search(r"^compiler (\S+) (\d+)", done.stdout, flags=re.M)
        dumps = sorted(Path(folder).glob("out.*"), key=lambda path: int(path.suffix[1:]))
        counts = dict(filter(None, (parse(dump.read_text()) for dump in dumps)))
    if compiler is None or not counts:
        raise GateError(f"instructions: {program.name} counted nothing:\n{done.stdout}")
    return f"{compiler[1]} {compiler[2]}", counts


def parse(dump: str) -> tuple[str, int] | None:
    """Name and instructions of one dump of callgrind; None for the one at the program's end."""
    name = re.search(r"^desc: Trigger: Client Request: (.+)$", dump, flags=re.M)
    total = re.search(r"^(?:totals|summary): (\d+)", dump, flags=re.M)
    return (name[1], int(total[1])) if name and total else None


def compare(got: Counts, recorded: Counts) -> tuple[list[str], list[str]]:
    """Rows of a table, and what is wrong: more than 3 % above the record, or not in it.

    Args:
        got: Instructions counted now.
        recorded: Those committed.
    """
    rows, wrong = [], []
    for name in list(got) + [name for name in recorded if name not in got]:
        now, then = got.get(name), recorded.get(name)
        if now is None or then is None:
            what = "not counted any more" if now is None else "not recorded yet"
            rows.append(f"{name:44}{now or '':>12}{then or '':>12}  {what}")
            wrong.append(f"{name}: {what}")
            continue
        change = now / then - 1
        rows.append(f"{name:44}{now:>12,}{then:>12,}{change:>+9.1%}")
        if 100 * now > (100 + LIMIT) * then:
            wrong.append(f"{name}: {now:,} instructions, {change:+.1%}; at most +{LIMIT} %")
    return rows, wrong


def merging(got: Counts) -> list[str]:
    """What every step that merges takes, as a multiple of the one that forgets."""
    rows = []
    for name, count in got.items():
        base = name.removesuffix(MERGING)
        if base != name and (other := got.get(base + FORGETTING)):
            rows.append(f"{base}: merging takes {count / other:.3f} times what forgetting takes")
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Count, print, compare; returns 1 where a kernel got more expensive."""
    parser = argparse.ArgumentParser(prog="instructions", description=__doc__)
    parser.add_argument("--record", action="store_true", help="write today's counts")
    parser.add_argument("--level", choices=LEVELS, nargs="+", default=["avx2"])
    args = parser.parse_args(argv)

    native.require("valgrind", "valgrind")
    program = native.build("less_instructions")
    record: Record = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    wrong: list[str] = []
    for level in args.level:
        compiler, got = count(program, level)
        print(f"# {compiler}, {level}: instructions of a run, now and as committed")
        if args.record:
            record.setdefault(compiler, {})[level] = got
        recorded = record.get(compiler, {}).get(level)
        ratios = merging(got)
        if recorded is None:
            print("\n".join([*(f"{name:44}{now:>12,}" for name, now in got.items()), *ratios]))
            known = ", ".join(f"{c} ({', '.join(levels)})" for c, levels in record.items())
            print(
                f"\nNOTHING WAS GATED: {RECORD.name} has no counts of {compiler} at {level}, only "
                f"of {known or 'nothing'}.\nOn the commit that is known to be good, record them: "
                f"make instructions ARGS='--record --level {level}'",
                file=sys.stderr,
            )
            continue
        rows, bad = compare(got, recorded)
        print("\n".join([*rows, *ratios]))
        wrong += bad
    if args.record:
        RECORD.write_text(json.dumps(record, indent=1) + "\n")
        print(f"recorded in {RECORD.name}")
    if wrong:
        print("\ninstructions: MORE THAN COMMITTED, or unknown:", *wrong, sep="\n  ")
        print("If it must be so: make instructions ARGS=--record, and say why in the commit.")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
