"""Wrong calls: each a clear error that names the argument, before any state changes."""

import re

import pytest
import torch

from less import H2O, LessKVCache, PagedLayer, Policy, Sidekick, SinkRecent
from tests.helpers import random_maps, random_qkv

SHAPE = {"layers": 2, "q_heads": 4, "kv_heads": 2, "head_dim": 8, "batch": 2}


def sidekick(layers=2, Q=4, K=2, D=8, kind="exp"):
    maps = [random_maps(Q, K, D, 6, 3, kind, seed=i) for i in range(layers)]
    return Sidekick(layers=maps, kind=kind)


def build(**changes):
    return LessKVCache(**{**SHAPE, "policy": H2O(4, 4), "sidekick": sidekick(), **changes})


PAGE = build().layouts[1].nbytes


class Broken(Policy):
    """Ranks what it is told to."""

    capacity = 8

    def __init__(self, result):
        self.result = result

    def rank(self, tokens):
        if isinstance(self.result, Exception):
            raise self.result
        return self.result(tokens)


CONSTRUCTOR = [
    ({"layers": 0}, "LessKVCache: layers must be a whole number >= 1, got 0"),
    ({"layers": 2.0}, "LessKVCache: layers must be a whole number >= 1, got 2.0"),
    ({"q_heads": -4}, "LessKVCache: q_heads must be a whole number >= 1, got -4"),
    ({"kv_heads": 3}, "LessKVCache: q_heads must be a multiple of kv_heads, got 4 and 3"),
    ({"head_dim": True}, "LessKVCache: head_dim must be a whole number >= 1, got True"),
    ({"batch": None}, "LessKVCache: batch must be a whole number >= 1, got None"),
    ({"policy": "h2o"}, "LessKVCache: policy must be a Policy or a list of them, got str"),
    ({"policy": H2O}, "LessKVCache: policy must be a Policy or a list of them, got ABCMeta"),
    ({"sidekick": {}}, "LessKVCache: sidekick must be a Sidekick, got dict"),
    ({"sidekick": sidekick(3)}, "LessKVCache: sidekick must have layers=2, got layers=3"),
    ({"sidekick": sidekick(Q=2)}, "LessKVCache: sidekick must have q_heads=4, got q_heads=2"),
    ({"sidekick": sidekick(K=1)}, "LessKVCache: sidekick must have kv_heads=2, got kv_heads=1"),
    ({"sidekick": sidekick(D=4)}, "LessKVCache: sidekick must have head_dim=8, got head_dim=4"),
    ({"dtype": torch.int16}, "LessKVCache: dtype must be one of torch.float32"),
    ({"dtype": torch.float64, "backend": "native"}, "LessKVCache: dtype must be one of"),
    ({"device": "gpu"}, "LessKVCache: device must name a torch device, got 'gpu'"),
    ({"scale": 0.0}, "LessKVCache: scale must be finite and positive, got 0.0"),
    ({"scale": float("nan")}, "LessKVCache: scale must be finite and positive, got nan"),
    ({"scale": "big"}, "LessKVCache: scale must be a number, got 'big'"),
    ({"softcap": 0.0}, "LessKVCache: softcap must be finite and positive, got 0.0"),
    ({"softcap": True}, "LessKVCache: softcap must be a number, got True"),
    ({"backend": "cuda"}, "LessKVCache: backend must be 'native', 'reference' or None"),
    (
        {"device": "meta", "backend": "native"},
        "LessKVCache: backend 'native' is not available on meta",
    ),
]


@pytest.mark.parametrize(("changes", "message"), CONSTRUCTOR, ids=lambda x: str(x)[:60])
def test_a_wrong_constructor_argument_is_refused_by_name(changes, message):
    if changes.get("backend") == "native":
        pytest.importorskip("less._C")
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        build(**changes)


POLICY = [
    (lambda: H2O(64), "H2O: recent must be given: H2O(heavy=32, recent=32) keeps the 32 highest"),
    (lambda: H2O(recent=4), "H2O: heavy must be given: H2O(heavy=32, recent=32)"),
    (lambda: H2O(decay=0.9), "H2O: heavy and recent must be given: H2O(heavy=32, recent=32)"),
    (lambda: H2O(0, 0), "H2O: heavy + recent must keep at least one token, got 0 + 0"),
    (lambda: H2O(-1, 4), "H2O: heavy must be 0 or more, got -1"),
    (lambda: H2O(4, -1), "H2O: recent must be 0 or more, got -1"),
    (lambda: H2O(0.05, 4), "H2O: heavy must be a whole number of tokens, got 0.05"),
    (lambda: H2O(4, 4, sinks=5), "H2O: sinks are part of heavy and must not exceed it"),
    (lambda: H2O(4, 4, decay=0.0), "H2O: decay must be in (0, 1], got 0.0"),
    (lambda: H2O(4, 4, decay=1.5), "H2O: decay must be in (0, 1], got 1.5"),
    (lambda: H2O(4, 4, decay="slow"), "H2O: decay must be a number in (0, 1], got 'slow'"),
    (lambda: H2O(4, 4, per_age=1), "H2O: per_age must be True or False, got 1"),
    (lambda: SinkRecent(0, 0), "SinkRecent: sinks + recent must keep at least one token"),
    (lambda: SinkRecent(-4, 8), "SinkRecent: sinks must be 0 or more, got -4"),
    (lambda: SinkRecent(4, "8"), "SinkRecent: recent must be a whole number of tokens, got '8'"),
]


@pytest.mark.parametrize(("call", "message"), POLICY, ids=[message[:50] for _, message in POLICY])
def test_a_wrong_budget_is_refused_by_name(call, message):
    with pytest.raises(
        TypeError if "given" in message else ValueError, match="^" + re.escape(message)
    ):
        call()


def qkv(T=3, **kw):
    return dict(zip("qkv", random_qkv(2, 4, 2, T, 8, **kw), strict=True))


ATTEND = [
    ({"layer": 2}, "attend: layer must be in 0 .. 1, got 2"),
    ({"layer": -1}, "attend: layer must be in 0 .. 1, got -1"),
    ({"layer": "0"}, "attend: layer must be a whole number, got '0'"),
    ({"layer": True}, "attend: layer must be a whole number, got True"),
    ({"q": torch.zeros(2, 4, 8)}, "attend: q must have shape [2, 4, T, 8], got [2, 4, 8]"),
    ({"q": torch.zeros(2, 4, 0, 8)}, "attend: q must have shape [2, 4, T, 8], got [2, 4, 0, 8]"),
    ({"q": torch.zeros(1, 4, 3, 8)}, "attend: q must have shape [2, 4, T, 8], got [1, 4, 3, 8]"),
    ({"q": torch.zeros(2, 2, 3, 8)}, "attend: q must have shape [2, 4, T, 8], got [2, 2, 3, 8]"),
    ({"k": torch.zeros(2, 4, 3, 8)}, "attend: k must have shape [2, 2, T, 8], got [2, 4, 3, 8]"),
    ({"k": torch.zeros(2, 2, 2, 8)}, "attend: k must have shape [2, 2, 3, 8], got [2, 2, 2, 8]"),
    ({"v": torch.zeros(2, 2, 3, 4)}, "attend: v must have shape [2, 2, T, 8], got [2, 2, 3, 4]"),
    ({"q": torch.zeros(2, 4, 3, 8).long()}, "attend: q must have dtype torch.float32"),
    ({"k": torch.zeros(2, 2, 3, 8).double()}, "attend: k must have dtype torch.float32"),
    ({"v": torch.zeros(2, 2, 3, 8).half()}, "attend: v must have k's dtype torch.float32"),
    ({"q": [[0.0]]}, "attend: q must be a torch.Tensor, got list"),
    ({"v": None}, "attend: v must be a torch.Tensor, got NoneType"),
    ({"q": torch.zeros(2, 4, 3, 8, device="meta")}, "attend: q must be on cpu, got meta"),
    ({"k": torch.zeros(2, 2, 3, 8, device="meta")}, "attend: k must be on cpu, got meta"),
    ({"q": torch.zeros(2, 4, 3, 8, requires_grad=True)}, "attend: q requires grad, but the cache"),
    ({"valid": torch.ones(2, 3)}, "attend: valid must have dtype torch.bool, got torch.float32"),
    ({"valid": torch.ones(2, 4).bool()}, "attend: valid must have shape [2, 3], got [2, 4]"),
    ({"valid": True}, "attend: valid must be a torch.Tensor, got bool"),
    ({"valid": torch.ones(2, 3, device="meta").bool()}, "attend: valid must be on cpu, got meta"),
    (
        {"out": torch.zeros(2, 4, 1, 8).expand(-1, -1, 3, -1)},
        "attend: out must not overlap itself, got strides (32, 8, 0, 1)",
    ),
    (
        {"out": torch.zeros(100).as_strided((2, 4, 3, 8), (30, 8, 8, 1))},
        "attend: out must not overlap itself, got strides (30, 8, 8, 1)",
    ),
]


def snapshot(cache):
    d = cache.state_dict()
    return d["columns"], d["tensors"]


def assert_unchanged(cache, before):
    columns, tensors = snapshot(cache)
    assert columns == before[0]
    assert all(torch.equal(x, before[1][n]) for n, x in tensors.items())


@pytest.fixture
def used():
    cache = build()
    for layer in range(2):
        cache.attend(layer, **qkv(20))
    return cache


@pytest.mark.parametrize(("changes", "message"), ATTEND, ids=lambda x: str(x)[:60])
def test_a_wrong_call_of_attend_is_refused_and_changes_nothing(used, changes, message):
    before = snapshot(used)
    with pytest.raises((ValueError, TypeError), match="^" + re.escape(message)):
        used.attend(**{"layer": 0, **qkv(), **changes})
    assert_unchanged(used, before)


@pytest.mark.parametrize("T", [1, 3])
@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_an_output_that_lies_in_what_the_call_reads_is_refused(used, name, T):
    call, before = qkv(T), snapshot(used)
    memory = torch.randn(2 * 4 * T * 8 + 8)
    out = memory[8:].view(2, 4, T, 8)
    call[name] = memory[: call[name].numel()].view_as(call[name])
    kept = memory.clone()
    with pytest.raises(ValueError, match=f"^attend: out must not overlap {name}, which the call"):
        used.attend(0, **call, out=out)
    assert torch.equal(memory, kept)
    assert_unchanged(used, before)
    used.attend(0, **qkv(T), out=out.transpose(1, 2).contiguous().transpose(1, 2))


METHODS = [
    (lambda c: c.positions(2), "positions: layer must be in 0 .. 1, got 2"),
    (lambda c: c.scores("a"), "scores: layer must be a whole number, got 'a'"),
    (lambda c: c.weights(-1), "weights: layer must be in 0 .. 1, got -1"),
    (lambda c: c.state(7), "state: layer must be in 0 .. 1, got 7"),
    (lambda c: build(sidekick=None).state(0), "state: this cache has no sidekick"),
    (lambda c: c.reorder([1, 0]), "reorder: rows must be a torch.Tensor, got list"),
    (lambda c: c.reorder(torch.tensor([0])), "reorder: rows must have shape [2], got [1]"),
    (lambda c: c.reorder(torch.tensor([0, 2])), "reorder: rows must be in 0 .. 1, got [0, 2]"),
    (lambda c: c.reorder(torch.tensor([0.0, 1.0])), "reorder: rows must be integers"),
    (lambda c: c.load_state_dict([]), "load_state_dict: d must be a result of"),
    (lambda c: c.load_state_dict({"cache": {}}), "load_state_dict: d must be a result of"),
    (
        lambda c: c.load_state_dict(build(batch=3).state_dict()),
        "load_state_dict: batch must be 2, got 3",
    ),
    (
        lambda c: c.load_state_dict(build(policy=H2O(5, 3)).state_dict()),
        "load_state_dict: policy must be 'H2O(heavy=4, recent=4",
    ),
    (
        lambda c: c.load_state_dict(build(dtype=torch.float16).state_dict()),
        "load_state_dict: dtype must be 'torch.float32', got 'torch.float16'",
    ),
    (
        lambda c: c.load_state_dict(build(sidekick=None).state_dict()),
        "load_state_dict: kind must be 'exp', got ''",
    ),
    (
        lambda c: c.load_state_dict(damaged(c, lambda t: t.pop("1.page"))),
        "load_state_dict: tensors missing: ['1.page'], unknown: []",
    ),
    (
        lambda c: c.load_state_dict(damaged(c, lambda t: t.update({"2.page": t["1.page"]}))),
        "load_state_dict: tensors missing: [], unknown: ['2.page']",
    ),
    (
        lambda c: c.load_state_dict(damaged(c, lambda t: t.update({"1.page": t["1.page"][:1]}))),
        f"load_state_dict: 1.page must have shape [2, {PAGE}], got [1, {PAGE}]",
    ),
    (
        lambda c: c.load_state_dict(damaged(c, lambda t: t.update({"1.page": t["1.page"].half()}))),
        "load_state_dict: 1.page must have dtype torch.uint8, got torch.float16",
    ),
    (
        lambda c: c.load_state_dict({**c.state_dict(), "columns": [1]}),
        "load_state_dict: columns must list 2 numbers, got [1]",
    ),
    (
        lambda c: c.load_state_dict({**c.state_dict(), "columns": [20, -1]}),
        "load_state_dict: columns[1] must be a whole number >= 0, got -1",
    ),
    (
        lambda c: c.load_state_dict({**c.state_dict(), "cache": None}),
        "load_state_dict: cache must be a dict, got NoneType",
    ),
    (
        lambda c: c.load_state_dict({**c.state_dict(), "tensors": []}),
        "load_state_dict: tensors must be a dict, got list",
    ),
    (
        # The last page: those before it stay what they are.
        lambda c: c.load_state_dict(
            damaged(c, lambda t: t.update({"1.page": t["1.page"].to("meta")}))
        ),
        "load_state_dict: 1.page must be a dense tensor with values, got meta",
    ),
    (
        lambda c: c.load_state_dict(
            damaged(c, lambda t: t["1.page"].view(torch.int64)[1, 0].fill_(-1))
        ),
        "load_state_dict: 1.page is damaged: tokens seen are [20, -1]",
    ),
    (
        lambda c: c.load_state_dict(damaged(c, lambda t: positions(c, t, 1).fill_(19))),
        "load_state_dict: 1.page is damaged: positions must differ and be below the tokens seen",
    ),
    (
        lambda c: c.load_state_dict(damaged(c, lambda t: positions(c, t, 1)[0, 0, 3].fill_(20))),
        "load_state_dict: 1.page is damaged: positions must differ and be below the tokens seen",
    ),
    (
        lambda c: c.load_state_dict({**c.state_dict(), "fed": torch.zeros(2, 3).long()}),
        "load_state_dict: fed must have shape [2, 2], got [2, 3]",
    ),
]


def positions(cache, tensors, layer):
    (views,) = cache.layouts[layer].views(tensors[f"{layer}.page"])
    return views.slots.position


def damaged(cache, change):
    d = cache.state_dict()
    change(d["tensors"])
    return d


@pytest.mark.parametrize(("call", "message"), METHODS, ids=[m[:60] for _, m in METHODS])
def test_a_wrong_call_of_another_method_is_refused_and_changes_nothing(used, call, message):
    before = snapshot(used)
    with pytest.raises((ValueError, TypeError), match="^" + re.escape(message)):
        call(used)
    assert_unchanged(used, before)


@pytest.mark.parametrize(
    ("result", "error", "message"),
    [
        (lambda t: None, TypeError, "Broken.rank: its result must be a torch.Tensor"),
        (lambda t: t.score[..., 1:], ValueError, "Broken.rank: its result must have shape"),
        (lambda t: t.position, ValueError, "Broken.rank: its result must be floating point"),
        (KeyError("mine"), KeyError, "mine"),
    ],
)
def test_a_failing_policy_changes_nothing(result, error, message):
    policy = Broken(lambda t: t.position.float())
    cache = build(policy=policy)
    cache.attend(0, **qkv(20))
    before = snapshot(cache)
    policy.result = result
    with pytest.raises(error, match=message):
        cache.attend(0, **qkv(1))
    assert_unchanged(cache, before)


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_call_that_is_interrupted_is_ahead_of_the_others(used, monkeypatch, when):
    """By that a model's next pass finds it: whether its tokens are in the pages nobody knows."""
    run = PagedLayer.run

    def interrupted(self, call, at):
        if when == "after":
            run(self, call, at)
        raise KeyboardInterrupt

    monkeypatch.setattr(PagedLayer, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        used.attend(0, **qkv(3))
    assert used.session.columns == [23, 20]
    used.reset()
    assert used.session.columns == [0, 0]
