"""Random sequences of calls of a cache: see ``tests/fuzz/machine.py``.

``make soak`` runs more of them: LESS_FUZZ_STEPS is how many steps each test makes, about.
"""

from __future__ import annotations

import os

import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import run_state_machine_as_test

from tests.conftest import simd_levels
from tests.fuzz.machine import CacheMachine

STEPS = 25  # of one sequence


def run(backend: str, examples: int) -> int:
    """Sequences of calls on a backend; the steps that were made."""
    steps = int(os.environ.get("LESS_FUZZ_STEPS", 0))
    machine = type("Machine", (CacheMachine,), {"BACKEND": backend, "steps": 0})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=steps // STEPS or examples,
            stateful_step_count=STEPS,
            derandomize=not steps,
            database=None,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
    return machine.steps


def test_any_sequence_of_calls_keeps_the_reference_whole() -> None:
    assert run("reference", 15) >= 100


@pytest.mark.parametrize("level", simd_levels())
def test_any_sequence_of_calls_keeps_the_kernels_whole_and_right(level: str) -> None:
    from less import _C

    before = _C.build_facts()["simd"]
    _C._test.set_simd(level)
    try:
        assert run("native", 15) >= 100
    finally:
        _C._test.set_simd(before)
