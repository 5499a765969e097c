"""lm-evaluation-harness on a bounded cache: what it scores is what the real cache says."""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from less import H2O, LessConfig, SinkRecent
from less.cli import main
from less.evaluate.perplexity import through_caches
from less.hf import attach, cache_for
from less.integrations.lm_eval import LessLM
from tests.tiny_model import (
    BOS,
    TEXT,
    byte_tokenizer,
    save_tiny,
    tiny_calibration,
    tiny_model,
    tiny_sidekick,
)

ROOT = Path(__file__).resolve().parent.parent
TASKS = ROOT / "docs" / "lm-eval"


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def build(model, config, batch=1, **kw):
    return LessLM(model, config=config, tokenizer=byte_tokenizer(), batch_size=batch, **kw)


def requests(kind, *arguments):
    return [Instance(kind, {}, a, i) for i, a in enumerate(arguments)]


PAIRS = [(TEXT[i : i + 40 + 3 * i], TEXT[100 : 104 + 2 * i]) for i in range(5)]


def scores(lm, kind="loglikelihood", pairs=PAIRS):
    return getattr(lm, kind)(requests(kind, *pairs), disable_tqdm=True)


def test_a_budget_as_long_as_the_text_scores_as_the_harness_own_model(model):
    want = scores(HFLM(model, tokenizer=byte_tokenizer(), batch_size=2))
    got = scores(build(model, LessConfig(tokens=128), batch=2))
    for (a, greedy_a), (b, greedy_b) in zip(got, want, strict=True):
        assert a == pytest.approx(b, abs=1e-3)
        assert greedy_a == greedy_b


@pytest.mark.parametrize("maps", [False, True])
def test_scores_are_those_of_the_real_cache_token_by_token(model, maps):
    sidekick = tiny_sidekick() if maps else None
    lm = build(model, LessConfig(tokens=16, policy=H2O(8, 8)), sidekick=sidekick)
    for (context, answer), (got, _) in zip(PAIRS, scores(lm), strict=True):
        ids = torch.tensor([lm.tok_encode(context + answer)])
        cache = cache_for(model, H2O(8, 8), sidekick)
        nats = through_caches(model, ids, [cache])[0].values[0]
        assert got == pytest.approx(-nats[-len(lm.tok_encode(answer)) :].sum().item(), abs=1e-3)


def test_something_was_evicted(model):
    full = scores(HFLM(model, tokenizer=byte_tokenizer()))
    lm = build(model, LessConfig(tokens=16))
    assert max(abs(a - b) for (a, _), (b, _) in zip(scores(lm), full, strict=True)) > 0.01
    assert all(n > 0 for n in lm._held[1].stats()["evictions"])


def test_batches_padding_and_requests_before_change_no_score(model):
    config = LessConfig(tokens=16)
    alone = [scores(build(model, config), pairs=[pair])[0] for pair in PAIRS]
    lm = build(model, config, batch=3, sidekick=None)
    for got in (scores(lm), scores(lm)):  # the second time on used caches
        for (a, greedy_a), (b, greedy_b) in zip(got, alone, strict=True):
            assert a == pytest.approx(b, abs=1e-3)
            assert greedy_a == greedy_b


def test_larger_chunks_see_their_own_tokens_exactly(model):
    config = LessConfig(tokens=16)
    one = scores(build(model, config))
    eight = scores(build(model, config, chunk=8))
    full = scores(HFLM(model, tokenizer=byte_tokenizer()))

    def distance(some):
        return sum(abs(a - b) for (a, _), (b, _) in zip(some, full, strict=True))

    assert distance(eight) != distance(one)
    whole = scores(build(model, config, chunk=512))
    assert whole != one


def test_rolling_likelihood_goes_through_the_cache_too(model):
    texts = [(TEXT[:90],), (TEXT[20:100],)]
    lm = build(model, LessConfig(tokens=16))
    got = lm.loglikelihood_rolling(requests("loglikelihood_rolling", *texts), disable_tqdm=True)
    for (text,), value in zip(texts, got, strict=True):
        ids = torch.tensor([[lm.prefix_token_id, *lm.tok_encode(text)]])
        cache = cache_for(model, H2O(8, 8, decay=0.98))
        nats = through_caches(model, ids, [cache])[0].values[0, 1:]
        assert value == pytest.approx(-nats.sum().item(), abs=1e-3)


def test_generation_runs_on_the_cache_and_resets_between_documents(model):
    kwargs = {"until": ["\0"], "max_gen_toks": 6, "do_sample": False}
    texts = [(TEXT[:50], kwargs), (TEXT[10:80], kwargs), (TEXT[:50], kwargs)]

    def write(lm):
        return lm.generate_until(requests("generate_until", *texts), disable_tqdm=True)

    alone = write(build(model, LessConfig(tokens=16)))
    assert write(build(model, LessConfig(tokens=16), batch=2)) == alone
    assert alone[0] == alone[2]
    full = write(HFLM(model, tokenizer=byte_tokenizer(), batch_size=2))
    assert write(build(model, LessConfig(tokens=128), batch=2)) == full


def test_a_text_is_opened_by_the_tokenizers_bos_once(model):
    lm = LessLM(model, config=LessConfig(tokens=16), tokenizer=byte_tokenizer(bos=True))
    assert lm.tok_encode("ab") == [BOS, *byte_tokenizer()("ab")["input_ids"]]
    assert lm.tok_encode("<bos>ab") == lm.tok_encode("ab")


def test_a_share_is_of_each_batchs_longest_request(model):
    lm = build(model, LessConfig(share=0.5))
    scores(lm, pairs=PAIRS[:1])
    length = len(lm.tok_encode("".join(PAIRS[0]))) - 1
    assert lm._held[1].policy.capacity == round(length / 2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "one of tokens, share and bytes must be given"),
        ({"tokens": 8, "chunk": 0}, "chunk must be a whole number of tokens >= 1"),
        ({"tokens": 8, "policy": "lru"}, "policy must be one of"),
        (
            {"config": LessConfig(tokens=8), "tokens": 9},
            r"has these settings already: \['tokens'\]",
        ),
        ({"bytes": 100}, "cannot hold 21 tokens per head"),
        ({"tokens": 30, "rows": "k5v5"}, "rows must be one of"),
        ({"tokens": 30, "rows": "k4v4", "slots": "k3v3"}, "slots and rows say the same"),
        ({"tokens": 16, "rows": "k4v4"}, "would keep 16 tokens, and k4v4 keeps 21 or more"),
        ({"tokens": 30, "rows": "k4v4", "calibration": "nowhere"}, "nowhere"),
    ],
)
def test_wrong_settings_are_refused_when_the_model_is_made(model, settings, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        LessLM(model, tokenizer=byte_tokenizer(), **settings)


def test_settings_may_be_written_on_the_command_line(model, tmp_path):
    save_tiny(tmp_path)
    lm = LessLM.create_from_arg_string(
        f"pretrained={tmp_path},tokens=20,policy=sinks,slots=float16,shape=pyramid,beta=2",
        {"batch_size": 2, "device": "cpu"},
    )
    assert lm.less_config == LessConfig(
        tokens=20, policy=SinkRecent(4, 1), dtype="float16", shape="pyramid", beta=2
    )
    assert lm.get_model_info()["less"]["tokens"] == 20


def test_packed_rows_and_a_calibration_may_be_written_on_the_command_line(tmp_path):
    save_tiny(tmp_path / "model")
    tiny_calibration().save_pretrained(tmp_path / "rows")
    for named in ("rows", "slots"):
        lm = LessLM.create_from_arg_string(
            f"pretrained={tmp_path / 'model'},tokens=24,{named}=k4v4,sinks=2,hot=8,"
            f"hot_dtype=float16,calibration={tmp_path / 'rows'}",
            {"batch_size": 2, "device": "cpu"},
        )
        assert lm.less_config == LessConfig(
            tokens=24, rows="k4v4", sinks=2, hot=8, hot_dtype="float16"
        )
        cache = lm._held[1]
        assert cache.calibration.digest == tiny_calibration().digest
        assert {(x.dtype, x.sinks, x.hot, x.hot_dtype) for x in cache.layouts} == {
            ("k4v4", 2, 8, torch.float16)
        }


def test_scores_on_packed_rows_are_those_of_single_tokens(model):
    config = LessConfig(tokens=24, rows="k3v3", sinks=2, hot=6)
    lm = build(model, config)
    for (context, answer), (got, _) in zip(PAIRS[:2], scores(lm, pairs=PAIRS[:2]), strict=True):
        ids = torch.tensor([lm.tok_encode(context + answer)])
        cache, want = config.cache(model), 0.0
        with torch.inference_mode(), attach(model, cache):
            for t in range(ids.shape[1] - 1):
                logits = model(ids[:, t : t + 1], past_key_values=cache).logits[0, -1]
                if t + 1 >= ids.shape[1] - len(lm.tok_encode(answer)):
                    want += logits.log_softmax(-1)[ids[0, t + 1]].item()
        assert got == pytest.approx(want, abs=2e-2)


def test_a_policy_of_a_file_is_imported_and_brought_to_the_budget(
    model, tmp_path, monkeypatch, fresh_registry
):
    page = (ROOT / "docs" / "policies.md").read_text()
    (tmp_path / "keys.py").write_text(page.split("```python\n")[1].split("```")[0])
    monkeypatch.chdir(tmp_path)
    written = {"name": "SmallestKeys", "budget": 64}
    with pytest.raises(ValueError, match="less-kv: policy: name must be one of"):
        LessLM(model, tokenizer=byte_tokenizer(), tokens=20, policy=written)
    with pytest.raises(ValueError, match="less-kv: imports keys: Python's path has no such module"):
        LessLM(model, tokenizer=byte_tokenizer(), tokens=20, policy=written, imports="keys")
    for policy in (written, json.dumps(written)):
        lm = LessLM(
            model, tokenizer=byte_tokenizer(), tokens=20, policy=policy, imports=["keys.py"]
        )
        assert lm._held[1].policy.capacity == 20
        assert lm.get_model_info()["less"]["policy"] == {**written, "recent": 8}
    h2o = build(model, LessConfig(tokens=20))
    assert scores(lm, pairs=PAIRS[:1]) != scores(h2o, pairs=PAIRS[:1])


@pytest.mark.parametrize("sidekick", ["none", "sidekick"])
@pytest.mark.parametrize(
    ("policy", "rows"),
    [
        ("trained", ["decayed H2O"]),
        ("h2o", []),
        ("sinks", ["sinks + recent"]),
        ('{"name": "H2O", "heavy": 3, "recent": 1}', ["H2O(heavy=12, recent=4, sinks=0,"]),
    ],
)
def test_the_policy_of_the_command_has_a_row_of_its_own_beside_h2o(
    model, tmp_path, monkeypatch, sidekick, policy, rows
):
    from less.cli.lm_eval import _methods, _policy

    tiny_sidekick().save_pretrained(tmp_path / "sidekick")
    monkeypatch.chdir(tmp_path)
    args = argparse.Namespace(budget=16, sidekick=sidekick)
    methods = _methods(args, model.config, _policy(policy, 16))
    assert all(method.policy.capacity == 16 for method in methods[1:])
    names = [method.name.split(" decay")[0] for method in methods]
    assert names == ["full cache", "H2O", *rows, *(["LESS"] if sidekick != "none" else [])]
    if sidekick != "none":
        assert methods[-1].policy == methods[-2].policy


@pytest.mark.parametrize("stored", ["float16", "k4v4"])
def test_one_command_prints_the_table(tmp_path, capsys, stored):
    save_tiny(tmp_path / "model")
    tiny_sidekick().save_pretrained(tmp_path / "sidekick")
    arguments = [
        "lm-eval", "--model", tmp_path / "model", "--sidekick", tmp_path / "sidekick",
        "--tasks", "recall", "--include-path", TASKS, "--budget", 48, "--batch-size", 2,
        "--limit", 2, "--chunk", 64, "--out", tmp_path / "results.json",
    ]  # fmt: skip
    if stored == "k4v4":
        tiny_calibration().save_pretrained(tmp_path / "rows")
        arguments += ["--rows", stored, "--calibration", tmp_path / "rows"]
    # The byte tokenizer makes 700 tokens of a document.
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(
        json.dumps({**config, "max_position_embeddings": 1024})
    )
    assert main(list(map(str, arguments))) == 0
    shown = capsys.readouterr().out
    assert f"48 tokens kept per head in {stored}" in shown
    assert "recall" in shown
    written = json.loads((tmp_path / "results.json").read_text())
    assert list(written) == ["full cache", "H2O", "decayed H2O", "LESS"]
    assert all(0 <= r["recall"]["acc,none"] <= 1 for r in written.values())


@pytest.mark.slow
def test_the_harness_own_command_line_runs_on_smollm2(tmp_path):
    pytest.importorskip("gguf")
    from less.evaluate.assets import smollm2

    arguments = [
        "run", "--model", "less-kv", "--model_args",
        f"pretrained={smollm2()},tokens=96,slots=float16,sidekick=smollm2-135m-instruct,chunk=16",
        "--tasks", "recall", "--include_path", TASKS, "--limit", 4, "--batch_size", 4,
        "--output_path", tmp_path, "--device", "cpu",
    ]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "less.integrations.lm_eval", *map(str, arguments)],
        capture_output=True, text=True, cwd=ROOT, env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "|recall|" in done.stdout
    (file,) = tmp_path.rglob("results_*.json")
    assert json.loads(file.read_text())["results"]["recall"]["acc,none"] >= 0.25
