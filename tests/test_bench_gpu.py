"""What can be known of the GPU's bench without a GPU: it runs, it reports, its script is whole."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("less._C")

import torch

from bench import gpu
from tests import emulated

ROOT = Path(__file__).resolve().parent.parent
ROWS = [
    {"part": "device", "gpu": "Some GPU", "capability": "9.0", "l2": 1, "copy": 2.5e12},
    {
        "part": "kernels", "op": "decode_step", "shape": "llama-3-8b", "B": 8, "C": 205, "T": 1,
        "slots": "float16", "layers": 60, "launches": 1.0, "best": 4e-6, "median": 4.25e-6,
        "bytes": 8_000_000, "flops": 0, "copy": 2.5e12, "share": 0.8,
    },
    {
        "part": "kernels", "op": "prompt_scores", "shape": "llama-3-8b", "B": 8, "C": 205, "T": 128,
        "slots": "float16", "layers": 60, "launches": 2.0, "best": 4e-6, "median": 4.25e-6,
        "bytes": 8_000_000, "flops": 4e8, "copy": 2.5e12, "share": 0.8,
    },
    {"part": "soak", "replays": 100000, "seconds": 1.5},
    {
        "part": "compare", "shape": "llama-3-8b", "C": 205, "B": 8, "contender": "less",
        "layers": 60, "best": 5e-6, "median": 5e-6, "bytes": 8_000_000,
    },
    {
        "part": "compare", "shape": "llama-3-8b", "C": 205, "B": 8, "contender": "sdpa 4096",
        "layers": 2, "best": 5e-5, "median": 5e-5, "bytes": 134_217_728,
    },
]  # fmt: skip


def test_rows_become_the_tables_of_the_results(tmp_path, capsys):
    rows = tmp_path / "gpu.jsonl"
    rows.write_text("\n".join(map(json.dumps, ROWS)))
    page = tmp_path / "results.md"
    page.write_text("before\n<!-- begin gpu -->\nold\n<!-- end gpu -->\nafter\n")
    assert gpu.main(["report", "--json", str(rows), "--update", str(page)]) == 0
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    assert "Some GPU, compute capability 9.0, which copies 2500 GB/s" in text
    assert "| decode_step | llama-3-8b | 8 | 205 | 1 | float16 | 1 | 4.0 | 4.2 | 8.00 | 2000 | 80% |  |" in text  # fmt: skip  # noqa: E501
    assert "| 8.00 | 2000 | 80% | 100 |" in text
    assert "| llama-3-8b | 205 | 8 | 5.0 | 50.0 (10x) |" in text
    assert "replayed 100,000 times in 2 s" in text
    assert "<!-- begin gpu -->" in (ROOT / "docs" / "results.md").read_text()


def test_every_contender_runs_and_agrees_with_the_reference(tmp_path):
    rows = tmp_path / "gpu.jsonl"
    assert gpu.main(["compare", "--json", str(rows), "--dry-run"]) == 0
    names = [json.loads(line)["contender"] for line in rows.read_text().splitlines()]
    assert names[:3] == ["less", "less, eviction alone", "sdpa 32"]


def test_a_contender_that_is_wrong_is_not_timed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "difference", lambda got, want: float("nan"))
    rows = tmp_path / "gpu.jsonl"
    assert gpu.main(["compare", "--json", str(rows), "--dry-run"]) == 1
    assert rows.read_text() == ""
    assert capsys.readouterr().out.count("WRONG, not timed") == 3


def test_a_contender_that_fails_is_named_and_the_rest_goes_on(tmp_path, monkeypatch, capsys):
    def broken():
        raise ImportError("no such kernel")

    others = [gpu.Other("broken", broken), *gpu.others(gpu.TINY[0])]
    monkeypatch.setattr(gpu, "others", lambda shape: iter(others))
    rows = tmp_path / "gpu.jsonl"
    assert gpu.main(["compare", "--json", str(rows), "--dry-run"]) == 1
    names = [json.loads(line)["contender"] for line in rows.read_text().splitlines()]
    assert "sdpa 32" in names
    printed = capsys.readouterr()
    assert "FAILED, not timed: no such kernel" in printed.out
    assert "tiny, batch 1, broken 32" in printed.err


@pytest.mark.slow
def test_the_script_is_whole_and_its_commands_are_there():
    env = {**os.environ, "PYTHON": sys.executable}
    done = subprocess.run(
        ["bench/gpu.sh", "--dry-run"], cwd=ROOT, env=env, text=True, check=False,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    for tool in ("memcheck", "racecheck", "initcheck", "synccheck"):
        assert f"--tool {tool} --error-exitcode 1 build/gpu/bench/cuda/less_gpu" in done.stdout
    for missing in ("failed", "nothing can be built"):
        assert missing not in done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="it would do all of it")
def test_without_a_gpu_the_script_says_so_and_builds_nothing(tmp_path):
    env = {**os.environ, "PYTHON": sys.executable, "CUDACXX": ""}
    done = subprocess.run(
        ["bench/gpu.sh"], cwd=ROOT, env=env, text=True, check=False,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert done.returncode == 1
    assert "torch sees no GPU" in done.stdout or "nothing can be built" in done.stdout
    assert "== build the package" not in done.stdout


@pytest.mark.slow
def test_the_program_runs_its_small_layers_on_the_emulator(request):
    """Every parameter that it hands to a kernel is sound: where not, the emulator ends it."""
    if not emulated.supported():
        pytest.skip("NO EMULATOR: it wants Linux on x86-64")
    tier = request.config.getoption("--emulator-tier")
    program = emulated.make(tier, f"less_gpu_{tier}") / "bench" / "cuda" / f"less_gpu_{tier}"
    env = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    done = subprocess.run(
        [program, "--small"], env=env, text=True, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    ops = {path.stem for path in (ROOT / "csrc" / "ops").glob("*.cpp")}
    assert {row["op"] for row in rows if row["part"] == "kernels"} == ops
    assert all(row["bytes"] > 0 for row in rows if row["part"] == "kernels")
    done = subprocess.run(
        [program, "--soak", "2"], env=env, text=True, capture_output=True, check=False
    )  # its graphs count one step, whatever they are asked for
    assert done.returncode == 1
    assert "a row has seen 206 tokens, wanted 207" in done.stderr


def test_an_unknown_word_is_refused():
    done = subprocess.run(
        ["bench/gpu.sh", "--fast"], cwd=ROOT, text=True, capture_output=True, check=False
    )
    assert done.returncode == 2
    assert "usage: bench/gpu.sh [--dry-run [--build]]" in done.stderr
