"""Packed rows where kernels are launched, against the reference: rotation, codec, step, prompts."""

from __future__ import annotations

import pytest
import torch

from less import H2O, PagedLayer, PageLayout
from less.dtypes import FORMATS
from less.layer import Paged, Space
from less.reference import Attended, codec
from tests.helpers import assert_close, random_maps, random_qkv

pytest.importorskip("less._C")
from less.backend import ops as less_ops

D_OF = (64, 128)
#: Fields whose bits a step decides; scores are sums of floats.
EXACT = ("position", "k", "v", "k_scale", "v_scale", "hot_k", "hot_v", "hot_k_scale", "hot_v_scale")


def space_of(K, D):
    g = torch.Generator().manual_seed(5)
    mean, scale = torch.randn(2, K, D, generator=g), torch.rand(2, K, D, generator=g) + 0.5
    return Space.of(
        K, D, key_mean=mean[0], key_scale=scale[0], value_mean=mean[1], value_scale=scale[1]
    )


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
        assert_close(mine.slots.score, theirs.slots.score, dtype)


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


@pytest.mark.parametrize("rotation", codec.ROTATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("D", [64, 80, 96, 128, 256])
def test_a_launched_rotation_has_the_references_bits(launched, rotation, dtype, D):
    native, reference = layers(form=torch.float32, D=D, Q=6, K=2, sinks=0, hot=0, device=launched)
    heads = 6 if rotation in ("query", "output") else 2
    x = torch.randn(2, heads, 3, D, generator=torch.Generator().manual_seed(1)).to(dtype)
    valid = torch.tensor([[True, True, False], [True, False, True]])
    got = less_ops.rotate(x.to(launched), native.plan, rotation, valid.to(launched))
    want = codec.rotate(x, reference.plan.space, rotation, valid)
    assert torch.equal(got.cpu(), want)


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


@pytest.mark.parametrize("where", ["cluster", "workspace"])
@pytest.mark.parametrize("G", [1, 3, 8])
def test_blocks_of_packed_slots_meet(launched, monkeypatch, where, G, request):
    if where == "cluster" and request.config.getoption("--emulator-tier") == "ptx_80":
        pytest.skip("sm_80 has no clusters")
    if where == "workspace":
        monkeypatch.setenv("LESS_EMULATOR_ARCHITECTURE", "80")
    native, reference = layers(Q=2 * G, K=2, capacity=300, device=launched)
    check_calls(native, reference, [280, *[1] * 25])


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
    calls = [random_qkv(3, 4, 2, T, 64, seed=i) for i, T in enumerate([150, 1, 1, 40, *[1] * 12])]

    def run(rows):
        pool = native.new_pool(len(range(3)[rows]))
        outs = []
        for call in calls:
            outs.append(native.attend(pool, *(x[rows].to(launched) for x in call)))
        return torch.cat(outs, 2), pool

    out, pool = run(slice(0, 3))
    for b in range(3):
        alone, own = run(slice(b, b + 1))
        assert torch.equal(alone[0], out[b])
        assert torch.equal(own[0], pool[b])


def odd_rows(D):
    """Rows of every kind that the codec treats apart."""
    g = torch.Generator().manual_seed(2)
    x = torch.randn(24, D, generator=g)
    x[1] = 0.0
    x[2] *= 1e-30
    x[3] *= 1e30
    x[4, 1:] = 0.0
    x[5] = 1.0
    x[6] = torch.arange(D) % 2 * 2.0 - 1.0
    x[7, ::3] = torch.nan
    x[8, 0] = torch.inf
    return x


@pytest.mark.parametrize("D", [*D_OF, 256])
@pytest.mark.parametrize("form", FORMATS)
def test_compact_encodes_rows_of_any_size_to_the_references_bits(launched, form, D):
    native, reference = layers(form, D, 1, 1, capacity=30, hot=1, sinks=0, device=launched)
    k = odd_rows(D).view(1, 1, 24, D)
    pool, want = native.new_pool(1), reference.new_pool(1)
    score = torch.zeros(1, 1, 54)
    score[..., 30:] = torch.rand(24, generator=torch.Generator().manual_seed(1))
    for layer, own, device in ((native, pool, launched), (reference, want, "cpu")):
        rows = layer.backend.rounded(*(x.to(device) for x in (k, k.flip(-1))), layer.plan)
        step = Attended(torch.zeros(0), score.to(device), torch.zeros(1, 1, 24, device=device))
        layer.backend.compact(rows, None, step, Paged(own), layer.plan, None)
    mine, theirs = (native.layout.views(x.cpu())[0].slots for x in (pool, want))
    assert torch.equal(mine.position, theirs.position)
    for label in ("k", "v"):
        assert torch.equal(getattr(mine, label), getattr(theirs, label))
        scale, wanted = getattr(mine, f"{label}_scale"), getattr(theirs, f"{label}_scale")
        torch.testing.assert_close(scale, wanted, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(("layout", "message"), [
    ({"D": 96}, "packed rows must have a head dim of a multiple of 64, at most 256, on a GPU"),
    ({"hot_dtype": torch.float16}, "hot rows of packed formats must be int8 on a GPU"),
    ({"rank": 4}, "packed rows with feature maps have no CUDA kernel yet; use victim forget"),
], ids=["head dim", "hot rows", "maps"])  # fmt: skip
@pytest.mark.parametrize("T", [1, 3])
def test_packed_rows_without_a_kernel_are_refused_by_name(launched, layout, message, T):
    if "rank" in layout:
        page = PageLayout(2, 64, 40, "k4v4", **layout)
        maps = random_maps(2, 2, 64, 16, 4, "exp")
        native = PagedLayer(H2O(34, 6), page, 2, maps=maps, device=launched)
    else:
        native, _ = layers(device=launched, **layout)
    pool = native.new_pool(1)
    before = pool.clone()
    q, k, v = (x.to(launched) for x in random_qkv(1, 2, 2, T, native.layout.head_dim))
    with pytest.raises(RuntimeError, match=message):
        native.attend(pool, q, k, v)
    assert torch.equal(pool, before)
