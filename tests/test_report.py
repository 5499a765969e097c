"""``less-kv report``: tasks, cells that are measured once, tables and the page."""

import argparse
import dataclasses
import importlib
import itertools
import json
import math
import re
import shlex
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("plotly")

from less import H2O, LessConfig
from less.cli import main
from less.evaluate import harness
from less.evaluate.cells import Cells
from less.evaluate.feeding import greedy
from less.evaluate.named import Budget, NamedMethod, built_in, methods_for, own_method
from less.evaluate.outcome import joined, mean, share_recovered, shown, tables
from less.evaluate.side_by_side import SideBySide
from less.evaluate.tasks import all_tasks, chosen
from less.evaluate.tasks.asking import METRICS
from less.evaluate.tasks.base import Given, Metric, UnavailableError, forced
from less.hf import cache_for
from less.hf.models import describe
from tests.browser import opened
from tests.test_curves import with_curves
from tests.tiny_model import TEXT, byte_tokenizer, save_tiny, tiny_model

LENGTH = 448
ASKING = 640  # a token is a byte here
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}<assistant>"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A model's folder, a text, and documents with summaries."""
    folder = tmp_path_factory.mktemp("report")
    save_tiny(folder / "model")
    (folder / "text.txt").write_text("".join(f"{i}. {TEXT}" for i in range(60)))
    rows = [{"input": TEXT, "target": "A cache of few tokens."}] * 3
    (folder / "xsum.json").write_text(json.dumps({"examples": rows}))
    return folder


@pytest.fixture(scope="module")
def given(files):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    data = {"mine": files / "text.txt", "xsum-bigbench": files / "xsum.json"}
    return Given(tokenizer, (LENGTH,), 2, data, steps=12, batches=(1,), together=1)


def task(given, name):
    return chosen(all_tasks(given), [name])[0]


def asking(given):
    return [t for t in all_tasks(given) if t.metrics == METRICS]


def ask(files, out, *more):
    return [
        "report", "--model", str(files / "model"), "--data", f"mine={files / 'text.txt'}",
        "--lengths", str(LENGTH), "--examples", "2", "--steps", "8", "--batches", "1",
        "--together", "1", "--methods", "full,sinks,h2o,merge", "--budgets", "64,25%",
        "--threads", "1", "--tasks", "perplexity:mine,needle", "--out", str(out), *map(str, more),
    ]  # fmt: skip


# -- tasks -----------------------------------------------------------------------------------------


def test_every_question_has_its_length_and_asks_for_its_answers(given):
    names = [t.name for t in asking(given)]
    assert {"needle", "multikey", "variables", "common-words", "passkey", "turns"} <= set(names)
    for one in asking(given):
        blocks = one.blocks(given, ASKING)
        assert len({block.digest for block in blocks}) == len(blocks) == given.count
        for block in blocks:
            ids, asked = block.content["ids"][0], block.content["asked"][0]
            assert len(ids) == len(asked) == block.tokens == ASKING, one.name
            assert asked[: block.content["context"]].sum() == 0
            assert asked[-1] == asked.max() > 0
            if one.name in ("needle", "multikey", "passkey", "turns"):
                answer = given.tokenizer.decode(ids[asked > 0])
                context = given.tokenizer.decode(ids[: block.content["context"]])
                assert answer.strip()
                assert answer in context, one.name


def test_examples_are_the_same_in_every_run(given):
    for one in asking(given):
        first, again = (one.blocks(given, ASKING) for _ in range(2))
        assert [b.digest for b in first] == [b.digest for b in again]


def test_a_cache_that_keeps_all_scores_as_the_full_cache_does(given):
    model = tiny_model()
    for name in ("needle", "perplexity:mine", "copy"):
        block = task(given, name).blocks(given, LENGTH)[0]
        roomy, small = (cache_for(model, H2O(n, n)) for n in (LENGTH, 8))
        full, kept, lost = forced(model, block, [None, roomy, small])
        torch.testing.assert_close(full.nats, kept.nats, atol=2e-3, rtol=1e-3, equal_nan=True)
        assert torch.equal(full.greedy, kept.greedy)
        asked = block.content["asked"] > 0
        assert torch.equal(~full.nats.isnan(), asked)
        assert not torch.allclose(full.nats[asked], lost.nats[asked], atol=2e-3)


def test_examples_score_together_as_they_do_apart(given):
    model, both = tiny_model(), dataclasses.replace(given, together=2)
    for name in ("needle", "perplexity:mine", "copy", "divergence"):
        apart = []
        for block in task(given, name).blocks(given, ASKING):
            apart.append(
                task(given, name).score(model, block, [None, cache_for(model, H2O(20, 20))])
            )
        (block,) = task(both, name).blocks(both, ASKING)
        caches = [None, cache_for(model, H2O(20, 20), batch=2)]
        for i, scores in enumerate(task(both, name).score(model, block, caches)):
            for metric, values in scores.items():
                want = [one[i][metric][0] for one in apart]
                if (name, i) == ("needle", 1):
                    continue  # rows of a block share the end of what comes in pieces
                assert values == pytest.approx(want, rel=2e-3, abs=2e-3), (name, metric)


def test_greedy_decoding_side_by_side_is_that_of_each_cache_alone():
    model = tiny_model()
    prompt = torch.arange(40)[None] % 250
    mask = torch.ones_like(prompt)
    want = model.generate(prompt, attention_mask=mask, max_new_tokens=9, do_sample=False)[0, 40:]
    assert greedy("test", model, prompt, None, 9) == [want.tolist()]
    apart = [greedy("test", model, prompt, cache_for(model, H2O(n, n)), 9)[0] for n in (4, 12)]
    both = SideBySide([cache_for(model, H2O(n, n)) for n in (4, 12)])
    assert greedy("test", model, prompt.repeat(2, 1), both, 9) == apart
    end = apart[0][3]
    assert greedy("test", model, prompt, cache_for(model, H2O(4, 4)), 9, {end}) == [
        apart[0][: apart[0].index(end)]
    ]


def test_divergence_finds_where_free_decoding_departs(given):
    model, one = tiny_model(), task(given, "divergence")
    block = one.blocks(given, LENGTH)[0]
    prompt, steps = block.content["ids"], block.content["steps"]
    (text,) = greedy("test", model, prompt, None, steps)
    caches = [cache_for(model, H2O(n, n)) for n in (8, 24, LENGTH)]
    full, *found = one.score(model, block, [None, *caches])
    assert full == {"kl": [0.0], "same": [float(steps)]}
    for n, scores in zip((8, 24, LENGTH), found, strict=True):
        cache = cache_for(model, H2O(n, n))
        # As the task feeds it: the prompt in pieces, then token by token.
        (free,) = _greedy_in_pieces(model, prompt, cache, steps)
        apart = next((i for i, (a, b) in enumerate(zip(free, text, strict=True)) if a != b), steps)
        assert scores["same"] == [float(apart)]
        assert scores["kl"][0] >= -1e-9
    assert found[-1]["same"] == [float(steps)]
    assert found[-1]["kl"][0] < 1e-4 < found[0]["kl"][0]


def _greedy_in_pieces(model, prompt, cache, steps):
    from less.hf import attach

    length = prompt.shape[1]
    cuts = [0, *range(min(length, cache.at_once), length, 128), length]
    with torch.inference_mode(), attach(model, cache):
        for start, stop in itertools.pairwise(cuts):
            if stop > start:
                logits = model(prompt[:, start:stop], past_key_values=cache).logits
        written = []
        for _ in range(steps):
            step = logits[:, -1:].argmax(-1)
            written.append(int(step))
            logits = model(step, past_key_values=cache).logits
    return [written]


def test_summaries_are_scored_against_their_reference(given):
    model, one = tiny_model(), task(given, "summaries:xsum-bigbench")
    block = one.blocks(given, LENGTH)[0]
    full, kept = one.score(model, block, [None, cache_for(model, H2O(LENGTH, LENGTH))])
    assert full == kept
    assert set(full) == {"rouge1", "rouge2", "rougeL"}
    assert all(0 <= x <= 100 for values in full.values() for x in values)


def test_a_model_without_a_template_summarises_a_plain_text(given, files):
    plain = Given(byte_tokenizer(), (LENGTH,), 1, given.data)
    (block,) = task(plain, "summaries:xsum-bigbench").blocks(plain, LENGTH)
    assert plain.tokenizer.decode(block.content["ids"][0]).endswith("Summary:")


@pytest.mark.parametrize(
    ("name", "data", "length", "message"),
    [
        ("turns", {}, LENGTH, "no chat template"),
        ("needle", {}, 100, "room for -"),
        ("perplexity:mine", {}, 400_000, "the text mine is too short"),
        ("perplexity:wikitext", {}, LENGTH, "the hub does not give Salesforce/wikitext"),
        ("summaries:xsum", {}, LENGTH, "--data xsum=FILE"),
        ("summaries:xsum-bigbench", {}, LENGTH, "PyPI's bigbench"),
        ("summaries:xsum", {"xsum": "xsum.json"}, LENGTH, "must have the fields document"),
        ("summaries:xsum", {"xsum": "text.txt"}, LENGTH, "cannot be read"),
    ],
)
def test_a_task_that_cannot_run_says_why(files, monkeypatch, name, data, length, message):
    import huggingface_hub

    def unreachable(*_, **__):
        raise OSError("no route to the hub")

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", unreachable)
    named = {"mine": files / "text.txt", **{k: files / v for k, v in data.items()}}
    plain = Given(byte_tokenizer(), (length,), 2, named)
    with pytest.raises(UnavailableError, match=message):
        task(plain, name).blocks(plain, length)


def test_lines_of_other_implementations_join_the_tables_of_the_same_examples():
    def line(method, block, budget="5%", **more):
        return {
            "kind": "cell", "key": f"{method} {budget} {block}", "model": "tiny", "task": "copy",
            "length": 9, "block": block, "index": 0, "method": method, "budget": budget,
            "tokens": 1, "bytes": {"row": 1, "shared": 0}, "scores": {"nats": [1.0]}, **more,
        }  # fmt: skip

    mine = [line("full", "a", ""), line("h2o", "a")]
    press = line("kvpress SnapKVPress", "a")
    others = [press, line("full", "a", ""), line("kvpress X", "b"), line("y", "a", model="other")]
    assert joined(mine, others) == [*mine, press]
    assert joined(mine, others[1:]) == mine


# -- methods and budgets ---------------------------------------------------------------------------


def test_every_method_takes_at_most_the_bytes_of_the_budget():
    model = tiny_model()
    methods, left = methods_for(
        ["full", "sinks", "h2o", "decayed-h2o", "i8", "k4v4", "merge", "best", "less"],
        None, None, None,
    )  # fmt: skip
    assert set(left) == {"best", "less"}
    assert "the same as merge" in left["best"]
    room = Budget("25%").room(describe(model, "test"), 400)
    for method in methods:
        cache = method.cache(model, 2, room)
        if cache is None:
            assert method.name == "full"
            continue
        held = cache.memory()
        assert room * 0.8 < (held["slots"] + held["state"]) / 2 <= room, method.name
    assert len({json.dumps(m.identity(), sort_keys=True) for m in methods}) == len(methods)


def test_means_and_scales_are_taken_off_the_bytes_as_if_there_were_one_row():
    model = tiny_model()
    calibrated = NamedMethod("best", LessConfig(bytes=1), None, with_curves(model))
    plain = NamedMethod("merge", LessConfig(bytes=1))
    room = 60_000
    for rows in (1, 3):
        held = calibrated.cache(model, rows, room).memory()
        assert held["maps"] > 0
        assert room * 0.9 < held["slots"] / rows + held["maps"] <= room
        assert room * 0.9 < plain.cache(model, rows, room).memory()["slots"] / rows <= room
    assert calibrated.identity()["counted"] == "calibration"  # results of other bytes are others
    assert "counted" not in plain.identity()
    with pytest.raises(ValueError, match="LessConfig: bytes="):
        calibrated.cache(model, 1, held["maps"])


@pytest.mark.parametrize("text", ["0", "-1", "0%", "101%", "many", "1.5"])
def test_a_budget_that_is_none_is_refused(text):
    with pytest.raises(ValueError, match="--budgets must be"):
        Budget(text)


def test_a_budget_is_tokens_or_a_share_of_them():
    assert Budget("64").tokens(1024) == 64
    assert Budget("12.5%").tokens(1024) == 128


def test_a_method_of_ones_own(tmp_path):
    name, config = own_method('mine={"rows": "k3v3", "victim": "merge"}')
    assert (name, config.rows, config.victim) == ("mine", "k3v3", "merge")
    LessConfig(tokens=9, policy=H2O(1, 3)).save_pretrained(tmp_path)
    assert own_method(f"other={tmp_path}")[1].policy == H2O(1, 3)
    for bad in ("mine", "mine={", 'mine={"rows": "k9"}', "mine=/nowhere"):
        with pytest.raises(ValueError):
            own_method(bad)


# -- what cells come to ----------------------------------------------------------------------------


def test_the_baseline_recovers_nothing_and_the_full_cache_all():
    full, base = [1.0, 1.2, 0.9], [2.0, 1.9, 2.4]
    assert share_recovered(full, base, base).value == 0
    assert share_recovered(full, base, full).value == 1
    half = [(a + b) / 2 for a, b in zip(full, base, strict=True)]
    found = share_recovered(full, base, half)
    assert found.value == pytest.approx(0.5)
    assert found.error == pytest.approx(0, abs=1e-9)
    assert math.isnan(share_recovered(full, full, base).value)
    assert math.isnan(share_recovered(full[:1], base[:1], half[:1]).error)


def test_figures_carry_their_errors():
    assert shown(Metric("nats", "", scale="exp"), mean([math.log(10)])) == "10.00"
    assert shown(Metric("recall", "", scale="percent", digits=0), mean([0.0, 1.0])) == "50 ± 50"


# -- the command -----------------------------------------------------------------------------------


def cells_of(out):
    lines = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == "cell"]


def scores_of(out):
    return {(c["task"], c["index"], c["method"], c["budget"]): c["scores"] for c in cells_of(out)}


def test_the_report_has_every_method_at_every_budget(files, tmp_path, capsys):
    assert main(ask(files, tmp_path / "out")) == 0
    written = (tmp_path / "out" / "report.md").read_text()
    for name in ("perplexity:mine", "needle"):
        assert f"## {name}, {LENGTH} tokens, model" in written
    assert written.count("| merge | 25% (112) |") == 2
    assert "## The paper's claims" in written
    assert "arXiv:2402.09398" in written
    assert len(cells_of(tmp_path / "out")) == 2 * 2 * (1 + 3 * 2)
    assert "about" in capsys.readouterr().out
    # The same lines under another name are as another implementation writes them.
    peers = [
        {**cell, "method": "kvpress Some", "key": f"peer {cell['key']}"}
        for cell in cells_of(tmp_path / "out")
        if (cell["method"], cell["budget"]) == ("h2o", "25%")
    ]
    file, more = tmp_path / "peers.jsonl", ("--minutes", 0, "--peers", tmp_path / "peers.jsonl")
    file.write_text("".join(json.dumps(cell) + "\n" for cell in peers))
    assert main(ask(files, tmp_path / "out", *more)) == 0
    assert (tmp_path / "out" / "report.md").read_text().count("| kvpress Some | 25%") == 2
    assert "no line is of an example" not in capsys.readouterr().err
    file.write_text(json.dumps(peers[0] | {"block": "another"}) + "\n")
    assert main(ask(files, tmp_path / "out", *more)) == 0
    assert "--peers: no line is of an example of this report" in capsys.readouterr().err
    file.unlink()
    assert main(ask(files, tmp_path / "out", *more)) == 2
    assert "there is no such file" in capsys.readouterr().err


def test_a_killed_report_goes_on_where_it_was(files, tmp_path, monkeypatch):
    assert main(ask(files, tmp_path / "whole")) == 0
    calls = []
    measured = harness._cells

    def counting(model, facts, unit, built, progress):
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(unit.name)
        return measured(model, facts, unit, built, progress)

    out = tmp_path / "killed"
    monkeypatch.setattr(harness, "_cells", counting)
    assert main(ask(files, out)) == 130
    assert (out / "report.md").exists()
    with (out / "results.jsonl").open("ab") as file:
        file.write(b'{"kind": "cell", "key": "torn')  # as a kill in the middle of a line leaves it
    first = list(calls)
    calls[:] = ["", "", ""]
    assert main(ask(files, out)) == 0
    assert len(first) == 2
    assert set(first).isdisjoint(calls)
    assert len(first) + len(calls[3:]) == 4
    assert scores_of(out) == scores_of(tmp_path / "whole")
    before = (out / "report.md").read_text().splitlines()[3:]
    calls[:] = ["", "", ""]
    assert main(ask(files, out)) == 0
    assert calls == ["", "", ""]
    assert (out / "report.md").read_text().splitlines()[3:] == before


def test_what_cannot_run_is_a_sentence_and_the_rest_goes_on(files, tmp_path):
    out = tmp_path / "out"
    arguments = ask(files, out, "--tasks", "perplexity:mine,turns,summaries:xsum-bigbench")
    assert main([*arguments, "--model", "nobody/has-this-model"]) == 0
    written = (out / "report.md").read_text()
    assert "| turns, 448 tokens | the model has no chat template" in written
    assert "PyPI's bigbench" in written
    assert "| model has-this-model | model nobody/has-this-model is no folder here" in written
    assert "## perplexity:mine" in written


def test_a_task_that_fails_is_named_and_the_rest_goes_on(files, tmp_path, monkeypatch, capsys):
    from less.evaluate.tasks.asking import Asking

    def fails(*_, **__):
        raise TypeError("planted")

    monkeypatch.setattr(Asking, "score", fails)
    assert main(ask(files, tmp_path)) == 1
    assert "needle failed: TypeError: planted" in capsys.readouterr().err
    assert "## perplexity:mine" in (tmp_path / "report.md").read_text()


def test_the_time_that_is_given_is_kept_and_what_it_left_out_is_said(files, tmp_path):
    assert main(ask(files, tmp_path, "--minutes", "0")) == 0
    assert not cells_of(tmp_path)
    assert "2 blocks left out: the time was up" in (tmp_path / "report.md").read_text()


def test_a_clock_allows_what_it_expects_to_end_in_time(given):
    block = task(given, "needle").blocks(given, LENGTH)[0]
    unit = harness.Unit(task(given, "needle"), 0, block, {})
    clock = harness.Clock(100)
    assert clock.allows(unit, 4)
    clock.done(unit, 4, 60.0)
    assert clock.estimate(unit, 8) == pytest.approx(120)
    assert clock.allows(unit, 4)
    assert not clock.allows(unit, 8)


def test_a_row_that_lacks_examples_is_named_not_shown(files, tmp_path, given):
    assert main(ask(files, tmp_path)) == 0
    cells = cells_of(tmp_path)
    lacking = [c for c in cells if not (c["method"] == "merge" and c["index"] == 1)]
    table = tables(lacking, [task(given, "needle")])[0]
    assert table.incomplete == ["merge at 64", "merge at 25%"]
    assert {row.method for row in table.rows} == {"full", "sinks", "h2o"}
    assert table.examples == 2


def test_a_damaged_file_of_results_is_refused(tmp_path):
    (tmp_path / "results.jsonl").write_text('not json\n{"kind": "run"}\n')
    with pytest.raises(ValueError, match="damaged: line 1"):
        Cells(tmp_path / "results.jsonl")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--tasks", "nothing"], "--tasks must be among"),
        (["--methods", "h3o"], "--methods must be among"),
        (["--budgets", "0"], "--budgets must be"),
        (["--data", "mine"], "--data must be NAME=PATH"),
        (["--data", "mine=/nowhere"], "does not exist"),
        (["--calibration", "/nowhere"], "--calibration /nowhere is neither a folder nor shipped"),
        (["--method", "x"], "--method must be"),
    ],
)
def test_a_wrong_call_is_refused(files, tmp_path, capsys, more, message):
    assert main(ask(files, tmp_path, *more)) == 2
    assert message in capsys.readouterr().err


def test_it_lists_tasks_and_methods(capsys):
    assert main(["report", "--list"]) == 0
    shown = capsys.readouterr().out
    assert "needle" in shown
    assert "decayed-h2o" in shown


def test_the_page_opens_sorts_and_draws(files, tmp_path):
    assert main(ask(files, tmp_path)) == 0
    with opened(tmp_path / "report.html") as page:
        assert page.locator(".plot .main-svg").count() > 0
        table = page.locator("table").first
        head = table.locator("th").nth(2)  # bytes

        def column():
            cells = table.locator("tbody td:nth-child(3)")
            return [float(x) for x in cells.evaluate_all("all => all.map(x => x.dataset.sort)")]

        head.click()
        assert column() == sorted(column())
        assert len(set(column())) > 2
        head.click()
        assert column() == sorted(column(), reverse=True)
        assert head.get_attribute("aria-sort") == "descending"


def test_bench_measures_speed_and_peak_against_length_and_batch(files, tmp_path):
    out = tmp_path / "out"
    assert main([
        "bench", "--model", str(files / "model"), "--lengths", "128,256,4096", "--batches", "1,3",
        "--methods", "full,merge", "--budgets", "25%", "--threads", "1", "--out", str(out),
    ]) == 0  # fmt: skip
    cells = cells_of(out)
    assert {(c["task"], c["length"]) for c in cells} == {
        (f"speed:batch-{b}", n) for b in (1, 3) for n in (128, 256)
    }
    for cell in cells:
        assert cell["scores"]["tokens_per_second"][0] > 0
        assert cell["scores"]["prompt_seconds"][0] > 0
        assert cell["scores"]["peak_mib"][0] >= 0
    written = (out / "report.md").read_text()
    assert written.startswith("# less-kv bench\n")
    assert "beyond the model's context of 512" in written
    page = (out / "report.html").read_text()
    for name in ("first token, s", "peak, MiB"):
        assert page.count(f"{name} against tokens") == 2  # of two batch sizes
    full = [c["bytes"]["row"] for c in cells if c["method"] == "full"]
    assert sorted(set(full)) == [128 * 256, 256 * 256]


def test_a_full_cache_that_would_not_fit_is_refused_before_it_is_tried(given, monkeypatch):
    from less.evaluate.tasks import speed

    monkeypatch.setattr(speed, "available_bytes", lambda: 10_000)
    one = task(given, "speed:batch-1")
    with pytest.raises(UnavailableError, match="as it grows, the machine has 9.77 KiB left"):
        one.score(tiny_model(), one.blocks(given, LENGTH)[0], [None])


def test_the_peak_sees_what_was_taken_and_freed():
    from less.evaluate.machine import Peak

    peak = Peak(torch.device("cpu"))
    before = peak.bytes()
    if before is None:
        pytest.skip("NO PEAK: this system does not say")
    torch.ones(64 * 2**20, dtype=torch.uint8)
    assert peak.bytes() - before > 48 * 2**20


def test_the_page_of_docs_names_every_task_and_method_and_its_commands_parse(given):
    text = (Path(__file__).resolve().parent.parent / "docs" / "report.md").read_text()
    named = set(re.findall(r"`([\w-]+)(?::\w+)?`", text))
    assert {one.name.partition(":")[0] for one in all_tasks(given)} <= named
    assert set(built_in()) <= named
    parser = argparse.ArgumentParser()
    subparsers = parser.add_subparsers()
    for name in ("report", "bench", "view"):
        importlib.import_module(f"less.cli.{name}").add_parser(subparsers)
    commands = re.findall(r"^    less-kv (.+?)(?: +# .*)?$", text, re.MULTILINE)
    assert len(commands) >= 6
    for command in commands:
        parser.parse_args(shlex.split(command))
