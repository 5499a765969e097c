"""The pages' examples, as they stand, on a random model."""

import os
import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

from less import H2O, PageLayout
from less.dtypes import FORMATS
from less.evaluate.assets import AssetError, convert_gguf
from less.evaluate.methods import Storage, in_formats
from tests.test_curves import with_curves
from tests.tiny_model import byte_tokenizer, save_tiny, tiny_model, tiny_sidekick

DOCS = Path(__file__).resolve().parent.parent / "docs"
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}<end>{% endfor %}<assistant>"


@pytest.fixture
def names(tmp_path, monkeypatch):
    """What the pages take for granted: a model, its folder, a sidekick beside it."""
    save_tiny(tmp_path / "model")
    tiny_sidekick().save_pretrained(tmp_path / "my-sidekick")
    with_curves(tiny_model()).save_pretrained(tmp_path / "my-model")
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


def test_gguf(names, tmp_path, monkeypatch, capsys):
    pytest.importorskip("gguf")
    pytest.importorskip("accelerate")
    write_gguf(names["model"], names["tokenizer"], tmp_path / "model.gguf")
    done = run("gguf.md", names)
    ids = done["tokenizer"]("In 1984, 12 cats", return_tensors="pt")["input_ids"]
    want = tiny_model()(ids).logits
    torch.testing.assert_close(done["model"](ids).logits, want, rtol=1e-3, atol=1e-3)
    assert "In 1984, 12 cats" in capsys.readouterr().out
    with pytest.raises(AssetError, match="exists and is no empty folder"):
        convert_gguf("model.gguf", "converted")
    with pytest.raises(AssetError, match=r"nowhere\.gguf does not exist"):
        convert_gguf("nowhere.gguf", "other")
    (tmp_path / "broken.gguf").write_bytes(b"GGUF")
    with pytest.raises(AssetError, match=r"broken\.gguf"):
        convert_gguf("broken.gguf", "other")


def write_gguf(model, tokenizer, file):
    """A Llama and its byte-level tokenizer as llama.cpp's converter writes them."""
    from gguf import GGUFWriter

    config, weights = model.config, model.state_dict()
    writer = GGUFWriter(file, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    names = [tokenizer.convert_ids_to_tokens(i) or f"<{i}>" for i in range(config.vocab_size)]
    names[-1] = "zq"  # the reader wants a merge, and no text here has this one
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(names)
    writer.add_token_types([1] * 256 + [3] * (config.vocab_size - 256))
    writer.add_token_merges(["z q"])
    writer.add_eos_token_id(256)
    writer.add_pad_token_id(257)

    def add(name, weight, heads=0):
        if heads:  # rotary halves are stored interleaved
            weight = weight.view(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape_as(weight)
        writer.add_tensor(name, weight.numpy())

    add("token_embd.weight", weights["model.embed_tokens.weight"])
    add("output_norm.weight", weights["model.norm.weight"])
    add("output.weight", weights["lm_head.weight"])
    for i in range(config.num_hidden_layers):
        here, there = f"blk.{i}.", f"model.layers.{i}."
        add(here + "attn_q.weight", weights[there + "self_attn.q_proj.weight"], 4)
        add(here + "attn_k.weight", weights[there + "self_attn.k_proj.weight"], 2)
        for name, of_model in (
            ("attn_v", "self_attn.v_proj"),
            ("attn_output", "self_attn.o_proj"),
            ("attn_norm", "input_layernorm"),
            ("ffn_norm", "post_attention_layernorm"),
            ("ffn_gate", "mlp.gate_proj"),
            ("ffn_up", "mlp.up_proj"),
            ("ffn_down", "mlp.down_proj"),
        ):
            add(f"{here}{name}.weight", weights[f"{there}{of_model}.weight"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_architecture(names):
    done = run("architecture.md", names)
    (views,) = done["layout"].views(done["layout"].check_pool("test", done["pool"]))
    assert views.seen[[3, 7]].tolist() == [301, 41]
    assert not done["out"][2].any()
    assert done["out"][:2].isfinite().all()


def test_budgets(names):
    done = run("budgets.md", names)
    assert [p.capacity for p in done["pyramid"].policies] == [112, 16]
    assert [p.capacity for p in done["exact"].policies] == [48, 80]
    assert done["first_full"].max_columns == 2048
    slots = [n for layout in done["by_heads"].layouts for n in layout.capacities]
    assert len(set(slots)) > 1
    memory = done["by_heads"].memory()
    assert 60_000 < memory["slots"] <= 64_000


def test_the_bytes_of_a_slot_are_those_of_a_page():
    table = re.findall(
        r"^\| ([\w, ]+?) \| (\d+) \| (\d+) \| (\d+) \| (\d+) \|$",
        (DOCS / "dtypes.md").read_text(), re.MULTILINE,
    )  # fmt: skip
    assert [names for names, *_ in table][3:] == list(FORMATS)
    for names, *said in table:
        for name in names.split(", "):
            dtype = name if name in FORMATS else getattr(torch, name)
            slots, kept = [], []
            for dim, heads in ((64, 3), (128, 8)):
                one, other = (PageLayout(1, dim, 20 + 512 * n, dtype).nbytes for n in (1, 3))
                slots.append((other - one) // 1024)
                bought = in_formats(64, [Storage(dtype)], H2O(1, 1), (heads, dim), torch.float16)
                kept.append(bought[0].policy.capacity)
            assert [*slots, *kept] == list(map(int, said)), name


def test_policies(names, fresh_registry):
    assert run("policies.md", names)["config"].policy.budget == 64


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
    for page in [*DOCS.glob("*.md"), *DOCS.parent.glob("*.md")]:
        for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
            if "://" in target:
                continue
            name, _, anchor = target.partition("#")
            file = page.parent / name if name else page
            if not file.exists() or (anchor and anchor not in anchors(file.read_text())):
                dead.append(f"{page.name}: {target}")
    assert not dead


def recipes():
    """CONTRIBUTING.md's recipes: title -> the product files that its table lists."""
    text = (DOCS.parent / "CONTRIBUTING.md").read_text()
    sections = text.partition("\n## Recipes\n")[2].split("\n### ")[1:]
    return {
        section.splitlines()[0]: re.findall(r"^\| `([^`]+)` \|", section, re.MULTILINE)
        for section in sections
    }


def test_every_file_that_contributing_names_exists():
    text = (DOCS.parent / "CONTRIBUTING.md").read_text()
    named = re.findall(r"`([\w.]+(?:/[\w.]+)+)`", text)
    assert len(named) > 70
    assert not [name for name in named if not (DOCS.parent / name).exists()]


def test_the_recipes_list_as_many_product_files_as_they_say():
    text = (DOCS.parent / "CONTRIBUTING.md").read_text()
    said = {name: int(n) for name, n in re.findall(r"^\| \[([^]]+)\].*?\| (\d+) \|", text, re.M)}
    assert said == {name: len(set(files)) for name, files in recipes().items()}
    assert all(
        file.startswith(("less/", "csrc/")) for files in recipes().values() for file in files
    )
