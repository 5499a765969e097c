"""What a command refuses, it refuses before a model is loaded."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("transformers")

from less import Calibration, Sidekick
from less.cli import main, rows
from less.dtypes import FORMATS, ROW_TYPES
from less.evaluate import assets
from tests.tiny_model import TEXT, byte_tokenizer, save_tiny, tiny_calibration, tiny_sidekick

ROOT = Path(__file__).resolve().parent.parent
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}<end>{% endfor %}"
STRICT = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}x"


class ModelLoadedError(Exception):
    """A model was loaded."""


@pytest.fixture
def no_model(monkeypatch):
    """Whoever loads a model, or converts one, is found out."""

    def load(*args, **kwargs):
        raise ModelLoadedError

    monkeypatch.setattr(assets.FoundModel, "load", load)
    monkeypatch.setattr(assets, "convert_gguf", load)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with what is right and what is wrong."""
    root = tmp_path_factory.mktemp("world")
    save_tiny(root / "model")
    for name, template in (("chatty", TEMPLATE), ("strict", STRICT)):
        shutil.copytree(root / "model", root / name)
        tokenizer = byte_tokenizer()
        tokenizer.chat_template = template
        tokenizer.save_pretrained(root / name)
    shutil.copytree(root / "model", root / "scrambled")
    (root / "scrambled" / "tokenizer_config.json").write_text("{")
    (root / "text.txt").write_text("".join(f"{i}. {TEXT}" for i in range(40)))
    (root / "latin.txt").write_bytes(b"caf\xe9")
    (root / "empty").mkdir()
    (root / "page.md").write_text("no lines to put a table between")
    (root / "model.gguf").write_bytes(b"GGUF")
    (root / "ggufs").mkdir()
    shutil.copy(root / "model.gguf", root / "ggufs")
    shutil.copytree(root / "model", root / "weightless")
    (root / "weightless" / "model.safetensors").unlink()
    shutil.copytree(root / "model", root / "foreign")
    (root / "foreign" / "config.json").write_text(json.dumps({"model_type": "mamba"}))
    tiny_sidekick().save_pretrained(root / "sidekick")
    Sidekick.random(3, 4, 2, 16, 4, 8, "exp").save_pretrained(root / "other")
    tiny_calibration().save_pretrained(root / "rows")
    foreign = [tiny_calibration()[0]] * 3
    Calibration(foreign).save_pretrained(root / "rows-of-three")
    other = {"model": {"name": "another", "fingerprint": "0"}}
    Calibration(foreign[:2], other).save_pretrained(root / "rows-of-another")
    shutil.copytree(root / "rows", root / "damaged-rows")
    (root / "damaged-rows" / "rows.safetensors").write_bytes(b"nothing")
    shutil.copytree(root / "sidekick", root / "damaged")
    (root / "damaged" / "model.safetensors").write_bytes(b"nothing")
    return root


MEASURED = "--model model --text text.txt --out out --length 96 --chunks 2 --probes 1"
RIGHT = {
    "demo": f"{MEASURED} --budget 16",
    "evaluate": f"{MEASURED} --budgets 16 --contexts 128",
    "train": "--model model --text text.txt --out out --length 96 --chunks 2 --budget 16",
    "calibrate": "--model model --text text.txt --out out --length 200 --chunks 2",
    "chat": "--model chatty",
    "lm-eval": "--model model --tasks recall --include-path tasks --budget 16",
}
MEASURING = ("demo", "evaluate")
FITTING = ("train", "calibrate")
WITH_ROWS = ("evaluate", "chat", "lm-eval")
ALL = tuple(RIGHT)
STORING = tuple(command for command in ALL if command != "calibrate")
# (commands, what is wrong, part of the message)
WRONG = [
    (MEASURING, "--text nowhere.txt", "nowhere.txt does not exist"),
    (MEASURING, "--text empty", "empty is a folder without .txt or .md files"),
    (MEASURING, "--text latin.txt", "latin.txt is not UTF-8: byte 3 is 0xe9"),
    (FITTING, "--text text.txt nowhere.txt", "nowhere.txt does not exist"),
    (FITTING, "--text empty", "empty is a folder without .txt or .md files"),
    (FITTING, "--text latin.txt", "latin.txt is not UTF-8: byte 3 is 0xe9"),
    (ALL, "--model ./nowhere", "neither 'smollm2', nor a folder here, nor a name on the hub"),
    (ALL, "--model empty", "has no config.json"),
    (ALL, "--model weightless", "has no weights"),
    (ALL, "--model model.gguf", "is a file: a GGUF file has to be converted"),
    (ALL, "--model ggufs", "a GGUF file has to be converted"),
    (
        ("demo", "evaluate", "train", "calibrate", "lm-eval"),
        "--model foreign",
        "--model foreign: MambaFor",
    ),
    (ALL, "--model-dtype float8", "invalid choice: 'float8'"),
    (STORING, "--dtype float64", "invalid choice: 'float64'"),
    (MEASURING, "--maps-dtype float64", "invalid choice: 'float64'"),
    (("demo", "evaluate", "chat", "lm-eval"), "--sidekick nobody", "neither a folder, nor 'none'"),
    (("demo", "evaluate", "chat", "lm-eval"), "--sidekick other", "layers"),
    (("demo", "evaluate", "chat", "lm-eval"), "--sidekick damaged", "model.safetensors"),
    (WITH_ROWS, "--rows k5v5", "must be one of k8v4, k4v4,"),
    (WITH_ROWS, "--dtype int8 --rows k4v4", "--rows: not allowed with argument --dtype"),
    (WITH_ROWS, "--hot 4", "--hot 4: it is a setting of --rows, which is not given"),
    (WITH_ROWS, "--calibration rows", "--calibration rows: it is a setting of --rows"),
    (WITH_ROWS, "--rows int8 --sinks 4", "--sinks 4: it is a setting of the packed formats"),
    (WITH_ROWS, "--rows k4v4 --hot 0", "--hot must be 1 or more, got 0"),
    (WITH_ROWS, "--rows k4v4 --sinks -1", "--sinks must be 0 or more, got -1"),
    (WITH_ROWS, "--rows k4v4 --hot-dtype int4", "invalid choice: 'int4'"),
    (WITH_ROWS, "--rows int8 --calibration nowhere", "nowhere is neither a folder nor"),
    (WITH_ROWS, "--rows int8 --calibration empty", "rows.json: no such file"),
    (WITH_ROWS, "--rows int8 --calibration damaged-rows", "damaged, or of another rows.json"),
    (WITH_ROWS, "--rows int8 --calibration rows-of-three", "must have layers=2, got layers=3"),
    (WITH_ROWS, "--rows int8 --calibration rows-of-another", "it was measured on another, not on"),
    (("evaluate",), "--rows int8,k4v4 --hot 60", "too small for k4v4: 65 tokens, the fewest"),
    (("lm-eval",), "--rows k4v4", "would keep 16 tokens, and k4v4 keeps 21 or more"),
    (("chat",), "--rows k4v4 --budget 20", "would keep 20 tokens, and k4v4 keeps 21 or more"),
    (("chat",), "--rows k4v4 --config sidekick", "--rows: the config of --config has them"),
    (("demo", "evaluate", *FITTING), "--out text.txt/out", "text.txt is not a folder"),
    (("demo", "evaluate", *FITTING), "--out /proc/less", "/proc is not writable"),
    (("train",), "--work text.txt", "text.txt is not a folder"),
    (("lm-eval",), "--out empty", "empty is a folder, not a file"),
    (("lm-eval",), "--out nowhere/out.json", "nowhere is not a folder"),
    (MEASURING, "--update nowhere.md", "nowhere.md does not exist"),
    (MEASURING, "--update page.md", "has no lines <!-- begin table -->"),
    (MEASURING, "--length 4096", "beyond the model's context of 512"),
    (FITTING, "--length 4096", "beyond the model's context of 512"),
    (("evaluate",), "--contexts 4096", "--contexts 4096 is beyond the model's context"),
    (MEASURING, "--length 400 --chunks 90", "ask for fewer or shorter chunks"),
    (FITTING, "--length 400 --chunks 90", "ask for fewer or shorter chunks"),
    (MEASURING, "--probes 3", "--probes must be in 0 .. 2"),
    (("demo",), "--budget 96", "--length 96 must exceed --budget 96"),
    (("evaluate",), "--budgets 8,96", "--length 96 must exceed the largest budget 96"),
    (("evaluate",), "--budgets 0", "must be 1 or more"),
    (("train",), "--budget 8,96", "longer than the largest budget 96"),
    (("train",), "--policy sinks --budget 4", "leaves no recent token"),
    (("train", "lm-eval"), "--policy lru", "--policy must be one of h2o, sinks"),
    (("train", "lm-eval"), '--policy {"name":', "is not JSON"),
    (("train", "lm-eval"), '--policy {"name":"LRU"}', "--policy: name must be one of"),
    (("train", "lm-eval"), '--policy {"name":"H2O","size":1}', "--policy: bad settings for H2O"),
    (("train",), '--policy {"name":"Full","max_tokens":9}', "policies must evict tokens, got Full"),
    (("lm-eval",), '--policy {"name":"Full","max_tokens":9}', "keeps every token"),
    (("train",), '--policy {"name":"SinkRecent"} --budget 3', "4 sinks and a window do not fit"),
    (("lm-eval",), "--policy sinks --budget 3", "4 sinks and a window do not fit"),
    (("train",), "--decay 2", "decay"),
    (("train",), "--policy sinks --decay 1", "--decay is a setting of --policy h2o, not of sinks"),
    (("train",), '--policy {"name":"SinkRecent"} --sinks 2', "--sinks is a setting of --policy"),
    (("train",), "--held 2", "held must be in 1..1"),
    (("train",), "--rank 0", "rank must be a whole number >= 1"),
    (FITTING, "--device nowhere", "--device nowhere"),
    (("calibrate",), "--plot map.jpg", "--plot map.jpg must end in .png or .svg"),
    (("calibrate",), "--plot nowhere/map.png", "nowhere is not a folder"),
    (("calibrate",), "--plot map.svg --no-budgets", "--no-budgets leaves out"),
    (("chat",), "--model model", "model has no chat template"),
    (("chat",), "--model scrambled", "tokenizer_config.json is damaged"),
    (("chat",), "--model strict --system Brief.", "chat template fails: no system role"),
    (("chat",), "--bytes many", "bytes"),
    (("chat",), "--bytes 100", "cannot hold one token per head"),
    (("chat",), "--config nowhere", "cannot read nowhere/less_config.json"),
    (("chat",), "--temperature -1", "temperature must be 0 or more"),
    (("lm-eval",), "--tasks recall,recal", "'recal'"),
    (("lm-eval",), "--tasks rexall*", "'rexall*'"),
    (("lm-eval",), "--include-path nowhere", "nowhere is not a folder"),
    (("matrix",), "--only llamma", "--only must be one of"),
    (("matrix",), "--backend cpu", "invalid choice: 'cpu'"),
]
CASES = [(command, more, message) for commands, more, message in WRONG for command in commands]


def status(command, more, world, monkeypatch):
    """Exit status of a right call with `more` behind it, in the world's folder."""
    if command == "lm-eval":
        pytest.importorskip("lm_eval")
        shutil.copytree(ROOT / "docs" / "lm-eval", world / "tasks", dirs_exist_ok=True)
    monkeypatch.chdir(world)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    before = sorted(world.rglob("*"))
    try:
        return main([command, *RIGHT.get(command, "").split(), *more.split()])
    except SystemExit as left:  # argparse
        return left.code
    finally:
        assert more == "" or sorted(world.rglob("*")) == before, "something was written"


@pytest.mark.parametrize(("command", "more", "message"), CASES)
def test_what_is_wrong_is_refused_before_a_model_is_loaded(
    no_model, world, monkeypatch, capsys, command, more, message
):
    assert status(command, more, world, monkeypatch) == 2
    assert message in capsys.readouterr().err


def test_the_formats_that_commands_know_are_the_librarys():
    assert tuple(FORMATS) == rows.FORMATS
    assert set(rows.DTYPES) < {row.name for row in ROW_TYPES.values()}


@pytest.mark.parametrize("command", ALL)
def test_a_right_call_does_load_the_model(no_model, world, monkeypatch, command):
    with pytest.raises(ModelLoadedError):
        status(command, "", world, monkeypatch)


def test_a_file_that_must_not_be_read_is_named(no_model, world, monkeypatch, capsys):
    def refuse(self, *args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_text", refuse)
    assert status("evaluate", "--text text.txt", world, monkeypatch) == 2
    assert "text.txt cannot be read: Permission denied" in capsys.readouterr().err


def test_a_hub_that_does_not_answer_is_given_up_at_once(no_model, world, monkeypatch, capsys):
    huggingface_hub = pytest.importorskip("huggingface_hub")
    asked = []

    def model_info(self, name, timeout=None):
        asked.append((name, timeout))
        raise ConnectionError("the hub is away")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
    assert status("evaluate", "--model nobody/nothing", world, monkeypatch) == 2
    assert "the hub does not give it: the hub is away" in capsys.readouterr().err
    assert asked == [("nobody/nothing", 2)]


@pytest.mark.parametrize(
    ("command", "more"),
    [
        ("evaluate", "--dtype float64"),
        ("evaluate", "--text nowhere.txt"),
        ("evaluate", "--rows k4v4,k5v5"),
        ("evaluate", "--rows k4v4 --calibration nowhere"),
        ("chat", "--rows int8 --hot 4"),
        ("evaluate", "--out text.txt/out"),
        ("demo", "--update page.md"),
        ("train", "--text nowhere.txt"),
        ("chat", "--model ./nowhere"),
        ("chat", "--model model"),
        ("lm-eval", "--tasks recal"),
    ],
)
def test_files_and_names_are_refused_before_torch_is_imported(world, command, more):
    if command == "lm-eval":
        pytest.importorskip("lm_eval")
    script = (
        "import sys; from less.cli import main\n"
        "try:\n    status = main(sys.argv[1:])\n"
        "except SystemExit as left:\n    status = left.code\n"
        "sys.exit(77 if 'torch' in sys.modules else status)"
    )
    arguments = [command, *RIGHT[command].split(), *more.split()]
    if command == "lm-eval":
        shutil.copytree(ROOT / "docs" / "lm-eval", world / "tasks", dirs_exist_ok=True)
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        cwd=world, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr


@pytest.mark.slow
def test_with_a_real_model_what_is_wrong_is_refused_before_it_is_loaded(tmp_path, capfd):
    pytest.importorskip("gguf")
    assets.smollm2()
    calls = [
        ["evaluate", "--text", tmp_path / "nowhere.txt"],
        ["evaluate", "--sidekick", "nobody"],
        ["evaluate", "--out", "/proc/less"],
        ["evaluate", "--dtype", "float64"],
        ["train", "--out", tmp_path / "out", "--text", tmp_path / "nowhere.txt"],
        ["chat", "--bytes", 100],
        ["lm-eval", "--tasks", "recal"],
    ]
    script = (
        "import sys; from less.cli import main; from less.evaluate import assets\n"
        "assets.FoundModel.load = lambda *_: sys.exit(77)\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    for call in calls:
        begun = time.monotonic()
        done = subprocess.run([sys.executable, "-c", script, *map(str, call)], capture_output=True)
        seconds = time.monotonic() - begun
        assert done.returncode == 2, done.stderr.decode()
        with capfd.disabled():
            print(f"  {seconds:.1f} s: {' '.join(map(str, call))}")
