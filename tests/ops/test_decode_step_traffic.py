"""What a step moves, as the emulator's tier track counts it: bytes, sectors and banks."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from tests.emulated import ROOT, Emulator
from tests.ops.test_decode_step_launched import RULES, make, run

proof = pytest.mark.proof
SHAPES = [
    pytest.param({"Q": 2, "K": 2, "D": 64, "S": 205, "E": 256}, id="small"),
    pytest.param({"Q": 2, "K": 2, "D": 128, "S": 205, "E": 512}, id="cores", marks=proof),
    pytest.param({"Q": 8, "K": 2, "D": 128, "S": 205, "E": 512}, id="tensor-cores", marks=proof),
]
# Lines that read shared memory in the loops over tiles.
LOOPS = re.compile(r"Tile::place|narrow_q\(\) \+ \(g0|mass\[g \* stride \+ r\]|load8_shared\(mass")


def step(emulator: Emulator, shape: dict[str, int]) -> tuple[dict[str, Any], int]:
    """The profile of a step, and the bytes that it cannot do without.

    Those are slots, scores and state once, read or written, and the maps.
    """
    a = make(torch.float16, B=1, R=8, maps_dtype=torch.float16, **shape)
    run(a, RULES[0])
    read = [a[n] for n in ("slot_k", "slot_v", "position", "weight", "score", "H", "z")]
    written = [a[n] for n in ("score", "H", "z")]
    floor = sum(x.numel() * x.element_size() for x in [*read, *written, *a["maps"].values()])
    return emulator.profile(), floor


@pytest.mark.parametrize("shape", SHAPES)
def test_an_emulated_step_moves_what_it_must_once_in_one_launch(counting, shape):
    profile, floor = step(counting, shape)
    moved = profile["load"]["bytes"] + profile["store"]["bytes"]
    assert floor <= moved <= 1.05 * floor
    assert profile["blocks"] == -(-shape["S"] // 32) * shape["K"]


@pytest.mark.parametrize("shape", SHAPES)
def test_an_emulated_step_uses_whole_sectors_and_every_bank(counting, shape):
    profile, _ = step(counting, shape)
    looked_at = set()
    for one in profile["instructions"]:
        if one["memory"] == "global" and one["bytes_per_lane"] == 16:
            assert one["sectors"] == one["ideal_sectors"], one
        if one["memory"] == "shared":
            file, line = one["where"].split(":")
            text = (ROOT / "csrc" / "cuda" / file).read_text().splitlines()[int(line) - 1]
            if loop := LOOPS.search(text):
                assert one["wavefronts"] == one["ideal_wavefronts"], one
                looked_at.add(loop[0])
    assert len(looked_at) >= 2
    for way in ("load", "store"):
        # Heads whose rows of per-slot numbers do not begin with a sector.
        assert profile[way]["sectors"] <= 1.01 * profile[way]["ideal_sectors"] + 16
