"""The fused step where kernels are launched, against the reference in float64."""

from __future__ import annotations

import pytest
import torch

from less.layer.kinds import KINDS
from less.policies import Rule
from tests.ops import flat_reference as reference
from tests.ops.common import layer

pytest.importorskip("less._C")
from tests.ops import flat as ops

RULES = [
    Rule(recent=4, sinks=0, by_score=True, per_age=False),
    Rule(recent=4, sinks=3, by_score=True, per_age=True),
    Rule(recent=6, sinks=3, by_score=False, per_age=False),
    Rule(recent=0, sinks=0, by_score=True, per_age=False),
]
# Of out: half a unit in the last place of its dtype, and what float32 sums lose.
ROUNDING = {torch.float32: 1e-5, torch.float16: 2**-11 + 1e-5, torch.bfloat16: 2**-8 + 1e-5}
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
EIGHT = (torch.int8, torch.float8_e4m3fn)
HEAD_DIMS = (64, 80, 96, 128, 256)
SLOTS = ("slot_k", "slot_v", "position", "score", "weight")
WRITTEN = (*SLOTS, "k_scale", "v_scale", "seen", "H", "z", "share")


def in_eight_bits(x, dtype):
    """Rows of 8 bits and their scales, as the slots hold them."""
    if dtype == torch.int8:
        return reference.quantize(x)
    scale = x.float().abs().amax(-1) / 448.0
    return (x.float() / scale[..., None]).to(dtype), scale


def make(dtype=torch.float16, q_dtype=None, maps_dtype=None, empty=0.0, device="cpu", **shape):
    """A layer in mid-life whose slots are of dtype; maps of R, E and kind as in ``layer``."""
    kind = shape.get("kind", "exp")
    a = layer(T=1, **({"E": 32} | shape))
    B, K, S, _ = a["slot_k"].shape
    g = torch.Generator().manual_seed(7)
    gone = torch.rand(B, K, S, generator=g) < empty
    position = torch.stack([torch.randperm(3 * S, generator=g)[:S] for _ in range(B * K)])
    a["position"] = position.reshape(B, K, S).int().masked_fill(gone, -1)
    for name in ("score", "weight"):
        a[name] = torch.rand(B, K, S, generator=g).masked_fill(gone, 0.0)
    for name in ("slot_k", "slot_v"):
        if dtype in EIGHT:
            a[name], a[f"{name[-1]}_scale"] = in_eight_bits(a[name], dtype)
        else:
            a[name] = a[name].to(dtype)
    q_dtype = q_dtype or (torch.float16 if dtype in EIGHT else dtype)
    for name in ("q", "k", "v"):
        a[name] = a[name].to(q_dtype)
    if maps_dtype is not None:
        for name in KINDS[kind].matrices:
            w = a["maps"][name]
            if maps_dtype == torch.int8:
                a["maps"][name], a["maps"][f"{name}_scale"] = reference.quantize(w, -2)
            else:
                a["maps"][name] = w.to(maps_dtype)
    a["valid"] = None
    a["kind"] = kind
    a["share"] = torch.rand(B, K, dtype=torch.float64, generator=g)
    return on(device, a)


def on(device, a):
    a = {n: x.to(device, copy=True) if isinstance(x, torch.Tensor) else x for n, x in a.items()}
    a["maps"] = {n: x.to(device) for n, x in a["maps"].items()}
    return a


def next_token(a, step):
    g = torch.Generator().manual_seed(1000 + step)
    for name in ("q", "k", "v"):
        x = torch.randn(a[name].shape, generator=g) * 1.5
        a[name] = x.to(a[name].dtype).to(a[name].device)


def run(a, rule, state=True, **options):
    """One step of the kernel; out is NaN before."""
    a["out"] = torch.full_like(a["q"], torch.nan)
    low = {"H": a["H"], "z": a["z"], "share": a["share"], "maps": a["maps"], "kind": a["kind"]}
    scales = {n: a[n] for n in ("k_scale", "v_scale") if n in a}
    ops.decode_step(
        a["q"], a["k"], a["v"], a["valid"], a["out"], *(a[n] for n in SLOTS), a["seen"], **scales,
        **(low if state else {}), **({"scale": 0.2, "decay": 0.97, "rule": rule} | options),
    )  # fmt: skip
    return a


def numbers(a, name):
    """The numbers that rows of slots stand for."""
    x = a[f"slot_{name}"].double()
    return x * a[f"{name}_scale"].double()[..., None] if f"{name}_scale" in a else x


def expected(a, rule, state=True, **options):
    """What the reference makes of the same step in float64."""
    a = on("cpu", a)
    dtype = a["slot_k"].dtype
    if dtype in EIGHT:
        new = [reference.dequantize(*in_eight_bits(a[n].float(), dtype)) for n in ("k", "v")]
    else:
        new = [a[n].to(dtype) for n in ("k", "v")]
    low = {}
    if state:
        maps = {n: x if x.dtype == torch.int8 else x.double() for n, x in a["maps"].items()}
        low = {"H": a["H"].double(), "z": a["z"].double(), "maps": maps, "kind": a["kind"]}
    return reference.decode_step(
        a["q"].double(), *(x.double() for x in new), a["valid"], numbers(a, "k"), numbers(a, "v"),
        a["position"], a["score"].double(), a["weight"], a["seen"], **low,
        **({"scale": 0.2, "decay": 0.97, "rule": rule} | options),
    )  # fmt: skip


def assert_near(got, want, bound, what):
    error = (got.cpu().double() - want.double()).abs().max().item() if want.numel() else 0.0
    size = max(1e-30, want.abs().max().item()) if want.numel() else 1.0
    assert error <= bound * size, f"{what}: {error / size:.3g} of the largest, above {bound:.3g}"


def check_steps(a, rule, steps=3, state=True, **options):
    """Steps of the kernel, each from the state that it left itself, against the reference."""
    eight = a["slot_k"].dtype in EIGHT
    for step in range(steps):
        next_token(a, step)
        before = a["share"].clone().cpu()
        attended, after = expected(a, rule, state, **options)
        run(a, rule, state, **options)
        assert torch.equal(a["position"].cpu(), after.position), f"step {step}"
        assert torch.equal(a["seen"].cpu(), after.seen)
        assert_near(a["out"], attended.out, ROUNDING[a["out"].dtype], "out")
        assert_near(a["score"], after.score, 1e-5, "score")
        assert torch.equal(a["weight"].cpu(), after.weight.float())
        held = after.position >= 0
        for name in ("k", "v"):
            got, want = numbers(on("cpu", a), name)[held], getattr(after, f"slot_{name}")[held]
            assert_near(got, want, 1e-6 if eight else 0.0, f"slot_{name}")
        if state:
            assert_near(a["H"], after.H, 1e-5, "H")
            assert_near(a["z"], after.z, 1e-5, "z")
            share = attended.share.reshape(*before.shape, -1).sum(2)
            assert_near(a["share"], before + share, 1e-5, "share")


@pytest.mark.parametrize("D", HEAD_DIMS)
@pytest.mark.parametrize("dtype", [*FLOATS, *EIGHT], ids=str)
def test_a_launched_step_equals_the_reference(launched, meeting, dtype, D):
    for G in (1, 4):
        a = make(dtype, Q=2 * G, K=2, D=D, S=70, empty=0.02, device=launched)
        check_steps(a, RULES[D // 16 % 4])


@pytest.mark.parametrize("G", [1, 2, 4, 7, 8, 71])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int8], ids=str)
def test_any_number_of_query_heads_share_a_kv_head(launched, meeting, dtype, G):
    check_steps(make(dtype, B=1, Q=G, K=1, D=64, S=45, device=launched), RULES[0])


@pytest.mark.parametrize("maps_dtype", [*FLOATS, torch.int8], ids=str)
@pytest.mark.parametrize("kind", ["paper", "exp", "centroid"])
@pytest.mark.parametrize(("R", "E"), [(8, 64), (3, 10), (64, 512), (1, 24)])
def test_maps_of_any_kind_rank_width_and_dtype(launched, meeting, kind, maps_dtype, R, E):
    shape = {"B": 1, "Q": 4, "K": 2, "D": 64, "S": 40, "R": R, "E": E, "kind": kind}
    check_steps(make(maps_dtype=maps_dtype, device=launched, **shape), RULES[1], steps=2)


@pytest.mark.parametrize("q_dtype", FLOATS, ids=str)
@pytest.mark.parametrize("dtype", [*FLOATS, *EIGHT], ids=str)
def test_slots_of_another_dtype_than_the_models(launched, dtype, q_dtype):
    for G in (1, 5):
        a = make(dtype, q_dtype, B=1, Q=G, K=1, D=64, S=40, device=launched)
        check_steps(a, RULES[0], steps=2)


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("empty", [1.0, 0.3, 0.0])
def test_slots_fill_and_then_one_leaves_per_step(launched, meeting, rule, empty):
    a = make(Q=2, K=1, D=64, S=37, empty=empty, device=launched)
    a["seen"].fill_(0 if empty == 1.0 else int(a["seen"][0]))
    check_steps(a, rule, steps=42 if empty else 8)


@pytest.mark.parametrize("G", [1, 4])
def test_soft_capped_logits(launched, G):
    check_steps(make(Q=G, K=1, D=64, S=40, device=launched), RULES[0], softcap=1.5)


@pytest.mark.parametrize("victim", ["fold", "forget"])
def test_a_step_without_state_is_eviction_alone(launched, meeting, victim):
    a = make(Q=4, K=2, D=64, S=40, device=launched)
    before = {n: a[n].clone() for n in ("H", "z", "share")}
    _, after = expected(a, RULES[0], state=False)
    run(a, RULES[0], state=False, victim=victim)
    assert torch.equal(a["position"].cpu(), after.position)
    assert all(torch.equal(a[n], before[n]) for n in before)


def test_attention_alone_writes_out_and_share_and_nothing_else(launched, meeting):
    a = make(Q=4, K=2, D=64, S=40, device=launched)
    before = {n: a[n].clone() for n in WRITTEN if n in a}
    attended, _ = expected(a, RULES[0])
    run(a, RULES[0], victim="none")
    assert_near(a["out"], attended.out, ROUNDING[torch.float16], "out")
    assert all(torch.equal(a[n], x) for n, x in before.items() if n != "share")


def test_rows_without_a_token_are_left_as_they_are(launched, meeting):
    a = make(B=4, Q=4, K=2, D=64, S=40, device=launched)
    a["valid"] = torch.tensor([[True], [False], [True], [False]], device=launched)
    before = {n: a[n][1::2].clone() for n in WRITTEN if n in a}
    check_steps(a, RULES[0])
    assert torch.equal(a["out"][1::2], torch.zeros_like(a["out"][1::2]))
    assert all(torch.equal(a[n][1::2], x) for n, x in before.items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.int8], ids=str)
@pytest.mark.parametrize("G", [1, 4])
def test_what_an_empty_slot_holds_is_never_used(launched, dtype, G):
    a = make(dtype, Q=G, K=1, D=64, S=40, empty=0.4, device=launched)
    b = on(launched, a)
    empty = b["position"] < 0
    for name in ("score", "weight", "k_scale", "v_scale"):
        if name in b:
            b[name][empty] = torch.nan
    for name in ("slot_k", "slot_v"):
        b[name][empty] = 99 if dtype == torch.int8 else torch.nan
    run(a, RULES[0])
    run(b, RULES[0])
    assert torch.equal(a["out"], b["out"])
    assert torch.equal(a["position"], b["position"])


@pytest.mark.parametrize(
    "dtype",
    [
        torch.float16,
        torch.int8,
        *(pytest.param(dtype, marks=pytest.mark.proof)
          for dtype in (torch.float32, torch.bfloat16, torch.float8_e4m3fn)),
    ],
    ids=str,
)  # fmt: skip
def test_five_hundred_steps_lose_the_same_tokens_as_the_reference(launched, dtype):
    a = make(dtype, B=1, Q=2, K=1, D=64, S=20, R=4, E=16, empty=1.0, device=launched)
    a["seen"].zero_()
    b = on("cpu", a)
    for step in range(500):
        next_token(a, step)
        next_token(b, step)
        run(a, RULES[0])
        _, after = expected(b, RULES[0])
        for name in ("position", "seen"):
            b[name] = getattr(after, name)
        b["score"], b["weight"] = after.score, after.weight.float()
        b["H"], b["z"] = after.H, after.z
        if dtype in EIGHT:
            taken = b["position"] == step
            for name in ("k", "v"):
                row, scale = in_eight_bits(b[name].float(), dtype)
                b[f"slot_{name}"][taken] = row[0, 0, 0]
                b[f"{name}_scale"][taken] = scale[0, 0, 0]
        else:
            b["slot_k"], b["slot_v"] = after.slot_k.to(dtype), after.slot_v.to(dtype)
        assert torch.equal(a["position"].cpu(), b["position"]), f"step {step}"
    assert_near(a["H"], b["H"], 1e-5, "H")
    assert_near(a["score"], b["score"], 1e-5, "score")


@pytest.mark.parametrize("G", [1, 4])
def test_a_row_has_the_same_bits_alone_and_in_a_ragged_batch_of_sixteen(launched, meeting, G):
    a = make(B=16, Q=2 * G, K=2, D=64, S=45, R=8, empty=0.05, device=launched)
    a["valid"] = (torch.arange(16) % 3 != 1)[:, None].to(launched)
    start = on(launched, a)
    whole = []
    for step in range(3):
        next_token(a, step)
        whole.append(run(a, RULES[0])["out"].clone())
    for b in (0, 1, 15):
        one = {n: x[b : b + 1] if isinstance(x, torch.Tensor) else x for n, x in start.items()}
        one = on(launched, one)
        tokens = on(launched, start)
        for step in range(3):
            next_token(tokens, step)
            for name in ("q", "k", "v"):
                one[name] = tokens[name][b : b + 1].contiguous()
            assert torch.equal(run(one, RULES[0])["out"][0], whole[step][b])
        assert all(torch.equal(one[n][0], a[n][b]) for n in WRITTEN if n in a)


@pytest.mark.parametrize("victim", ["fold", "merge"])
@pytest.mark.parametrize("G", [1, 4])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.int8], ids=str)
def test_how_many_ranges_of_a_head_a_block_has_changes_no_bit(
    launched, meeting, monkeypatch, dtype, G, victim
):
    """Of seven ranges a block has one, three, four or all, by the multiprocessors."""
    first = make(dtype, B=2, Q=2 * G, K=2, D=64, S=205, empty=0.01, device=launched)
    results = []
    for multiprocessors in (132, 5, 3, 1):
        monkeypatch.setenv("LESS_EMULATOR_SMS", str(multiprocessors))
        a = on(launched, first)
        outs = []
        for step in range(3):
            next_token(a, step)
            outs.append(run(a, RULES[1], victim == "fold", victim=victim)["out"])
        results.append([*outs, *(a[n] for n in WRITTEN if n in a)])
    for other in results[1:]:
        for one, same in zip(results[0], other, strict=True):
            assert torch.equal(one.cpu().view(torch.uint8), same.cpu().view(torch.uint8))


@pytest.mark.parametrize("scale", [0.2, 6.0])
@pytest.mark.parametrize("dtype", [torch.float16, torch.int8], ids=str)
@pytest.mark.parametrize("S", [17, 33, 65, 193])
def test_a_last_range_of_one_slot_counts_once(launched, S, dtype, scale):
    """Its tile has one row, and its score decays once; the token is in its softmax."""
    a = make(dtype, B=1, Q=8, K=2, D=64, S=S, device=launched)
    a["k"] *= 2
    check_steps(a, RULES[1], steps=2, scale=scale, decay=0.5)


def test_what_an_empty_slots_score_was_is_forgotten(launched, meeting):
    a = make(B=2, Q=4, K=2, D=64, S=70, empty=0.5, device=launched)
    empty = a["position"] < 0
    a["score"][empty] = 7.0
    run(a, RULES[0])
    assert empty.sum() > 4
    assert (a["score"][a["position"] < 0] == 0).all()


@pytest.mark.parametrize("multiprocessors", [1, 3])
@pytest.mark.parametrize(("dtype", "G"), [(torch.float16, 1), (torch.float16, 4), (torch.int8, 2)])
def test_a_block_of_several_ranges_equals_the_reference(
    launched, meeting, monkeypatch, dtype, G, multiprocessors
):
    monkeypatch.setenv("LESS_EMULATOR_SMS", str(multiprocessors))
    a = make(dtype, B=2, Q=2 * G, K=2, D=64, S=177, empty=0.1, device=launched)
    check_steps(a, RULES[1], steps=2)


@pytest.mark.parametrize("state", [True, False])
def test_a_dependent_launch_changes_no_bit(launched, state):
    a = make(Q=4, K=2, D=64, S=45, device=launched)
    b = on(launched, a)
    for step in range(3):
        next_token(a, step)
        next_token(b, step)
        run(a, RULES[0], state)
        run(b, RULES[0], state, dependent=True)
        assert torch.equal(a["out"], b["out"])
    assert all(torch.equal(a[n], b[n]) for n in WRITTEN if n in a)


@pytest.mark.parametrize("code", ["80", "90", "100"])
def test_a_newer_gpu_that_older_code_serves_is_asked_for_what_the_code_has(
    emulator, monkeypatch, code
):
    """As a build of PTX for sm_80 serves compute capability 10.0: without clusters."""
    if emulator.tier == "ptx_80" and code != "80":
        pytest.skip("this tier's code is for sm_80")
    a = make(Q=4, K=2, D=64, S=70)
    monkeypatch.setenv("LESS_EMULATOR_ARCHITECTURE", code)
    wanted = ops.decode_step_workspace(a["slot_k"], 4, a["maps"])
    monkeypatch.setenv("LESS_EMULATOR_ARCHITECTURE", "100")
    monkeypatch.setenv("LESS_EMULATOR_CODE", code)
    assert ops.decode_step_workspace(a["slot_k"], 4, a["maps"]) == wanted
    run(on("cpu", a), RULES[0], dependent=True)
    check_steps(a, RULES[0], steps=2)


def test_one_workspace_serves_step_after_step(launched, monkeypatch):
    monkeypatch.setenv("LESS_EMULATOR_ARCHITECTURE", "80")
    a = make(Q=4, K=2, D=64, S=70, device=launched)
    size = ops.decode_step_workspace(a["slot_k"], 4, a["maps"])
    workspace = torch.zeros(size, dtype=torch.uint8, device=launched)
    b = on(launched, a)
    for step in range(5):
        next_token(a, step)
        next_token(b, step)
        run(a, RULES[0], workspace=workspace)
        run(b, RULES[0])
        assert torch.equal(a["out"], b["out"])
    assert all(torch.equal(a[n], b[n]) for n in WRITTEN if n in a)


def test_more_slots_than_a_cluster_holds_meet_in_the_workspace(launched):
    check_steps(make(B=1, Q=1, K=1, D=64, S=8300, device=launched), RULES[0], steps=1)


@pytest.mark.parametrize("G", [1, 4])
@pytest.mark.parametrize("dtype", [*FLOATS, *EIGHT], ids=str)
def test_blocks_on_cuda_meet_in_the_workspace_where_slots_are_many(cuda, dtype, G):
    """Where a GPU has clusters, nothing else has its blocks meet there."""
    check_steps(make(dtype, B=2, Q=2 * G, K=2, D=64, S=8300, device=cuda), RULES[0])


def test_a_head_dim_that_has_no_kernel_is_refused_by_name(launched):
    a = make(Q=2, K=1, D=72, S=20, device=launched)
    before = {n: a[n].clone() for n in SLOTS}
    with pytest.raises(RuntimeError, match="decode_step"):
        run(a, RULES[0])
    assert all(torch.equal(a[n], x) for n, x in before.items())
