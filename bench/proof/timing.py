"""How long a decode step of one layer would take on a GPU, modelled; ``make timing`` prints it.

The emulator runs the step's blocks of one head, translated from the PTX that nvcc emits, with
clocks (emulator/timeline.h): it counts instructions, bytes, and the longest chain of dependent
waits. A table of latencies (`GPUS`) makes cycles of that. What the model assumes:

- A block that has an SM to itself lives as long as its longest chain. Between two jumps or barriers
  the assembler orders instructions so that only results are waited for; caches of an SM hold
  nothing; a sector that was loaded or stored in this launch is in L2, any other in DRAM.
- An SM holds as many blocks as registers and shared memory allow, and replaces each as it ends. A
  wave of them takes the longest of three: the life of a block, the wave's bytes at the GPU's
  bandwidth, the wave's instructions at one a cycle and scheduler.
- A layer takes its waves, of which there is at least one, and one launch.
- Latencies are those of an idle machine. Under load DRAM answers later, but then the bytes are what
  takes long.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.native import ROOT

from .launches import occupancy
from .report import table
from .roofline import GPUS, SCHEDULERS, Machine, Shape, decode_bytes
from .toolchain import BUILD, CUDA, compile_cubin, compile_to, cuda_toolkit, jobs, run

HEAD_DIM = 128
SOURCES = {"fp16": CUDA / "decode_step_fp16.cu", "k4v4": CUDA / "decode_step_packed.cu"}


SHAPES = (
    *(Shape("Llama-2-7B", 32, 32, 205, B) for B in (1, 8, 64)),
    *(Shape("Llama-3-8B", 32, 8, 205, B) for B in (1, 8, 64)),
    Shape("Llama-2-7B", 32, 32, 4096, 64),
)
# Equally many rows, which a token leaves for good, in fp16 and in fewer bits.
PAIRS = tuple(
    (
        Shape("Llama-2-7B", 32, 32, C, 64, R=0),
        Shape("Llama-2-7B", 32, 32, C, 64, R=0, rows="k4v4"),
    )
    for C in (205, 4096)
)


@dataclass(frozen=True)
class Counts:
    """What the emulator counted of a step.

    Args:
        kernel: Mangled.
        blocks: Of the launch.
        threads: Of a block.
        shared: Bytes of dynamic shared memory of a block.
        cycles: Of a block's longest chain.
        causes: Cycles of that, by what was waited for.
        trips: To L2, DRAM or another SM in that chain, one after the other.
        barriers: In that chain, of the block and of its cluster.
        instructions: Of a block, counted by warps.
        bytes: From and to DRAM, of the launch.
        phases: Where each barrier of the chain is, and its cycle.
    """

    kernel: str
    blocks: int
    threads: int
    shared: int
    cycles: int
    causes: dict[str, int]
    trips: int
    barriers: int
    instructions: float
    bytes: int
    phases: tuple[tuple[str, int], ...]


def _sectors(profile: dict[str, Any]) -> int:
    return sum(profile[way]["distinct_sectors"] for way in ("load", "store"))


def counts(shape: Shape, one: dict[str, Any], two: dict[str, Any]) -> Counts:
    """Of the profiles of one batch row's first head, and of two rows'.

    Args:
        shape: The step.
        one: The emulator's profile of a row; all that it reads comes from DRAM.
        two: Of two rows; what they share, the second one finds in L2.
    """
    line = two["timeline"]
    launch = line["launch"]
    more = _sectors(two) - _sectors(one) if shape.B > 1 else 0
    return Counts(
        kernel=launch["kernel"],
        blocks=launch["blocks"],
        threads=launch["threads"],
        shared=launch["shared"],
        cycles=line["cycles"],
        causes=line["cycles_by_cause"],
        trips=line["trips"],
        barriers=line["waits"]["barrier"] + line["waits"]["cluster_barrier"],
        instructions=line["warp_instructions"] / line["blocks"],
        bytes=32 * shape.K * (_sectors(one) + (shape.B - 1) * more),
        phases=tuple((phase["until"], phase["at"]) for phase in line["phases"]),
    )


@dataclass(frozen=True)
class Estimate:
    """A step's time in seconds.

    Args:
        life: Of a block.
        transfer: Of a wave's bytes.
        work: Of a wave's instructions.
        waves: Blocks over what the GPU holds.
        held: Blocks that an SM holds.
        total: Of the layer.
    """

    life: float
    transfer: float
    work: float
    waves: float
    held: int
    total: float


def estimate(of: Counts, held: int, gpu: Machine) -> Estimate:
    """The module's formula.

    Args:
        of: What the step does.
        held: Blocks that an SM holds at once.
        gpu: Where it runs.
    """
    waves = max(1.0, of.blocks / (held * gpu.sms))
    resident = min(held, -(-of.blocks // gpu.sms))
    life = of.cycles / gpu.clock
    transfer = of.bytes / waves / gpu.bandwidth
    work = of.instructions * resident / SCHEDULERS / gpu.clock
    return Estimate(
        life, transfer, work, waves, held, waves * max(life, transfer, work) + gpu.launch
    )


def program(arch: str) -> Path:
    """Build timed.cpp with the kernels of an architecture, "80" or "90a".

    Raises:
        ProofError: Something does not compile.
    """
    folder = BUILD / "timed" / arch
    folder.mkdir(parents=True, exist_ok=True)
    nvcc = cuda_toolkit.require().nvcc
    mask = f"-DLESS_HEAD_DIM_MASK={1 << HEAD_DIM // 16}"

    def translate(rows: str) -> Path:
        ptx = folder / f"{rows}.ptx"
        compile_to(ptx, [nvcc, "-std=c++17", "-O3", "--expt-relaxed-constexpr",
                         f"-arch=compute_{arch}", "-lineinfo", mask, "-ptx",
                         SOURCES[rows]])  # fmt: skip
        # Under another name, because compile_to keeps a file's notes under its name alone.
        translated = folder / f"{rows}_translated.cpp"
        run(["env", f"PYTHONPATH={ROOT / 'emulator'}", sys.executable, "-m", "ptx2cpp", "--timed",
             ptx, "-o", translated])  # fmt: skip
        return translated

    with ThreadPoolExecutor(jobs()) as pool:
        translated = pool.map(translate, SOURCES)
        host = [*sorted(CUDA.glob("decode_step*.cu")), Path(__file__).with_name("timed.cpp"),
                *translated, *sorted((ROOT / "emulator").glob("*.cpp"))]  # fmt: skip
        objects = list(pool.map(lambda file: _compile(file, folder, mask), host))
    target = folder / "timed"
    run(["g++", "-rdynamic", "-no-pie", *objects, "-ldl", "-o", target])
    return target


def _compile(source: Path, folder: Path, mask: str) -> Path:
    target = (
        folder / f"{source.stem}.o" if source.suffix == ".cpp" else folder / f"{source.stem}.cu.o"
    )
    # Launchers' kernels are dead code; the emulator is what takes time.
    level = (
        "-O2" if source.parent.name == "emulator" else "-O1" if source.suffix == ".cpp" else "-O0"
    )
    flags = ["-std=c++17", level, "-w", "-ffp-contract=off", "-fno-strict-aliasing", mask]
    flags += ["-DLESS_EMULATOR=1", "-DLESS_EMULATOR_SHARED_GUARD=0", "-mavx2", "-mfma", "-mf16c"]
    include = [flag for path in cuda_toolkit.require().include for flag in ("-isystem", str(path))]
    compile_to(target, ["g++", *flags, f"-I{ROOT}", *include, "-x", "c++", "-c", source])
    return target


def measure(gpu: Machine, shapes: Sequence[Shape]) -> list[Counts]:
    """Run the shapes on the emulator with a GPU's latencies."""
    built = program(gpu.code)
    asked = "race=0\n"
    asked += "".join(f"latency_{cause}={cycles}\n" for cause, cycles in gpu.latency.items())
    asked += "".join(shape.line for shape in shapes)
    environment = {**os.environ, "LESS_EMULATOR_ARCHITECTURE": "90" if gpu.clusters else "80"}
    done = subprocess.run(
        [built], input=asked, capture_output=True, text=True, check=True, env=environment
    )
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    return [counts(shape, *lines[2 * i : 2 * i + 2]) for i, shape in enumerate(shapes)]


def floor(shape: Shape, gpu: Machine) -> float:
    """Seconds in which the bytes that the step cannot do without go by."""
    return decode_bytes(shape).total / gpu.bandwidth


def estimates(gpu: Machine, shapes: Sequence[Shape]) -> list[tuple[Shape, Counts, Estimate]]:
    """Of all shapes, on one GPU."""
    measured = measure(gpu, shapes)
    resources = {}
    for rows in {shape.rows for shape in shapes}:
        resources |= compile_cubin(SOURCES[rows], gpu.code, HEAD_DIM)[1]
    asked = [(gpu.arch, resources[one.kernel].registers, resources[one.kernel].shared, one.shared,
              one.threads) for one in measured]  # fmt: skip
    return [(shape, one, estimate(one, held.blocks, gpu))
            for shape, one, held in
            zip(shapes, measured, occupancy(asked), strict=True)]  # fmt: skip


def text(gpu: Machine, rows: Iterable[tuple[Shape, Counts, Estimate]]) -> str:
    """The table of one GPU, in Markdown."""
    lines = []
    for shape, one, time in rows:
        least = floor(shape, gpu)
        lines.append([
            shape.model, shape.rows, shape.R, shape.C, shape.B, f"{time.total * 1e6:.1f}",
            f"{least * 1e6:.1f}",
            f"{time.total / least:.1f}", f"{time.waves:.2f}", time.held,
            f"{time.life * 1e6:.1f}", f"{time.transfer * 1e6:.1f}", f"{time.work * 1e6:.1f}",
            one.trips, one.barriers, f"{one.bytes / 1e6:.2f}",
        ])  # fmt: skip
    head = ["model", "rows", "R", "C", "B", "µs a layer", "floor", "over it", "waves", "blocks/SM",
            "life", "bytes", "instructions", "trips", "barriers", "MB"]  # fmt: skip
    return f"### {gpu.name}\n\n{table(head, lines)}"


def faster(seconds: dict[Shape, float]) -> str:
    """How many times as long fp16 rows take as equally many of fewer bits, a line a pair."""
    return "\n".join(
        f"{few.rows} against {wide.rows}, {few.model}, C={few.C}, B={few.B}: "
        f"{seconds[wide] / seconds[few]:.2f} times as fast"
        for wide, few in PAIRS
    )


def phases(rows: Iterable[tuple[Shape, Counts, Estimate]]) -> str:
    """Where the longest chain of each step goes: a barrier a line, and cycles from the last."""
    lines = []
    for shape, one, _ in rows:
        lines.append(
            f"{shape.model}, {shape.rows}, R={shape.R}, C={shape.C}, B={shape.B}: "
            f"{one.cycles} cycles"
        )
        lines += [f"  {cause:16} {cycles:7}" for cause, cycles in one.causes.items() if cycles]
        before = 0
        for where, at in one.phases:
            lines.append(f"  {at - before:7}  until {where}")
            before = at
    return "\n".join(lines)


def measured(records: Iterable[dict[str, Any]]) -> tuple[Machine | None, dict[Shape, float]]:
    """The GPU of ``less_gpu``'s rows, None if it is not in the table; seconds of the shapes there.

    Args:
        records: As ``bench/gpu.sh`` keeps them.
    """
    rows = list(records)
    name = next((row["gpu"] for row in rows if row["part"] == "device"), "")
    gpu = next((one for one in GPUS if one.name in name), None)
    seconds = {
        shape: row["best"]
        for row in rows
        for shape in SHAPES
        if row["part"] == "kernels" and row["op"] == "decode_step" and row["slots"] == "float16"
        and (row["shape"], row["C"], row["B"]) == (shape.model.lower(), shape.C, shape.B)
    }  # fmt: skip
    return gpu, seconds


def against(modelled: Iterable[tuple[Shape, float]], seconds: dict[Shape, float]) -> str:
    """The model beside what a GPU took, in Markdown."""
    lines = [
        [shape.model, shape.C, shape.B, f"{seconds[shape] * 1e6:.1f}", f"{model * 1e6:.1f}",
         f"{seconds[shape] / model:.2f}"]
        for shape, model in modelled
    ]  # fmt: skip
    return table(["model", "C", "B", "measured µs", "modelled µs", "measured over it"], lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the tables; 1 where there is nothing to set the model against."""
    names = [gpu.name for gpu in GPUS]
    parser = argparse.ArgumentParser(prog="timing", description=__doc__.split("\n")[0])
    parser.add_argument("--gpu", nargs="+", choices=names, default=names)
    parser.add_argument("--phases", action="store_true", help="and where the time goes")
    parser.add_argument("--against", type=Path, metavar="ROWS", help="rows of bench/gpu.sh")
    args = parser.parse_args(argv)
    if args.against is not None:
        gpu, seconds = measured(map(json.loads, args.against.read_text().splitlines()))
        if gpu is None or not seconds:
            print(f"timing: {args.against} has no decode step of a GPU that is modelled: {names}")
            return 1
        rows = estimates(gpu, list(seconds))
        print(against([(shape, time.total) for shape, _, time in rows], seconds))
        return 0
    for gpu in GPUS:
        if gpu.name in args.gpu:
            rows = estimates(gpu, [*SHAPES, *(shape for pair in PAIRS for shape in pair)])
            print(text(gpu, rows), end="\n\n", flush=True)
            print(faster({shape: time.total for shape, _, time in rows}), end="\n\n", flush=True)
            if args.phases:
                print(phases(rows), end="\n\n", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
