"""Kills and full disks while a folder is written, and a process of several that dies."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults.points import ROOT, points

pytest.importorskip("transformers")
ENVIRONMENT = os.environ | {
    "PYTHONPATH": str(ROOT),
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="NO fork")
def test_a_folder_is_old_or_new_or_refused_wherever_its_writing_ends(
    record_property: Callable[[str, object], None],
) -> None:
    found = points("kills", 12, ENVIRONMENT)
    record_property("kills and full disks", sum(x["points"] for x in found.values()))
    for at in ("sidekick, over an old one: kill", "calibration, over an old one: kill"):
        assert min(found[at][kind] for kind in ("old", "new", "refused")) > 0
    assert found["config, over an old one: kill"]["refused"] == 0
    assert found["training: kill"]["points"] >= 2
    assert found["report: kill"]["points"] >= 2


def test_a_process_that_dies_ends_the_others_with_an_error_in_seconds(tmp_path: Path) -> None:
    from less.evaluate.families import build

    build("llama").save_pretrained(tmp_path)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.faults.dying", tmp_path],
            cwd=ROOT,
            env=ENVIRONMENT
            | {"RANK": str(i), "LOCAL_RANK": str(i), "WORLD_SIZE": "2"}
            | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    try:
        assert ranks[1].wait(timeout=120) == 9
        died = time.monotonic()
        out, errors = ranks[0].communicate(timeout=60)
        seconds = time.monotonic() - died
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()
    print(f"\nthe other process ended {seconds:.1f} s later")
    assert ranks[0].returncode == 0, errors[-3000:]
    assert "ended by" in out
    assert "refused: the cache's layers" in out
