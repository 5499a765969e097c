"""What a step moves, as the emulator's tier track counts it: bytes, sectors and banks."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from less import H2O, PagedLayer, PageLayout
from less.layer import encode
from tests.emulated import ROOT, Emulator
from tests.helpers import random_qkv
from tests.ops.test_decode_step_launched import RULES, make, run

proof = pytest.mark.proof
SHAPES = [
    pytest.param({"Q": 2, "K": 2, "D": 64, "S": 205, "E": 256}, id="small"),
    pytest.param({"Q": 2, "K": 2, "D": 128, "S": 205, "E": 512}, id="cores", marks=proof),
    pytest.param({"Q": 8, "K": 2, "D": 128, "S": 205, "E": 512}, id="tensor-cores", marks=proof),
]
# Lines that read shared memory in the loops over tiles.
LOOPS = re.compile(r"Tile::place|narrow_q\(\) \+ \(g0|mass\[g \* stride \+ r\]|load8_shared\(mass")
PACKED = [
    pytest.param("k4v4", {"Q": 2, "K": 2, "D": 64, "S": 205}, id="small"),
    pytest.param("k4v4", {"Q": 2, "K": 2, "D": 128, "S": 718}, id="long", marks=proof),
    pytest.param("k3v3", {"Q": 2, "K": 2, "D": 64, "S": 718}, id="three bits", marks=proof),
    pytest.param("k8v4", {"Q": 2, "K": 2, "D": 128, "S": 205}, id="int8 keys", marks=proof),
]


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


def packed_step(form: str, Q: int, K: int, D: int, S: int) -> int:
    """A step of one kernel on packed slots, of float32 rows that are in the space; its floor.

    The floor: the slots' fields and the token's rows once, and the scores once more.
    """
    page = PageLayout(K, D, S, form)
    layer = PagedLayer(H2O(S - 16, 16, decay=0.97), page, Q, backend="reference")
    pool = layer.new_pool(1)
    layer.attend(pool, *random_qkv(1, Q, K, S + 40, D))
    q, k, v = random_qkv(1, Q, K, 1, D, seed=1)
    slots = page.views(pool)[0].slots
    once = [*slots.tensors().values(), slots.score, q, q, k, v]
    without_space = encode(layer.plan.spec, page)
    out = torch.empty_like(q)
    torch.ops.less.decode_step(q, k, v, None, out, pool, None, without_space, None, None)
    return sum(x.nbytes for x in once)


@pytest.mark.parametrize(("form", "shape"), PACKED)
def test_an_emulated_step_on_packed_rows_moves_what_it_must_once(counting, form, shape):
    floor = packed_step(form, **shape)
    profile = counting.profile()
    moved = profile["load"]["bytes"] + profile["store"]["bytes"]
    assert floor <= moved <= 1.05 * floor


@pytest.mark.parametrize(("form", "shape"), PACKED)
def test_an_emulated_step_on_packed_rows_uses_whole_sectors_and_every_bank(counting, form, shape):
    packed_step(form, **shape)
    profile = counting.profile()
    for one in profile["instructions"]:
        if one["memory"] == "global" and one["bytes_per_lane"] == 16:
            assert one["sectors"] == one["ideal_sectors"], one
        # Blocks of a cluster tell each other a few numbers, which lie as they may.
        among_blocks = one["where"].startswith("decode_step/meet.h") or one["lanes"] < 512
        if one["memory"] == "shared" and not among_blocks:
            assert one["wavefronts"] == one["ideal_wavefronts"], one
    # Cold slots' numbers of 2 bytes do not begin with a sector.
    for way in ("load", "store"):
        assert profile[way]["sectors"] <= 1.03 * profile[way]["ideal_sectors"] + 16
