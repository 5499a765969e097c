"""The pages' examples, as they stand, on a random model."""

import os
import re
from pathlib import Path

import pytest

pytest.importorskip("transformers")

from tests.tiny_model import byte_tokenizer, save_tiny, tiny_model, tiny_sidekick

DOCS = Path(__file__).resolve().parent.parent / "docs"
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}<end>{% endfor %}<assistant>"


@pytest.fixture
def names(tmp_path, monkeypatch):
    """What the pages take for granted: a model, its folder, a sidekick beside it."""
    save_tiny(tmp_path / "model")
    tiny_sidekick().save_pretrained(tmp_path / "my-sidekick")
    (tmp_path / "docs").symlink_to(DOCS)
    monkeypatch.chdir(tmp_path)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    inputs = tokenizer("The history of the lighthouse", return_tensors="pt")
    inputs.pop("token_type_ids", None)
    return {
        "folder": os.fspath(tmp_path / "model"),
        "model": tiny_model(),
        "tokenizer": tokenizer,
        "sidekick": tiny_sidekick(),
        "inputs": inputs,
    }


def run(page, names):
    """Run a page's blocks in order, in one namespace."""
    blocks = re.findall(
        r"^```python\n(.*?)^```", (DOCS / page).read_text(), re.DOTALL | re.MULTILINE
    )
    assert blocks
    for block in blocks:
        exec(compile(block, page, "exec"), names)
    return names


def test_your_model(names, capsys):
    cache = run("your-model.md", names)["cache"]
    assert cache.sidekick is not None
    assert cache.memory()["slots"] + cache.memory()["state"] <= 2**20
    assert "LessKVCache(layers=2" in capsys.readouterr().out


def test_budgets(names):
    done = run("budgets.md", names)
    assert [p.capacity for p in done["pyramid"].policies] == [112, 16]
    assert [p.capacity for p in done["exact"].policies] == [48, 80]
    assert done["first_full"].max_columns == 2048


def test_migration(names):
    done = run("migration.md", names)
    first, last = (p.capacity for p in done["cache"].policies)
    assert (first + last, last) == (500, 13)  # a twentieth of 250, and what rounding leaves


def test_adapters(names):
    pytest.importorskip("lm_eval")
    done = run("adapters.md", names)
    assert 0 <= done["scores"]["acc,none"] <= 1
    assert done["chat"].messages[-1]["role"] == "assistant"


def test_every_link_between_pages_leads_somewhere():
    def anchors(text):
        heads = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
        return {re.sub(r"[^\w\- ]", "", h.lower()).strip().replace(" ", "-") for h in heads}

    dead = []
    for page in [*DOCS.glob("*.md"), DOCS.parent / "README.md"]:
        for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
            if "://" in target:
                continue
            name, _, anchor = target.partition("#")
            file = page.parent / name if name else page
            if not file.exists() or (anchor and anchor not in anchors(file.read_text())):
                dead.append(f"{page.name}: {target}")
    assert not dead
