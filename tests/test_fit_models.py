"""Training for every kind of model that a cache serves, soft-caps included; the others refused."""

import functools
from dataclasses import replace

import pytest
import torch

pytest.importorskip("transformers")

import less.hf
from less import H2O, LessKVCache, Sidekick, SinkRecent
from less.backend import ops
from less.cli import main
from less.evaluate import families, matrix
from less.evaluate.families import REFUSED, build_refused
from less.evaluate.matrix import SMALL, Case, follow_reference, prompt
from less.fit import Eviction, LayerWalk, Recipe, fit_layer, objective, schedule, train
from less.hf import models
from tests.helpers import assert_close, random_maps, random_qkv
from tests.ops import flat_reference as reference
from tests.test_hf import footprint
from tests.tiny_model import TEXT, byte_tokenizer

# Each says in a way of its own where its layers, q, k, v, scale or output projection are.
KINDS = [
    "falcon (7B)",
    "falcon (40B)",
    "falcon (all heads)",
    "gemma2",
    "gpt2",
    "gpt_bigcode",
    "gpt_neox",
    "opt",
    "opt (350M)",
]
NATIVE = "native" if ops.missing(torch.device("cpu")) is None else "reference"
build = functools.cache(families.build)


def attention_in_float64(c):
    """Full causal attention of what was captured, written out: [N, T, Q * D]."""
    q, k, v = (x.double() for x in (c.q, c.k, c.v))
    group, T = q.shape[1] // k.shape[1], q.shape[2]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    logits = c.scale * q @ k.transpose(2, 3)
    if c.softcap:
        logits = c.softcap * torch.tanh(logits / c.softcap)
    future = torch.ones(T, T, dtype=torch.bool).triu(1)
    return (logits.masked_fill(future, -torch.inf).softmax(-1) @ v).transpose(1, 2).flatten(2)


# -- capture -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_captured_q_k_v_give_what_the_model_s_own_attention_gives(kind, tmp_path):
    model, ids = build(kind), prompt(24, rows=3)
    before, facts = footprint(model), models.describe(model, "test")
    own = []
    hooks = [m.register_forward_hook(lambda *call: own.append(call[-1][0])) for m in facts.modules]
    with torch.no_grad():
        model(ids)
    for hook in hooks:
        hook.remove()
    model.train()  # with whatever dropout the model has: a walk is without
    walk = LayerWalk(model, ids, tmp_path)
    for layer, module in enumerate(facts.modules):
        walk.seek(layer)
        if layer in walk.sliding:
            continue
        c = walk.capture(layer)
        assert (c.q.shape[1], c.k.shape[1]) == (facts.q_heads, facts.kv_heads)
        assert (c.scale, c.softcap) == (facts.scale, facts.softcap or 0.0)
        out = attention_in_float64(c)
        assert_close(c.out.transpose(1, 2).flatten(2), out, torch.float32)
        names = ("o_proj", "out_proj", "dense", "c_proj")
        bias = next(getattr(module, n) for n in names if hasattr(module, n)).bias
        projected = out @ c.o_weight.double().T + (0.0 if bias is None else bias.double())
        assert_close(own[layer], projected, torch.float32, factor=3)
    assert model.training
    assert footprint(model.eval()) == before


def test_capture_gives_a_model_its_own_attention_back_after_an_error(tmp_path):
    model = build("falcon (7B)")
    before = footprint(model)
    walk = LayerWalk(model, prompt(24, rows=2), tmp_path)
    walk.start()

    def fail():
        assert "forward" in vars(walk.facts.modules[0])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        walk.capture(0, fail)
    assert footprint(model) == before


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_soft_cap_is_held_in_float32_whatever_the_model_s_dtype(dtype, tmp_path):
    model = families.build("gemma2").to(dtype)
    walk = LayerWalk(model, prompt(24, rows=2), tmp_path)
    walk.seek(1)
    c = walk.capture(1)
    assert c.out.dtype == dtype
    assert_close(c.out.transpose(1, 2).flatten(2), attention_in_float64(c), dtype)


# -- the mathematics under a soft-cap ----------------------------------------------------------

CAP = 1.5


@pytest.mark.parametrize("policy", [H2O(6, 6, decay=0.98), SinkRecent(4, 6)], ids=str)
def test_the_schedule_under_a_soft_cap_is_the_reference_s_and_the_cache_s(policy):
    q, k, v = random_qkv(2, 4, 2, 40, 16)
    left = schedule(q, k, v, policy, softcap=CAP)
    assert torch.equal(left, reference.evict_schedule(q, k, v, policy, softcap=CAP))
    if policy.needs_scores:
        assert not torch.equal(left, schedule(q, k, v, policy))
    cache = LessKVCache(1, 4, 2, 16, 2, policy, softcap=CAP, backend=NATIVE)
    for t in range(40):
        cache.attend(0, q[:, :, t : t + 1], k[:, :, t : t + 1], v[:, :, t : t + 1])
        for b, head in ((b, head) for b in range(2) for head in range(2)):
            held = sorted(p for p in cache.positions(0)[b, head].tolist() if p >= 0)
            assert held == (left[b, head, : t + 1] > t + 1).nonzero()[:, 0].tolist()


def formula(q, k, v, left, maps, kind, t):
    """LESS's output at position t under a soft-cap, each head by itself, in float64: [B, Q, D]."""
    B, Q, _, D = q.shape
    K = k.shape[1]
    phi, psi = reference.phi(q, maps, kind), reference.psi(k, maps, kind)
    out = torch.zeros(B, Q, D, dtype=torch.float64)
    for b in range(B):
        for h in range(Q):
            g = h // (Q // K)
            above, below = torch.zeros(D, dtype=torch.float64), 0.0
            for p in range(t + 1):
                if left[b, g, p] <= t:
                    mass = phi[b, h, t] @ psi[b, g, p]
                else:
                    mass = (CAP * torch.tanh(q[b, h, t] @ k[b, g, p] / D**0.5 / CAP)).exp()
                above, below = above + mass * v[b, g, p], below + mass
            out[b, h] = above / below
    return out


@pytest.mark.parametrize("loss", ["norm", "squared"])
@pytest.mark.parametrize("kind", ["exp", "centroid", "paper"])
def test_the_loss_under_a_soft_cap_is_the_formula_s_in_float64(kind, loss):
    q, k, v = random_qkv(2, 4, 2, 26, 8, dtype=torch.float64)
    maps = random_maps(4, 2, 8, 6, 3, kind, dtype=torch.float64)
    weight = torch.randn(5, 32, dtype=torch.float64)
    left = reference.evict_schedule(q, k, v, H2O(4, 4), softcap=CAP)
    at = [9, 17, 25]
    stay = torch.full_like(left, 27)  # full attention: nobody leaves
    target = torch.stack([formula(q, k, v, stay, maps, kind, t) for t in at], 2)
    wanted = torch.stack([formula(q, k, v, left, maps, kind, t) for t in at], 2)
    error = (wanted - target).transpose(1, 2).flatten(2) @ weight.T
    error = error.square().mean() if loss == "squared" else error.square().sum(-1).sqrt().mean()

    single = [x.float() for x in (q, k, v)]
    full = reference.parallel(q, k, v, stay, softcap=CAP).float()
    maps = {n: x.float() for n, x in maps.items()}
    for softcap, same in ((CAP, True), (0.0, False)):
        rows = objective.prepare(
            *single, full, left, torch.tensor([at, at]), 8**-0.5, softcap, gone_mass=True
        )
        out = objective.attend(rows, maps, kind)
        got = objective.LOSSES[loss](out, rows.target, weight.float())
        assert (abs(got - error) < 1e-5 * error) == same
    assert_close(rows.target, target, torch.float32)


@pytest.mark.parametrize("kind", ["exp", "centroid", "paper"])
def test_the_gradient_under_a_soft_cap_is_the_reference_s(kind):
    q, k, v = random_qkv(1, 4, 2, 30, 8)
    left = schedule(q, k, v, H2O(4, 4), softcap=CAP)
    full = reference.parallel(q, k, v, torch.full_like(left, 31), softcap=CAP)
    rows = objective.prepare(q, k, v, full, left, torch.arange(30)[None], 8**-0.5, CAP)
    grads = []
    for form in ("objective", "reference"):
        maps = {n: x.requires_grad_() for n, x in random_maps(4, 2, 8, 6, 3, kind).items()}
        if form == "objective":
            out = objective.attend(rows, maps, kind)
        else:
            out = reference.parallel(q, k, v, left, maps, kind, softcap=CAP)
        out.square().sum().backward()
        grads.append({n: x.grad for n, x in maps.items()})
    for name, grad in grads[0].items():
        torch.testing.assert_close(grad, grads[1][name], rtol=1e-4, atol=1e-5)


# -- training ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [k for k in KINDS if k not in ("falcon (all heads)", "gpt_neox")])
def test_training_helps_on_text_it_has_not_seen_and_its_sidekick_serves_the_model(kind, tmp_path):
    model = build(kind)
    recipe = Recipe(rank=4, hidden=8, steps=60, lr=5e-3, rows=16, held_rows=16)
    made = train(model, prompt(32, rows=40), SMALL, recipe=recipe, held=8, name=kind)
    records = made.config["training"]["layers"]
    sliding = models.describe(model, "test").windows
    assert [r["layer"] for r in records] == [i for i in range(made.layers) if i not in sliding]
    for record in records:
        assert record["sidekick"][0] < record["start"][0]
        assert record["sidekick"][0] < 0.95 * record["eviction"][0]
    made.save_pretrained(tmp_path)
    loaded = Sidekick.from_pretrained(tmp_path)
    loaded.check_model(model)
    follow_reference(Case(model, NATIVE), loaded)


@pytest.mark.parametrize("kind", ["falcon (40B)", "gemma2"])
def test_a_trained_sidekick_is_read_in_parts(kind, tmp_path):
    model = build(kind)
    recipe = Recipe(rank=4, hidden=8, steps=1, rows=4, held_rows=4)
    made = train(model, prompt(24, rows=3), SMALL, recipe=recipe)
    made.save_pretrained(tmp_path)
    parts = [Sidekick.from_pretrained(tmp_path, shard=(rank, 2)) for rank in range(2)]
    for layer, maps in enumerate(made):
        for name, whole in maps.items():
            assert torch.equal(torch.cat([part[layer][name] for part in parts]), whole)


@pytest.mark.parametrize("kind", ["falcon (7B)", "gemma2"])
def test_the_command_trains_for_a_folder_of_any_kind(kind, tmp_path, monkeypatch, capsys):
    families.build(kind, vocab_size=260).save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text(TEXT * 10)
    monkeypatch.chdir(tmp_path)
    options = {"model": "model", "text": "text.txt", "out": "out", "budget": 8, "length": 32}
    options |= {"chunks": 4, "steps": 2, "rank": 2, "hidden": 4}
    assert main(["train", *(f"--{name}={value}" for name, value in options.items())]) == 0
    assert "with sidekick:" in capsys.readouterr().out
    Sidekick.from_pretrained(tmp_path / "out").check_model(families.build(kind, vocab_size=260))


def test_the_soft_cap_is_trained_under(tmp_path):
    walk = LayerWalk(build("gemma2"), prompt(32, rows=12), tmp_path)
    walk.seek(1)
    captured = walk.capture(1)
    recipe = Recipe(rank=4, hidden=8, steps=1, rows=8, held_rows=16)
    _, capped = fit_layer(captured, [Eviction(SMALL)], recipe, 1, held=4)
    _, uncapped = fit_layer(replace(captured, softcap=0.0), [Eviction(SMALL)], recipe, 1, held=4)
    assert capped.eviction[0] < 0.9 * uncapped.eviction[0]


# -- refusals ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", REFUSED)
def test_a_model_that_no_cache_serves_has_no_sidekick_trained(name, tmp_path):
    with pytest.raises(less.hf.UnsupportedModelError, match="train: ") as error:
        train(build_refused(name), prompt(40, rows=4), SMALL, held=1, work=tmp_path / "w")
    assert REFUSED[name].message in str(error.value)
    assert not (tmp_path / "w").exists()


def test_a_model_whose_heads_are_dealt_out_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(models, "part_of", lambda *_: (0, 2))
    with pytest.raises(ValueError, match=r"must be whole, .* dealt out to 2 processes"):
        train(build("gemma2"), prompt(40, rows=4), SMALL, held=1, work=tmp_path / "w")
    assert not (tmp_path / "w").exists()


def test_chunks_beyond_learned_positions_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"512 learned positions; ids must .*, got 513"):
        train(build("gpt2"), prompt(513, rows=4), SMALL, held=1, work=tmp_path / "w")
    assert not (tmp_path / "w").exists()


def test_what_changes_attention_otherwise_is_refused(monkeypatch, tmp_path):
    model = build("gpt2")
    module = model.transformer.h[0].attn
    monkeypatch.setattr(module, "forward", functools.partial(module.forward, head_mask=1))
    walk = LayerWalk(model, prompt(24, rows=2), tmp_path)
    walk.start()
    with pytest.raises(ValueError, match=r"GPT2Attention is not a causal softmax .*head_mask=1"):
        walk.capture(0)


def test_the_matrix_notices_a_capture_that_is_wrong(monkeypatch):
    capture = LayerWalk.capture

    def wrong(self, layer):
        c = capture(self, layer)
        c.k.mul_(1.001)
        return c

    monkeypatch.setattr(LayerWalk, "capture", wrong)
    with pytest.raises(matrix.MatrixError, match="k of layer 0 differ"):
        matrix.training(Case(build("falcon (7B)"), "reference"))
