import pytest
import torch

from less import reference
from tests.helpers import assert_close
from tests.ops.common import layer

pytest.importorskip("less._C")
from less import ops

INPUTS = ("q", "k", "v", "valid", "slot_k", "slot_v", "position", "score", "weight")
STATE = ("phi_q", "H", "z")


def arguments(a, state=True, **options):
    args = {n: a[n] for n in INPUTS + (STATE if state else ())}
    return args | {"scale": 0.3, "decay": 0.9} | options


def widened(args):
    wide = {}
    for n, x in args.items():
        wide[n] = x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x
    return wide


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("T", [1, 2, 5, 70])
@pytest.mark.parametrize("heads", [(2, 2), (6, 2), (17, 1)])
@pytest.mark.parametrize("state", [True, False])
def test_chunk_attention_equals_the_reference_in_float64(simd, dtype, T, heads, state):
    a = layer(B=3, Q=heads[0], K=heads[1], T=T, S=70, D=20, dtype=dtype)
    args = arguments(a, state)
    want = reference.chunk_attention(**widened(args))
    out, slot_score, chunk_score, share = ops.chunk_attention(**args)
    assert out.dtype == dtype
    assert_close(out, want.out, dtype)
    assert_close(slot_score, want.slot_score, torch.float32)
    assert_close(chunk_score, want.chunk_score, torch.float32)
    assert_close(share, want.share, torch.float32)


@pytest.mark.parametrize("q_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_queries_may_be_of_another_dtype_than_the_slots(simd, q_dtype):
    a = layer(dtype=torch.float16)
    a["q"] = a["q"].to(q_dtype)
    args = arguments(a)
    out, *_ = ops.chunk_attention(**args)
    assert out.dtype == q_dtype
    assert_close(out, reference.chunk_attention(**widened(args)).out, q_dtype)


def test_scores_may_be_left_alone(simd):
    for T in (1, 50):
        a = layer(T=T)
        out, slot_score, chunk_score, _ = ops.chunk_attention(**arguments(a, scores=False))
        want, *_ = ops.chunk_attention(**arguments(a))
        assert torch.equal(out, want)
        empty = a["position"] < 0
        assert torch.equal(slot_score, a["score"].masked_fill(empty, 0.0))
        assert (chunk_score == 0).all()


def test_scores_of_a_token_add_up_to_the_queries_that_could_see(simd):
    for T in (1, 4, 60):
        a = layer(T=T, Q=6, K=2)
        a["score"] = torch.zeros_like(a["score"])
        _, slot_score, chunk_score, _ = ops.chunk_attention(**arguments(a, decay=1.0))
        total = slot_score.sum(-1) + chunk_score.sum(-1)
        queries = 3.0 * a["valid"].sum(1, keepdim=True).float()
        torch.testing.assert_close(total, queries.expand_as(total), rtol=1e-5, atol=1e-5)


def test_an_extreme_low_rank_part_neither_overflows_nor_is_lost(simd):
    a = layer(T=1)
    a["valid"][:] = True
    for factor in (1e-30, 1e30):
        args = arguments(a | {"H": a["H"] * factor, "z": a["z"] * factor})
        out, _, _, share = ops.chunk_attention(**args)
        want = reference.chunk_attention(**widened(args))
        assert out.isfinite().all()
        assert_close(out, want.out, torch.float32)
        assert_close(share, want.share, torch.float32)


def test_chunk_attention_passes_opcheck():
    a = layer()
    for state in (True, False):
        args = [a[n] for n in INPUTS] + [a[n] if state else None for n in STATE]
        torch.library.opcheck(torch.ops.less.chunk_attention.default, (*args, 0.25, 0.9, True))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("q", lambda x: x[:, :5], "q's heads must be a multiple of 2, got 5"),
        ("q", lambda x: x.double(), "q must be float32, bfloat16 or float16, got float64"),
        ("k", lambda x: x[:, :, :4], r"k must have shape \[2, 2, 5, 16\], got \[2, 2, 4, 16\]"),
        ("k", lambda x: x.half(), "k must be float32, got float16"),
        ("v", lambda x: x[:1], "v must have shape"),
        ("valid", lambda x: x.int(), "valid must be bool, got int32"),
        ("slot_v", lambda x: x[:, :, 1:], "slot_v must have shape"),
        ("position", lambda x: x.long(), "position must be int32, got int64"),
        ("score", lambda x: x[..., :3], "score must have shape"),
        ("weight", lambda x: x.double(), "weight must be float32, got float64"),
        ("phi_q", lambda x: None, "phi_q, H and z must be given together"),
        ("H", lambda x: x[:, :, :2], "H must have shape"),
        ("z", lambda x: x.half(), "z must be float32, got float16"),
    ],
)
def test_chunk_attention_refuses_bad_input(name, change, message):
    a = layer()
    args = arguments(a | {name: change(a[name])})
    with pytest.raises(RuntimeError, match=f"chunk_attention: {message}"):
        ops.chunk_attention(**args)
