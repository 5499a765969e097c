import pytest
import torch

from less.sidekick import MATRICES
from tests.helpers import assert_close, random_maps
from tests.ops import flat_reference as reference

pytest.importorskip("less._C")
from tests.ops import flat as ops
from tests.ops import pages

SHAPES = [(1, 1, 1, 1, 1, 1), (2, 3, 5, 16, 12, 8), (1, 2, 3, 13, 7, 5), (1, 4, 2, 128, 512, 16)]
# Of a GPU: every head dim, more rows than a block takes, ranks up to the highest, widths that no 16
# bytes divide.
GPU_SHAPES = [
    (1, 1, 1, 64, 1, 1),
    (2, 2, 37, 64, 64, 8),
    (1, 2, 20, 80, 72, 16),
    (5, 1, 7, 96, 37, 5),
    (2, 1, 3, 128, 512, 17),
    (1, 1, 33, 256, 80, 64),
]
X_DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def on(device, maps):
    return {n: t.to(device) for n, t in maps.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["paper", "exp", "centroid"])
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
    if dtype == torch.float32:
        return small, wide
    for name in [n for n in MATRICES if n in maps]:
        if dtype == torch.int8:
            small[name], scale = reference.quantize(maps[name], -2)
            small[f"{name}_scale"] = scale
            wide[name] = reference.dequantize(small[name], scale, -2)
        else:
            small[name] = maps[name].to(dtype)
            wide[name] = small[name].float()
    return small, wide


@pytest.mark.parametrize("dtype", MAP_DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["paper", "exp", "centroid"])
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


@pytest.mark.parametrize("w_dtype", [torch.float32, *MAP_DTYPES], ids=str)
@pytest.mark.parametrize("x_dtype", X_DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["paper", "exp", "centroid"])
@pytest.mark.parametrize("shape", GPU_SHAPES)
def test_a_gpus_features_are_those_of_the_numbers_in_float64(
    launched, shape, kind, x_dtype, w_dtype
):
    B, N, T, D, E, R = shape
    small, wide = narrowed(random_maps(N, N, D, E, R, kind, seed=T), w_dtype)
    x = (torch.randn(B, N, T, D, generator=torch.Generator().manual_seed(1)) * 2).to(x_dtype)
    wide = {n: t.double() for n, t in wide.items()}
    for side in ("phi", "psi"):
        got = getattr(ops, side)(x.to(launched), on(launched, small), kind).cpu()
        assert_close(got, getattr(reference, side)(x.double(), wide, kind), torch.float32)


@pytest.mark.parametrize("w_dtype", MAP_DTYPES, ids=str)
@pytest.mark.parametrize("by", [1e-30, 1e-6, 1e4, 1e25])
def test_rows_of_any_magnitude_keep_their_digits(launched, w_dtype, by):
    small, wide = narrowed(random_maps(1, 1, 64, 32, 8, "paper"), w_dtype)
    x = torch.randn(1, 1, 20, 64, generator=torch.Generator().manual_seed(1)) * by
    wide = {n: t.double() for n, t in wide.items()}
    got = ops.phi(x.to(launched), on(launched, small), "paper").cpu()
    assert_close(got, reference.phi(x.double(), wide, "paper"), torch.float32)


@pytest.mark.parametrize("w_dtype", [torch.float32, *MAP_DTYPES], ids=str)
@pytest.mark.parametrize("x_dtype", X_DTYPES, ids=str)
def test_a_row_has_the_same_bits_in_any_block_of_a_gpu(launched, x_dtype, w_dtype):
    maps, _ = narrowed(random_maps(2, 2, 64, 80, 8, "paper"), w_dtype)
    maps = on(launched, maps)
    x = torch.randn(3, 2, 50, 64, generator=torch.Generator().manual_seed(1)).to(launched, x_dtype)
    whole = ops.psi(x, maps, "paper")
    for b, t in ((0, 0), (1, 17), (2, 49)):
        row = x[b : b + 1, :, t : t + 1].contiguous()
        assert torch.equal(ops.psi(row, maps, "paper"), whole[b : b + 1, :, t : t + 1])


@pytest.mark.parametrize("w_dtype", MAP_DTYPES, ids=str)
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("R", [8, 64])
def test_a_gpu_of_little_shared_memory_makes_the_same_bits(
    emulator, monkeypatch, R, x_dtype, w_dtype
):
    small, _ = narrowed(random_maps(1, 1, 256, 80, R, "paper"), w_dtype)
    x = torch.randn(1, 1, 70, 256, generator=torch.Generator().manual_seed(1)).to(x_dtype)
    want = ops.psi(x, small, "paper")
    monkeypatch.setenv("LESS_EMULATOR_ARCHITECTURE", "120")  # 99 kB a block
    assert torch.equal(ops.psi(x, small, "paper"), want)


@pytest.mark.parametrize(
    ("D", "R", "message"),
    [
        (72, 8, "x must have a head dim of a multiple of 16, at most 256, on a GPU, got 72"),
        (64, 65, "w2 must have a rank of at most 64 on a GPU, got 65"),
    ],
)
def test_a_gpu_refuses_sizes_that_no_kernel_takes_by_name(launched, D, R, message):
    maps = on(launched, random_maps(2, 2, D, 16, R, "exp"))
    with pytest.raises(RuntimeError, match=f"feature_map: {message}"):
        ops.psi(torch.zeros(1, 2, 3, D, device=launched), maps, "exp")


@pytest.mark.parametrize("shape", [(0, 2, 3), (2, 2, 0)])
def test_no_rows_have_no_features(launched, shape):
    B, N, T = shape
    maps = on(launched, random_maps(N, N, 64, 16, 8, "exp"))
    x = torch.zeros(B, N, T, 64, device=launched)
    assert ops.psi(x, maps, "exp").shape == (B, N, T, 8)


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


@pytest.mark.parametrize("query", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, *MAP_DTYPES], ids=str)
@pytest.mark.parametrize("kind", ["paper", "exp", "centroid"])
def test_feature_map_passes_opcheck(kind, dtype, query):
    args = pages.arguments("feature_map", kind=kind, maps_dtype=dtype)
    if not query:
        args |= {"x": args["x"][:, : pages.K], "query": False}
    torch.library.opcheck(torch.ops.less.feature_map.default, tuple(args.values()))
