"""Writes docs/kernels.md."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import groupby

from .gates import Excuse
from .launches import Launch, Occupancy
from .roofline import LATENCY, MACHINES, decode_bytes, in_flight
from .toolchain import Unit, cuda_toolkit, demangle

HEAD = """\
# The kernels' machine code

Made by `make proof`, which compiles every file of csrc/cuda as the product is compiled (nvcc
{version}), reads the machine code, and stops where a gate does not hold. No GPU is needed, and no
figure below was measured on one.

## Gates

Of every kernel, for {archs} and head dims {head_dims}:
no spilled register, no stack, no local memory, no generic load or store; in every main loop (one
without a loop inside), accesses of global memory of 16 bytes (or bulk copies), but for lines that
a comment in the source excuses (`// narrow: <why>`):

{excuses}

## Registers

`kernel<...>`: instances, registers (least-most) for each architecture, static shared memory.

{registers}

## Launches

For fp16 slots at Llama-2-7B's heads (K = Q = 32, D = 128) and Llama-3-8B's (K = 8, Q = 32), R = 8,
a chunk of 512 tokens where an op takes one; sm_90a on 132 SMs. Blocks and warps an SM holds are by
NVIDIA's `cuda_occupancy.h`; waves are blocks over what all SMs hold.

{launches}

## One decode step of one layer: bytes, and time at the machine's bandwidth

Slots B·K·C·2·D·2 bytes, scores 12·B·K·C, state 8·B·K·R·D, maps once per batch. Time is bytes over
bandwidth, assumed to be {bandwidths}: a floor, without the time of a launch.

{roofline}

## Time, modelled

`make timing` runs a step's blocks of one head on the emulator with clocks, from the PTX that nvcc
emits, and makes microseconds a layer of what it counts: dependent trips to memory, barriers,
instructions, bytes. The table of latencies for each GPU, with its sources, is in
`bench/proof/roofline.py`, the model's assumptions are in `bench/proof/timing.py`. Below each GPU's
table stands how many times as fast a step of k4v4 rows is as one of as many fp16 rows. `--gpu H200`
chooses, `--phases` shows the longest chain from barrier to barrier. Where `bench/gpu.sh` has timed
a GPU of the table, its report puts the model beside the measurement.

## Bytes in flight

A memory that takes {latency} ns to answer is kept busy (Little's law) by so much under way on each
SM: {needed}.
Below: what a step's blocks have asked for of the slots when they first wait, on an SM that has
blocks; state, scores and maps' weights come besides. Where not all SMs have one, the step is too
short for the memory's bandwidth, and its time is latency.

{flight}
"""


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        cells = [str(cell).replace("|", "\\|") for cell in row]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _registers(units: Sequence[Unit], archs: Sequence[str]) -> str:
    by_name: dict[str, dict[str, list[tuple[int, int]]]] = {}
    for unit in units:
        for kernel in unit.kernels:
            name = demangle(kernel.name).split("<")[0]
            taken = unit.resources[kernel.name]
            found = by_name.setdefault(name, {}).setdefault(unit.arch, [])
            found.append((taken.registers, taken.shared))
    rows = []
    for name, of_arch in sorted(by_name.items()):
        instances = max(len(found) for found in of_arch.values())
        shared = max(one for found in of_arch.values() for _, one in found)
        cells = [_range([one for one, _ in of_arch.get(arch, [])]) for arch in archs]
        rows.append([f"`{name}`", instances, *cells, shared])
    return table(["kernel", "instances", *(f"sm_{arch}" for arch in archs), "shared"], rows)


def _range(values: Sequence[int]) -> str:
    if not values:
        return "-"
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low}-{high}"


def _launches(rows: Sequence[tuple[Launch, int, int, Occupancy]]) -> str:
    lines = []
    for launch, registers, fixed, held in rows:
        waves = launch.blocks / (held.blocks * MACHINES[0].sms) if held.blocks else 0.0
        lines.append([
            launch.op, launch.model, launch.B, launch.C, f"{launch.map} {launch.E}",
            f"`{demangle(launch.kernel)}`", "x".join(map(str, launch.grid)), launch.cluster,
            launch.threads, registers, fixed + launch.shared, held.blocks,
            f"{held.warps}/{held.most_warps}", f"{waves:.2f}",
        ])  # fmt: skip
    head = ["op", "model", "B", "C", "map", "kernel", "grid", "cluster", "threads", "registers",
            "shared", "blocks/SM", "warps/SM", "waves"]  # fmt: skip
    return table(head, lines)


def _roofline(steps: Sequence[Launch]) -> str:
    rows = []
    for at in steps:
        moved = decode_bytes(at, paper=at.map == "paper")
        parts = [f"{one / 1e6:.3f}" for one in
                 (moved.slots, moved.scores, moved.state, moved.maps, moved.total)]  # fmt: skip
        times = [f"{moved.total / machine.bandwidth * 1e6:.2f}" for machine in MACHINES]
        rows.append([at.model, at.C, f"{at.map} {at.E}", at.B, *parts, *times])
    head = ["model", "C", "map", "B", "slots MB", "scores MB", "state MB", "maps MB", "all MB"]
    return table([*head, *(f"{machine.name} µs" for machine in MACHINES)], rows)


def _flight(rows: Sequence[tuple[Launch, int, int, Occupancy]]) -> str:
    lines = []
    for launch, _, _, held in rows:
        if launch.map != "exp":  # the slots are the same
            continue
        sms = MACHINES[0].sms
        have = in_flight(launch, held, sms)
        shares = [f"{have / machine.needs_in_flight(LATENCY[1]):.1f}" for machine in MACHINES]
        lines.append([launch.model, launch.C, launch.B, min(launch.blocks, sms),
                      f"{have / 1024:.1f}", *shares])  # fmt: skip
    head = ["model", "C", "B", "SMs with blocks", "KiB/SM"]
    return table([*head, *(f"of {m.name}'s need at {LATENCY[1] * 1e9:.0f} ns" for m in MACHINES)],
                 lines)  # fmt: skip


def _excuses(used: Mapping[Excuse, Collection[str]]) -> str:
    of_reason: dict[str, tuple[set[str], set[str]]] = {}
    for excuse, kernels in used.items():
        names, files = of_reason.setdefault(excuse.reason, (set(), set()))
        names.update(f"`{name}`" for name in kernels)
        files.add(excuse.file)
    rows = [[", ".join(sorted(names)), ", ".join(sorted(files)), reason]
            for reason, (names, files) in of_reason.items()]  # fmt: skip
    return table(["kernels", "lines in", "why"], sorted(rows)) if rows else "none."


def write(
    units: Sequence[Unit],
    archs: Sequence[str],
    head_dims: Sequence[int],
    used: Mapping[Excuse, Collection[str]],
    launches: Sequence[tuple[Launch, int, int, Occupancy]],
) -> str:
    """The text of docs/kernels.md.

    Args:
        units: All that was compiled.
        archs: For which architectures.
        head_dims: For which head dims.
        used: The excuses that were needed, and for which kernels.
        launches: On sm_90a: with registers, static shared memory, and what an SM holds.
    """
    steps = [row for row in launches if row[0].op == "decode_step"]
    shapes = [next(group)[0] for _, group in groupby(
        steps, key=lambda row: (row[0].model, row[0].C, row[0].E, row[0].B))]  # fmt: skip
    needed = [f"{m.needs_in_flight(t) / 1024:.1f} KiB ({m.name}, {t * 1e9:.0f} ns)"
              for m in MACHINES for t in LATENCY]  # fmt: skip
    return HEAD.format(
        version=".".join(map(str, cuda_toolkit.require().version)),
        archs=", ".join(f"sm_{arch}" for arch in archs),
        head_dims=", ".join(map(str, head_dims)),
        excuses=_excuses(used),
        registers=_registers(units, archs),
        launches=_launches(launches),
        bandwidths=" and ".join(f"{m.bandwidth / 1e12:.1f} TB/s ({m.name})" for m in MACHINES),
        roofline=_roofline(shapes),
        latency="-".join(f"{one * 1e9:.0f}" for one in LATENCY),
        needed=", ".join(needed),
        flight=_flight(steps),
    )
