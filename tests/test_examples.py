"""The scripts of examples/, run as a reader runs them."""

import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
NAMES = {"byte_budget", "decoding_loop", "generate", "own_policy", "page_pool"}
OF_A_MODEL = ("generate", "byte_budget")


def run(monkeypatch, name, *arguments):
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
    return runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")


@pytest.fixture
def folder(tmp_path):
    pytest.importorskip("transformers")
    from tests.tiny_model import save_tiny

    return str(save_tiny(tmp_path / "model"))


def test_every_example_is_tested_and_short():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == NAMES
    for path in EXAMPLES.glob("*.py"):
        assert 15 <= len(path.read_text().splitlines()) <= 45, path.name


def test_generate_runs_on_a_folder_of_a_model(monkeypatch, folder, capsys):
    cache = run(monkeypatch, "generate", folder)["cache"]
    assert cache.policy.capacity == 64
    assert cache.stats()["evictions"][0] > 0
    assert "tokens were evicted in layer 0" in capsys.readouterr().out


def test_the_decoding_loop_keeps_its_capacity_and_returns_to_its_snapshot(monkeypatch, capsys):
    run(monkeypatch, "decoding_loop")
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "510 tokens seen, 128 kept per kv head"
    assert said[2] == "500 tokens seen after the snapshot was loaded"


def test_the_policy_of_the_example_keeps_what_its_docstring_says(monkeypatch, capsys):
    run(monkeypatch, "own_policy")
    kept = eval(capsys.readouterr().out)
    assert kept[16:] == list(range(86, 102))  # the 16 last of 102
    assert set(range(0, 86, 8)) < set(kept[:16])


def test_the_pool_of_pages_serves_sequences_that_come_and_go(monkeypatch, capsys):
    done = run(monkeypatch, "page_pool")
    assert done["views"].seen.tolist() == [66, 0, 31, 0]
    assert f"4 pages of {done['layout'].nbytes:,} bytes" in capsys.readouterr().out


def test_a_budget_in_bytes_is_spent_and_not_exceeded(monkeypatch, folder):
    memory = run(monkeypatch, "byte_budget", folder)["memory"]
    assert 0.95 * 2 * 2**20 < memory["slots"] + memory["state"] <= 2 * 2**20


@pytest.mark.slow
@pytest.mark.parametrize("name", OF_A_MODEL)
def test_an_example_runs_on_smollm2(monkeypatch, name):
    pytest.importorskip("gguf")
    memory = run(monkeypatch, name)["memory"]
    assert memory["slots"] + memory["state"] < memory["full"]
