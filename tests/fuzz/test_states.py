"""Random sequences of calls of a cache: see ``tests/fuzz/machine.py``.

``make soak`` draws others: LESS_FUZZ_STEPS is how many steps it makes in all, at the least.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, seed, settings
from hypothesis.stateful import run_state_machine_as_test

from tests.conftest import simd_levels
from tests.fuzz.machine import CacheMachine

STEPS = int(os.environ.get("LESS_FUZZ_STEPS", 20_000))
#: A step of the reference, which is slow, is one of so many; the SIMD levels share the others.
REFERENCE = 12
PARTS = 10  # of a level's steps: tests of their own, which a failure names
SEQUENCE = 40  # steps of a sequence, at most
#: Sequences that Hypothesis draws at once. It remembers them all, so that a round cannot be long.
ROUND = 100


def run(backend: str, steps: int, part: int = 0) -> int:
    """Sequences of calls on a backend, in rounds, until so many steps were made.

    Returns:
        The steps that were made.

    Raises:
        AssertionError: With the number of the round, and the calls that are needed.
    """
    machine = type("Machine", (CacheMachine,), {"BACKEND": backend, "steps": 0})
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
    record_property("steps of caches", run("reference", -(-STEPS // REFERENCE)))


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
