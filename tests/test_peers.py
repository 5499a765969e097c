"""``bench.peers``: kvpress's runner on the report's blocks, without kvpress."""

import contextlib
import json
import runpy
import sys
from types import ModuleType
from typing import Any

import pytest

pytest.importorskip("transformers")


from bench.peers import __main__ as exporting
from less.evaluate.tasks import all_tasks, chosen
from less.evaluate.tasks.base import Given, forced
from tests.tiny_model import TEXT, byte_tokenizer, tiny_model


class Halved:
    """A press that removes nothing."""

    def __init__(self, compression_ratio):
        assert compression_ratio == pytest.approx(0.5)

    def __call__(self, model):
        return contextlib.nullcontext()


def blocks(tmp_path, tasks="needle,passkey"):
    (tmp_path / "text.txt").write_text(TEXT * 20)
    words = ["--out", str(tmp_path), "--tasks", tasks, "--lengths", "400", "--examples", "1"]
    args = exporting.options([*words, "--data", f"mine={tmp_path / 'text.txt'}"])
    return exporting.blocks(args, byte_tokenizer())


def test_the_runner_scores_the_reports_blocks_as_the_report_does(tmp_path, monkeypatch):
    stub: Any = ModuleType("kvpress")
    stub.Halved = Halved
    monkeypatch.setitem(sys.modules, "kvpress", stub)
    tiny_model().save_pretrained(tmp_path / "model")
    work = {"blocks": blocks(tmp_path), "shares": [0.5], "presses": ["Halved"]}
    (tmp_path / "blocks.json").write_text(json.dumps(work))
    runner = str(exporting.RUNNER)
    monkeypatch.setattr(sys, "argv", [runner, str(tmp_path / "model"), str(tmp_path), "tiny"])
    runpy.run_path(runner, run_name="__main__")
    lines = [json.loads(x) for x in (tmp_path / "kvpress.jsonl").read_text().splitlines()]
    assert [line["method"] for line in lines] == ["full", "kvpress Halved"] * 2
    given = Given(byte_tokenizer(), (400,), 1, {"mine": tmp_path / "text.txt"}, together=1)
    for line in lines:
        (block,) = chosen(all_tasks(given), [line["task"]])[0].blocks(given, 400)
        assert line["block"] == block.digest
        (want,) = forced(tiny_model(), block, [None])
        nats = want.nats[~want.nats.isnan()].mean()
        assert line["scores"]["nats"][0] == pytest.approx(float(nats), rel=1e-3)
        assert line["bytes"]["row"] == 400 * 2 * 2 * 2 * 16 * 4  # k, v; layers, heads, dims; bytes


def test_a_task_without_a_question_is_refused(tmp_path):
    with pytest.raises(ValueError, match="copy has none"):
        blocks(tmp_path, "copy")
