import subprocess
import sys

import pytest
import torch

from tests.helpers import assert_close
from tests.ops import flat_reference as reference
from tests.ops.common import SCALES, assert_rounded, in_fp8, in_int8, layer

pytest.importorskip("less._C")
from tests.ops import flat as ops
from tests.ops import pages

INPUTS = ("q", "k", "v", "valid", "slot_k", "slot_v", "position", "score", "weight")
STATE = ("phi_q", "H", "z")
_ROWS = ("q", "k", "v", "slot_k", "slot_v")


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


@pytest.mark.parametrize("softcap", [0.5, 4.0, 50.0])
@pytest.mark.parametrize("T", [1, 5, 70])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8], ids=str)
def test_a_soft_cap_equals_the_reference_in_float64(simd, dtype, T, softcap):
    a = layer(B=2, Q=6, K=2, T=T, S=40, D=20, dtype=torch.float32)
    a["weight"] = torch.rand(a["weight"].shape) * 3  # beyond the cap, which is not theirs
    plain, scales = a, {}
    if dtype == torch.int8:
        a, plain = in_int8(a)
        scales = {n: a[n] for n in SCALES}
    elif dtype != torch.float32:
        a = plain = {n: x.to(dtype) if n in _ROWS else x for n, x in a.items()}
    options = {"softcap": softcap, "scale": 2.0}
    want = reference.chunk_attention(**widened(arguments(plain)) | options)
    out, slot_score, chunk_score, share = ops.chunk_attention(**arguments(a) | options, **scales)
    assert_close(out, want.out, out.dtype)
    assert_close(slot_score, want.slot_score, torch.float32)
    assert_close(chunk_score, want.chunk_score, torch.float32)
    assert_close(share, want.share, torch.float32)
    without, *_ = ops.chunk_attention(**arguments(a), **scales)
    assert (out - without).abs().max() > 1e-3


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


@pytest.mark.parametrize("q_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("T", [1, 5, 70])
def test_int8_rows_have_the_bits_of_the_numbers_that_they_stand_for(simd, T, q_dtype):
    eight, plain = in_int8(layer(B=3, T=T, S=70, D=20))
    eight["q"] = plain["q"] = eight["q"].to(q_dtype)
    scales = {n: eight[n] for n in SCALES}
    got = ops.chunk_attention(**arguments(eight), **scales)
    for x, y in zip(got, ops.chunk_attention(**arguments(plain)), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("dtype", [torch.float16, torch.int8], ids=str)
@pytest.mark.parametrize("state", [True, False])
def test_chunk_attention_passes_opcheck(dtype, state):
    args = pages.arguments("chunk_attention", dtype=dtype, state=state)
    torch.library.opcheck(torch.ops.less.chunk_attention.default, tuple(args.values()))


def test_a_long_prompt_cut_into_strips_equals_the_reference_in_float64(simd):
    a = layer(B=2, Q=6, K=2, T=700, S=100, D=24)
    args = arguments(a, decay=0.998)
    want = reference.chunk_attention(**widened(args))
    got = ops.chunk_attention(**args)
    for x, name in zip(got, ("out", "slot_score", "chunk_score", "share"), strict=True):
        assert_close(x, getattr(want, name), torch.float32)


@pytest.mark.parametrize(("heads", "T"), [((2, 2), 3), ((6, 2), 150), ((71, 1), 9)])
def test_a_row_alone_has_the_bits_that_it_has_in_a_padded_batch(simd, heads, T):
    a = layer(B=3, Q=heads[0], K=heads[1], T=T, S=120, D=20)
    a["valid"][:, -1] = True
    out, slot_score, chunk_score, share = ops.chunk_attention(**arguments(a))
    for b in range(3):
        mine = a["valid"][b]
        alone = {n: x[b : b + 1] for n, x in a.items() if n != "maps"}
        for n in ("q", "k", "v", "phi_q"):
            alone[n] = alone[n][:, :, mine]
        single = ops.chunk_attention(**arguments(alone | {"valid": None}))
        assert torch.equal(single[0][0], out[b][:, mine])
        assert torch.equal(single[1][0], slot_score[b])
        assert torch.equal(single[2][0], chunk_score[b][:, mine])
        assert torch.equal(single[3][0], share[b][:, mine])


@pytest.mark.parametrize("T", [1, 20, 400])
def test_the_thread_count_changes_no_bit(simd, with_threads, T):
    args = arguments(layer(B=2, Q=6, K=2, T=T, S=50, D=32))
    with_threads(1)
    want = ops.chunk_attention(**args)
    for threads in (2, 5):
        with_threads(threads)
        got = ops.chunk_attention(**args)
        assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))


def test_rows_of_nothing_but_padding_are_zero_and_receive_nothing(simd):
    a = layer(T=40)
    a["valid"][1] = False
    out, slot_score, chunk_score, share = ops.chunk_attention(**arguments(a))
    assert (out[1] == 0).all()
    assert (chunk_score[1] == 0).all()
    assert (share[1] == 0).all()
    assert torch.equal(slot_score[1], a["score"][1].masked_fill(a["position"][1] < 0, 0.0))


def test_a_weight_of_minus_infinity_silences_a_slot(simd):
    a = layer(T=30, S=100)
    a["weight"][:, :, :97] = -torch.inf
    args = arguments(a)
    want = reference.chunk_attention(**widened(args))
    out, slot_score, _, _ = ops.chunk_attention(**args)
    assert_close(out, want.out, torch.float32)
    assert_close(slot_score, want.slot_score, torch.float32)


MEASURED = """
import resource, torch
from tests.ops import flat as ops
torch.set_num_threads(1)
T, S = {T}, 64
def call(T):
    q, k, v = torch.randn(1, 3, T, 64), torch.randn(1, 1, T, 64), torch.randn(1, 1, T, 64)
    position = torch.full((1, 1, S), -1, dtype=torch.int32)
    slots, floats = torch.zeros(1, 1, S, 64), torch.zeros(1, 1, S)
    return lambda: ops.chunk_attention(
        q, k, v, None, slots, slots, position, floats, floats, scale=0.125
    )
call(100)()
run = call(T)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
out, *_ = run()
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 - out.nbytes)
"""


def test_scratch_of_a_prompt_of_32768_tokens_is_a_few_hundred_bytes_a_token():
    done = subprocess.run(
        [sys.executable, "-c", MEASURED.format(T=32768)], capture_output=True, text=True, check=True
    )
    # 4 bytes of each of a block's 64 queries, and of each of 16 strips; nothing grows like T x T.
    assert int(done.stdout) <= 32768 * 4 * (64 + 16) + (8 << 20)


# -- where kernels are launched: head dims of 64 and more, every pairing of dtypes -----------------


def on(device, args):
    return {n: x.to(device) if isinstance(x, torch.Tensor) else x for n, x in args.items()}


def row_alone(a, b):
    """Row b of a padded batch, without its padding."""
    row = {n: x[b : b + 1] for n, x in a.items() if n != "maps"}
    for n in ("q", "k", "v", "phi_q"):
        row[n] = row[n][:, :, a["valid"][b]].contiguous()
    return row | {"valid": None}


def assert_attended(args, want, scales=None):
    """Runs the op; out is right to a rounding, scores and share to float32's."""
    out, slot_score, chunk_score, share = ops.chunk_attention(**args, **(scales or {}))
    assert out.dtype == args["q"].dtype
    assert_rounded(out, want.out)
    assert_close(slot_score.cpu(), want.slot_score, torch.float32)
    assert_close(chunk_score.cpu(), want.chunk_score, torch.float32)
    assert_close(share.cpu(), want.share, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("heads", "T"), [((2, 2), 1), ((3, 1), 70), ((16, 1), 9), ((8, 2), 65)])
@pytest.mark.parametrize("state", [True, False])
def test_a_launch_equals_the_reference_in_float64(launched, dtype, heads, T, state):
    a = layer(B=2, Q=heads[0], K=heads[1], T=T, S=70, D=64, dtype=dtype)
    args = arguments(a, state, scale=0.1)
    assert_attended(on(launched, args), reference.chunk_attention(**widened(args)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("D", [80, 96, 128, 256])
def test_a_launch_takes_every_head_dim_and_a_softcap(launched, dtype, D):
    a = layer(B=1, Q=4, K=1, T=50, S=100, D=D, R=17, dtype=dtype)
    args = arguments(a, scale=0.1)
    assert_attended(on(launched, args), reference.chunk_attention(**widened(args)))
    args["softcap"] = 3.0
    assert_attended(on(launched, args), reference.chunk_attention(**widened(args)))


@pytest.mark.parametrize("architecture", ["80", "90"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("D", [64, 256])
def test_tensor_cores_that_cut_sums_off_are_as_good(emulator, monkeypatch, D, dtype, architecture):
    monkeypatch.setenv("LESS_EMULATOR_ARCHITECTURE", architecture)
    args = arguments(layer(B=1, Q=4, K=1, T=20, S=70, D=D, dtype=dtype), scale=0.1)
    want = reference.chunk_attention(**widened(args))
    exact = ops.chunk_attention(**args)
    emulator.set(tensor="device")
    try:
        assert_attended(args, want)
        assert not torch.equal(ops.chunk_attention(**args)[1], exact[1])
    finally:
        emulator.set(tensor="exact")


@pytest.mark.parametrize("rows", [in_int8, in_fp8])
@pytest.mark.parametrize(
    ("q_dtype", "D"),
    [(torch.float16, 64), (torch.float16, 256), (torch.bfloat16, 80), (torch.bfloat16, 128),
     (torch.float32, 64)],
    ids=str,
)  # fmt: skip
def test_a_launch_over_rows_of_8_bits_is_over_the_numbers_they_stand_for(
    launched, rows, q_dtype, D
):
    eight, plain = rows(layer(B=2, T=50, S=70, D=D))
    eight["q"] = plain["q"] = eight["q"].to(q_dtype)
    want = reference.chunk_attention(**widened(arguments(plain, scale=0.1)))
    scales = {n: eight[n].to(launched) for n in SCALES}
    assert_attended(on(launched, arguments(eight, scale=0.1)), want, scales)


@pytest.mark.parametrize("q_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_launch_takes_queries_of_another_dtype_than_the_slots(launched, q_dtype, dtype):
    a = layer(D=64, T=20, dtype=dtype)
    a["q"] = a["q"].to(q_dtype)
    args = arguments(a, scale=0.1)
    assert_attended(on(launched, args), reference.chunk_attention(**widened(args)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("heads", "T"), [((2, 2), 3), ((6, 2), 150)])
def test_a_row_has_the_same_bits_alone_and_in_a_padded_batch(launched, dtype, heads, T):
    a = layer(B=3, Q=heads[0], K=heads[1], T=T, S=120, D=64, dtype=dtype)
    a["valid"][:, -1] = True
    batch = ops.chunk_attention(**on(launched, arguments(a)))
    out, slot_score, chunk_score, share = (x.cpu() for x in batch)
    for b in range(3):
        mine = a["valid"][b]
        single = ops.chunk_attention(**on(launched, arguments(row_alone(a, b))))
        single = [x.cpu() for x in single]
        assert torch.equal(single[0][0], out[b][:, mine])
        assert torch.equal(single[1][0], slot_score[b])
        assert torch.equal(single[2][0], chunk_score[b][:, mine])
        assert torch.equal(single[3][0], share[b][:, mine])


def test_a_launch_may_leave_scores_alone(launched):
    for T in (1, 50):
        args = arguments(layer(T=T, D=64, dtype=torch.float16))
        out, slot_score, chunk_score, _ = ops.chunk_attention(**on(launched, args), scores=False)
        want, *_ = ops.chunk_attention(**on(launched, args))
        assert torch.equal(out, want)
        assert torch.equal(slot_score.cpu(), args["score"].masked_fill(args["position"] < 0, 0.0))
        assert (chunk_score == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_empty_or_padding_is_not_looked_at(launched, dtype):
    a = layer(T=70, S=140, D=64, dtype=dtype)
    a["valid"][1] = False
    a["position"][0, 1] = -1
    args = arguments(a, scale=0.1)
    want = reference.chunk_attention(**widened(args))
    empty, padding = a["position"] < 0, ~a["valid"]
    for n in ("slot_k", "slot_v", "weight", "score"):
        a[n][empty] = torch.nan
    for n in ("q", "k", "v", "phi_q"):
        a[n][padding[:, None].expand(a[n].shape[:3])] = torch.nan
    assert_attended(on(launched, arguments(a, scale=0.1)), want)


def test_a_launch_with_extreme_states_and_silent_slots(launched):
    a = layer(T=30, S=100, D=64)
    a["weight"][:, :, :97] = -torch.inf
    for factor in (1e-30, 1e30):
        args = arguments(a | {"H": a["H"] * factor, "z": a["z"] * factor}, scale=0.1)
        assert_attended(on(launched, args), reference.chunk_attention(**widened(args)))


def test_a_launch_over_empty_slots_or_without_tokens(launched):
    for T, S in ((5, 1), (70, 3), (0, 5)):
        args = arguments(layer(T=T, S=S, D=64), scale=0.1)
        if T:
            args["position"].fill_(-1)
        out, slot_score, *_ = ops.chunk_attention(**on(launched, args))
        if T == 0:
            empty = args["position"] < 0
            assert torch.equal(slot_score.cpu(), args["score"].masked_fill(empty, 0.0))
        else:
            assert_rounded(out, reference.chunk_attention(**widened(args)).out)


def test_a_launch_refuses_other_head_dims_by_name(launched):
    args = on(launched, arguments(layer(D=72)))
    with pytest.raises(
        RuntimeError, match=r"chunk_attention: q must have a head dim of .*64.*got 72"
    ):
        ops.chunk_attention(**args)


# -- few queries: the keys of a head are cut into splits, which meet in the workspace --------------


@pytest.mark.parametrize(
    ("dtype", "heads", "T"),
    [(torch.float16, (8, 2), 16), (torch.bfloat16, (2, 2), 1), (torch.float32, (3, 1), 5)],
    ids=str,
)
def test_a_few_tokens_over_many_slots_equal_the_reference_in_float64(launched, dtype, heads, T):
    a = layer(B=2, Q=heads[0], K=heads[1], T=T, S=500, D=64, R=5, dtype=dtype)
    a["position"][0, 0, 70:] = -1  # most splits of this head have nothing
    args = arguments(a, scale=0.1)
    assert_attended(on(launched, args), reference.chunk_attention(**widened(args)))


@pytest.mark.parametrize("rows", [in_int8, in_fp8])
def test_a_few_tokens_over_many_rows_of_8_bits(launched, rows):
    eight, plain = rows(layer(B=1, T=3, S=300, D=64))
    want = reference.chunk_attention(**widened(arguments(plain, scale=0.1)))
    scales = {n: eight[n].to(launched) for n in SCALES}
    assert_attended(on(launched, arguments(eight, scale=0.1)), want, scales)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_row_of_few_tokens_has_the_same_bits_in_a_batch_of_many(launched, dtype):
    a = layer(B=3, Q=2, K=1, T=70, S=300, D=64, dtype=dtype)
    a["valid"][0] = torch.arange(70) >= 67
    a["valid"][1] = False
    batch = [x.cpu() for x in ops.chunk_attention(**on(launched, arguments(a)))]
    for b in range(3):
        mine = a["valid"][b]
        single = ops.chunk_attention(**on(launched, arguments(row_alone(a, b))))
        for name, x, y in zip(("out", "slots", "call", "share"), single, batch, strict=True):
            assert torch.equal(x[0].cpu(), y[b] if name == "slots" else y[b][:, mine]), name
        assert (batch[0][b][:, ~mine] == 0).all()
        assert (batch[3][b][:, ~mine] == 0).all()
