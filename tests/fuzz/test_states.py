"""Random sequences of calls of a cache: see ``tests/fuzz/machine.py``.

``make soak`` draws others: LESS_FUZZ_STEPS is how many steps it makes in all, at the least.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, seed, settings
from hypothesis.stateful import run_state_machine_as_test

from tests.conftest import simd_levels
from tests.emulated import Emulator
from tests.fuzz.machine import FORMATS, CacheMachine

FP8 = torch.float8_e4m3fn  # not of CPU kernels
STEPS = int(os.environ.get("LESS_FUZZ_STEPS", 20_000))
#: A step of the reference, which is slow, is one of so many; the SIMD levels share the others.
REFERENCE = 12
EMULATED = 400  # a step of the emulator is one of so many
PARTS = 10  # of a level's steps: tests of their own, which a failure names
SEQUENCE = 40  # steps of a sequence, at most
#: Sequences that Hypothesis draws at once. It remembers them all, so that a round cannot be long.
ROUND = 100


def run(backend: str, steps: int, part: int = 0, **of: object) -> int:
    """Sequences of calls on a backend, in rounds, until so many steps were made.

    Args:
        backend: Of the cache.
        steps: At the least.
        part: Which of several tests this is, that do not draw the same.
        of: What the machine draws from, where that is not what it says.

    Returns:
        The steps that were made.

    Raises:
        AssertionError: With the number of the round, and the calls that are needed.
    """
    machine = type("Machine", (CacheMachine,), {"BACKEND": backend, "steps": 0, **of})
    drawn = "LESS_FUZZ_STEPS" in os.environ
    n = random.randrange(1 << 48) if drawn else part << 16
    while machine.steps < steps:
        print(f"round {n}")  # shown where it fails
        left = (steps - machine.steps) // SEQUENCE + 2
        run_state_machine_as_test(
            seed(n)(machine),
            settings=settings(
                max_examples=min(ROUND, left),
                stateful_step_count=SEQUENCE,
                database=None,
                deadline=None,
                suppress_health_check=list(HealthCheck),
            ),
        )
        n += 1
    return machine.steps


def test_any_sequence_of_calls_keeps_the_reference_whole(
    record_property: Callable[[str, object], None],
) -> None:
    record_property(
        "steps of caches", run("reference", -(-STEPS // REFERENCE), FORMATS=[*FORMATS, FP8])
    )


@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize("level", simd_levels())
def test_any_sequence_of_calls_keeps_the_kernels_whole_and_right(
    level: str, part: int, record_property: Callable[[str, object], None]
) -> None:
    from less import _C

    share = -(-STEPS * (REFERENCE - 1) // REFERENCE // (len(simd_levels()) * PARTS))
    before = _C.build_facts()["simd"]
    _C._test.set_simd(level)
    try:
        steps = run("native", share, part)
    finally:
        _C._test.set_simd(before)
    record_property("steps of caches", steps)


def test_any_sequence_of_calls_keeps_the_emulated_kernels_whole_and_right(
    emulator: Emulator, record_property: Callable[[str, object], None]
) -> None:
    """A slice: a launch takes the emulator as long as a hundred calls take the CPU."""
    dims = os.environ.get("LESS_CUDA_HEAD_DIMS", "64").replace(",", " ").split()
    steps = run(
        "native",
        STEPS // EMULATED,
        FORMATS=[*FORMATS, FP8],
        # What has a CUDA kernel yet.
        PACKED_VICTIMS=("forget",),
        KINDS=("exp", "paper"),
        HEAD_DIMS=(int(dims[0]),),
    )
    record_property("steps of emulated caches", steps)
