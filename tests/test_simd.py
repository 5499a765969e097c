from __future__ import annotations

import math

import numpy as np
import pytest
import torch

_C = pytest.importorskip("less._C")

CHUNK = 1 << 24


def run(what: str, src: np.ndarray, out: type = np.float32) -> np.ndarray:
    results = {"sum": 1, "max": 1, "sums": 4, "width": 1}
    dst = np.empty(results.get(what, src.shape), out)
    call(what, src, dst)
    return dst


def call(what: str, src: np.ndarray, dst: np.ndarray) -> None:
    _C._test.simd(what, *((x.ctypes.data, x.size, x.itemsize) for x in (src, dst)))


def same_floats(a: np.ndarray, b: np.ndarray) -> bool:
    """Equal bits, except that any NaN equals any other."""
    return bool(np.all((a.view(np.uint32) == b.view(np.uint32)) | (np.isnan(a) & np.isnan(b))))


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_every_half_widens_exactly(simd: str, dtype: str) -> None:
    bits = np.arange(1 << 16, dtype=np.uint32).astype(np.uint16)
    torch_dtype = torch.bfloat16 if dtype == "bf16" else torch.float16
    wanted = torch.from_numpy(bits.view(np.int16)).view(torch_dtype).float().numpy()
    assert same_floats(run(f"from_{dtype}", bits), wanted)


def floats(step: int) -> np.ndarray:
    """Every step-th of all 2^32 floats, and the values around every half's rounding border."""
    every = np.arange(0, 1 << 32, step, dtype=np.uint64).astype(np.uint32)
    borders = (np.arange(1 << 19, dtype=np.uint64) << 13).astype(np.uint32)
    near = [borders + np.uint32(d) for d in (0, 1, 0x0FFF, 0x1000, 0x1001, 0x1FFF)]
    return np.concatenate([every, *near]).view(np.float32)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_narrowing_rounds_to_nearest_even_like_torch(simd: str, dtype: str) -> None:
    x = floats(step=997)
    torch_dtype = torch.bfloat16 if dtype == "bf16" else torch.float16
    wanted = torch.from_numpy(x).to(torch_dtype)
    got = torch.from_numpy(run(f"to_{dtype}", x, np.uint16).view(np.int16)).view(torch_dtype)
    nan = torch.from_numpy(np.isnan(x))
    assert bool(got[nan].isnan().all())
    assert torch.equal(got[~nan].view(torch.int16), wanted[~nan].view(torch.int16))


def ulps(got: np.ndarray, wanted: np.ndarray) -> float:
    """Largest distance in units of the last place of a float near `wanted` (float64)."""
    _, exponent = np.frexp(np.where(wanted == 0, 1.0, wanted))
    unit = np.ldexp(1.0, np.maximum(exponent, -125) - 24)
    return float(np.max(np.abs(got.astype(np.float64) - wanted) / unit))


def test_exp_is_within_two_ulp_of_float64(simd: str) -> None:
    # Every 61st float between the two ends of the finite results, of both signs.
    end = np.array([88.72, 103.97], np.float32).view(np.uint32)
    for sign, last in ((0, end[0]), (0x80000000, end[1])):
        x = (np.arange(0, last, 61, dtype=np.uint32) | np.uint32(sign)).view(np.float32)
        with np.errstate(under="ignore"):
            assert ulps(run("exp", x), np.exp(x.astype(np.float64))) <= 2.0


def test_exp_is_right_at_the_edges(simd: str) -> None:
    inf, nan = math.inf, math.nan
    x = np.array([-inf, inf, nan, 0.0, -0.0, -1e30, 1e30, -104.5, 88.73, 89.5], np.float32)
    wanted = np.array([0, inf, nan, 1, 1, 0, inf, 0, inf, inf], np.float32)
    assert same_floats(run("exp", x), wanted)


def test_gelu_is_within_1e6th_of_float64(simd: str) -> None:
    x = np.concatenate([np.linspace(-16, 16, 4_000_001), np.geomspace(1e-38, 1, 100_000)])
    x = x.astype(np.float32)
    wanted = torch.nn.functional.gelu(torch.from_numpy(x).double()).numpy()
    error = np.abs(run("gelu", x) - wanted)
    assert float(np.max(error - np.spacing(np.abs(x)) / 2)) <= 3e-7
    assert float(np.max(error[np.abs(x) <= 8])) <= 1e-6


def test_gelu_is_right_at_the_edges(simd: str) -> None:
    x = np.array([math.inf, -math.inf, math.nan, 0.0, 1e30, -1e30, -40.0], np.float32)
    got = run("gelu", x)
    assert same_floats(got[:1], x[:1])
    assert math.isnan(got[2])
    assert list(np.abs(got[[1, 3, 5, 6]]) <= 1e-37) == [True] * 4
    assert got[4] == x[4]


def test_tanh_is_within_two_ulp_of_float64(simd: str) -> None:
    # Every 61st float up to 10, where it is 1, of both signs.
    last = np.float32(10.0).view(np.uint32)
    for sign in (0, 0x80000000):
        x = (np.arange(0, last, 61, dtype=np.uint32) | np.uint32(sign)).view(np.float32)
        assert ulps(run("tanh", x), np.tanh(x.astype(np.float64))) <= 2.0


def test_tanh_is_right_at_the_edges(simd: str) -> None:
    x = np.array([math.inf, -math.inf, math.nan, 0.0, -0.0, 1e30, -1e30, 44.4, -50], np.float32)
    wanted = np.array([1, -1, math.nan, 0.0, -0.0, 1, -1, 1, -1], np.float32)
    assert same_floats(run("tanh", x), wanted)


def width() -> int:
    return int(run("width", np.empty(0, np.float32))[0])


def test_reductions_cover_exactly_the_first_n(simd: str) -> None:
    all_ = np.array([-3, 1.5, -2, 8, 0.25, -7, 100, -0.5, 2, -6, 130, 0.75, 9, -4, 300, 1])
    for n in range(1, width() + 1):
        x = all_[:n].astype(np.float32)
        assert run("sum", x)[0] == x.sum(dtype=np.float64)
        assert run("max", x)[0] == x.max()
        assert run("max", -abs(x))[0] == (-abs(x)).max()


def by_halves(x: np.ndarray) -> np.float32:
    while len(x) > 1:
        x = x[: len(x) // 2] + x[len(x) // 2 :]
    return x[0]


def test_sums_add_the_upper_half_to_the_lower_alone_or_four_at_once(simd: str) -> None:
    rng = np.random.default_rng(0)
    for _ in range(1000):
        rows = rng.standard_normal((4, width())).astype(np.float32)
        wanted = [by_halves(row) for row in rows]
        assert [run("sum", row)[0] for row in rows] == wanted
        assert list(run("sums", rows.ravel())) == wanted


def test_int8_widens_exactly_and_narrows_to_nearest_even(simd: str) -> None:
    every = np.arange(-128, 128).astype(np.int8)
    assert np.array_equal(run("from_i8", every), every.astype(np.float32))
    x = np.concatenate([np.linspace(-130, 130, 100_001), np.arange(-260, 261) / 2, [3e38, -np.inf]])
    x = np.concatenate([x, np.nextafter(np.arange(-127, 127) + 0.5, 0)]).astype(np.float32)
    wanted = np.clip(np.rint(x), -127, 127).astype(np.int8)
    assert np.array_equal(run("to_i8", x, np.int8), wanted)


@pytest.mark.parametrize("n", range(36))
def test_tails_touch_nothing_beyond_their_end(simd: str, n: int) -> None:
    for what, src, out in (
        ("exp", np.float32, np.float32),
        ("from_bf16", np.uint16, np.float32),
        ("from_fp16", np.uint16, np.float32),
        ("from_i8", np.int8, np.float32),
        ("to_bf16", np.float32, np.uint16),
        ("to_fp16", np.float32, np.uint16),
        ("to_i8", np.float32, np.int8),
    ):
        whole = np.full(n + 32, 7, out)
        call(what, np.zeros(n, src), whole[16 : 16 + n])
        assert (whole[:16] == 7).all()
        assert (whole[16 + n :] == 7).all()
        assert (whole[16 : 16 + n] == (1 if what == "exp" else 0)).all()


def test_levels_share_bits_where_no_fma_is_involved() -> None:
    levels = _C.build_facts()["simd_supported"]
    x = floats(step=9973)
    before = _C.build_facts()["simd"]
    try:
        results = []
        for level in levels:
            _C._test.set_simd(level)
            results.append([run(f"to_{dtype}", x, np.uint16) for dtype in ("bf16", "fp16")])
            results[-1].append(run("to_i8", x[~np.isnan(x)], np.int8))
    finally:
        _C._test.set_simd(before)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert np.array_equal(a, b)
