"""Training: capture, schedules, objective, and runs that survive being killed."""

import argparse
import json

import pytest
import torch

from less import H2O, LessKVCache, Sidekick, SinkRecent
from less.cli import main
from less.files import read_text, text_files
from less.fit import (
    LayerWalk,
    Recipe,
    fit_layer,
    objective,
    read_stream,
    sample_chunks,
    schedule,
    text,
    train,
)
from less.fit.eviction import Eviction
from less.fit.start import START, Trainable
from tests.helpers import HeavyValues, random_qkv
from tests.ops import flat_reference as reference
from tests.tiny_model import BOS, TEXT, byte_tokenizer, save_tiny, tiny_model

QUICK = Recipe(steps=4, rows=8, held_rows=16, rank=4, hidden=8)
POLICY = H2O(heavy=4, recent=4, decay=0.98)


def token_ids(chunks=6, tokens=48, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (chunks, tokens), generator=g)


@pytest.fixture(scope="module")
def model():
    return tiny_model()


# -- capture -----------------------------------------------------------------------------------


def test_capture_gives_what_each_layer_s_attention_saw_and_gave(model, tmp_path):
    ids = token_ids(3, 20)
    wanted = []

    def note(module, args, kwargs, output):
        wanted.append(output[0].detach())

    handles = [
        layer.self_attn.register_forward_hook(note, with_kwargs=True)
        for layer in model.model.layers
    ]
    with torch.no_grad():
        hidden = model(ids, output_hidden_states=True).hidden_states
    for handle in handles:
        handle.remove()
    walk = LayerWalk(model, ids, tmp_path)
    walk.start()
    for i in range(2):
        c = walk.capture(i)
        assert (c.q.shape, c.k.shape, c.v.shape) == ((3, 4, 20, 16), (3, 2, 20, 16), (3, 2, 20, 16))
        assert c.scale == 0.25
        again = torch.nn.functional.scaled_dot_product_attention(
            c.q, c.k, c.v, is_causal=True, enable_gqa=True
        )
        torch.testing.assert_close(c.out, again, rtol=1e-4, atol=1e-5)
        projected = c.out.transpose(1, 2).flatten(2) @ c.o_weight.T
        torch.testing.assert_close(projected, wanted[i], rtol=1e-4, atol=1e-4)
    with walk._map(1) as boundary:
        torch.testing.assert_close(boundary, hidden[1], rtol=1e-4, atol=1e-4)


def test_capture_leaves_the_model_and_transformers_as_they_were(model, tmp_path):
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    def facts():
        return (
            model.training,
            model.config._attn_implementation,
            sorted(ALL_ATTENTION_FUNCTIONS),
            sorted(ALL_MASK_ATTENTION_FUNCTIONS),
            [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()],
            [p.requires_grad for p in model.parameters()],
        )

    ids = token_ids(2, 16)
    with torch.no_grad():
        before, logits = facts(), model(ids).logits
    model.train()
    walk = LayerWalk(model, ids, tmp_path)
    walk.start()
    walk.capture(0)
    assert model.training
    model.eval()
    with torch.no_grad():
        assert facts() == before
        assert torch.equal(model(ids).logits, logits)


def test_capture_restores_the_model_after_an_error(model, tmp_path):
    walk = LayerWalk(model, token_ids(2, 16), tmp_path)
    walk.start()

    def fail():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        walk.capture(0, fail)
    assert model.config._attn_implementation == "sdpa"
    assert walk.boundaries == [0]


def test_disk_holds_one_boundary_however_many_the_layers(model, tmp_path):
    ids = token_ids(3, 20)
    size = ids.numel() * 64 * 4
    walk = LayerWalk(model, ids, tmp_path)
    walk.start()
    for i in range(2):
        assert sum(f.stat().st_size for f in tmp_path.iterdir()) == size
        walk.capture(i)
        walk.release(i)
    assert [f.name for f in tmp_path.iterdir()] == ["before-2.f32"]
    walk.close()
    assert not list(tmp_path.iterdir())


def test_seek_reaches_a_layer_from_the_text_or_a_boundary(model, tmp_path):
    ids = token_ids(2, 16)
    straight = LayerWalk(model, ids, tmp_path / "a")
    straight.start()
    straight.capture(0)
    wanted = straight.capture(1)
    sought = LayerWalk(model, ids, tmp_path / "b")
    sought.seek(1)
    assert sought.boundaries == [1]
    assert torch.equal(sought.capture(1).q, wanted.q)


def test_what_is_no_model_of_transformers_is_refused(tmp_path):
    with pytest.raises(TypeError, match="PreTrainedModel, got Linear"):
        LayerWalk(torch.nn.Linear(2, 2), token_ids(), tmp_path)


def test_decoder_layers_that_are_in_no_list_are_refused(tmp_path):
    model = tiny_model()
    model.model.layers = torch.nn.Sequential(*model.model.layers)
    with pytest.raises(ValueError, match="must have its decoder layers in one ModuleList"):
        LayerWalk(model, token_ids(), tmp_path)


# -- schedules ---------------------------------------------------------------------------------

POLICIES = [
    H2O(6, 6),
    H2O(6, 6, decay=0.9),
    H2O(0, 5),
    H2O(5, 0),
    H2O(8, 4, sinks=2, per_age=True),
    SinkRecent(4, 6),
    SinkRecent(0, 6),
    SinkRecent(3, 0),
    SinkRecent(6, 60),
    HeavyValues(7),
]


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_the_schedule_is_the_reference_s(policy):
    q, k, v = random_qkv(2, 4, 2, 50, 8)
    wanted = reference.evict_schedule(q, k, v, policy)
    assert torch.equal(schedule(q, k, v, policy), wanted)


@pytest.mark.parametrize("prompt", [1, 25])
@pytest.mark.parametrize(
    "policy", [H2O(6, 6, decay=0.98), SinkRecent(4, 6), HeavyValues(7)], ids=str
)
def test_the_schedule_is_the_cache_s_own_run(policy, prompt):
    q, k, v = random_qkv(2, 4, 2, 40, 16)
    left = reference.evict_schedule(q, k, v, policy, prompt=prompt)
    if prompt == 1:
        assert torch.equal(schedule(q, k, v, policy), left)
    cache = LessKVCache(1, 4, 2, 16, 2, policy)
    for start, stop in [(0, prompt), *((t, t + 1) for t in range(prompt, 40))]:
        cache.attend(0, *(x[:, :, start:stop] for x in (q, k, v)))
        positions = cache.positions(0)
        for b in range(2):
            for head in range(2):
                held = sorted(p for p in positions[b, head].tolist() if p >= 0)
                kept = (left[b, head, :stop] > stop).nonzero()[:, 0].tolist()
                assert held == kept


def test_the_schedule_refuses_a_rank_of_another_shape_by_name():
    class OneHead(HeavyValues):
        def rank(self, tokens):
            return super().rank(tokens)[:, :1]

    q, k, v = random_qkv(2, 4, 2, 20, 8)
    message = r"OneHead.rank: its result must have shape \[2, 2, 8\], got \[2, 1, 8\]"
    for run in (schedule, reference.evict_schedule):
        with pytest.raises(ValueError, match=message):
            run(q, k, v, OneHead(7))


# -- objective ---------------------------------------------------------------------------------


def rows_of(q, k, v, left, rows, gone_mass=False):
    full = reference.parallel(q, k, v, torch.full_like(left, q.shape[2] + 1))
    return objective.prepare(q, k, v, full, left, rows, q.shape[3] ** -0.5, gone_mass=gone_mass)


@pytest.mark.parametrize("kind", ["exp", "centroid", "paper"])
def test_the_objective_s_output_equals_the_reference_s_parallel_form(kind):
    q, k, v = random_qkv(2, 4, 2, 40, 8)
    left = schedule(q, k, v, H2O(4, 4))
    maps = Sidekick.random(1, 4, 2, 8, 3, 6, kind, 0)[0]
    rows = torch.tensor([[0, 5, 9, 20, 39], [7, 8, 21, 30, 31]])
    prepared = rows_of(q, k, v, left, rows)
    index = rows[:, None, :, None].expand(2, 4, 5, 8)
    for given, got in ((maps, objective.attend(prepared, maps, kind)), (None, None)):
        got = objective.attend(prepared) if got is None else got
        wanted = reference.parallel(q, k, v, left, given, kind).gather(2, index)
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["exp", "centroid", "paper"])
def test_the_objective_s_gradient_equals_the_reference_s(kind):
    q, k, v = random_qkv(1, 4, 2, 30, 8)
    left = schedule(q, k, v, H2O(4, 4))
    rows = torch.arange(30)[None]
    grads = []
    for form in ("objective", "reference"):
        maps = Sidekick.random(1, 4, 2, 8, 3, 6, kind, 0)[0]
        maps = {n: t.clone().requires_grad_() for n, t in maps.items()}
        if form == "objective":
            out = objective.attend(rows_of(q, k, v, left, rows), maps, kind)
        else:
            out = reference.parallel(q, k, v, left, maps, kind)
        out.square().sum().backward()
        grads.append(maps)
    for name, tensor in grads[0].items():
        torch.testing.assert_close(tensor.grad, grads[1][name].grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [1e-3, 1.0, 30.0])
def test_huge_and_tiny_logits_neither_overflow_nor_vanish(size):
    q, k, v = random_qkv(1, 4, 2, 30, 8)
    q, k = q * size, k * size
    left = schedule(q, k, v, H2O(4, 4))
    maps = Sidekick.random(1, 4, 2, 8, 3, 6, "exp", 0)[0]
    maps = {n: (t.clone() * 20).requires_grad_() for n, t in maps.items()}  # into the clamp
    out = objective.attend(rows_of(q, k, v, left, torch.arange(30)[None]), maps, "exp")
    out.sum().backward()
    assert out.isfinite().all()
    assert all(t.grad.isfinite().all() for t in maps.values())


def test_the_losses_are_of_the_error_after_the_output_projection():
    out, target, weight = torch.randn(2, 4, 3, 8), torch.randn(2, 4, 3, 8), torch.randn(5, 32)
    projected = [x.permute(0, 2, 1, 3).reshape(2, 3, 32) @ weight.T for x in (out, target)]
    difference = projected[0] - projected[1]
    squared, norm = objective.LOSSES["squared"], objective.LOSSES["norm"]
    torch.testing.assert_close(squared(out, target, weight), difference.square().mean())
    lengths = difference.square().sum(-1).sqrt()
    torch.testing.assert_close(norm(out, target, weight), lengths.mean())


@pytest.mark.parametrize("kind", ["exp", "centroid", "paper"])
def test_the_start_has_its_part_of_the_evicted_mass_of_every_query_head_or_group(kind):
    q, k, v = random_qkv(3, 4, 2, 60, 8)
    left = schedule(q, k, v, H2O(4, 4))
    batch = rows_of(q, k, v, left, torch.arange(20, 60).expand(3, 40), gone_mass=True)
    trainable = Trainable(kind, q * 1, k * 1, 4, 8, torch.Generator().manual_seed(0))
    trainable.match_mass([batch])
    mass, _ = objective.low_rank(batch, trainable.maps(), kind)
    gap = (batch.gone_log_mass - mass[..., 0].log()).view(3, 2, 2, 40).mean((0, 3))
    gap = gap if kind == "exp" else gap.mean(1)
    assert (gap + START).abs().max() < 1e-4


def test_the_trained_maps_act_on_inputs_as_they_are():
    q, k, _ = random_qkv(2, 4, 2, 30, 8)
    one = Trainable("exp", q, k, 4, 8, torch.Generator().manual_seed(0))
    two = Trainable("exp", 100 * q, k, 4, 8, torch.Generator().manual_seed(0))
    got, wanted = reference.phi(100 * q, two.maps(), "exp"), reference.phi(q, one.maps(), "exp")
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


# -- text --------------------------------------------------------------------------------------


def test_chunks_are_sampled_the_same_for_a_seed_and_identified():
    texts = [TEXT * 20, "short", TEXT.upper() * 20]
    ids, record = sample_chunks(byte_tokenizer(), iter(texts), 64, 8, seed=1)
    again, same = sample_chunks(byte_tokenizer(), texts, 64, 8, seed=1)
    assert ids.shape == (8, 64)
    assert torch.equal(ids, again)
    assert record == same == {"tokens_seen": record["tokens_seen"], **text.identity(ids)}
    other, _ = sample_chunks(byte_tokenizer(), texts, 64, 8, seed=2)
    assert not torch.equal(ids, other)
    assert len({tuple(row) for row in ids.tolist()}) > 4


def test_too_little_text_says_how_much_there_is():
    with pytest.raises(ValueError, match=r"4 chunks of 64 tokens wanted.*has 100 tokens \(1 chu"):
        sample_chunks(byte_tokenizer(), ["a" * 100], 64, 4)


def test_short_texts_are_joined():
    ids, _ = sample_chunks(byte_tokenizer(), ["abc"] * 50, 10, 15)
    assert ids.shape == (15, 10)


def test_a_sampled_chunk_opens_as_the_tokenizer_opens_a_text():
    texts = [TEXT * 20, "short", TEXT.upper() * 20]
    plain, record = sample_chunks(byte_tokenizer(), texts, 63, 8, seed=1)
    opened, same = sample_chunks(byte_tokenizer(bos=True), texts, 64, 8, seed=1)
    assert torch.equal(opened[:, 0], torch.full((8,), BOS))
    assert torch.equal(opened[:, 1:], plain)
    assert same["tokens_seen"] == record["tokens_seen"]


def test_a_pool_is_trained_on_as_the_texts_that_it_was_sampled_from():
    model, recipe = tiny_model(), Recipe(steps=2, hidden=4, rank=2)
    settings = {"recipe": recipe, "held": 1}
    pool = sample_chunks(byte_tokenizer(), [TEXT * 20], 32, 3, recipe.seed)
    ours = train(model, pool, H2O(4, 4), **settings)
    theirs = train(
        model, TEXT * 20, H2O(4, 4), tokenizer=byte_tokenizer(), chunks=3, chunk_tokens=32,
        **settings,
    )  # fmt: skip
    assert ours.config["training"]["text"] == theirs.config["training"]["text"]
    assert all(
        torch.equal(a[name], b[name]) for a, b in zip(ours, theirs, strict=True) for name in a
    )


def test_a_text_that_cannot_be_read_says_why(tmp_path):
    with pytest.raises(IsADirectoryError, match="is a folder, not a text file"):
        read_text(tmp_path)
    with pytest.raises(FileNotFoundError, match="is a folder without"):
        text_files(tmp_path)
    (tmp_path / "a.txt").write_bytes(b"caf\xc3\xa9 \xff")
    with pytest.raises(ValueError, match=r"a.txt is not UTF-8: byte 6 is 0xff"):
        read_text(tmp_path / "a.txt")


def test_files_and_folders_are_read_in_order(tmp_path):
    (tmp_path / "b.txt").write_text("B")
    (tmp_path / "a.md").write_text("A")
    (tmp_path / "c.bin").write_bytes(b"\xff")
    assert list(read_stream([tmp_path, tmp_path / "b.txt"])) == ["A", "B", "B"]
    with pytest.raises(ValueError, match=r"c.bin is not UTF-8"):
        list(read_stream([tmp_path / "c.bin"]))
    with pytest.raises(FileNotFoundError, match="nobody"):
        list(read_stream([tmp_path / "nobody"]))


def test_of_a_long_file_evenly_spaced_blocks_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(text, "LONG", 4000)
    monkeypatch.setattr(text, "_BLOCK", 500)
    lines = [f"line {i} é" for i in range(5000)]
    (tmp_path / "long.txt").write_text("\n".join(lines), encoding="utf-8")
    pieces = list(read_stream([tmp_path / "long.txt"]))
    assert len(pieces) == 8
    assert all(set(piece.split("\n")) <= set(lines) for piece in pieces)
    first = [int(piece.split()[1]) for piece in pieces]
    assert first == sorted(first)
    assert first[-1] > 4900


# -- training ----------------------------------------------------------------------------------


def equal(one, two):
    return (
        all(torch.equal(a[n], b[n]) for a, b in zip(one, two, strict=True) for n in a)
        and one.kind == two.kind
    )


@pytest.mark.parametrize("loss", ["norm", "squared"])
@pytest.mark.parametrize("kind", ["exp", "centroid", "paper"])
def test_training_ends_well_below_eviction_alone(kind, loss):
    q, k, v = random_qkv(8, 2, 1, 96, 8)
    full = reference.parallel(q, k, v, torch.full((8, 1, 96), 97))
    from less.fit import Captured

    captured = Captured(q, k, v, full, torch.eye(16), 8**-0.5)
    policies = [H2O(4, 4), H2O(8, 8)]
    recipe = Recipe(kind=kind, loss=loss, steps=120, rows=32, rank=4, hidden=16)
    fractions = []
    maps, record = fit_layer(
        captured, [Eviction(p) for p in policies], recipe, 0, 2, fractions.append
    )
    assert fractions[-1] == 1.0
    assert record.ratio < 0.8
    for end, start, eviction in zip(record.sidekick, record.start, record.eviction, strict=True):
        assert end < start
        assert end < eviction
    Sidekick([maps], kind=kind)


def test_a_run_makes_a_sidekick_with_its_record(model, tmp_path):
    seen = []
    sidekick = train(
        model, token_ids(), [POLICY, SinkRecent(4, 8)], recipe=QUICK, work=tmp_path / "w",
        source="random", name="tiny", show=seen.append,
    )  # fmt: skip
    sidekick.check_model(model)
    config = json.loads(json.dumps(sidekick.config))
    assert config["model"]["name"] == "tiny"
    assert sidekick.trained_length == 48
    assert sidekick.trained_capacities == (8, 12)
    weight = model.model.layers[0].self_attn.q_proj.weight
    noted = config["model_weights"]["0.q_proj.weight"]
    assert noted["shape"] == list(weight.shape)
    assert all(float((weight - x).abs().min()) < 1e-5 for x in noted["values"])
    assert config["budgets"] == [8, 12]
    assert config["policies"] == [POLICY.to_dict(), SinkRecent(4, 8).to_dict()]
    training = config["training"]
    assert training["text"]["source"] == "random"
    assert training["text"]["sha256"] == text.identity(token_ids())["sha256"]
    assert training["tokens"] == 6 * 48
    assert training["recipe"]["steps"] == 4
    assert [len(r["eviction"]) for r in training["layers"]] == [2, 2]
    assert not (tmp_path / "w").exists()
    assert [p.layer for p in seen if p.phase == "done"] == [0, 1]
    assert {p.phase for p in seen} == {"capture", "train", "done"}


class KilledError(Exception):
    pass


@pytest.mark.parametrize("phase", ["capture", "train", "done"])
@pytest.mark.parametrize("layer", [0, 1])
def test_a_killed_run_goes_on_to_the_same_sidekick(model, tmp_path, phase, layer):
    straight = train(model, token_ids(), POLICY, recipe=QUICK)

    def kill(progress):
        if (progress.layer, progress.phase) == (layer, phase) and progress.fraction > 0.1:
            raise KilledError

    with pytest.raises(KilledError):
        train(model, token_ids(), POLICY, recipe=QUICK, work=tmp_path / "w", show=kill)
    resumed = []
    again = train(
        model, token_ids(), POLICY, recipe=QUICK, work=tmp_path / "w", show=resumed.append
    )
    assert equal(straight, again)
    count = sum(p.resumed for p in resumed if p.phase == "done")
    assert count == layer + (phase == "done")
    assert not (tmp_path / "w").exists()


def test_lost_boundaries_are_made_anew(model, tmp_path):
    def kill(progress):
        if (progress.layer, progress.phase) == (1, "train"):
            raise KilledError

    with pytest.raises(KilledError):
        train(model, token_ids(), POLICY, recipe=QUICK, work=tmp_path, show=kill)
    for path in tmp_path.glob("before-*"):
        path.unlink()
    again = train(model, token_ids(), POLICY, recipe=QUICK, work=tmp_path)
    assert equal(again, train(model, token_ids(), POLICY, recipe=QUICK))


def test_an_unfinished_run_of_other_settings_is_refused(model, tmp_path):
    def kill(progress):
        raise KilledError

    with pytest.raises(KilledError):
        train(model, token_ids(), POLICY, recipe=QUICK, work=tmp_path, show=kill)
    with pytest.raises(ValueError, match="other settings .they differ in recipe"):
        train(model, token_ids(), POLICY, recipe=Recipe(steps=5), work=tmp_path)
    with pytest.raises(ValueError, match="they differ in policies, budgets, text"):
        train(model, token_ids(7), H2O(3, 3), recipe=QUICK, work=tmp_path)


def test_a_layer_is_the_same_whatever_was_trained_before_it(model, tmp_path):
    whole = train(model, token_ids(), POLICY, recipe=QUICK)
    walk = LayerWalk(model, token_ids(), tmp_path)
    walk.seek(1)
    maps, _ = fit_layer(walk.capture(1), [Eviction(POLICY)], QUICK, 1, held=1)
    assert all(torch.equal(maps[n], whole[1][n]) for n in maps)


def test_text_is_tokenised_and_sampled(model):
    sidekick = train(
        model, (TEXT for _ in range(20)), POLICY, tokenizer=byte_tokenizer(), recipe=QUICK,
        chunks=5, chunk_tokens=32,
    )  # fmt: skip
    assert sidekick.config["training"]["text"]["tokens_seen"] == 20 * len(TEXT)


WRONG = {
    "no policy": ({"policies": []}, "policies must be one Policy"),
    "a name for a policy": ({"policies": ["h2o"]}, "policies must be one Policy"),
    "text without tokenizer": ({"text": "hello"}, "needs tokenizer"),
    "ids of one dimension": ({"text": torch.ones(9, dtype=torch.int64)}, "int64 .chunks, tok"),
    "float ids": ({"text": torch.ones(2, 9)}, "int64 .chunks, tokens., got torch.float32"),
    "nothing to evict": ({"policies": H2O(24, 24)}, "longer than the largest budget 48"),
    "all held back": ({"held": 6}, r"held must be in 1\.\.5"),
    "one chunk": ({"text": token_ids(1)}, "held must be in"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_calls_are_refused_before_any_work(model, tmp_path, case):
    change, message = WRONG[case]
    call = {"text": token_ids(), "policies": POLICY, "recipe": QUICK, **change}
    with pytest.raises(ValueError, match=message):
        train(model, call.pop("text"), call.pop("policies"), work=tmp_path / "w", **call)
    assert not (tmp_path / "w").exists()


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"kind": "relu"}, "kind must be one of"),
        ({"loss": "l1"}, "loss must be one of"),
        ({"rank": 0}, "rank must be a whole number >= 1"),
        ({"hidden": 2.5}, "hidden must be a whole number"),
        ({"steps": -1}, "steps must be a whole number >= 0"),
        ({"rows": True}, "rows must be a whole number"),
        ({"lr": 0.0}, "lr must be a positive number"),
        ({"lr": float("nan")}, "lr must be a positive number"),
    ],
)
def test_recipes_out_of_range_are_refused_by_name(setting, message):
    with pytest.raises(ValueError, match=message):
        Recipe(**setting)


# -- the command -------------------------------------------------------------------------------


def command(folder, *more):
    return [
        "train", "--model", str(folder / "model"), "--text", str(folder / "text.txt"),
        "--out", str(folder / "out"), "--budget", "8,16", "--length", "48", "--chunks", "6",
        "--steps", "3", "--rows", "8", "--rank", "4", "--hidden", "8", *more,
    ]  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    save_tiny(tmp_path / "model")
    (tmp_path / "text.txt").write_text(TEXT * 10)
    return tmp_path


def test_the_command_trains_saves_and_logs_each_layer(folder, capsys):
    assert main(command(folder)) == 0
    log = capsys.readouterr().out.replace("\n", " ")
    assert "layer 0 of 0..1: loss of eviction alone -> with sidekick:" in log
    assert "layer 1 of 0..1:" in log
    sidekick = Sidekick.from_pretrained(folder / "out")
    assert sidekick.config["budgets"] == [8, 16]
    assert sidekick.config["training"]["text"]["source"] == "text.txt"
    assert sidekick.config["model"]["name"] == "model"
    assert str(folder) not in (folder / "out" / "config.json").read_text()
    assert sorted(p.name for p in (folder / "out").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]


def test_the_command_takes_sinks_paper_maps_and_a_dtype(folder):
    assert main(command(folder, "--policy", "sinks", "--kind", "paper", "--dtype", "int8")) == 0
    sidekick = Sidekick.from_pretrained(folder / "out")
    assert (sidekick.kind, sidekick.dtype) == ("paper", torch.int8)
    assert sidekick.config["policies"][0] == SinkRecent(4, 4).to_dict()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--budget", "64"), "longer than the largest budget 64"),
        (("--policy", "sinks", "--budget", "4"), "--budget 4 leaves no recent token"),
        (("--decay", "1.5"), "decay must be in"),
        (("--text", "/nowhere.txt"), "nowhere.txt"),
        (("--chunks", "500"), "500 chunks of 48 tokens wanted"),
        (("--model", "/nowhere"), "nowhere"),
    ],
)
def test_the_command_says_what_is_wrong(folder, capsys, more, message):
    assert main(command(folder, *more)) == 2
    assert message in capsys.readouterr().err.replace("\n", " ")


def test_the_command_s_policies_are_half_recent():
    from less.cli.train import add_parser, policies

    parser = argparse.ArgumentParser()
    add_parser(parser.add_subparsers())
    args = parser.parse_args(["train", "--out", "x", "--budget", "65,32"])
    assert policies(args) == [H2O(16, 16, decay=0.98), H2O(33, 32, decay=0.98)]
