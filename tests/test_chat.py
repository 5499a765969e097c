"""Chat: one cache over many turns, interruptions between steps, and the command around it."""

import io
import signal

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("rich")

from less import H2O, LessConfig, PageLayout
from less.cli import main
from less.evaluate.report import size
from less.hf import attach, cache_for
from less.integrations.chat import Chat, Interrupted, Sampling
from tests.tiny_model import (
    BOS,
    TEXT,
    byte_tokenizer,
    tiny_calibration,
    tiny_model,
    tiny_sidekick,
)

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
# Drops all answers but the last, as templates of reasoning models drop what led to them.
FORGETFUL = (
    "{% for m in messages %}{% if m.role == 'user' or loop.last %}<{{ m.role }}>{{ m.content }}"
    "<end>{% endif %}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def tokenizer(template=TEMPLATE):
    it = byte_tokenizer()
    it.chat_template = template
    return it


def build(model, tokens=200, template=TEMPLATE, **kw):
    cache = LessConfig(tokens=tokens).cache(model, sidekick=tiny_sidekick())
    return Chat(model, tokenizer(template), cache, **kw)


def test_a_bos_is_the_templates_and_comes_once(model, monkeypatch):
    it = byte_tokenizer(bos=True)
    it.chat_template = "{{ bos_token }}" + TEMPLATE
    fed = []
    step = Chat._step

    def watched(self, ids):
        fed.extend(ids)
        return step(self, ids)

    monkeypatch.setattr(Chat, "_step", watched)
    chat = Chat(model, it, LessConfig(tokens=200).cache(model))
    say(chat, "Hello")
    say(chat, "And?")
    assert fed[0] == BOS
    assert fed.count(BOS) == 1


SHORT = Sampling(max_new_tokens=6)


def say(chat, text, sampling=SHORT):
    return "".join(chat.stream(text, sampling))


def test_messages_are_those_of_the_conversation(model):
    chat = build(model, system="Be brief.")
    first = say(chat, "Hello")
    assert chat.messages == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": first},
    ]
    say(chat, "And?")
    assert [m["role"] for m in chat.messages] == [
        "system",
        "user",
        "assistant",
        "user",
        "assistant",
    ]
    chat.reset()
    assert chat.messages == [{"role": "system", "content": "Be brief."}]
    assert chat.cache.columns == 0
    assert say(chat, "Hello") == first


def test_turns_are_those_of_one_growing_text(model):
    """The second answer is that of a cache which was fed the same tokens in one go."""
    chat = build(model)
    fed = []
    step = chat._step
    chat._step = lambda ids: fed.append(ids) or step(ids)
    say(chat, "Hello there")
    turn = len(fed)
    say(chat, "Go on, then")
    ids = torch.tensor([[token for ids in fed[: turn + 1] for token in ids]])
    said = len(chat.tokenizer("<user>Hello there<end><assistant>")["input_ids"]) + 6
    assert chat.tokenizer.decode(ids[0, said:]) == "<end><user>Go on, then<end><assistant>"
    cache = cache_for(model, H2O(100, 100), tiny_sidekick())
    with attach(model, cache):
        out = model.generate(
            ids, past_key_values=cache, do_sample=False, max_new_tokens=6,
            attention_mask=torch.ones_like(ids),
        )  # fmt: skip
    assert [ids[0] for ids in fed[turn + 1 :]] == out[0, ids.shape[1] : -1].tolist()


def test_each_turn_reads_only_what_is_new(model):
    chat = build(model)
    say(chat, "Hello")
    before = chat.cache.columns
    say(chat, "x")
    fed = len(chat.tokenizer("<end><user>x<end><assistant>")["input_ids"])
    assert 0 <= chat.cache.columns - before - fed <= 1 + 5  # an unread token, and new ones


def test_a_template_that_rewrites_the_past_starts_over(model):
    chat = build(model, template=FORGETFUL)
    say(chat, "One")
    say(chat, "Two")
    assert chat.cache.columns < len("<user>One<end><user>Two<end><assistant>") + 6
    fresh = build(model, template=FORGETFUL)
    fresh.messages = chat.messages[:2]
    assert say(fresh, "Two") == chat.messages[-1]["content"]


def test_a_long_prompt_is_read_in_chunks_with_progress_and_bounded_memory(model):
    chat = build(model, tokens=24, prefill=32)
    held = chat.cache.memory()
    seen = []
    list(chat.stream(TEXT[:150], SHORT, lambda done, total: seen.append((done, total))))
    total = seen[0][1]
    assert [done for done, _ in seen] == [*range(32, total, 32), total]
    after = chat.cache.memory()
    assert {**after, "full": 0} == held
    assert min(chat.cache.stats()["evictions"]) > 0


def state(chat):
    snapshot = chat.cache.state_dict()
    return (
        {name: x.clone() for name, x in snapshot["tensors"].items()},
        snapshot["columns"], list(chat.messages),
    )  # fmt: skip


def assert_same(a, b):
    assert a[1:] == b[1:]
    assert all(torch.equal(a[0][name], b[0][name]) for name in a[0])


def test_an_interruption_while_reading_takes_the_message_back(model):
    calls = []
    chat = build(model, prefill=16, interrupted=lambda: len(calls) > 2)
    say(chat, "Hello")
    before = state(chat)
    with pytest.raises(Interrupted):
        list(chat.stream(TEXT, SHORT, lambda done, total: calls.append(done)))
    assert_same(state(chat), before)
    calls.clear()
    assert say(chat, "Go on") == say_both(model, "Hello", "Go on")


def say_both(model, *texts):
    chat = build(model, prefill=16)
    return [say(chat, text) for text in texts][-1]


def test_an_interruption_while_writing_keeps_what_was_said(model):
    stop = []
    chat = build(model, interrupted=lambda: bool(stop))
    pieces = []
    for piece in chat.stream("Hello", Sampling(max_new_tokens=50)):
        pieces.append(piece)
        if len(pieces) == 3:
            stop.append(True)
    assert chat.messages[-1]["content"] == "".join(pieces)
    stop.clear()
    assert say(chat, "Go on") is not None
    assert len(chat.messages) == 4


def test_a_failure_in_the_middle_of_a_step_takes_the_turn_back(model, monkeypatch):
    chat = build(model)
    say(chat, "Hello")
    before = state(chat)
    attend = type(chat.cache).attend

    def fails_in_layer_1(self, layer, *args, **kw):
        if layer == 1 and len(chat.messages) == 4:
            raise KeyboardInterrupt
        return attend(self, layer, *args, **kw)

    monkeypatch.setattr(type(chat.cache), "attend", fails_in_layer_1)
    with pytest.raises(KeyboardInterrupt):
        say(chat, "Go on")
    monkeypatch.undo()
    assert_same(state(chat), before)
    assert say(chat, "Go on") == say_both(model, "Hello", "Go on")


def test_a_text_beyond_the_models_context_is_refused(model):
    chat = build(model)
    say(chat, "Hello")
    before = state(chat)
    with pytest.raises(ValueError, match="beyond the model's context of 512"):
        say(chat, TEXT * 4)
    assert_same(state(chat), before)


def test_sampling_takes_from_the_top():
    logits = torch.tensor([1.0, 3.0, 2.0, -1.0])
    assert Sampling().choose(logits) == 1
    drawn = {Sampling(temperature=2.0, top_p=0.6).choose(logits) for _ in range(60)}
    assert drawn == {1, 2}
    assert {Sampling(temperature=1.0, top_p=1e-9).choose(logits) for _ in range(9)} == {1}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -1}, "temperature must be 0 or more"),
        ({"top_p": 0}, r"top_p must be in \(0, 1\]"),
        ({"max_new_tokens": 0}, "max_new_tokens must be 1 or more"),
    ],
)
def test_wrong_sampling_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**settings)


def test_what_cannot_chat_is_refused(model):
    cache = cache_for(model, H2O(8, 8))
    with pytest.raises(ValueError, match="no chat template"):
        Chat(model, byte_tokenizer(), cache)
    with pytest.raises(ValueError, match="got batch 2"):
        Chat(model, tokenizer(), cache_for(model, H2O(8, 8), batch=2))


# -- the command --------------------------------------------------------------------------------


@pytest.fixture
def folder(model, tmp_path):
    model.save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    tiny_sidekick().save_pretrained(tmp_path / "sidekick")
    return tmp_path


def talk(folder, monkeypatch, *lines, more=()):
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(line + "\n" for line in lines)))
    arguments = [
        "--model", folder / "model", "--sidekick", folder / "sidekick", "--budget", 24,
        "--max-new-tokens", 5, "--prefill", 64, *more,
    ]  # fmt: skip
    return main(["chat", *map(str, arguments)])


def test_a_script_on_stdin_is_a_conversation(folder, monkeypatch, capsys):
    (folder / "long.txt").write_text(TEXT[:120])
    lines = ["Hello", "", f"/read {folder}/long.txt", "/stats", "/reset", "Hello", "/nothing"]
    assert talk(folder, monkeypatch, *lines) == 0
    shown = capsys.readouterr().out
    first, second = (part.splitlines()[1] for part in shown.split("you ▸ Hello")[1:])
    assert first == second
    assert "tokens seen · " in shown
    assert "of attention from the state" in shown
    assert "evicted" in shown
    assert "reading, tokens: done" in shown
    assert "forgotten" in shown
    assert "H2O(heavy=12" in shown
    assert "no command '/nothing'" in shown


def test_a_budget_may_come_in_bytes_or_from_a_config(folder, monkeypatch, capsys):
    model, none = ["--model", str(folder / "model")], ["--sidekick", "none"]
    monkeypatch.setattr("sys.stdin", io.StringIO("Hello\n/quit\nnever read\n"))
    assert main(["chat", *model, *none, "--bytes", "40kB", "--max-new-tokens", "3"]) == 0
    shown = capsys.readouterr().out
    assert "no sidekick: eviction alone" in shown
    assert "never read" not in shown
    LessConfig(tokens=[9, 9], sidekick=folder / "sidekick").save_pretrained(folder / "sidekick")
    monkeypatch.setattr("sys.stdin", io.StringIO("/stats\n"))
    config = ["--config", str(folder / "sidekick")]
    assert main(["chat", *model, *config]) == 0
    assert "H2O(heavy=5" in capsys.readouterr().out
    assert main(["chat", *model, *none, *config]) == 2
    assert "--sidekick: the config of --config names one" in capsys.readouterr().err


def test_rows_may_be_packed_and_calibrated(folder, monkeypatch, capsys):
    tiny_calibration().save_pretrained(folder / "rows")
    model, none = ["--model", str(folder / "model")], ["--sidekick", "none"]
    more = ["--rows", "k4v4", "--calibration", str(folder / "rows"), "--hot", "8"]
    monkeypatch.setattr("sys.stdin", io.StringIO("Hello\n"))
    assert main(["chat", *model, *none, *more, "--budget", "24", "--max-new-tokens", "3"]) == 0
    shown = capsys.readouterr().out
    layout = PageLayout(2, 16, 24, "k4v4", hot=8)
    held = size(2 * (layout.nbytes - layout.header_bytes))
    assert f"the cache holds {held} from the first token to the last, rows in k4v4" in shown
    means = size(2 * 4 * 128)  # four fields of a page's alignment in each of two layers
    assert f"the first 4 and the last 8 tokens in int8; means and scales {means}; no" in shown
    assert f"{held} held, a full cache " in shown
    settings = {"rows": "k3v3", "hot": 4, "calibration": str(folder / "rows")}
    LessConfig(tokens=24, **settings).save_pretrained(folder / "config")
    monkeypatch.setattr("sys.stdin", io.StringIO("Hello\n"))
    config = ["--config", str(folder / "config"), "--max-new-tokens", "3"]
    assert main(["chat", *model, *config]) == 0
    assert "rows in k3v3, the first 4 and the last 4 tokens in int8" in capsys.readouterr().out


def test_ctrl_c_stops_the_answer_and_not_the_conversation(folder, monkeypatch, capsys):
    written = []
    stream = Chat.stream

    def interrupted(self, *args):
        for piece in stream(self, *args):
            written.append(piece)
            if len(written) == 2:
                signal.raise_signal(signal.SIGINT)
            yield piece

    monkeypatch.setattr(Chat, "stream", interrupted)
    before = signal.getsignal(signal.SIGINT)
    assert talk(folder, monkeypatch, "Hello", "Go on", more=("--max-new-tokens", 4)) == 0
    assert signal.getsignal(signal.SIGINT) is before
    shown = capsys.readouterr().out
    assert shown.count("(stopped)") == 1
    assert shown.count("tokens seen") == 2


def test_too_long_a_text_is_said_and_the_conversation_goes_on(folder, monkeypatch, capsys):
    assert talk(folder, monkeypatch, TEXT * 4, "Hello") == 0
    shown = capsys.readouterr().out
    assert "beyond the model's context of 512" in shown
    assert shown.count("tokens seen") == 2


def test_on_a_terminal_lines_go_up_and_the_last_one_has_a_status_below(model):
    from rich.console import Console

    from less.cli.chat import _Screen

    chat = build(model)
    say(chat, "Hello")
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    with _Screen(console, chat) as screen:
        for piece in ("one", " line\nand ", "another"):
            screen.write(piece)
    shown = console.file.getvalue()
    assert "one line" in shown
    assert shown.rstrip().endswith("and another")
    assert "tokens seen" in shown


@pytest.mark.slow
def test_smollm2_says_what_it_says_on_a_full_cache(monkeypatch, capsys):
    pytest.importorskip("gguf")
    from less.evaluate.assets import load_model

    script = "My name is Ada and I keep a lighthouse.\nWhat is my name?\n/stats\n"
    monkeypatch.setattr("sys.stdin", io.StringIO(script))
    assert main(["chat", "--budget", "128", "--dtype", "float32", "--max-new-tokens", "12"]) == 0
    shown = capsys.readouterr().out
    model, tokenizer = load_model()
    messages = [{"role": "user", "content": script.split("\n")[0]}]
    text = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    out = model.generate(**text, do_sample=False, max_new_tokens=12)
    said = tokenizer.decode(out[0, text["input_ids"].shape[1] :], skip_special_tokens=True)
    assert said in shown
    assert shown.count(" tokens seen") == 3
    assert "H2O(heavy=64, recent=64" in shown
