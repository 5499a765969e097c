"""The emulator on itself: every planted error is found by its name, and what is right passes."""

from __future__ import annotations

import json
import os
import re
import subprocess
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests import emulated

HERE = Path(__file__).resolve().parent
TIERS = ("fast", "asan", "track")
SCHEDULES = ("in_order", "reverse", "random", "warp_ahead", "warp_behind", "lockstep")

# What finds an error that a tier cannot name: wrong values, or a sanitizer.
VALUES = "wrong values"
ASAN = "AddressSanitizer"
UNSEEN = ""

# What is not about one line of a kernel.
WITHOUT_A_PLACE = ("dependent-launch", "launch", "livelock", "out-of-bounds")

# Of each planted error, what the tiers fast, asan and track must say.
PLANTED = {
    "shared_barrier": (VALUES, VALUES, "race"),
    "reuse_barrier": (VALUES, VALUES, "race"),
    "warp_order": (UNSEEN, UNSEEN, "race"),
    "divergent_shuffle": ("divergent-collective",) * 3,
    "own_mask": ("mask",) * 3,
    "exited_lane": ("shuffle-source",) * 3,
    "two_barriers": ("barrier-divergence",) * 3,
    "missed_barrier": ("deadlock",) * 3,
    "named_barrier": ("barrier-count",) * 3,
    "half_warps": ("barrier-divergence",) * 3,
    "shared_bounds": ("out-of-bounds", ASAN, "out-of-bounds"),
    "global_bounds": (UNSEEN, ASAN, "out-of-bounds"),
    "shared_unwritten": (VALUES, VALUES, "uninitialised"),
    "global_unwritten": (VALUES, VALUES, "uninitialised"),
    "missed_output": (VALUES, VALUES, VALUES),
    "misaligned": ("misaligned",) * 3,
    "other_stack": (UNSEEN, UNSEEN, "stack"),
    "async_wait": (VALUES, ASAN, "async-race"),
    "async_groups": (VALUES, ASAN, "async-race"),
    "async_end": ("async-pending",) * 3,
    "async_address": ("address-space",) * 3,
    "bulk_too_many_expected": ("mbarrier-bytes",) * 3,
    "bulk_too_few_expected": ("mbarrier-bytes",) * 3,
    "bulk_no_wait": (VALUES, ASAN, "race"),
    "bulk_no_fence": ("mbarrier-fence",) * 3,
    "bulk_no_empty": ("mbarrier",) * 3,
    "bulk_arrive_twice": ("deadlock",) * 3,
    "mbarrier_unknown": ("mbarrier",) * 3,
    "global_race": (UNSEEN, UNSEEN, "race"),
    "unregistered": (UNSEEN, UNSEEN, "race"),
    "foreign_memory": (UNSEEN, UNSEEN, "out-of-bounds"),
    "last_block_no_release": (UNSEEN, UNSEEN, "race"),
    "last_block_no_acquire": (UNSEEN, UNSEEN, "race"),
    "last_block_no_barrier": (UNSEEN, UNSEEN, "race"),
    "plain_counter": (UNSEEN, UNSEEN, "race"),
    "spin": ("livelock",) * 3,
    "cluster_no_start": ("cluster-start",) * 3,
    "cluster_no_sync": (VALUES, VALUES, "race"),
    "cluster_no_exit": ("cluster-exit",) * 3,
    "cluster_bad_rank": ("cluster-rank",) * 3,
    "cluster_two_arrivals": ("cluster-barrier",) * 3,
    "dependent": (UNSEEN, UNSEEN, "dependent-launch"),
    "dependent_no_wait": ("dependent-launch",) * 3,
    "bad_launch": ("launch",) * 3,
    "static_beside_dynamic": ("launch",) * 3,
}

pytestmark = pytest.mark.skipif(
    not emulated.supported(), reason="NO EMULATOR: its tests want Linux on x86-64"
)


@dataclass(frozen=True)
class Answer:
    """What a run of the program has said."""

    status: int
    told: dict[str, Any]
    stderr: str

    def wrong_values(self) -> bool:
        return self.told["right"] < self.told["runs"]


@cache
def program(tier: str) -> Path:
    return emulated.make(tier, f"planted_{tier}") / "tests" / "emulator" / f"planted_{tier}"


def run(tier: str, case: str, which: str = "right", **options: object) -> Answer:
    words = [f"{name.rstrip(chr(95))}={value}" for name, value in options.items()]
    env = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    done = subprocess.run(
        [program(tier), case, which, *words],
        env=env, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    told = json.loads(done.stdout) if done.returncode == 0 else {}
    return Answer(done.returncode, told, done.stderr)


def test_every_planted_error_is_in_the_table() -> None:
    sources = "".join((HERE / f"planted_{part}.cu").read_text() for part in
                      ("block", "async", "grid"))  # fmt: skip
    assert set(re.findall(r'\{"(\w+)", \w', sources)) == set(PLANTED)


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("case", PLANTED)
def test_what_is_right_passes_under_every_schedule(case: str, tier: str) -> None:
    answer = run(tier, case)
    assert answer.status == 0, answer.stderr
    assert answer.told["tier"] == tier
    assert not answer.told["errors"]
    assert not answer.wrong_values()


@pytest.mark.parametrize(
    ("case", "tier", "wanted"),
    [
        (case, tier, wanted)
        for case, by_tier in PLANTED.items()
        for tier, wanted in zip(TIERS, by_tier, strict=True)
        if wanted != UNSEEN
    ],
)
def test_a_planted_error_is_found_by_name(case: str, tier: str, wanted: str) -> None:
    answer = run(tier, case, "wrong")
    if wanted == ASAN:
        assert answer.status != 0
        assert ASAN in answer.stderr
        return
    assert answer.status == 0, answer.stderr
    if wanted == VALUES:
        assert answer.wrong_values()
        return
    messages = [e["message"] for e in answer.told["errors"] if e["kind"] == wanted]
    assert messages
    assert "planted_" in messages[0] or wanted in WITHOUT_A_PLACE


@pytest.mark.parametrize("case", ["cluster_no_sync", "dependent"])
def test_code_for_sm_80_has_neither_clusters_nor_dependent_launches(
    monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    monkeypatch.setenv("LESS_EMULATOR_CODE", "80")
    assert "launch" in {error["kind"] for error in run("fast", case).told["errors"]}


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("case", ["fragments_fp16", "fragments_bf16", "halves"])
def test_values_of_fragments_and_halves_are_exact(case: str, tier: str) -> None:
    answer = run(tier, case)
    assert answer.status == 0, answer.stderr
    assert not answer.told["errors"]
    assert not answer.wrong_values()


@pytest.mark.parametrize(("stride", "wavefronts"), [(1, 1), (2, 2), (32, 32), (33, 1)])
def test_bank_conflicts_are_counted(stride: int, wavefronts: int) -> None:
    profile = run("track", f"banks_{stride}", schedule="in_order", async_="late").told
    shared = profile["profile"]["shared"]
    assert shared == {"requests": 2, "wavefronts": 2 * wavefronts, "ideal_wavefronts": 2}


@pytest.mark.parametrize(("which", "share"), [("right", 1), ("wrong", 2)])
def test_sectors_show_accesses_that_are_not_contiguous(which: str, share: int) -> None:
    told = run("track", "traffic", which, schedule="in_order", async_="late").told
    load, store = told["profile"]["load"], told["profile"]["store"]
    bytes_copied = 2 * 64 * 16
    assert store == {"bytes": bytes_copied, "sectors": bytes_copied // 32,
                     "ideal_sectors": bytes_copied // 32,
                     "distinct_sectors": bytes_copied // 32}  # fmt: skip
    assert load["bytes"] == bytes_copied
    assert load["sectors"] == share * load["ideal_sectors"]
    where = [entry["where"] for entry in told["profile"]["instructions"]]
    assert all(re.fullmatch(r"planted_profile\.cu:\d+", place) for place in where), where


def test_schedules_differ_and_seeds_repeat() -> None:
    def arrivals(schedule: str, seed: int) -> int:
        told = run("fast", "arrivals", schedule=schedule, async_="late", seed=seed).told
        assert not told["errors"]
        return int(told["seen"][0])

    first = {schedule: arrivals(schedule, 1) for schedule in SCHEDULES}
    assert len(set(first.values())) == len(SCHEDULES)
    for schedule in ("random", "warp_ahead", "warp_behind"):
        assert arrivals(schedule, 1) == first[schedule]
        assert arrivals(schedule, 2) != first[schedule]


def test_an_unknown_option_is_refused() -> None:
    assert run("fast", "arrivals", schedule="sideways").status == 2
    env = {**os.environ, "LESS_EMULATOR_SCHEDULE": "sideways"}
    done = subprocess.run([program("fast"), "arrivals", "right"], env=env, capture_output=True,
                          text=True, check=False)  # fmt: skip
    assert done.returncode != 0
    assert "LESS_EMULATOR_SCHEDULE" in done.stderr
