"""What can be known of the GPU's bench without a GPU: it runs, it reports, its script is whole."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("less._C")

import torch

from bench import gpu
from tests import emulated
from tests.conftest import end_if_lost
from tests.test_house import OPS

ROOT = Path(__file__).resolve().parent.parent
ROWS = [
    {"part": "machine", "torch": "9.9.9+cu999", "less": "0.1.0", "commit": None},
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
    assert "torch 9.9.9+cu999, less 0.1.0 (no checkout)" in text  # where it was measured, not here
    assert "| decode_step | llama-3-8b | 8 | 205 | 1 | float16 | 1 | 4.0 | 4.2 | 8.00 | 2000 | 80% |  |" in text  # fmt: skip  # noqa: E501
    assert "| 8.00 | 2000 | 80% | 100 |" in text
    assert "| llama-3-8b | 205 | 8 | 5.0 | 50.0 (10x) |" in text
    assert "replayed 100,000 times in 2 s" in text
    assert "<!-- begin gpu -->" in (ROOT / "docs" / "results.md").read_text()


def test_every_contender_runs_and_agrees_with_the_reference(tmp_path):
    rows = tmp_path / "gpu.jsonl"
    assert gpu.main(["compare", "--json", str(rows), "--dry-run"]) == 0
    first, *others = map(json.loads, rows.read_text().splitlines())
    assert first["torch"] == torch.__version__
    assert [x["contender"] for x in others][:3] == ["less", "less, eviction alone", "sdpa 32"]


def test_a_contender_that_is_wrong_is_not_timed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "difference", lambda got, want: float("nan"))
    rows = tmp_path / "gpu.jsonl"
    assert gpu.main(["compare", "--json", str(rows), "--dry-run"]) == 1
    assert [json.loads(line)["part"] for line in rows.read_text().splitlines()] == ["machine"]
    assert capsys.readouterr().out.count("WRONG, not timed") == 3


def test_a_contender_that_fails_is_named_and_the_rest_goes_on(tmp_path, monkeypatch, capsys):
    def broken():
        raise ImportError("no such kernel")

    others = [gpu.Other("broken", broken), *gpu.others(gpu.TINY[0])]
    monkeypatch.setattr(gpu, "others", lambda shape: iter(others))
    rows = tmp_path / "gpu.jsonl"
    assert gpu.main(["compare", "--json", str(rows), "--dry-run"]) == 1
    names = [json.loads(line).get("contender") for line in rows.read_text().splitlines()]
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


def script(path, text):
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def test_a_step_that_fails_is_named_and_the_rest_goes_on(tmp_path):
    """On a machine that looks as if it had a GPU: tools say what they were asked, and answer."""
    for folder in ("bench", "tools", "bin"):
        (tmp_path / folder).mkdir()
    for name in ("bench/gpu.sh", *(f"tools/{tool}.py" for tool in ("native", "cuda_toolkit"))):
        shutil.copy(ROOT / name, tmp_path / name)
    bin_, log = tmp_path / "bin", tmp_path / "log"
    script(bin_ / "nvidia-smi", "echo 9.0")
    nvcc = f'case $1 in -dryrun) echo "#\\$ TOP={tmp_path}" >&2 ;; *) echo "release 13.0" ;; esac'
    script(bin_ / "nvcc", nvcc)
    program = "build/gpu/bench/cuda"
    script(
        bin_ / "cmake",
        '[ "$1" = --version ] && echo "cmake version 4.0" && exit; echo "cmake $*" >> log\n'
        f"mkdir -p {program} && cp bin/less_gpu {program}/",
    )
    script(bin_ / "less_gpu", 'echo "less_gpu $*" >> log; echo "{}"')
    script(bin_ / "compute-sanitizer", 'echo "sanitizer $*" >> log; [ "$2" != racecheck ]')
    script(
        bin_ / "python",
        'case "$*" in *setup.py*|*pytest*|*bench.gpu*|*bench.proof*)\n'
        'echo "python $*" >> log ;; esac\n'
        'case "$*" in\n*bench.gpu*report*|*bench.proof*|*setup.py*|*get_device_name*) ;;\n'
        "*bench.gpu*|*pytest*tests/ops*) exit 1 ;;\n"
        f'*) exec {sys.executable} "$@" ;;\nesac',
    )
    env = {name: value for name, value in os.environ.items() if not name.startswith("LESS_CUDA")}
    env |= {"PYTHON": str(bin_ / "python"), "PATH": f"{bin_}:{env['PATH']}"}
    done = subprocess.run(
        [tmp_path / "bench" / "gpu.sh"], env=env, text=True, capture_output=True, check=False
    )
    assert done.returncode == 1, done.stdout + done.stderr
    failed = ["parity on cuda", "compare with full attention", "compute-sanitizer racecheck"]
    assert done.stderr.split("failed:\n")[1].split("\n") == [*(f"  {x}" for x in failed), ""]
    asked = log.read_text()
    assert "-DLESS_CUDA_ARCHS=90a" in asked
    for what in (
        "synccheck", "less_gpu --dependent", "less_gpu --soak 100000", "bench.gpu report",
        "bench.proof.timing --against",
    ):  # fmt: skip
        assert what in asked
    order = [asked.index(what) for what in ("--op decode_step", "-m pytest", "--op fold")]
    assert order == sorted(order)
    ops = set(OPS) - {"rotate"}  # which decode_step launches, and is timed in it
    assert {line.split()[-1] for line in asked.splitlines() if "less_gpu --op" in line} == ops
    assert (tmp_path / "out" / "gpu.jsonl").read_text() == "{}\n" * (len(ops) + 2)

    log.write_text("")
    done = subprocess.run(
        [tmp_path / "bench" / "gpu.sh", "sanitize", "report"], env=env, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert done.stderr.split("failed:\n")[1] == "  compute-sanitizer racecheck\n"
    asked = log.read_text()
    assert asked.count("sanitizer --tool") == 4
    assert "bench.gpu report" in asked
    assert "setup.py" not in asked
    assert "less_gpu --op" not in asked
    assert (tmp_path / "out" / "gpu.jsonl").read_text() == "{}\n" * (len(ops) + 2)


def test_a_gpu_that_answers_no_more_ends_the_tests(monkeypatch):
    def lost():
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    end_if_lost("test_x")
    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    with pytest.raises(pytest.exit.Exception, match="test_x left a GPU .* illegal memory access"):
        end_if_lost("test_x")


def test_the_script_knows_its_parts():
    for words in (["tests"], ["--build"], ["--dry", "build"]):
        done = subprocess.run(
            [ROOT / "bench" / "gpu.sh", *words], text=True, capture_output=True, check=False
        )
        assert done.returncode == 2
        assert "[build test time compare report sanitize]" in done.stderr


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
    ops = set(OPS) - {"rotate"}  # which decode_step launches, and is timed in it
    assert {row["op"] for row in rows if row["part"] == "kernels"} == ops
    assert all(row["bytes"] > 0 for row in rows if row["part"] == "kernels")
    done = subprocess.run(
        [program, "--small", "--dependent"], env=env, text=True, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr
    done = subprocess.run(
        [program, "--small", "--op", "fold"], env=env, text=True, capture_output=True, check=False
    )
    assert {json.loads(line).get("op") for line in done.stdout.splitlines()} == {None, "fold"}
    done = subprocess.run([program, "--op", "none"], env=env, capture_output=True, check=False)
    assert done.returncode == 2
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
