"""The fused step against chunk_attention and compact, which are held to the reference."""

import pytest
import torch

from less.layer.kinds import KINDS
from less.policies import Rule
from tests.helpers import assert_close
from tests.ops import flat_reference as reference
from tests.ops.common import layer

pytest.importorskip("less._C")
from tests.ops import flat as ops
from tests.ops import pages

RULES = [
    Rule(recent=4, sinks=0, by_score=True, per_age=False),
    Rule(recent=4, sinks=3, by_score=True, per_age=True),
    Rule(recent=6, sinks=3, by_score=False, per_age=False),
    Rule(recent=0, sinks=0, by_score=True, per_age=False),
]
WRITTEN = ("slot_k", "slot_v", "position", "score", "weight", "seen", "H", "z", "share")
SHAPES = {
    "gqa": {"Q": 6, "K": 2, "D": 16, "S": 9},
    "mha": {"Q": 2, "K": 2, "D": 64, "S": 37},
    "odd": {"Q": 5, "K": 1, "D": 20, "S": 13},
    "wide": {"Q": 8, "K": 1, "D": 128, "S": 70},
}


def clone(a):
    a = {n: x.clone() if isinstance(x, torch.Tensor) else x for n, x in a.items()}
    B, K = a["slot_k"].shape[:2]
    a.setdefault("share", torch.rand(B, K, dtype=torch.float64))
    a.setdefault("out", torch.full(a["q"].shape, torch.nan, dtype=a["q"].dtype))
    return a


def fused(a, state=True, kind="exp", decay=0.97, scores=True, victim="fold", **by):
    low = {"H": a["H"], "z": a["z"], "share": a["share"], "maps": a["maps"], "kind": kind}
    ops.decode_step(
        a["q"], a["k"], a["v"], a["valid"], a["out"], a["slot_k"], a["slot_v"], a["position"],
        a["score"], a["weight"], a["seen"], **(low if state else {}), scale=0.2, decay=decay,
        scores=scores, victim=victim, **by,
    )  # fmt: skip
    return a


def unfused(a, state=True, kind="exp", softcap=0.0, decay=0.97, scores=True, **by):
    k, v = (x.to(a["slot_k"].dtype) for x in (a["k"], a["v"]))
    low = {"H": a["H"], "z": a["z"]} if state else {}
    phi = {"phi_q": ops.phi(a["q"], a["maps"], kind)} if state else {}
    slots = [a[n] for n in ("slot_k", "slot_v", "position", "score", "weight")]
    out, slot_score, chunk_score, share = ops.chunk_attention(
        a["q"], k, v, a["valid"], *slots, **phi, **low, scale=0.2, softcap=softcap, decay=decay,
        scores=scores,
    )  # fmt: skip
    if state:
        low |= {"maps": a["maps"], "kind": kind}
    ops.compact(k, v, chunk_score, slot_score, a["valid"], *slots, a["seen"], **low, **by)
    a["out"] = out
    if state:
        K = a["slot_k"].shape[1]
        a["share"] += share.double().unflatten(1, (K, -1)).sum((2, 3))
    return a


def assert_same(got, want, dtype):
    held = want["position"] >= 0
    assert torch.equal(got["position"], want["position"])
    assert torch.equal(got["seen"], want["seen"])
    for name in ("slot_k", "slot_v"):
        assert torch.equal(got[name][held], want[name][held]), name
    assert_close(got["out"], want["out"], dtype)
    for name in ("score", "weight", "H", "z", "share"):
        assert_close(got[name], want[name], torch.float32)


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("kind", ["paper", "exp", "centroid", ""])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_decode_step_equals_attention_then_compaction(simd, rule, kind, shape, dtype):
    a = layer(B=3, T=1, kind=kind or "exp", dtype=dtype, **SHAPES[shape])
    a["valid"] = torch.tensor([[True], [False], [True]])
    by = {"rule": rule, "state": bool(kind), "kind": kind or "exp", "scores": rule.by_score}
    got, want = clone(a), clone(a)
    got["share"] = want["share"].clone()
    for step in range(30):  # through the filling of the slots into the steady state
        g = torch.Generator().manual_seed(step)
        for name in ("q", "k", "v"):
            got[name] = want[name] = torch.randn(a[name].shape, generator=g).to(dtype)
        got["out"].fill_(torch.nan)
        fused(got, **by)
        unfused(want, **by)
        assert_same(got, want, dtype)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_soft_cap_acts_in_the_step_as_in_attention(simd, dtype, shape):
    a = layer(B=2, T=1, dtype=dtype, **SHAPES[shape])
    a["valid"] = None
    got, want = clone(a), clone(a)
    got["share"] = want["share"].clone()
    for step in range(20):
        g = torch.Generator().manual_seed(step)
        for name in ("q", "k", "v"):
            got[name] = want[name] = torch.randn(a[name].shape, generator=g).to(dtype)
        got["out"].fill_(torch.nan)
        fused(got, rule=RULES[0], softcap=0.7)
        unfused(want, rule=RULES[0], softcap=0.7)
        assert_same(got, want, dtype)


def with_int8_slots(a):
    a = dict(a)
    a["slot_k"], a["k_scale"] = reference.quantize(a["slot_k"])
    a["slot_v"], a["v_scale"] = reference.quantize(a["slot_v"])
    return a


INT8 = ("k_scale", "v_scale")


@pytest.mark.parametrize("softcap", [0.0, 0.7])
@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_int8_slots_equal_the_reference_on_the_same_rows(simd, rule, shape, softcap):
    a = clone(with_int8_slots(layer(B=2, T=1, **SHAPES[shape])))
    a["valid"] = None
    for step in range(25):
        g = torch.Generator().manual_seed(step)
        for name in ("q", "k", "v"):
            a[name] = torch.randn(a[name].shape, generator=g)
        new_k, new_v = (reference.dequantize(*reference.quantize(a[n])) for n in ("k", "v"))
        attended, after = reference.decode_step(
            a["q"].double(), new_k.double(), new_v.double(), None,
            reference.dequantize(a["slot_k"], a["k_scale"]).double(),
            reference.dequantize(a["slot_v"], a["v_scale"]).double(),
            a["position"], a["score"].double(), a["weight"], a["seen"], H=a["H"].double(),
            z=a["z"].double(), maps={n: x.double() for n, x in a["maps"].items()}, scale=0.2,
            softcap=softcap, decay=0.97, rule=rule,
        )  # fmt: skip
        fused(a, rule=rule, softcap=softcap, k_scale=a["k_scale"], v_scale=a["v_scale"])
        assert torch.equal(a["position"], after.position)
        assert_close(a["out"], attended.out, torch.float32)
        assert_close(a["score"], after.score, torch.float32)
        assert_close(a["H"], after.H, torch.float32)
        held = after.position >= 0
        for name in ("k", "v"):
            got = reference.dequantize(a[f"slot_{name}"], a[f"{name}_scale"])
            assert_close(got[held], getattr(after, f"slot_{name}")[held], torch.float32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int8], ids=str)
@pytest.mark.parametrize("kind", ["paper", "exp", "centroid"])
def test_narrow_maps_equal_the_same_maps_in_float32(simd, dtype, kind):
    a = layer(B=2, T=1, kind=kind, **SHAPES["mha"])
    narrow, wide = dict(a["maps"]), dict(a["maps"])
    for name in KINDS[kind].matrices:
        if dtype == torch.int8:
            narrow[name], narrow[f"{name}_scale"] = reference.quantize(wide[name], -2)
            wide[name] = reference.dequantize(narrow[name], narrow[f"{name}_scale"], -2)
        else:
            narrow[name] = wide[name].to(dtype)
            wide[name] = narrow[name].float()
    got, want = clone(a | {"maps": narrow}), clone(a | {"maps": wide})
    got["share"] = want["share"].clone()
    for _ in range(12):
        fused(got, kind=kind, rule=RULES[0])
        fused(want, kind=kind, rule=RULES[0])
        assert_same(got, want, torch.float32)


def test_slots_narrower_than_the_models_keys_round_them_once(simd):
    a = layer(B=2, T=1, dtype=torch.float16)
    for name in ("q", "k", "v"):
        a[name] = torch.randn(a[name].shape)
    got, want = clone(a), clone(a)
    got["share"] = want["share"].clone()
    fused(got, rule=RULES[0])
    unfused(want, rule=RULES[0])
    assert_same(got, want, torch.float32)


def test_attention_alone_changes_nothing(simd):
    start = layer(T=1) | {"valid": torch.tensor([[True], [False]])}
    a = clone(start)
    before = {n: a[n].clone() for n in WRITTEN}
    fused(a, rule=RULES[0], victim="none")
    assert all(torch.equal(a[n], before[n]) for n in WRITTEN if n != "share")
    assert_close(a["out"], unfused(clone(start), rule=RULES[0])["out"], torch.float32)


def test_what_an_empty_slot_holds_is_never_read(simd):
    a = clone(layer(B=2, T=1, **SHAPES["mha"]))
    clean = clone(a)
    empty = a["position"] < 0
    for name in ("slot_k", "slot_v"):
        clean[name][empty] = 0.0
        a[name][empty] = torch.nan
    fused(a, rule=RULES[0])
    fused(clean, rule=RULES[0])
    assert torch.equal(a["out"], clean["out"])
    assert torch.equal(a["position"], clean["position"])


@pytest.mark.parametrize("int8", [False, True])
def test_threads_and_neighbours_never_change_a_bit(simd, with_threads, int8):
    shape = {"B": 4, "Q": 8, "K": 4, "D": 64, "S": 90, "R": 8, "E": 64}
    start = layer(T=1, **shape)
    start["valid"] = None
    start = clone(with_int8_slots(start) if int8 else start)

    def run(a, steps=30):
        a = clone(a)
        scales = {n: a[n] for n in INT8} if int8 else {}
        outs = []
        for step in range(steps):
            g = torch.Generator().manual_seed(step)
            rows = a["row"] if "row" in a else slice(None)
            for name, heads in (("q", 8), ("k", 4), ("v", 4)):
                a[name] = torch.randn(4, heads, 1, 64, generator=g)[rows].contiguous()
            fused(a, rule=RULES[0], **scales)
            outs.append(a["out"].clone())
        return torch.cat(outs, 2), a

    with_threads(1)
    out, whole = run(start)
    with_threads(3)
    again, threaded = run(start)
    names = [*WRITTEN, *(INT8 if int8 else ())]
    assert torch.equal(out, again)
    assert all(torch.equal(whole[n], threaded[n]) for n in names)
    for b in range(4):
        one = {
            n: x[b : b + 1].clone() if isinstance(x, torch.Tensor) else x for n, x in start.items()
        }
        alone, state = run(one | {"row": slice(b, b + 1)})
        assert torch.equal(alone[0], out[b])
        assert all(torch.equal(state[n][0], whole[n][b]) for n in names)


def test_of_equal_ranks_the_older_leaves(simd):
    a = clone(layer(B=1, K=1, Q=1, T=1, S=40))
    a["valid"] = None
    a["position"] = (torch.randperm(40, generator=torch.Generator().manual_seed(1)) + 5).view(
        1, 1, 40
    ).int()  # fmt: skip
    a["score"].zero_()
    a["seen"].fill_(45)
    oldest = a["position"].argmin().item()
    fused(a, rule=RULES[3], scores=False)
    assert a["position"][0, 0, oldest] == 45
    assert a["seen"].tolist() == [46]


def test_a_score_that_is_nan_ranks_lowest(simd):
    a = clone(layer(B=1, K=1, Q=1, T=1, S=30))
    a["valid"] = None
    a["position"] = torch.arange(30, dtype=torch.int32).view(1, 1, 30)
    a["seen"].fill_(30)
    a["score"].fill_(1.0)
    a["score"][0, 0, 17] = torch.nan
    fused(a, rule=RULES[0])
    assert a["position"][0, 0, 17] == 30


@pytest.mark.parametrize("dtype", [torch.float16, torch.int8], ids=str)
@pytest.mark.parametrize("state", [True, False])
def test_decode_step_passes_opcheck(dtype, state):
    args = pages.arguments("decode_step", dtype=dtype, state=state)
    torch.library.opcheck(torch.ops.less.decode_step.default, tuple(args.values()))
