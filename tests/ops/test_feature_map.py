import pytest
import torch

from less import reference
from less.sidekick import MATRICES
from tests.helpers import assert_close, random_maps

pytest.importorskip("less._C")
from less import ops

SHAPES = [(1, 1, 1, 1, 1, 1), (2, 3, 5, 16, 12, 8), (1, 2, 3, 13, 7, 5), (1, 4, 2, 128, 512, 16)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["paper", "exp"])
@pytest.mark.parametrize("shape", SHAPES)
def test_feature_maps_equal_the_reference_in_float64(simd, shape, kind, dtype):
    B, N, T, D, E, R = shape
    maps = random_maps(N, N, D, E, R, kind, seed=T)
    x = torch.randn(B, N, T, D, generator=torch.Generator().manual_seed(1)).to(dtype) * 2
    wide = {n: t.double() for n, t in maps.items()}
    for side in ("phi", "psi"):
        got = getattr(ops, side)(x, maps, kind)
        want = getattr(reference, side)(x.double(), wide, kind)
        assert got.dtype == torch.float32
        assert (got >= 0).all()
        assert_close(got, want, torch.float32)


MAP_DTYPES = [torch.bfloat16, torch.float16, torch.int8]


def narrowed(maps, dtype):
    """A layer's maps with matrices of another dtype, and the float32 that those stand for."""
    small, wide = dict(maps), dict(maps)
    for name in MATRICES:
        if dtype == torch.int8:
            small[name], scale = reference.quantize(maps[name], -2)
            small[f"{name}_scale"] = scale
            wide[name] = reference.dequantize(small[name], scale, -2)
        else:
            small[name] = maps[name].to(dtype)
            wide[name] = small[name].float()
    return small, wide


@pytest.mark.parametrize("dtype", MAP_DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["paper", "exp"])
@pytest.mark.parametrize("shape", SHAPES)
def test_maps_of_fewer_bits_are_those_of_the_numbers_they_stand_for(simd, shape, kind, dtype):
    B, N, T, D, E, R = shape
    small, wide = narrowed(random_maps(N, N, D, E, R, kind, seed=T), dtype)
    x = torch.randn(B, N, T, D, generator=torch.Generator().manual_seed(1)) * 2
    double = {n: t.double() for n, t in wide.items()}
    for side in ("phi", "psi"):
        got = getattr(ops, side)(x, small, kind)
        assert_close(got, getattr(reference, side)(x.double(), double, kind), torch.float32)
        assert_close(got, getattr(reference, side)(x, small, kind), torch.float32)
        if dtype != torch.int8:  # widening is exact, so nothing else may differ
            assert torch.equal(got, getattr(ops, side)(x, wide, kind))


@pytest.mark.parametrize("dtype", MAP_DTYPES, ids=str)
def test_rows_of_small_maps_have_the_same_bits_in_any_batch_and_thread_count(
    simd, with_threads, dtype
):
    maps, _ = narrowed(random_maps(3, 3, 32, 48, 8, "exp"), dtype)
    x = torch.randn(4, 3, 100, 32)
    with_threads(1)
    whole = ops.psi(x, maps, "exp")
    with_threads(3)
    assert torch.equal(ops.psi(x, maps, "exp"), whole)
    assert torch.equal(ops.psi(x[2:3, :, 40:41], maps, "exp"), whole[2:3, :, 40:41])


@pytest.mark.parametrize("dtype", MAP_DTYPES, ids=str)
def test_feature_map_of_small_maps_passes_opcheck(dtype):
    maps, _ = narrowed(random_maps(2, 2, 8, 6, 3, "exp"), dtype)
    names = ("k_w1", "k_w2", "k_w1_scale", "k_w2_scale", "k_bias")
    args = (torch.randn(1, 2, 4, 8), *(maps.get(n) for n in names), None, None, None, 1)
    torch.library.opcheck(torch.ops.less.feature_map.default, args)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"w1_scale": None}, "w1_scale and w2_scale belong to int8 weights, and must be given"),
        ({"w2_scale": None}, "w1_scale and w2_scale belong to int8 weights, and must be given"),
        ({"w1_scale": torch.ones(2, 8)}, r"w1_scale must have shape \[2, 6\], got \[2, 8\]"),
        ({"w2_scale": torch.ones(2, 3).half()}, "w2_scale must be float32, got float16"),
        ({"w2": torch.zeros(2, 6, 3)}, "w2 must be int8, got float32"),
        (
            {"w1": torch.zeros(2, 8, 6), "w2": torch.zeros(2, 6, 3)},
            "w1_scale and w2_scale belong to int8 weights",
        ),
    ],
)
def test_feature_map_refuses_scales_that_do_not_fit(change, message):
    args = {
        "x": torch.zeros(1, 2, 4, 8),
        "w1": torch.zeros(2, 8, 6, dtype=torch.int8),
        "w2": torch.zeros(2, 6, 3, dtype=torch.int8),
        "w1_scale": torch.ones(2, 6),
        "w2_scale": torch.ones(2, 3),
    }
    assert torch.equal(ops.feature_map(**args, kind="exp"), torch.ones(1, 2, 4, 3))
    with pytest.raises(RuntimeError, match=f"feature_map: {message}"):
        ops.feature_map(**{**args, **change}, kind="exp")


def test_exp_features_are_clamped_and_never_overflow(simd):
    maps = random_maps(1, 1, 8, 8, 3, "exp")
    x = torch.randn(1, 1, 40, 8) * 1e4
    y = ops.phi(x, maps, "exp")
    assert y.isfinite().all()
    limit = torch.tensor(15.0).exp().item()
    assert y.max().item() == pytest.approx(limit, rel=1e-6)
    assert y.min().item() == pytest.approx(1 / limit, rel=1e-6)


def test_the_scale_of_the_papers_psi_may_be_tiny(simd):
    maps = random_maps(1, 1, 8, 8, 4, "paper")
    maps["k_scale"] = torch.full_like(maps["k_scale"], 1e-6)
    x = torch.randn(1, 1, 9, 8)
    wide = {n: t.double() for n, t in maps.items()}
    assert_close(ops.psi(x, maps, "paper"), reference.psi(x.double(), wide, "paper"), torch.float32)


def test_a_row_has_the_same_bits_in_any_batch_and_thread_count(simd, with_threads):
    maps = random_maps(3, 3, 32, 48, 8, "paper")
    x = torch.randn(4, 3, 100, 32)
    with_threads(1)
    whole = ops.psi(x, maps, "paper")
    with_threads(3)
    assert torch.equal(ops.psi(x, maps, "paper"), whole)
    assert torch.equal(ops.psi(x[2:3, :, 40:41], maps, "paper"), whole[2:3, :, 40:41])


@pytest.mark.parametrize("kind", ["paper", "exp"])
def test_feature_map_passes_opcheck(kind):
    maps = random_maps(2, 2, 8, 6, 3, kind)
    x = torch.randn(1, 2, 4, 8)
    rest = [maps.get(n) for n in ("k_bias", "k_mix", "k_scale", "k_mix_scale")]
    args = (x, maps["k_w1"], maps["k_w2"], None, None, *rest, {"paper": 0, "exp": 1}[kind])
    torch.library.opcheck(torch.ops.less.feature_map.default, args)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 3, 4)}, r"x must be \[B, heads, T, D\]"),
        ({"x": torch.zeros(1, 2, 4, 8, dtype=torch.float64)}, "x must be float32, bfloat16 or"),
        ({"w1": torch.zeros(2, 9, 6)}, r"w1 must have shape \[2, 8, 6\], got \[2, 9, 6\]"),
        ({"w2": torch.zeros(2, 6, 3).half()}, "w2 must be float32, got float16"),
        ({"bias": torch.zeros(2, 4)}, r"bias must have shape \[2, 3\], got \[2, 4\]"),
        ({"mix": torch.zeros(2, 3, 3)}, "mix belongs to kind 0"),
    ],
)
def test_feature_map_refuses_bad_input(change, message):
    args = {"x": torch.zeros(1, 2, 4, 8), "w1": torch.zeros(2, 8, 6), "w2": torch.zeros(2, 6, 3)}
    with pytest.raises(RuntimeError, match=f"feature_map: {message}"):
        ops.feature_map(**{**args, **change}, kind="exp")
    with pytest.raises(ValueError, match="feature_map: kind must be 'paper' or 'exp', got 'no'"):
        ops.feature_map(**args, kind="no")
