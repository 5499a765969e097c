"""Packed rows have the bits of the reference: codes and scales, at every SIMD level.

The op that encodes many rows is compact: all of a call's tokens but the last leave the hot ones.
"""

import pytest
import torch

pytest.importorskip("less._C")
from less import PageLayout
from less.backend import ops
from less.dtypes import FORMATS
from less.layer import LayerPlan, LayerSpec, Paged, Rows, Space, allocate
from less.reference import codec

K = 2
NAN, INF = float("nan"), float("inf")


def rows_of(D, seed=0):
    """Rows [N, D] of every size, and such as codecs go wrong at."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(60, D, generator=g) * torch.logspace(-9, 6, 60).unsqueeze(1)
    odd = torch.zeros(12, D)
    odd[1] = -0.0
    odd[2, D // 2], odd[3, D - 1], odd[4, 0] = 1.0, -1e-30, 1e30
    odd[5], odd[6] = 3.0, 1e-40
    odd[7] = torch.randn(D, generator=g) * 1e37
    odd[8:] = torch.randn(4, D, generator=g)
    odd[8, 1], odd[9, D - 2], odd[10, 3] = NAN, INF, -INF
    odd[11, :2] = torch.tensor([INF, -INF])
    return torch.cat([x, odd])


def encoded(x, dtype, hot_dtype):
    """The rows x [N, D] as a layer's cold slots store them: keys and values, with their scales."""
    N, D = x.shape
    layout = PageLayout(K, D, N + 1, dtype, sinks=0, hot=1, hot_dtype=hot_dtype)
    spec = LayerSpec(K, scale=1.0, decay=1.0, rule=None, victim="forget")
    plan = LayerPlan(spec, layout, space=Space.of(K, D))
    rows = torch.cat([x, torch.zeros(1, D)]).to(hot_dtype).repeat(1, K, 1, 1)
    pool = allocate([layout], 1)[0]
    score = torch.zeros(1, K, 2 * (N + 1))
    ops.compact(Rows(rows, rows), None, score, Paged(pool), plan, rank=torch.zeros_like(score))
    (views,) = layout.views(pool)
    assert views.slots.position[0, 0].tolist() == [N, *range(N)]
    return views.slots


def assert_bits_of_the_reference(x, dtype, hot_dtype=torch.float32):
    slots = encoded(x, dtype, hot_dtype)
    for label, kind in vars(FORMATS[dtype]).items():
        want, want_scale = codec.encode(x.to(hot_dtype), kind)
        got, scale = getattr(slots, label), getattr(slots, f"{label}_scale")
        assert scale.dtype == want_scale.dtype
        nan = want_scale.isnan()
        for h in range(K):
            assert torch.equal(got[0, h], want)
            assert torch.equal(scale[0, h].isnan(), nan)
            assert torch.equal(scale[0, h][~nan], want_scale[~nan])
            assert torch.equal(scale[0, h][~nan].signbit(), want_scale[~nan].signbit())


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("D", [64, 80, 96, 128, 256])
def test_codes_and_scales_have_the_bits_of_the_reference(simd, D, dtype):
    assert_bits_of_the_reference(rows_of(D), dtype)


def test_rows_of_any_width_have_the_bits_of_the_reference(simd):
    for D in (8, 16, 24, 40, 56, 72, 88, 512, 1040):
        for dtype in ("k4v4", "k3v2"):
            assert_bits_of_the_reference(rows_of(D, seed=D), dtype)


def test_numbers_beside_a_threshold_get_the_code_of_their_side(simd):
    for bits, dtype in ((4, "k4v4"), (3, "k3v3"), (2, "k2v2")):
        rows = []
        for largest in (1.0, 3.7, 1e-6):
            x = torch.full((64,), largest)
            edges = x[:1] * codec.clip(bits, 64) * torch.tensor(codec.thresholds(bits))
            for i, side in enumerate((edges, *(edges.nextafter(x[:1] * s) for s in (-9, 9)))):
                x[16 * i : 16 * i + len(edges)] = side
            rows.append(x)
        assert_bits_of_the_reference(torch.stack(rows), dtype)


@pytest.mark.parametrize("dtype", ["k4v4", "k3v2"])
def test_hot_rows_of_float16_are_encoded_as_the_numbers_that_they_are(simd, dtype):
    x = rows_of(64).half().float()
    assert_bits_of_the_reference(x, dtype, torch.float16)
