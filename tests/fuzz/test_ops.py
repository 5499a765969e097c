"""Wrong calls straight at the ops, in a process of their own: see ``tests/fuzz/ops.py``.

LESS_FUZZ_CALLS is how many; ``make soak`` makes 20,000.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Callable

import pytest

pytest.importorskip("less._C")
COUNT = int(os.environ.get("LESS_FUZZ_CALLS", 1000))


def test_a_wrong_call_of_an_op_is_refused_or_right_and_never_a_crash(
    record_property: Callable[[str, object], None],
) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.fuzz.ops", str(COUNT)],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    last = done.stderr.strip().splitlines()[-1:]
    assert done.returncode == 0, f"exit {done.returncode} in call {last}\n{done.stdout[-4000:]}"
    found = ast.literal_eval(done.stdout.splitlines()[-1])
    assert found["refused"] + found["taken"] == COUNT
    assert min(found["refused"], found["taken"]) > COUNT // 8
    record_property("wrong calls of ops", COUNT)
