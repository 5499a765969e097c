"""The command: what it says, what it refuses, and a whole demo on a random model."""

import json
import subprocess
import sys

import pytest

pytest.importorskip("transformers")

from less.cli import COMMANDS, main
from less.evaluate import report
from tests.tiny_model import TEXT, save_tiny, tiny_sidekick


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
        (["--text", "/nowhere.txt"], "cannot read"),
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
    assert [r.method for r in rows] == ["full cache", "sinks + recent", "H2O"]


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
    assert len(rows) == 14
    written = (tmp_path / "out" / "report.md").read_text()
    assert "### 8 tokens kept per head" in written


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
