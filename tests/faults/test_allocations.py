"""Memory that runs out, at every allocation of every call: see allocations.py and .cpp."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("less._C")
HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def preloaded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment in which allocations can be made to fail."""
    compiler = os.environ.get("CXX") or shutil.which("c++")
    if compiler is None or not sys.platform.startswith("linux"):
        pytest.skip("NO FAULTS: wants a C++ compiler on Linux")
    library = tmp_path_factory.mktemp("faults") / "liballocations.so"
    flags = ["-std=c++17", "-O1", "-shared", "-fPIC"]
    subprocess.run([compiler, *flags, HERE / "allocations.cpp", "-o", library, "-ldl"], check=True)
    return os.environ | {"LD_PRELOAD": str(library), "PYTHONPATH": str(HERE.parents[1])}


def test_a_cache_survives_the_failure_of_every_allocation_or_says_that_it_did_not(
    preloaded: dict[str, str],
) -> None:
    every = "1" if os.environ.get("LESS_FUZZ_STEPS") else "4"
    run = subprocess.run(
        [sys.executable, "-m", "tests.faults.allocations", every],
        env=preloaded,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    found = json.loads(run.stdout.splitlines()[-1])
    points = sum(x["points"] for x in found.values())
    refused = sum(x["refused"] for x in found.values())
    print(f"\n{points} allocations of {len(found)} calls failed; {refused} caches refused to go on")
    assert points > 400
    # What stops amid pages is found, and nearly all stops before.
    assert 0 < refused < points / 4
