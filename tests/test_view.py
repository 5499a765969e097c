"""``less-kv view``: where a cache has each token, as it really has it."""

import pytest
import torch

pytest.importorskip("transformers")

from less import H2O
from less.cli import main
from less.evaluate.lives import as_text, lives, page
from less.hf import attach, cache_for
from tests.browser import opened
from tests.tiny_model import TEXT, byte_tokenizer, save_tiny, tiny_model, tiny_sidekick

T = 70
SETTINGS = {
    "forgotten": {},
    "folded": {"sidekick": tiny_sidekick()},
    "merged": {"dtype": "k4v4", "sinks": 2, "hot": 6, "victim": "merge"},
}


def seen(gone, capacities=None):
    model = tiny_model()
    ids = torch.tensor([byte_tokenizer()(TEXT, add_special_tokens=False)["input_ids"][:T]])

    def cache():
        policy = H2O(12, 8, decay=0.98)
        return cache_for(model, policy, capacities=capacities, **SETTINGS[gone])

    pieces = list(TEXT[:T])
    return model, ids, cache, lives(model, ids, pieces, cache())


@pytest.mark.parametrize("gone", SETTINGS)
def test_a_token_is_where_the_cache_has_it_at_every_step(gone):
    model, ids, build, found = seen(gone)
    cache = build()
    assert found.gone == gone
    with torch.inference_mode(), attach(model, cache):
        for at in range(1, T + 1):
            model(ids[:, at - 1 : at], past_key_values=cache)
            for n, (layer, head) in enumerate(found.heads):
                held = set(cache.positions(layer)[0, head].tolist()) - {-1}
                shown = {t for t in range(at) if found.place(n, t, at) != gone}
                assert shown == held
                hot = {t for t in held if found.place(n, t, at) == "hot"}
                want = {t for t in held if t < 2 or t >= at - 6} if gone == "merged" else set()
                assert hot == want


def test_slots_that_merge_stand_for_all_tokens_that_were_seen():
    *_, found = seen("merged")
    for n, slots in enumerate(found.slots):
        count = dict.fromkeys(range(T), 1)
        for _, token, number in found.counts[n]:
            count[token] = number
        held = [t for t in range(T) if found.place(n, t, T) != "merged"]
        assert len(held) == slots
        assert sum(count[t] for t in held) == T


def test_the_states_share_of_attention_is_that_of_the_cache():
    model, ids, build, found = seen("folded")
    cache = build()
    with torch.inference_mode(), attach(model, cache):
        model(ids[:, :20], past_key_values=cache)
        for at in range(20, T):
            model(ids[:, at : at + 1], past_key_values=cache)
    for layer, mean in enumerate(cache.stats()["memory_share"]):
        assert sum(found.state_share[layer]) / T == pytest.approx(mean, abs=1e-3)
        assert max(found.state_share[layer]) > 0
        assert found.state_share[layer][:20] == [0.0] * 20


def test_text_for_a_terminal_is_the_text():
    *_, found = seen("merged")
    assert as_text(found).plain.startswith(TEXT[:T])
    assert "hot" in as_text(found, 1).plain


def test_pieces_must_be_as_many_as_tokens():
    model, ids, build, _ = seen("forgotten")
    with pytest.raises(ValueError, match="as many as pieces"):
        lives(model, ids, ["x"], build())


def test_the_page_shows_every_step(tmp_path):
    *_, found = seen("merged", capacities=[[20, 24], [12, 40]])
    assert found.slots == [20, 24, 12, 40]
    file = tmp_path / "view.html"
    file.write_text(page(found, "A text </script>", ["One <line>."]), encoding="utf-8")
    with opened(file) as shown:
        assert shown.locator("#text").inner_text().startswith(TEXT[:40])
        assert shown.locator("#now").inner_text() == f"{T} of {T} tokens seen"
        shown.locator("#map td").nth(2).click()
        for at in (T, 41, 10):
            shown.locator("#time").evaluate(
                "(slider, at) => { slider.value = at; slider.dispatchEvent(new Event('input')) }",
                at,
            )
            assert shown.locator("#now").inner_text() == f"{at} of {T} tokens seen"
            classes = shown.locator("#text span").evaluate_all("all => all.map(x => x.className)")
            want = [found.place(2, t, at) if t < at else "future" for t in range(T)]
            assert classes == want
        shown.locator("#time").focus()
        shown.keyboard.press("ArrowRight")
        assert shown.locator("#now").inner_text() == f"11 of {T} tokens seen"
        shown.locator("#all").click()
        assert "All heads" in shown.locator("#legend").inner_text()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("view")
    save_tiny(folder / "model")
    (folder / "text.txt").write_text(TEXT * 3)
    return folder


def ask(files, *more):
    return [
        "view", "--model", str(files / "model"), "--text", str(files / "text.txt"),
        "--tokens", "120", "--method", "merge", "--threads", "1", *map(str, more),
    ]  # fmt: skip


def test_the_command_writes_a_page_or_the_terminal(files, tmp_path, capsys):
    assert main(ask(files, "--out", tmp_path / "page.html")) == 0
    assert "1 of the" not in capsys.readouterr().err
    assert '"gone":"merged"' in (tmp_path / "page.html").read_text()
    assert main(ask(files, "--head", "1.0")) == 0
    shown = capsys.readouterr().out
    assert "slots of each kv head" in shown
    assert "■ merged" in shown


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--method", "full"], "there is nothing to see"),
        (["--method", "less"], "no sidekick fits"),
        (["--head", "9.0"], "--head must be LAYER.HEAD"),
        (["--budget", "4"], "cannot hold 21 tokens"),
        (["--tokens", "9999"], "--tokens 9999 is beyond the model's context"),
        (["--text", "/nowhere.txt"], "does not exist"),
    ],
)
def test_a_wrong_call_is_refused(files, capsys, more, message):
    assert main(ask(files, *more)) == 2
    assert message in capsys.readouterr().err
