import pytest
import torch

from tests.helpers import assert_close, misplaced, random_qkv
from tests.ops import flat_reference as reference
from tests.ops.common import MISALIGNED

pytest.importorskip("less._C")
from tests.ops import flat as ops

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def prompt(B=2, Q=6, K=2, T=70, D=64, dtype=torch.float32, seed=0):
    """Queries, keys, and padding on the left of some rows."""
    q, k, _ = random_qkv(B, Q, K, T, D, seed=seed, dtype=dtype)
    valid = torch.arange(T) >= torch.arange(B)[:, None] * 5
    return q, k, valid


def exact(q, k, valid, **options):
    return reference.prompt_scores(q.double(), k.double(), valid, **options)


def masses(q, k, valid, scale, softcap=0.0):
    """The log-masses of queries, in float64, 0 for padding."""
    B, Q, T, D = q.shape
    query = q.double().view(B, k.shape[1], -1, T, D)
    logits = scale * torch.einsum("bkgtd,bknd->bkgtn", query, k.double())
    if softcap:
        logits = softcap * (logits / softcap).tanh()
    seen = torch.ones(T, T, dtype=torch.bool).tril() & valid[:, None, :]
    lse = logits.masked_fill(~seen[:, None, None], -torch.inf).logsumexp(-1).view(B, Q, T)
    return torch.where(valid[:, None], lse, 0.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("heads", "T"), [((2, 2), 1), ((6, 2), 70), ((17, 1), 150)])
def test_prompt_scores_equal_the_reference_in_float64(device, dtype, heads, T):
    q, k, valid = prompt(Q=heads[0], K=heads[1], T=T, dtype=dtype)
    options = {"scale": 0.1, "decay": 0.98}
    want = exact(q, k, valid, **options)
    got = ops.prompt_scores(q.to(device), k.to(device), valid.to(device), **options)
    assert got.dtype == torch.float32
    assert_close(got.cpu(), want, torch.float32)
    assert (got.cpu()[~valid[:, None].expand_as(got)] == 0).all()


def test_log_masses_may_be_given(device):
    q, k, valid = prompt(dtype=torch.float16)
    lse = masses(q, k, valid, 0.1)
    want = exact(q, k, valid, scale=0.1, decay=0.9)
    lse = lse.float()
    inputs = [x.to(device) for x in (q, k, valid, lse)]
    assert_close(ops.prompt_scores(*inputs, scale=0.1, decay=0.9).cpu(), want, torch.float32)
    half = [x.to(device) for x in (q, k, valid, lse + 1.0)]
    got = ops.prompt_scores(*half, scale=0.1, decay=0.9).cpu()
    assert_close(got, want / torch.e, torch.float32)


def test_a_prompt_without_slots_has_the_scores_of_chunk_attention(device):
    q, k, valid = prompt(T=100)
    S = 3
    slots = torch.zeros(2, 2, S, 64)
    floats = torch.zeros(2, 2, S)
    inputs = [
        x.to(device) for x in (q, k, k, valid, slots, slots, floats.int() - 1, floats, floats)
    ]
    _, _, want, _ = ops.chunk_attention(*inputs, scale=0.1, decay=0.97)
    got = ops.prompt_scores(inputs[0], inputs[1], inputs[3], scale=0.1, decay=0.97)
    assert_close(got.cpu(), want.cpu(), torch.float32)


@pytest.mark.parametrize("q_dtype", DTYPES, ids=str)
def test_int8_keys_have_the_scores_of_the_numbers_that_they_stand_for(device, q_dtype):
    q, k, valid = prompt()
    q = q.to(q_dtype)
    eight, scale = reference.quantize(k)
    want = exact(q, reference.dequantize(eight, scale.double()), valid, scale=0.1)
    got = ops.prompt_scores(
        q.to(device), eight.to(device), valid.to(device), k_scale=scale.to(device), scale=0.1
    )
    assert_close(got.cpu(), want, torch.float32)


@pytest.mark.parametrize("q_dtype", DTYPES, ids=str)
def test_fp8_keys_have_the_scores_of_the_numbers_that_they_stand_for(launched, q_dtype):
    q, k, valid = prompt()
    q = q.to(q_dtype)
    eight, scale = reference.quantize(k, dtype=torch.float8_e4m3fn)
    want = exact(q, eight.double() * scale.double()[..., None], valid, scale=0.1)
    got = ops.prompt_scores(
        q.to(launched),
        eight.to(launched),
        valid.to(launched),
        k_scale=scale.to(launched),
        scale=0.1,
    )
    assert_close(got.cpu(), want, torch.float32)


@pytest.mark.parametrize("D", [80, 96, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_every_head_dim_and_a_softcap(device, D, dtype):
    q, k, valid = prompt(B=1, Q=4, K=1, T=40, D=D, dtype=dtype)
    for softcap in (0.0, 4.0):
        options = {"scale": 0.2, "softcap": softcap}
        got = ops.prompt_scores(q.to(device), k.to(device), valid.to(device), **options)
        assert_close(got.cpu(), exact(q, k, valid, **options), torch.float32)


def test_scores_add_up_to_the_queries(device):
    q, k, valid = prompt()
    got = ops.prompt_scores(q.to(device), k.to(device), valid.to(device), scale=0.1).cpu()
    want = 3.0 * valid.sum(1).float()
    torch.testing.assert_close(got.sum(2), want[:, None].expand(2, 2), rtol=1e-5, atol=1e-5)


def test_a_row_alone_has_the_bits_that_it_has_in_a_padded_batch(device):
    q, k, valid = prompt(B=3, T=90, dtype=torch.bfloat16)
    valid[2, 40:44] = False
    inputs = [x.to(device) for x in (q, k, valid)]
    got = ops.prompt_scores(*inputs, scale=0.1, decay=0.9).cpu()
    for b in range(3):
        mine = valid[b]
        alone = [x[b : b + 1, :, mine].contiguous().to(device) for x in (q, k)]
        single = ops.prompt_scores(*alone, scale=0.1, decay=0.9).cpu()
        assert torch.equal(single[0], got[b][:, mine])


@pytest.mark.parametrize("T", [1, 20, 400])
def test_the_thread_count_changes_no_bit(simd, with_threads, T):
    q, k, valid = prompt(T=T, D=24)
    with_threads(1)
    want = ops.prompt_scores(q, k, valid, scale=0.1)
    for threads in (2, 5):
        with_threads(threads)
        assert torch.equal(ops.prompt_scores(q, k, valid, scale=0.1), want)


@pytest.mark.parametrize("shape", [(0, 2, 1, 3, 64), (1, 2, 1, 0, 64)])
def test_no_tokens_are_no_error(device, shape):
    B, Q, K, T, D = shape
    got = ops.prompt_scores(
        torch.zeros(B, Q, T, D, device=device), torch.zeros(B, K, T, D, device=device), scale=1.0
    )
    assert got.shape == (B, K, T)


def test_a_launch_refuses_other_head_dims_by_name(launched):
    q, k, valid = prompt(T=5, D=72)
    with pytest.raises(
        RuntimeError, match=r"prompt_scores: q must have a head dim of .*64.*got 72"
    ):
        ops.prompt_scores(q.to(launched), k.to(launched), valid.to(launched), scale=0.1)


@pytest.mark.parametrize("name", ["q", "k", "workspace"])
def test_a_launch_refuses_rows_that_do_not_begin_at_16_bytes(launched, name):
    q, k, valid = prompt(T=5)
    args = {"q": q, "k": k, "valid": valid, "workspace": torch.zeros(4096, dtype=torch.uint8)}
    args = {n: x.to(launched) for n, x in args.items()}
    ops.prompt_scores(**args, scale=0.1)
    args[name] = misplaced(args[name])
    with pytest.raises(RuntimeError, match=MISALIGNED):
        ops.prompt_scores(**args, scale=0.1)


def test_prompt_scores_passes_opcheck():
    q, k, valid = prompt(T=5)
    lse = masses(q, k, valid, 0.1).float()
    for given in (lse, None):
        torch.library.opcheck(
            torch.ops.less.prompt_scores.default, (q, k, None, valid, given, None, 0.1, 0.0, 0.9)
        )


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("q", lambda x: x[0], r"q must be \[B, Q, T, D\], got shape \[6, 5, 64\]"),
        ("q", lambda x: x[:, :5], "q's heads must be a multiple of 2, got 5"),
        ("q", lambda x: x.double(), "q must be float32, bfloat16 or float16, got float64"),
        ("k", lambda x: x[:, :, :4], r"k must have shape \[2, 2, 5, 64\], got \[2, 2, 4, 64\]"),
        ("k", lambda x: x.to(torch.int8), "k_scale belongs to a k of 8 bits, and must be given"),
        ("k_scale", lambda x: torch.ones(2, 2, 5), "k_scale belongs to a k of 8 bits"),
        ("valid", lambda x: x.int(), "valid must be bool, got int32"),
        ("lse", lambda x: torch.zeros(2, 6, 4), r"lse must have shape \[2, 6, 5\]"),
        ("softcap", lambda x: -1.0, "softcap must be 0 .* or a positive number, got -1"),
    ],
)
def test_prompt_scores_refuses_bad_input(name, change, message):
    q, k, valid = prompt(T=5)
    args = {"q": q, "k": k, "valid": valid, "lse": None, "k_scale": None, "softcap": 0.0}
    args[name] = change(args[name])
    with pytest.raises(RuntimeError, match=f"prompt_scores: {message}"):
        ops.prompt_scores(**args, scale=0.1)
