"""The command: what it says, what it refuses, and a whole demo on a random model."""

import argparse
import json
import subprocess
import sys

import pytest
import torch

pytest.importorskip("transformers")

from less.cli import COMMANDS, main
from less.evaluate import report
from tests.tiny_model import (
    BOS,
    TEXT,
    byte_tokenizer,
    save_tiny,
    tiny_calibration,
    tiny_sidekick,
)

MERGING = "decayed H2O, k4v4, merging"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("".join(f"{i}. {TEXT}" for i in range(40)))
    return file


def tiny(folder, text, out, *more):
    return [
        "--model", str(folder), "--text", str(text), "--out", str(out), "--length", "96",
        "--chunks", "2", "--probes", "1", *map(str, more),
    ]  # fmt: skip


def test_without_a_command_it_prints_the_commands(capsys):
    assert main([]) == 2
    shown = capsys.readouterr().out
    assert all(name in shown for name in COMMANDS)


def test_version(capsys):
    from less import __version__

    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"less-kv {__version__}\n"


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_every_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as left:
        main([command, "--help"])
    assert left.value.code == 0
    assert f"less-kv {command}" in capsys.readouterr().out


def test_an_unknown_command_is_refused(capsys):
    with pytest.raises(SystemExit) as left:
        main(["pager"])
    assert left.value.code == 2
    assert "invalid choice: 'pager'" in capsys.readouterr().err


def test_info_tells_what_was_built(capsys):
    assert main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["machine"]["torch"]
    assert "backend" in facts["native code"]
    assert main(["info"]) == 0
    assert "sidekicks" in capsys.readouterr().out


def test_info_imports_no_transformers():
    code = (
        "import sys; from less.cli import main; main(['info']);"
        "sys.exit('transformers' in sys.modules or 'matplotlib' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--budget", 96], "--length 96 must exceed --budget 96"),
        (["--probes", 3], "--probes must be in 0 .. 2"),
        (["--text", "/nowhere.txt"], "/nowhere.txt does not exist"),
        (["--model", "/nowhere/model"], "neither 'smollm2'"),
        (["--length", 4096], "beyond the model's context of 512"),
        (["--length", 400, "--chunks", 90], "ask for fewer or shorter chunks"),
        (["--sidekick", "/nowhere/sidekick"], "sidekick"),
    ],
)
def test_demo_says_what_is_wrong(folder, text, tmp_path, capsys, more, message):
    assert main(["demo", *tiny(folder, text, tmp_path, "--budget", 16, *more)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("less-kv demo: error: ")
    assert message in error


def test_a_sidekick_of_another_model_is_refused(folder, text, tmp_path, capsys):
    from less import Sidekick

    Sidekick.random(3, 4, 2, 16, 4, 8, "exp").save_pretrained(tmp_path / "other")
    arguments = tiny(folder, text, tmp_path, "--budget", 16, "--sidekick", tmp_path / "other")
    assert main(["demo", *arguments]) == 2
    assert "layers" in capsys.readouterr().err


@pytest.mark.parametrize("bad", ["0", "-3", "x"])
def test_counts_must_be_positive(folder, text, tmp_path, capsys, bad):
    with pytest.raises(SystemExit) as left:
        main(["demo", *tiny(folder, text, tmp_path, "--budget", bad)])
    assert left.value.code == 2
    assert "--budget" in capsys.readouterr().err


def test_demo_without_a_sidekick_says_how_to_train_one(folder, text, tmp_path, capsys):
    arguments = tiny(folder, text, tmp_path / "out", "--budget", 16, "--new-tokens", 4)
    assert main(["demo", *arguments]) == 0
    shown = capsys.readouterr().out
    assert "less-kv train --model" in shown
    assert "eviction alone" in shown
    _, rows = report.read_json_lines((tmp_path / "out" / "results.jsonl").read_text())
    assert [r.method for r in rows] == [
        "full cache",
        "sinks + recent",
        "H2O",
        "decayed H2O",
        MERGING,
    ]


def test_demo_writes_table_plot_and_figures(folder, text, tmp_path, capsys):
    tiny_sidekick().save_pretrained(tmp_path / "sidekick")
    readme = tmp_path / "README.md"
    readme.write_text("<!-- begin table -->\n<!-- end table -->\n")
    out = tmp_path / "out"
    arguments = tiny(
        folder, text, out, "--budget", 16, "--new-tokens", 4,
        "--sidekick", tmp_path / "sidekick", "--update", readme,
    )  # fmt: skip
    assert main(["demo", *arguments]) == 0
    shown = capsys.readouterr().out
    for name in ("full cache ▸", "H2O ▸", "LESS ▸", "perplexity", "tok/s", "finished in"):
        assert name in shown
    facts, rows = report.read_json_lines((out / "results.jsonl").read_text())
    assert facts["budget"] == 16
    assert [r.method for r in rows] == [
        "full cache",
        "sinks + recent",
        "H2O",
        "H2O, equal bytes",
        "decayed H2O, equal bytes",
        "decayed H2O, equal bytes + maps",
        "LESS",
        MERGING,
    ]
    assert "| **LESS** |" in readme.read_text()
    assert "](out/plot.png)" in readme.read_text()
    assert "](plot.png)" in (out / "report.md").read_text()
    assert (out / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert "## Continuations" in (out / "report.md").read_text()


def test_evaluate_measures_speed_with_more_text(folder, text, tmp_path):
    arguments = tiny(folder, text, tmp_path / "out", "--budgets", "16", "--contexts", "128,256")
    assert main(["evaluate", *arguments]) == 0
    written = (tmp_path / "out" / "report.md").read_text()
    assert "| 128 | full cache |" in written
    assert "| 256 | H2O |" in written
    assert main(["evaluate", *arguments, "--contexts", "9999"]) == 2


def test_evaluate_measures_every_budget(folder, text, tmp_path, capsys):
    tiny_sidekick().save_pretrained(tmp_path / "sidekick")
    arguments = tiny(
        folder, text, tmp_path / "out", "--budgets", "8,16", "--no-speed",
        "--sidekick", tmp_path / "sidekick",
    )  # fmt: skip
    assert main(["evaluate", *arguments]) == 0
    _, rows = report.read_json_lines((tmp_path / "out" / "results.jsonl").read_text())
    assert {r.budget for r in rows} == {8, 16}
    assert len(rows) == 15  # the bytes of 16 tokens hold merging's least, those of 8 do not
    written = (tmp_path / "out" / "report.md").read_text()
    assert "### 8 tokens kept per head" in written


@pytest.mark.parametrize(("command", "budget"), [("demo", "--budget"), ("evaluate", "--budgets")])
def test_the_report_names_the_models_dtype_and_what_opens_a_chunk(
    text, tmp_path, capsys, command, budget
):
    save_tiny(tmp_path / "model", bos=True)
    out = tmp_path / "out"
    arguments = tiny(tmp_path / "model", text, out, budget, "16", "--model-dtype", "bfloat16")
    arguments += ["--no-speed"] if command == "evaluate" else ["--new-tokens", "4"]
    assert main([command, *arguments]) == 0
    assert "model in bfloat16, every chunk opened by <bos>" in (out / "report.md").read_text()
    facts, rows = report.read_json_lines((out / "results.jsonl").read_text())
    assert (facts["model_dtype"], facts["opened"]) == ("bfloat16", [BOS])
    assert all(row.perplexity > 1 for row in rows)


def test_the_dtype_of_the_model_is_what_it_runs_in(folder, text, tmp_path, monkeypatch):
    from less.evaluate import assets

    loaded = []
    load = assets.FoundModel.load

    def watched(self, dtype):
        loaded.append(load(self, dtype))
        return loaded[-1]

    monkeypatch.setattr(assets.FoundModel, "load", watched)
    common = ("--no-speed", "--budgets", "16", "--model-dtype", "bfloat16")
    assert main(["evaluate", *tiny(folder, text, tmp_path, *common)]) == 0
    assert {p.dtype for model in loaded for p in model.parameters()} == {torch.bfloat16}


def test_heads_are_those_that_the_cache_will_have(text, tmp_path, capsys):
    from less.cli import measuring
    from less.evaluate.families import build

    build("falcon (7B)", vocab_size=260).save_pretrained(tmp_path / "falcon")
    byte_tokenizer().save_pretrained(tmp_path / "falcon")
    parser = argparse.ArgumentParser()
    measuring.add_common(parser, out="out", chunks=1)
    args = parser.parse_args(tiny(tmp_path / "falcon", text, tmp_path / "out")[:-2])
    subject = measuring.prepare(args, measuring.console_for())
    assert (subject.facts.q_heads, subject.facts.kv_heads) == (4, 1)
    assert "4 query heads, 1 kv head\n" in capsys.readouterr().out


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_slots_and_maps_may_be_of_another_dtype(folder, text, tmp_path, capsys, dtype):
    tiny_sidekick().save_pretrained(tmp_path / "sidekick")
    common = ("--budgets", "16", "--no-speed", "--sidekick", tmp_path / "sidekick")
    held = {}
    for name, more in (("plain", ()), ("small", ("--dtype", dtype, "--maps-dtype", dtype))):
        arguments = tiny(folder, text, tmp_path / name, *common, *more)
        assert main(["evaluate", *arguments]) == 0
        _, rows = report.read_json_lines((tmp_path / name / "results.jsonl").read_text())
        held[name] = {r.method: r for r in rows}["LESS"]
    assert (held["plain"].dtype, held["plain"].maps_dtype) == ("float16", "float32")
    assert (held["small"].dtype, held["small"].maps_dtype) == (dtype, dtype)
    assert held["small"].maps < 0.6 * held["plain"].maps
    assert held["small"].perplexity == pytest.approx(held["plain"].perplexity, rel=0.05)
    assert f"{dtype} keys and values" in (tmp_path / "small" / "report.md").read_text()


def test_evaluate_compares_formats_of_rows_at_the_budgets_bytes(folder, text, tmp_path, capsys):
    tiny_calibration().save_pretrained(tmp_path / "rows")
    tiny_sidekick().save_pretrained(tmp_path / "sidekick")
    arguments = tiny(
        folder, text, tmp_path / "out", "--budgets", "24,32", "--contexts", "128",
        "--sidekick", tmp_path / "sidekick", "--model-dtype", "bfloat16",
        "--rows", "k4v4,int8,k4v4", "--calibration", tmp_path / "rows", "--hot", "8",
    )  # fmt: skip
    assert main(["evaluate", *arguments]) == 0
    facts, rows = report.read_json_lines((tmp_path / "out" / "results.jsonl").read_text())
    assert facts["rows"] == ["k4v4", "int8"]
    at = {(r.budget, r.method): r for r in rows}
    assert [r.method for r in rows if r.budget == 24][-4:] == [
        "decayed H2O, k4v4", "decayed H2O, int8", "LESS, k4v4", "LESS, int8",
    ]  # fmt: skip
    for budget in (24, 32):
        plain, few = at[budget, "H2O"], at[budget, "decayed H2O, k4v4"]
        assert plain.dtype == "bfloat16"
        assert plain.kept == budget < few.kept
        assert few.slots <= plain.slots
        assert (few.storage["sinks"], few.storage["hot"]) == (None, 8)
        assert few.storage["calibration"] == tiny_calibration().digest
    written = (tmp_path / "out" / "report.md").read_text()
    assert "| 128 | LESS, k4v4 |" in written
    assert "--rows k4v4,int8" in written
