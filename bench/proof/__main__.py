"""Command: ``python -m bench.proof [--arch 80 90a [--write]]``; LESS_CUDA_HEAD_DIMS: fewer dims."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from bench.native import ROOT

from . import report
from .gates import Excuse, judge
from .launches import Launch, Occupancy, all_launches, occupancy
from .toolchain import (
    HOST_ONLY,
    ProofError,
    Unit,
    all_excuses,
    all_head_dims,
    compile_unit,
    demangle,
    excuse_of,
    head_dims,
    jobs,
    sources,
    work,
)

ARCHS = ("80", "90a", "100", "120")
DOCS = ROOT / "docs" / "kernels.md"


def distinct(units: Sequence[Unit]) -> None:
    """Leave a kernel to the first of the units that have it for an architecture.

    Those that do not depend on the head dim are compiled with each.
    """
    seen: set[tuple[str, str]] = set()
    for unit in units:
        unit.kernels = [one for one in unit.kernels if (unit.arch, one.name) not in seen]
        seen.update((unit.arch, one.name) for one in unit.kernels)


def judge_all(units: Sequence[Unit], used: dict[Excuse, set[str]]) -> list[str]:
    """What is wrong, a line each; `used` as in `judge`."""
    wrong = []
    for unit in units:
        for kernel in unit.kernels:
            name = demangle(kernel.name)
            resources = unit.resources[kernel.name]
            found = judge(kernel, resources, name, excuse_of, used)
            wrong += [f"sm_{unit.arch} {name}: {what}" for what in found]
    return wrong


def with_occupancy(units: Sequence[Unit]) -> list[tuple[Launch, int, int, Occupancy]]:
    """The launches on sm_90a: registers, static shared memory, what an SM holds."""
    taken = {
        name: one for unit in units if unit.arch == "90a" for name, one in unit.resources.items()
    }
    launches = all_launches(clusters=True)
    unknown = {launch.kernel for launch in launches} - set(taken)
    if unknown:
        raise ProofError(f"proof: launched, but not in the machine code: {sorted(unknown)}")
    resources = [taken[launch.kernel] for launch in launches]
    asked = [(90, one.registers, one.shared, launch.shared, launch.threads)
             for launch, one in zip(launches, resources, strict=True)]  # fmt: skip
    return [(launch, one.registers, one.shared, held) for launch, one, held in
            zip(launches, resources, occupancy(asked), strict=True)]  # fmt: skip


def missing_kernels() -> list[str]:
    """Launchers that kernels.h names and no .cu file is there for."""
    header = (ROOT / "csrc" / "cuda" / "kernels.h").read_text()
    ops = re.findall(r"^cudaError_t (\w+)\(", header, flags=re.M)
    there = {path.stem for path in sources()}
    return [f"csrc/cuda/{op}.cu is missing" for op in ops if op not in there]


def main(argv: Sequence[str] | None = None) -> int:
    """Compile, judge, write; 1 where a gate does not hold."""
    parser = argparse.ArgumentParser(prog="proof", description=__doc__)
    parser.add_argument("--arch", nargs="+", choices=ARCHS, default=list(ARCHS))
    parser.add_argument(
        "--only",
        nargs="+",
        metavar="FILE",
        choices=[path.stem for path in sources() if path not in HOST_ONLY],
        help="these files of csrc/cuda, by their stems",
    )
    parser.add_argument(
        "--write",
        action="store_true",
        help="docs/kernels.md for these architectures and head dims, if not all",
    )
    args = parser.parse_args(argv)
    dims = sorted(head_dims() or all_head_dims())
    if args.write and "90a" not in args.arch:
        parser.error("--write: the page tells of launches on sm_90a; --arch must have 90a")
    if args.write and 128 not in dims:
        parser.error(f"--write: LESS_CUDA_HEAD_DIMS must have 128, the page's models'; got {dims}")
    files = [path for path in sources() if args.only is None or path.stem in args.only]
    with ThreadPoolExecutor(jobs()) as pool:
        units = list(pool.map(lambda one: compile_unit(*one), work(files, args.arch)))
    distinct(units)
    used: dict[Excuse, set[str]] = {}
    wrong = judge_all(units, used)
    whole = args.only is None
    everything = whole and dims == sorted(all_head_dims()) and set(args.arch) == set(ARCHS)
    if whole:
        wrong += missing_kernels()
    if everything:
        wrong += [
            f"{one.file}:{one.line}: its comment excuses nothing"
            for one in sorted(all_excuses() - set(used), key=lambda one: (one.file, one.line))
        ]
    kernels = sum(len(unit.kernels) for unit in units)
    print(f"proof: {kernels} kernels in {len(files)} files for sm_{', sm_'.join(args.arch)}")
    if (everything or (whole and args.write)) and not wrong:
        DOCS.write_text(report.write(units, args.arch, dims, used, with_occupancy(units)))
        print(f"proof: wrote {DOCS.relative_to(ROOT)}")
    if not kernels:
        wrong.append("there is no kernel that could hold to any")
    if wrong:
        print("proof: GATES THAT DO NOT HOLD:", *wrong, sep="\n  ")
        return 1
    print("proof: every gate holds")
    return 0


if __name__ == "__main__":
    sys.exit(main())
