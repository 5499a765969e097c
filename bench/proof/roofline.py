"""The GPUs, the bytes that a step must move, and what must be under way meanwhile.

Bandwidths are what a long copy is assumed to reach, launches what a kernel of a graph is assumed to
cost; clocks are the boost clocks of NVIDIA's data sheets. Cycles of shared memory, L2 and DRAM of
A100, H100 and RTX 4090 are those that arXiv:2402.13499 measured (its table of memory latencies), of
tensor cores and of another block's shared memory too; H200 is an H100 with other memory, L40S a
chip as the RTX 4090's. Assumed without a source: arithmetic 4 cycles (the arithmetic latency that
the same authors find on all), special functions 18, a division of integers 100, shuffles 24, a
barrier of a block 20, and a barrier of a cluster a fence to L2 and a trip to another SM.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from .launches import Launch, Occupancy

SCHEDULERS = 4  # of an SM, an instruction a cycle each


@dataclass(frozen=True)
class Machine:
    """A GPU.

    Args:
        name: Its name.
        bandwidth: Bytes a second that a kernel can hope for.
        sms: Multiprocessors.
        arch: 89 for sm_89.
        code: What the code is compiled for that it runs.
        clock: Cycles a second.
        launch: Seconds that a launch takes.
        latency: Cycles, by what is waited for (emulator/timeline.h).
    """

    name: str
    bandwidth: float
    sms: int
    arch: int = 90
    code: str = "90a"
    clock: float = 1.98e9
    launch: float = 1.0e-6
    latency: dict[str, int] = field(default_factory=dict)

    @property
    def clusters(self) -> bool:
        """Whether blocks of a head are a cluster."""
        return self.arch >= 90

    def needs_in_flight(self, latency: float) -> float:
        """Bytes that each SM must have under way, by Little's law.

        Args:
            latency: Seconds from a load to its data.
        """
        return self.bandwidth / self.sms * latency


def _latency(shared: int, l2: int, dram: int, tensor: int, remote: int) -> dict[str, int]:
    return {
        "issue": 1, "arithmetic": 4, "special": 18, "division": 100, "shared": shared,
        "shuffle": 24, "tensor": tensor, "l2": l2, "dram": dram, "remote": remote, "barrier": 20,
        "cluster_barrier": l2 + remote,
    }  # fmt: skip


_HOPPER = _latency(shared=29, l2=263, dram=479, tensor=33, remote=180)
_ADA = _latency(shared=30, l2=273, dram=542, tensor=33, remote=0)
MACHINES = (
    Machine("H100", 3.0e12, 132, latency=_HOPPER),
    Machine("H200", 4.3e12, 132, latency=_HOPPER),
)
GPUS = (
    *MACHINES,
    Machine("A100", 1.75e12, 108, 80, "80", 1.41e9, 1.5e-6,
            _latency(shared=29, l2=262, dram=466, tensor=33, remote=0)),
    Machine("L40S", 0.78e12, 142, 89, "80", 2.52e9, 1.5e-6, _ADA),
    Machine("RTX 4090", 0.93e12, 128, 89, "80", 2.52e9, 1.5e-6, _ADA),
)  # fmt: skip
LATENCY = (600e-9, 800e-9)
SINKS, HOT = 4, 16  # int8 slots of a head whose others are packed: the product's default
PACKED_BYTES = {"k4v4": 0.5}  # of a number of such a row, which has a scale of 2 bytes


@dataclass(frozen=True)
class Shape:
    """A decode step with maps of kind exp; letters as in csrc/params.h.

    Args:
        R: 0: there is no state, and no maps.
        rows: How slots' rows are stored: ``fp16``, or ``k4v4``, which has no state.
    """

    model: str
    Q: int
    K: int
    C: int
    B: int
    D: int = 128
    E: int = 64
    R: int = 8
    rows: str = "fp16"

    @property
    def line(self) -> str:
        """As timed.cpp reads it."""
        hot = f"{SINKS} {HOT}" if self.rows in PACKED_BYTES else "0 0"
        return f"{self.Q} {self.K} {self.D} {self.C} {self.E} {self.R} {self.B} {hot}\n"


@dataclass(frozen=True)
class Bytes:
    """What one layer's decode step moves at least; maps in fp16."""

    slots: int
    scores: int
    state: int
    maps: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.slots + self.scores + self.state + self.maps


def decode_bytes(at: Launch | Shape, paper: bool = False) -> Bytes:
    """By the formulas of docs/kernels.md.

    Args:
        at: The step's shape.
        paper: Whether its maps are of kind ``paper``, else ``exp``.
    """
    rows = at.B * at.K
    weights = at.D * at.E + at.E * at.R if at.R > 0 else 0
    mix = at.K * (at.R * at.R + 2 * at.R) * 4 if paper else (at.Q + at.K) * at.R * 4
    slots, score = at.C * at.D * 2, 4
    if isinstance(at, Shape) and at.rows in PACKED_BYTES:
        hot = SINKS + HOT
        slots = hot * (at.D + 4) + (at.C - hot) * (int(at.D * PACKED_BYTES[at.rows]) + 2)
        score = 2
    return Bytes(
        slots=rows * 2 * slots,
        scores=(4 + 2 * score) * rows * at.C,
        state=8 * rows * at.R * at.D,
        maps=(at.Q + at.K) * weights * 2 + mix,
    )


def in_flight(step: Launch, held: Occupancy, sms: int) -> int:
    """Bytes of slots that an SM with blocks has under way when those first wait.

    A block asks for tiles of keys, then of values, up to all but one of its ring's stages.
    """
    row = 2 * step.D
    per = -(-step.C // step.grid[0] // 16) * 16  # slots of a block, a multiple of 16
    tile = min(per, step.rows)
    tiles = min(step.stages - 1, 2 * -(-per // tile))
    return min(held.blocks, -(-step.blocks // sms)) * tiles * tile * row
