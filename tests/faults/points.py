"""A program that ends calls at point after point, in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def points(program: str, sampled: int, env: Mapping[str, str]) -> dict[str, Any]:
    """What a program of this folder found, which it prints as its last line.

    Args:
        program: Its module's name.
        sampled: Of so many points it tries one; each in ``make soak``.
        env: Its environment.
    """
    every = 1 if os.environ.get("LESS_FUZZ_STEPS") else sampled
    run = subprocess.run(
        [sys.executable, "-m", f"tests.faults.{program}", str(every)],
        cwd=ROOT,
        env={**env, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300 if every > 1 else 3600,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    found: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    return found
