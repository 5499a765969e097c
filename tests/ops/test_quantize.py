import pytest
import torch

from tests.ops import flat_reference as reference

pytest.importorskip("less._C")
from tests.ops import flat as ops

SHAPES = [(1, 1, 1, 1), (2, 3, 5, 16), (1, 2, 7, 13), (2, 1, 33, 100), (1, 8, 64, 128)]
SHAPES += [(1, 2, 3, D) for D in (64, 80, 96, 256)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_quantize_has_the_bits_of_the_reference(device, shape, dtype):
    g = torch.Generator().manual_seed(shape[-1])
    x = (
        torch.randn(shape, generator=g)
        * torch.randn(shape[:-1], generator=g).mul(6).exp()[..., None]
    )
    x[0, 0, -1] = 0
    x = x.to(dtype)
    x = torch.where(x.isfinite(), x, 1)
    eight, scale = ops.quantize(x.to(device))
    want, want_scale = reference.quantize(x)
    assert torch.equal(scale.cpu(), want_scale)
    assert torch.equal(eight.cpu(), want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_fp8_rows_have_the_bits_of_the_reference(launched, shape, dtype):
    g = torch.Generator().manual_seed(shape[-1])
    x = (torch.randn(shape, generator=g) * 3).to(dtype)
    x[0, 0, 0, 0] = 0
    eight, scale = ops.quantize(x.to(launched), torch.float8_e4m3fn)
    want, want_scale = reference.quantize(x, dtype=torch.float8_e4m3fn)
    assert torch.equal(scale.cpu(), want_scale)
    assert torch.equal(eight.cpu().view(torch.uint8), want.view(torch.uint8))


def test_ties_subnormals_and_what_is_not_finite_are_as_in_the_reference(device):
    x = torch.zeros(1, 1, 8, 19)
    x[0, 0, 0, :7] = torch.tensor([127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -126.5])
    x[0, 0, 1, 3] = 1e-45
    x[0, 0, 2, 3:6] = torch.tensor([190.0, -190.0, 63.0]) * 1.4012984643e-45
    x[0, 0, 3, 18] = torch.nan
    x[0, 0, 4, :2] = torch.tensor([torch.inf, 3.0])
    x[0, 0, 5, :2] = torch.tensor([-torch.inf, torch.nan])
    x[0, 0, 6, 17:] = torch.tensor([torch.finfo(torch.float32).max, -1e38])
    x[0, 0, 7, 0] = -0.0
    eight, scale = ops.quantize(x.to(device))
    want, want_scale = reference.quantize(x)
    assert torch.equal(scale.cpu().nan_to_num(-1), want_scale.nan_to_num(-1))
    assert torch.equal(eight.cpu(), want)


def test_rows_are_the_same_alone_and_for_any_thread_count(simd, with_threads):
    x = torch.randn(2, 4, 3000, 64)
    with_threads(1)
    eight, scale = ops.quantize(x)
    with_threads(3)
    again, same = ops.quantize(x)
    assert torch.equal(eight, again)
    assert torch.equal(scale, same)
    one, alone = ops.quantize(x[1:, 2:3, 77:78])
    assert torch.equal(one[0, 0, 0], eight[1, 2, 77])
    assert torch.equal(alone[0, 0, 0], scale[1, 2, 77])


@pytest.mark.parametrize("shape", [(0, 2, 3, 8), (1, 2, 0, 8)])
def test_nothing_to_quantise_is_no_error(device, shape):
    eight, scale = ops.quantize(torch.zeros(shape, device=device))
    assert eight.shape == shape
    assert scale.shape == shape[:-1]


def test_fp8_is_refused_on_a_cpu_by_name():
    with pytest.raises(
        RuntimeError, match="quantize: dtype must be int8 on a CPU, got float8_e4m3"
    ):
        ops.quantize(torch.zeros(1, 1, 3, 8), torch.float8_e4m3fn)
    with pytest.raises(ValueError, match=r"quantize: dtype must be torch.int8 or torch.float8"):
        ops.quantize(torch.zeros(1, 1, 3, 8), torch.float16)


def test_quantize_passes_opcheck():
    torch.library.opcheck(torch.ops.less.quantize.default, (torch.randn(1, 2, 3, 8),))


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(3, 8), r"x must be \[B, K, T, D\], got shape \[3, 8\]"),
        (torch.zeros(1, 1, 3, 8, dtype=torch.float64), "x must be float32, bfloat16 or float16"),
        (torch.zeros(1, 1, 3, 8, dtype=torch.int8), "x must be float32, bfloat16 or float16"),
    ],
)
def test_quantize_refuses_bad_input(x, message):
    with pytest.raises(RuntimeError, match=f"quantize: {message}"):
        ops.quantize(x)
