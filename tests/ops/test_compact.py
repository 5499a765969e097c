import pytest
import torch

from less import Sidekick
from less.policies import Rule
from tests.helpers import assert_close
from tests.ops import flat_reference as reference
from tests.ops.common import SCALES, in_int8, layer

pytest.importorskip("less._C")
from tests.ops import flat as ops
from tests.ops import pages

RULES = [
    Rule(recent=4, sinks=0, by_score=True, per_age=False),
    Rule(recent=4, sinks=3, by_score=True, per_age=True),
    Rule(recent=6, sinks=3, by_score=False, per_age=False),
    Rule(recent=0, sinks=0, by_score=True, per_age=False),
]
LAYER = ("slot_k", "slot_v", "position", "score", "weight", "seen", "H", "z")


def moved(a, device):
    """The same layer on a device, in memory of its own."""
    return {
        n: moved(x, device) if isinstance(x, dict) else x.to(device, copy=True)
        for n, x in a.items()
    }


def chunk_score_of(a):
    score = torch.rand(a["k"].shape[:3], generator=torch.Generator().manual_seed(9))
    return score * a["valid"][:, None]


def run_both(a, device="cpu", state=True, kind="exp", **by):
    """What the op makes of the layer, on the CPU again, and what the reference makes of it."""
    chunk_score, slot_score = chunk_score_of(a), a["score"] * 1.5
    low = {"H": a["H"], "z": a["z"], "maps": a["maps"], "kind": kind} if state else {}
    scales = {n: a[n] for n in SCALES if n in a}
    want = reference.compact(
        a["k"], a["v"], chunk_score, a["valid"], a["slot_k"], a["slot_v"], a["position"],
        slot_score, a["weight"], a["seen"], **scales, **low, **by,
    )  # fmt: skip
    a = moved(a, device)
    low = {"H": a["H"], "z": a["z"], "maps": a["maps"], "kind": kind} if state else {}
    scales = {n: a[n] for n in scales}
    by = {n: x.to(device) if isinstance(x, torch.Tensor) else x for n, x in by.items()}
    ops.compact(
        a["k"], a["v"], chunk_score.to(device), slot_score.to(device), a["valid"],
        *(a[n] for n in LAYER[:6]), **scales, **low, **by,
    )  # fmt: skip
    return moved(a, "cpu"), want


def assert_same_layer(got, want, names=LAYER):
    held = want.position >= 0
    for name in names:
        a, b = got[name], getattr(want, name)
        if name in ("H", "z"):
            assert_close(a, b, torch.float32)
        elif name in ("slot_k", "slot_v"):
            assert torch.equal(a[held].float(), b[held].float())
        else:
            assert torch.equal(a, b), name


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("T", [1, 5, 40])
@pytest.mark.parametrize("kind", ["paper", "exp", "centroid"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_compact_equals_the_reference(device, rule, T, kind, dtype):
    got, want = run_both(layer(T=T, kind=kind, dtype=dtype), device, kind=kind, rule=rule)
    assert_same_layer(got, want)


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("T", [1, 5, 40])
def test_int8_rows_fold_as_the_numbers_that_they_stand_for_and_move_with_their_scales(
    device, rule, T
):
    eight, plain = in_int8(layer(T=T))
    got, _ = run_both(eight, device, rule=rule)
    want, _ = run_both(plain, device, rule=rule)
    held = want["position"] >= 0
    for name in LAYER[2:6]:
        assert torch.equal(got[name], want[name]), name
    for name in LAYER[6:]:
        assert_close(got[name], want[name], torch.float32)
    for name, scale in (("slot_k", "k_scale"), ("slot_v", "v_scale")):
        numbers = reference.dequantize(got[name], got[scale])
        assert torch.equal(numbers[held], want[name][held])


# Each has what the one before has not: several tiles of rows and strips of the fold, slots past a
# block of the selection, every head dim, ranks up to the highest, weights that no 16 bytes divide.
SHAPES = [
    {"T": 600, "S": 20, "D": 64, "R": 16, "E": 64},
    {"T": 70, "S": 530, "D": 80, "R": 8, "E": 72},
    {"T": 60, "S": 12, "D": 96, "R": 5, "E": 21},
    {"T": 60, "S": 12, "D": 128, "R": 33, "E": 100},
    {"T": 40, "S": 12, "D": 256, "R": 64, "E": 16},
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int8], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_gpu_compacts_layers_of_every_size(launched, shape, dtype):
    a = layer(B=2, K=2, Q=2, **shape, dtype=torch.float32 if dtype == torch.int8 else dtype)
    got, want = run_both(in_int8(a)[0] if dtype == torch.int8 else a, launched, rule=RULES[1])
    assert_same_layer(got, want)


def in_fp8(a):
    """The same layer with fp8 rows and their scales, and with the numbers that those stand for."""
    eight, plain = dict(a), dict(a)
    for name, scale in zip(("k", "v", "slot_k", "slot_v"), SCALES, strict=True):
        eight[scale] = a[name].abs().amax(-1) / 448
        eight[name] = (a[name] / eight[scale][..., None]).to(torch.float8_e4m3fn)
        plain[name] = eight[name].float() * eight[scale][..., None]
    return eight, plain


@pytest.mark.parametrize("T", [1, 40])
def test_fp8_rows_fold_as_the_numbers_that_they_stand_for(launched, T):
    eight, plain = in_fp8(layer(T=T))
    chunk_score = chunk_score_of(eight)
    a = moved(eight, launched)
    ops.compact(
        a["k"], a["v"], chunk_score.to(launched), a["score"] * 1.5, a["valid"],
        *(a[n] for n in LAYER[:6]), **{n: a[n] for n in SCALES},
        H=a["H"], z=a["z"], maps=a["maps"], rule=RULES[0],
    )  # fmt: skip
    got = moved(a, "cpu")
    want, _ = run_both(plain, launched, rule=RULES[0])
    held = want["position"] >= 0
    for name in LAYER[2:6]:
        assert torch.equal(got[name], want[name]), name
    for name in LAYER[6:]:
        assert_close(got[name], want[name], torch.float32)
    for name, scale in (("slot_k", "k_scale"), ("slot_v", "v_scale")):
        numbers = got[name].float() * got[scale][..., None]
        assert torch.equal(numbers[held], want[name][held])


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"D": 72}, "k must have a head dim of a multiple of 16, at most 256, on a GPU, got 72"),
        ({"D": 272}, "k must have a head dim of a multiple of 16, at most 256, on a GPU, got 272"),
        ({"R": 65}, "w2 must have a rank of at most 64 on a GPU, got 65"),
    ],
)
def test_a_gpu_refuses_sizes_that_no_kernel_takes_by_name(launched, sizes, message):
    with pytest.raises(RuntimeError, match=f"compact: {message}"):
        run_both(layer(T=3, **sizes), launched, rule=RULES[0])


@pytest.mark.parametrize("T", [30, 600])
def test_compact_takes_the_policys_own_ranks(device, T):
    a = layer(T=T)
    g = torch.Generator().manual_seed(2)
    rank = torch.rand(2, 2, 9 + T, generator=g)
    rank[0, 0, ::3] = torch.nan
    rank[1] = 0.5
    rank[0, 1, 3] = torch.inf
    rank[0, 1, 6:20] = torch.tensor([0.0, -0.0, -torch.inf, -1.0, torch.nan, 0.0, -0.0] * 2)
    got, want = run_both(a, device, rank=rank)
    assert_same_layer(got, want)


def test_of_equal_scores_the_older_leaves_first(device):
    a = layer(B=1, K=1, Q=1, T=4, S=3)
    a["position"] = torch.tensor([[[7, 2, 5]]], dtype=torch.int32)
    a["valid"] = torch.ones(1, 4, dtype=torch.bool)
    a = moved(a, device)
    ops.compact(
        a["k"], a["v"], torch.zeros(1, 1, 4, device=device), torch.zeros(1, 1, 3, device=device),
        a["valid"], a["slot_k"], a["slot_v"], a["position"], a["score"], a["weight"], a["seen"],
        rule=RULES[3],
    )  # fmt: skip
    assert a["position"].tolist() == [[[10, 11, 12]]]  # 2, 5, 7 and 9 have left


def test_compact_without_state_only_forgets(device):
    got, want = run_both(layer(T=12), device, state=False, rule=RULES[0])
    assert torch.equal(got["position"], want.position)
    assert torch.equal(got["seen"], want.seen)


def test_a_row_of_padding_changes_nothing(device):
    a = layer(T=6)
    a["valid"][1] = False
    before = {n: a[n][1].clone() for n in LAYER}
    got, _ = run_both(a, device, rule=RULES[0])
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


@pytest.mark.parametrize("dtype", [torch.float16, torch.int8], ids=str)
@pytest.mark.parametrize("state", [True, False])
def test_compact_passes_opcheck(dtype, state):
    args = pages.arguments("compact", dtype=dtype, state=state)
    torch.library.opcheck(torch.ops.less.compact.default, tuple(args.values()))


@pytest.mark.parametrize("kind", ["paper", "exp", "centroid"])
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int8], ids=str
)
def test_what_leaves_a_long_prompt_goes_through_maps_of_any_dtype(device, kind, dtype):
    a = layer(T=150, S=20, D=32, R=7, E=37, kind=kind)
    maps = Sidekick(layers=[a["maps"]], kind=kind).to(dtype)[0]
    got, want = run_both(a | {"maps": maps}, device, kind=kind, rule=RULES[0])
    assert_close(got["H"], want.H, torch.float32)
    assert_close(got["z"], want.z, torch.float32)


@pytest.mark.parametrize("T", [12, 200])
def test_a_row_alone_has_the_bits_that_it_has_in_a_padded_batch(device, T):
    a = layer(B=3, T=T, S=11, D=32, R=8, E=32)
    got, _ = run_both(a, device, rule=RULES[0])
    chunk_score, a = chunk_score_of(a), moved(a, device)
    for b in range(3):
        mine = a["valid"][b]
        row = {n: a[n][b : b + 1].clone() for n in LAYER}
        k, v = (a[n][b : b + 1, :, mine].clone() for n in ("k", "v"))
        score = chunk_score[b : b + 1].to(device)[:, :, mine].contiguous()
        ops.compact(
            k, v, score, row["score"] * 1.5, None, *(row[n] for n in LAYER[:6]), H=row["H"],
            z=row["z"], maps=a["maps"], rule=RULES[0],
        )  # fmt: skip
        for n in LAYER:
            assert torch.equal(row[n][0].cpu(), got[n][b]), n
