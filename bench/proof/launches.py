"""How the launchers launch for the shapes of two models, and how many blocks an SM then holds."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from bench.native import ROOT

from .toolchain import BUILD, ProofError, compile_to, cuda_toolkit, jobs, run, sources

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Launch:
    """One launch of one kernel; letters as in csrc/params.h.

    Args:
        stages: Tiles of slots' rows in a block's ring, of decode_step; else 0.
        rows: Rows of a tile, at most.
    """

    op: str
    model: str
    Q: int
    K: int
    D: int
    B: int
    C: int
    E: int
    R: int
    map: str
    stages: int
    rows: int
    kernel: str
    grid: tuple[int, int, int]
    threads: int
    shared: int
    cluster: int

    @property
    def blocks(self) -> int:
        """Of the grid."""
        return self.grid[0] * self.grid[1] * self.grid[2]


def all_launches(clusters: bool) -> list[Launch]:
    """Every launch of every op at every shape of launches.cpp.

    Args:
        clusters: Whether the device has them, as from sm_90 on.
    """
    folder = BUILD / "launches"
    folder.mkdir(parents=True, exist_ok=True)
    asked = ROOT / "emulator" / "host.cpp"  # what launchers ask of the device
    files = [*sources(), asked, HERE / "launches.cpp"]
    with ThreadPoolExecutor(jobs()) as pool:
        objects = list(pool.map(lambda file: _compile(file, folder), files))
    program = folder / "launches"
    # Kernels' bodies name a runtime that is not there: nothing runs them.
    run(["g++", "-rdynamic", *objects, "-ldl", "-Wl,--unresolved-symbols=ignore-all", "-w",
         "-no-pie", "-o", program])  # fmt: skip
    environment = {**os.environ, "LESS_EMULATOR_ARCHITECTURE": "90" if clusters else "80"}
    done = subprocess.run([program], capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise ProofError(f"proof: a launcher refuses a shape: {done.stderr[-2000:]}")
    rows = (json.loads(line) for line in done.stdout.splitlines())
    return [Launch(**{**row, "grid": tuple(row["grid"])}) for row in rows]


def _compile(source: Path, folder: Path) -> Path:
    target = folder / f"{source.stem}.o"
    flags = ["-std=c++17", "-O0", "-w", "-DLESS_EMULATOR=1", "-DLESS_EMULATOR_SHARED_GUARD=0"]
    flags += ["-mavx2", "-mfma", "-mf16c", f"-I{ROOT}"]
    include = [flag for path in cuda_toolkit.require().include for flag in ("-isystem", str(path))]
    compile_to(target, ["g++", *flags, *include, "-x", "c++", "-c", source])
    return target


@dataclass(frozen=True)
class Occupancy:
    """What an SM holds at once, by NVIDIA's cuda_occupancy.h."""

    blocks: int
    warps: int
    most_warps: int


def occupancy(questions: Sequence[tuple[int, int, int, int, int]]) -> list[Occupancy]:
    """Occupancy for each (arch, registers, static shared, dynamic shared, threads)."""
    BUILD.mkdir(parents=True, exist_ok=True)
    program = BUILD / "occupancy"
    include = [flag for path in cuda_toolkit.require().include for flag in ("-isystem", str(path))]
    run(["g++", "-std=c++17", "-O1", *include, HERE / "occupancy.cpp", "-o", program])
    asked = "".join(" ".join(map(str, question)) + "\n" for question in questions)
    answers = run([program], asked).stdout.splitlines()
    return [Occupancy(*map(int, answer.split())) for answer in answers]
