"""The bytes that a step must move, the time that follows, and what must be under way meanwhile.

The figures of the machines are assumed, not measured: what a long copy reaches on an H100 SXM and
an H200, and how long a load from their memory takes under load.
"""

from __future__ import annotations

from dataclasses import dataclass

from .launches import Launch, Occupancy


@dataclass(frozen=True)
class Machine:
    """A GPU of sm_90a.

    Args:
        name: Its name.
        bandwidth: Bytes a second that a kernel can hope for.
        sms: Multiprocessors.
    """

    name: str
    bandwidth: float
    sms: int

    def needs_in_flight(self, latency: float) -> float:
        """Bytes that each SM must have under way, by Little's law.

        Args:
            latency: Seconds from a load to its data.
        """
        return self.bandwidth / self.sms * latency


MACHINES = (Machine("H100", 3.0e12, 132), Machine("H200", 4.3e12, 132))
LATENCY = (600e-9, 800e-9)


@dataclass(frozen=True)
class Bytes:
    """What one layer's decode step moves at least; slots and maps in fp16."""

    slots: int
    scores: int
    state: int
    maps: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.slots + self.scores + self.state + self.maps


def decode_bytes(at: Launch) -> Bytes:
    """By the formulas of docs/kernels.md.

    Args:
        at: Any launch of the step: its shape counts.
    """
    rows = at.B * at.K
    weights = at.D * at.E + at.E * at.R
    mix = at.K * (at.R * at.R + 2 * at.R) * 4 if at.map == "paper" else (at.Q + at.K) * at.R * 4
    return Bytes(
        slots=rows * at.C * 2 * at.D * 2,
        scores=12 * rows * at.C,
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
