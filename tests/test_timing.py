"""The model of a decode step's time: what it makes of counts; the counting is the emulator's."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from bench.proof.roofline import GPUS, Machine, Shape, decode_bytes
from bench.proof.timing import (
    PAIRS,
    Counts,
    against,
    counts,
    estimate,
    faster,
    floor,
    main,
    measured,
    phases,
    text,
)

GPU = Machine("some GPU", 1e12, 10, clock=1e9, launch=1e-6)
SHAPE = Shape("Llama-3-8B", Q=32, K=8, C=205, B=4)


def of(**changes: object) -> Counts:
    values: dict[str, object] = {
        "kernel": "k", "blocks": 20, "threads": 128, "shared": 0, "cycles": 5000, "causes": {},
        "trips": 7, "barriers": 9, "instructions": 100.0, "bytes": 1000, "phases": (),
    }  # fmt: skip
    return Counts(**{**values, **changes})  # type: ignore[arg-type]


def profile(loaded: int, stored: int, blocks: int, cycles: int) -> dict[str, object]:
    """A profile as the emulator prints it, without what the model does not read."""
    waits = {"barrier": 8, "cluster_barrier": 1}
    return {
        "load": {"distinct_sectors": loaded},
        "store": {"distinct_sectors": stored},
        "timeline": {
            "launch": {"kernel": "k", "blocks": 224, "cluster": 7, "threads": 128, "shared": 9},
            "cycles": cycles, "trips": 7, "warp_instructions": 50 * blocks, "blocks": blocks,
            "cycles_by_cause": {"dram": 900}, "waits": waits,
            "phases": [{"until": "meet.h:1", "at": 40}],
        },
    }  # fmt: skip


def test_blocks_that_fit_side_by_side_are_one_wave_as_long_as_a_block() -> None:
    time = estimate(of(), held=3, gpu=GPU)
    assert time.waves == 1
    assert time.total == pytest.approx(5e-6 + 1e-6)


def test_more_blocks_are_more_waves() -> None:
    time = estimate(of(blocks=75), held=3, gpu=GPU)
    assert time.total == pytest.approx(2.5 * 5e-6 + 1e-6)


def test_a_wave_takes_no_less_than_its_bytes_and_its_instructions() -> None:
    bytes_ = estimate(of(bytes=int(80e6)), held=3, gpu=GPU)
    assert bytes_.total == pytest.approx(80e-6 + 1e-6)
    work = estimate(of(blocks=30, instructions=20000.0), held=3, gpu=GPU)
    assert work.total == pytest.approx(3 * 20000 / 4 * 1e-9 + 1e-6)


def test_counts_are_of_all_heads_and_rows_that_share_the_maps() -> None:
    got = counts(SHAPE, profile(100, 20, 7, 1), profile(150, 40, 14, 2))
    assert got.bytes == 32 * 8 * (120 + 3 * 70)
    assert got.instructions == 50
    assert (got.cycles, got.trips, got.barriers) == (2, 7, 9)
    alone = Shape("Llama-3-8B", Q=32, K=8, C=205, B=1)
    assert counts(alone, profile(100, 20, 7, 1), profile(100, 20, 7, 1)).bytes == 32 * 8 * 120


def test_every_gpu_has_a_latency_for_every_cause_that_the_emulator_knows() -> None:
    known = {"issue", "arithmetic", "special", "division", "shared", "shuffle", "tensor", "dram",
             "l2", "remote", "barrier", "cluster_barrier"}  # fmt: skip
    for gpu in GPUS:
        assert set(gpu.latency) == known
        assert gpu.latency["shared"] < gpu.latency["l2"] < gpu.latency["dram"]
        assert gpu.clusters == (gpu.latency["remote"] > 0)


def test_the_floor_of_packed_rows_counts_codes_scales_and_finer_rows() -> None:
    few = decode_bytes(Shape("some model", Q=2, K=2, C=50, B=3, D=64, R=0, rows="k4v4"))
    # Of a head: 20 rows of 64 numbers and a float, 30 of 32 bytes and a half; positions and halves.
    assert few.slots == 3 * 2 * 2 * (20 * (64 + 4) + 30 * (32 + 2))
    assert few.scores == 3 * 2 * 50 * (4 + 2 + 2)
    assert (few.state, few.maps) == (0, 0)


def test_packed_rows_are_set_against_as_many_of_fp16() -> None:
    for wide, few in PAIRS:
        assert replace(few, rows=wide.rows) == wide
        assert few.line.endswith(" 4 16\n")
        assert wide.line.endswith(" 0 0\n")
    seconds = {shape: (7e-6 if shape.rows == "fp16" else 2e-6) for pair in PAIRS for shape in pair}
    assert faster(seconds).split("\n")[0] == (
        "k4v4 against fp16, Llama-2-7B, C=205, B=64: 3.50 times as fast"
    )


def test_the_table_has_a_row_for_every_shape_and_the_floor_beside_it() -> None:
    rows = [(SHAPE, of(phases=(("a.h:1", 30), ("b.h:2", 70))), estimate(of(), 3, GPU))]
    shown = text(GPU, rows)
    assert f"| 6.0 | {floor(SHAPE, GPU) * 1e6:.1f} |" in shown
    assert len({line.count("|") for line in shown.split("\n") if line.startswith("|")}) == 1
    assert phases(rows).split("\n")[-1] == "       40  until b.h:2"


ROWS = [
    {"part": "device", "gpu": "NVIDIA H200"},
    {
        "part": "kernels", "op": "decode_step", "shape": "llama-3-8b", "B": 8, "C": 205,
        "slots": "float16", "best": 12e-6,
    },
    {
        "part": "kernels", "op": "decode_step", "shape": "llama-3-8b", "B": 8, "C": 205,
        "slots": "int8", "best": 9e-6,
    },
    {"part": "soak", "replays": 1},
]  # fmt: skip


def test_the_model_is_set_against_what_a_gpu_took() -> None:
    gpu, seconds = measured(ROWS)
    assert gpu is not None
    assert gpu.name == "H200"
    ((shape, taken),) = seconds.items()
    assert (shape.model, shape.B, taken) == ("Llama-3-8B", 8, 12e-6)
    assert "| Llama-3-8B | 205 | 8 | 12.0 | 10.0 | 1.20 |" in against([(shape, 10e-6)], seconds)


def test_a_gpu_that_is_not_modelled_is_named_and_nothing_is_built(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"part": "device", "gpu": "NVIDIA T4"}))
    assert main(["--against", str(rows)]) == 1
    assert "no decode step of a GPU that is modelled" in capsys.readouterr().out
