"""Packed rows where kernels are launched: steps, prompts and chunks, against the reference."""

from __future__ import annotations

import pytest
import torch

from less import H2O, Full, PagedLayer, PageLayout, SinkRecent
from less.dtypes import FORMATS
from tests.helpers import assert_close, random_maps, random_qkv
from tests.ops.common import assert_alone_as_in_a_batch, space_of

pytest.importorskip("less._C")

D_OF = (64, 80, 96, 128, 256)
#: Fields whose bits a step decides; scores are sums of floats.
EXACT = ("position", "k", "v", "k_scale", "v_scale", "hot_k", "hot_v", "hot_k_scale", "hot_v_scale")


def layers(form="k4v4", D=64, Q=2, K=2, capacity=40, device="cpu", policy=None, **layout):
    """The same layer twice: native on the device, and the reference."""
    S = max(capacity) if isinstance(capacity, tuple) else capacity
    policy = policy or H2O(heavy=S - 6, recent=6, decay=0.97)
    page = PageLayout(K, D, capacity, form, **({"sinks": 2, "hot": 5} | layout))
    made = {"q_heads": Q, "space": space_of(K, D)}
    native = PagedLayer(policy, page, backend="native", device=device, **made)
    return native, PagedLayer(policy, page, backend="reference", **made)


def assert_same(native, pool, want, dtype=torch.float32):
    """Two pools hold the same pages: all bits, but for scores."""
    for mine, theirs in zip(
        native.layout.views(pool.cpu()), native.layout.views(want), strict=True
    ):
        assert torch.equal(mine.seen, theirs.seen)
        assert torch.equal(mine.slots.position, theirs.slots.position)
        for name in EXACT:
            got, wanted = getattr(mine.slots, name), getattr(theirs.slots, name)
            assert (got is None) == (wanted is None)
            if got is not None:
                assert torch.equal(got, wanted), name
        assert_close(mine.slots.score, theirs.slots.score, torch.float16)


def check_calls(native, reference, lengths, B=2, dtype=torch.float16, pages=None, valid=None):
    """Calls of so many tokens each, on both, from empty pages."""
    Q, K, D = native.plan.spec.q_heads, native.layout.kv_heads, native.layout.head_dim
    N = B if pages is None else 5
    pool, want = native.new_pool(N), reference.new_pool(N)
    for i, T in enumerate(lengths):
        q, k, v = random_qkv(B, Q, K, T, D, seed=i, dtype=dtype)
        there = None if valid is None else valid(i, T)
        a = {"pages": pages, "valid": there}
        on = {n: None if x is None else x.to(native.device) for n, x in a.items()}
        moved = (x.to(native.device) for x in (q, k, v))
        out = native.attend(pool, *moved, **on)
        expected = reference.attend(want, q, k, v, **a)
        assert out.dtype == dtype
        assert_close(out, expected, dtype)
        assert_same(native, pool, want)
    return pool


@pytest.mark.parametrize("D", D_OF)
@pytest.mark.parametrize("form", FORMATS)
def test_a_launched_step_on_packed_rows_equals_the_reference(launched, form, D):
    native, reference = layers(form, D, Q=4, K=2, capacity=28, device=launched)
    check_calls(native, reference, [1] * 34)


@pytest.mark.parametrize("D", D_OF)
@pytest.mark.parametrize("form", FORMATS)
def test_prompts_and_chunks_on_packed_rows_equal_the_reference(launched, form, D):
    native, reference = layers(form, D, Q=6, K=2, capacity=40, device=launched)
    check_calls(native, reference, [70, 1, 3, 9, 1, 60])


@pytest.mark.parametrize("where", ["cluster", "workspace", "one block"])
@pytest.mark.parametrize("G", [1, 3, 8])
def test_blocks_of_packed_slots_meet(launched, monkeypatch, where, G, request):
    if where == "cluster" and request.config.getoption("--emulator-tier") == "ptx_80":
        pytest.skip("sm_80 has no clusters")
    if where == "workspace":
        monkeypatch.setenv("LESS_EMULATOR_ARCHITECTURE", "80")
    if where == "one block":  # has all ranges of a head
        monkeypatch.setenv("LESS_EMULATOR_SMS", "1")
    native, reference = layers(Q=2 * G, K=2, capacity=300, device=launched)
    check_calls(native, reference, [310, *[1] * 6])


@pytest.mark.parametrize(
    "policy",
    [H2O(heavy=33, recent=7, sinks=3, per_age=True), SinkRecent(sinks=4, recent=36), Full(40)],
    ids=["per age", "youngest", "full"],
)
def test_packed_rows_leave_by_any_rule(launched, policy):
    native, reference = layers(capacity=40, policy=policy, device=launched)
    lengths = [*[1] * 9, 20, *[1] * 11] if isinstance(policy, Full) else [*[1] * 30, 25, *[1] * 12]
    check_calls(native, reference, lengths)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int8], ids=str)
def test_rows_that_are_not_packed_may_live_in_a_space_too(launched, dtype):
    native, reference = layers(dtype, Q=4, capacity=40, sinks=0, hot=0, device=launched)
    check_calls(native, reference, [50, *[1] * 6, 9, 1])


def test_heads_of_different_capacity_hold_packed_rows(launched):
    native, reference = layers(Q=4, K=4, capacity=(40, 9, 140, 40), device=launched)
    check_calls(native, reference, [30, 1, 1, 20, *[1] * 8])


@pytest.mark.parametrize(("sinks", "hot"), [(0, 1), (0, 8), (4, 16), (9, 1)])
def test_any_number_of_slots_is_hot(launched, sinks, hot):
    native, reference = layers(capacity=37, sinks=sinks, hot=hot, device=launched)
    check_calls(native, reference, [*[1] * 24, 12, *[1] * 24])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_padding_and_absent_pages_leave_packed_rows_alone(launched, dtype):
    native, reference = layers(device=launched)
    pages = torch.tensor([3, -1, 1], dtype=torch.int32)

    def valid(i, T):
        g = torch.Generator().manual_seed(i)
        return torch.rand(3, T, generator=g) < 0.7

    check_calls(native, reference, [50, *[1] * 12, 5], 3, dtype, pages, valid)


@pytest.mark.parametrize("form", ["k4v4", "k3v2"])
def test_a_row_of_packed_slots_alone_has_the_bits_that_it_has_in_a_batch(launched, form):
    native, _ = layers(form, Q=4, K=2, capacity=200, device=launched)
    assert_alone_as_in_a_batch(native, [150, 1, 1, 40, *[1] * 12])


@pytest.mark.parametrize("D", D_OF)
def test_queries_and_values_keep_their_digits_beside_larger_ones(launched, D):
    """Of float32; in their row and in others."""
    native, reference = layers(D=D, Q=6, K=2, capacity=300, device=launched)
    pool, want = native.new_pool(1), reference.new_pool(1)
    for i, T in enumerate([310, 1, 1]):
        q, k, v = random_qkv(1, 6, 2, T, D, seed=i)
        q[..., 3] *= 20.0
        v *= 10.0 ** torch.linspace(-1.0, 1.0, T)[:, None]
        out = native.attend(pool, *(x.to(native.device) for x in (q, k, v)))
        assert_close(out, reference.attend(want, q, k, v), torch.float32, factor=3.0)


def test_a_query_of_nan_or_infinity_shows_in_its_own_output_alone(launched):
    native, _ = layers(Q=4, K=2, capacity=140, device=launched)
    pool = native.new_pool(1)
    native.attend(pool, *(x.to(launched) for x in random_qkv(1, 4, 2, 150, 64)))
    q, k, v = random_qkv(1, 4, 2, 1, 64, seed=1)
    q[0, 0, 0, 5], q[0, 3, 0, 60] = torch.nan, torch.inf
    out = native.attend(pool, *(x.to(launched) for x in (q, k, v))).cpu()
    assert torch.equal(out.isnan().all(-1)[0, :, 0], torch.tensor([True, False, False, True]))
    assert not out[0, 1:3].isnan().any()


@pytest.mark.parametrize("T", [1, 3])
def test_packed_rows_with_maps_are_refused_by_name(launched, T):
    page = PageLayout(2, 64, 40, "k4v4", rank=4)
    maps = random_maps(2, 2, 64, 16, 4, "exp")
    native = PagedLayer(H2O(34, 6), page, 2, maps=maps, device=launched)
    pool = native.new_pool(1)
    before = pool.clone()
    rows = (x.to(launched) for x in random_qkv(1, 2, 2, T, 64))
    message = "packed rows with feature maps have no CUDA kernel yet; use victim forget"
    with pytest.raises(RuntimeError, match=message):
        native.attend(pool, *rows)
    assert torch.equal(pool, before)


@pytest.mark.parametrize("hot_dtype", [torch.float16, torch.float32], ids=str)
def test_prompts_take_hot_rows_of_any_dtype_but_steps_int8_alone(launched, hot_dtype):
    native, reference = layers(hot_dtype=hot_dtype, device=launched)
    pool = check_calls(native, reference, [70, 3])
    before = pool.clone()
    token = (x.to(launched) for x in random_qkv(2, 2, 2, 1, 64))
    with pytest.raises(RuntimeError, match="hot rows of packed formats must be int8 on a GPU"):
        native.attend(pool, *token)
    assert torch.equal(pool, before)
