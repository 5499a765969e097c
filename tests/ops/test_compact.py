import pytest
import torch

from less import Sidekick, reference
from less.policies import Rule
from tests.helpers import assert_close
from tests.ops.common import SCALES, in_int8, layer

pytest.importorskip("less._C")
from less import ops

RULES = [
    Rule(recent=4, sinks=0, by_score=True, per_age=False),
    Rule(recent=4, sinks=3, by_score=True, per_age=True),
    Rule(recent=6, sinks=3, by_score=False, per_age=False),
    Rule(recent=0, sinks=0, by_score=True, per_age=False),
]
LAYER = ("slot_k", "slot_v", "position", "score", "weight", "seen", "H", "z")


def run_both(a, state=True, kind="exp", **by):
    chunk_score = torch.rand(a["k"].shape[:3], generator=torch.Generator().manual_seed(9))
    chunk_score = chunk_score * a["valid"][:, None]
    slot_score = a["score"] * 1.5
    a = {n: x if n in ("maps",) else x.clone() for n, x in a.items()}
    low = {"H": a["H"], "z": a["z"], "maps": a["maps"], "kind": kind} if state else {}
    want = reference.compact(
        a["k"], a["v"], chunk_score, a["valid"], a["slot_k"], a["slot_v"], a["position"],
        slot_score, a["weight"], a["seen"], **low, **by,
    )  # fmt: skip
    ops.compact(
        a["k"], a["v"], chunk_score, slot_score, a["valid"], *(a[n] for n in LAYER[:6]),
        **low, **by,
    )  # fmt: skip
    return a, want


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("T", [1, 5, 40])
@pytest.mark.parametrize("kind", ["paper", "exp"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_compact_equals_the_reference(simd, rule, T, kind, dtype):
    got, want = run_both(layer(T=T, kind=kind, dtype=dtype), kind=kind, rule=rule)
    held = want.position >= 0
    for name in LAYER:
        a, b = got[name], getattr(want, name)
        if name in ("H", "z"):
            assert_close(a, b, torch.float32)
        elif name in ("slot_k", "slot_v"):
            assert torch.equal(a[held], b[held])
        else:
            assert torch.equal(a, b), name


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("T", [1, 5, 40])
def test_int8_rows_fold_as_the_numbers_that_they_stand_for_and_move_with_their_scales(
    simd, rule, T
):
    eight, plain = in_int8(layer(T=T))
    eight = {n: x if n == "maps" else x.clone() for n, x in eight.items()}
    want, _ = run_both(plain, rule=rule)
    chunk_score = torch.rand(eight["k"].shape[:3], generator=torch.Generator().manual_seed(9))
    chunk_score = chunk_score * eight["valid"][:, None]
    ops.compact(
        eight["k"], eight["v"], chunk_score, eight["score"] * 1.5, eight["valid"],
        *(eight[n] for n in LAYER[:6]), **{n: eight[n] for n in SCALES},
        H=eight["H"], z=eight["z"], maps=eight["maps"], rule=rule,
    )  # fmt: skip
    held = want["position"] >= 0
    for name in LAYER[2:]:
        assert torch.equal(eight[name], want[name]), name
    for name, scale in (("slot_k", "k_scale"), ("slot_v", "v_scale")):
        got = reference.dequantize(eight[name], eight[scale])
        assert torch.equal(got[held], want[name][held])


def test_compact_takes_the_policys_own_ranks(simd):
    a = layer(T=30)
    g = torch.Generator().manual_seed(2)
    rank = torch.rand(2, 2, 9 + 30, generator=g)
    rank[0, 0, ::3] = torch.nan
    rank[1] = 0.5
    rank[0, 1, 3] = torch.inf
    got, want = run_both(a, rank=rank)
    assert torch.equal(got["position"], want.position)
    assert_close(got["H"], want.H, torch.float32)


def test_of_equal_scores_the_older_leaves_first(simd):
    a = layer(B=1, K=1, Q=1, T=4, S=3)
    a["position"] = torch.tensor([[[7, 2, 5]]], dtype=torch.int32)
    a["valid"] = torch.ones(1, 4, dtype=torch.bool)
    ops.compact(
        a["k"], a["v"], torch.zeros(1, 1, 4), torch.zeros(1, 1, 3), a["valid"], a["slot_k"],
        a["slot_v"], a["position"], a["score"], a["weight"], a["seen"], rule=RULES[3],
    )  # fmt: skip
    assert a["position"].tolist() == [[[10, 11, 12]]]  # 2, 5, 7 and 9 have left


def test_compact_without_state_only_forgets(simd):
    got, want = run_both(layer(T=12), state=False, rule=RULES[0])
    assert torch.equal(got["position"], want.position)
    assert torch.equal(got["seen"], want.seen)


def test_a_row_of_padding_changes_nothing(simd):
    a = layer(T=6)
    a["valid"][1] = False
    before = {n: a[n][1].clone() for n in LAYER}
    got, _ = run_both(a, rule=RULES[0])
    for name in LAYER:
        if name != "score":  # the scores are the caller's new ones
            assert torch.equal(got[name][1], before[name]), name


def test_thread_count_never_changes_a_bit(simd, with_threads):
    results = []
    for threads in (1, 2, 5):
        with_threads(threads)
        a, _ = run_both(layer(B=3, T=200, S=40, D=64, R=8, E=32), rule=RULES[1])
        results.append(a)
    for other in results[1:]:
        assert all(torch.equal(other[n], results[0][n]) for n in LAYER)


def test_compact_passes_opcheck():
    a = layer()
    w = a["maps"]
    for x in (a, in_int8(a)[0]):
        torch.library.opcheck(
            torch.ops.less.compact.default,
            (
                x["k"], x["v"], x.get(SCALES[0]), x.get(SCALES[1]), torch.rand(2, 2, 5),
                x["score"].clone(), x["valid"], None, x["slot_k"], x["slot_v"], x.get(SCALES[2]),
                x.get(SCALES[3]), *(x[n] for n in LAYER[2:]), None, w["k_w1"], w["k_w2"], None,
                None, w["k_bias"], None, None, None, 1, 4, 0, True, False,
            ),
        )  # fmt: skip


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("k", lambda x: x.half(), "k must be float32, got float16"),
        ("v", lambda x: x[:, :1], "v must have shape"),
        ("valid", lambda x: x[:, :2], r"valid must have shape \[2, 5\], got \[2, 2\]"),
        ("position", lambda x: x.long(), "position must be int32, got int64"),
        ("seen", lambda x: x.int(), "seen must be int64, got int32"),
        ("H", lambda x: x[..., :3], "H must have shape"),
        ("z", lambda x: None, "H, z, w1 and w2 must be given together"),
        ("slot_k", lambda x: x.mT.contiguous().mT, "slot_k must be contiguous"),
        ("weight", lambda x: x.half(), "weight must be float32, got float16"),
    ],
)
def test_compact_refuses_bad_input_and_writes_nothing(name, change, message):
    a = layer()
    before = {n: a[n].clone() for n in LAYER}
    bad = a | {name: change(a[name])}
    with pytest.raises(RuntimeError, match=f"compact: {message}"):
        ops.compact(
            bad["k"], bad["v"], torch.rand(2, 2, 5), a["score"].clone(), bad["valid"],
            *(bad[n] for n in LAYER[:6]), H=bad["H"], z=bad["z"], maps=a["maps"], rule=RULES[0],
        )  # fmt: skip
    assert all(torch.equal(a[n], before[n]) for n in LAYER)
    with pytest.raises(ValueError, match="compact: exactly one of rule and rank"):
        ops.compact(a["k"], a["v"], a["score"], a["score"], None, *(a[n] for n in LAYER[:6]))


@pytest.mark.parametrize("kind", ["paper", "exp"])
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int8], ids=str
)
def test_what_leaves_a_long_prompt_goes_through_maps_of_any_dtype(simd, kind, dtype):
    a = layer(T=150, S=20, D=21, R=7, E=37, kind=kind)
    maps = Sidekick(layers=[a["maps"]], kind=kind).to(dtype)[0]
    got, want = run_both(a | {"maps": maps}, kind=kind, rule=RULES[0])
    assert_close(got["H"], want.H, torch.float32)
    assert_close(got["z"], want.z, torch.float32)


@pytest.mark.parametrize("T", [12, 200])
def test_a_row_alone_has_the_bits_that_it_has_in_a_padded_batch(simd, T):
    a = layer(B=3, T=T, S=11, D=24, R=8, E=32)
    got, _ = run_both(a, rule=RULES[0])
    chunk_score = torch.rand(a["k"].shape[:3], generator=torch.Generator().manual_seed(9))
    for b in range(3):
        mine = a["valid"][b]
        row = {n: a[n][b : b + 1].clone() for n in LAYER}
        k, v = (a[n][b : b + 1, :, mine].clone() for n in ("k", "v"))
        ops.compact(
            k, v, chunk_score[b : b + 1, :, mine].contiguous(), row["score"] * 1.5, None,
            *(row[n] for n in LAYER[:6]), H=row["H"], z=row["z"], maps=a["maps"], rule=RULES[0],
        )  # fmt: skip
        for n in LAYER:
            assert torch.equal(row[n][0], got[n][b]), n
