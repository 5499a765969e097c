from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("less._C")
from tests.ops import flat as ops

# Relative to the largest sum of magnitudes; v is exact in float64 whatever its dtype.
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 1e-6, torch.float16: 1e-6}
SHAPES = [
    (1, 1, 1, 1, 1),
    (2, 3, 5, 8, 64),
    (1, 2, 33, 4, 80),
    (2, 1, 7, 3, 13),
    (1, 2, 6, 5, 96),
    (1, 1, 4, 16, 128),
    (2, 1, 3, 2, 256),
]


def make(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    B, K, N, R, D = shape
    g = torch.Generator().manual_seed(sum(shape))
    return {
        "H": torch.randn(B, K, R, D, generator=g),
        "z": torch.rand(B, K, R, generator=g),
        "psi_k": torch.rand(B, K, N, R, generator=g) * 3,
        "v": torch.randn(B, K, N, D, generator=g).to(dtype),
        "keep": torch.rand(B, K, N, generator=g) < 0.6,
    }


def moved(a: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    return {name: x.to(device, copy=True) for name, x in a.items()}


def exact(a: dict[str, Tensor], masked: bool) -> tuple[Tensor, Tensor]:
    psi = a["psi_k"].double()
    if masked:
        psi = psi * a["keep"].unsqueeze(-1)
    H = a["H"].double() + psi.transpose(-1, -2) @ a["v"].double()
    return H, a["z"].double() + psi.sum(-2)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("masked", [False, True])
def test_fold_equals_the_float64_sum(
    device: torch.device, shape: tuple[int, ...], dtype: torch.dtype, masked: bool
) -> None:
    a = make(shape, dtype)
    H, z = exact(a, masked)
    scale = float(H.abs().max()) + float(a["psi_k"].sum(-2).max())
    a = moved(a, device)
    ops.fold(a["H"], a["z"], a["psi_k"], a["v"], a["keep"] if masked else None)
    assert (a["H"].cpu() - H).abs().max() <= TOLERANCE[dtype] * scale
    assert (a["z"].cpu() - z).abs().max() <= TOLERANCE[dtype] * scale


def test_fold_never_reads_a_token_that_is_masked_out(device: torch.device) -> None:
    a = make((2, 3, 9, 8, 20))
    H, z = exact(a, masked=True)
    a["v"][~a["keep"]] = float("nan")
    a["psi_k"][~a["keep"]] = float("nan")
    a = moved(a, device)
    ops.fold(a["H"], a["z"], a["psi_k"], a["v"], a["keep"])
    torch.testing.assert_close(a["H"].cpu(), H.float())
    torch.testing.assert_close(a["z"].cpu(), z.float())


def test_fold_gives_the_same_bits_for_any_thread_count(simd: str, with_threads) -> None:
    results = []
    for threads in (1, 2, 5):
        with_threads(threads)
        a = make((3, 5, 40, 8, 72), torch.float16)
        ops.fold(a["H"], a["z"], a["psi_k"], a["v"], a["keep"])
        results.append((a["H"], a["z"]))
    for H, z in results[1:]:
        assert torch.equal(H, results[0][0])
        assert torch.equal(z, results[0][1])


def test_folding_in_two_calls_gives_the_bits_of_one(device: torch.device) -> None:
    a, b = (moved(make((2, 2, 10, 8, 64)), device) for _ in range(2))
    ops.fold(a["H"], a["z"], a["psi_k"], a["v"])
    for part in (slice(0, 3), slice(3, 10)):
        psi_k, v = (b[name][:, :, part].contiguous() for name in ("psi_k", "v"))
        ops.fold(b["H"], b["z"], psi_k, v)
    assert torch.equal(a["H"], b["H"])
    assert torch.equal(a["z"], b["z"])


@pytest.mark.parametrize(
    "shape", [(0, 2, 3, 4, 8), (2, 0, 3, 4, 8), (1, 1, 0, 4, 8), (1, 1, 3, 0, 8)]
)
def test_folding_nothing_changes_nothing(device: torch.device, shape: tuple[int, ...]) -> None:
    a = moved(make(shape), device)
    before = a["H"].clone()
    ops.fold(a["H"], a["z"], a["psi_k"], a["v"])
    assert torch.equal(a["H"], before)


@pytest.mark.parametrize("by", [1, 8])
def test_rows_that_begin_anywhere_in_memory_fold_as_well(device: torch.device, by: int) -> None:
    a = make((2, 2, 6, 8, 64), torch.float16)
    want = moved(a, device)
    ops.fold(want["H"], want["z"], want["psi_k"], want["v"])
    a = {name: shifted(x, by, device) for name, x in a.items()}
    ops.fold(a["H"], a["z"], a["psi_k"], a["v"])
    assert torch.equal(a["H"], want["H"])
    assert torch.equal(a["z"], want["z"])


def shifted(x: Tensor, by: int, device: torch.device) -> Tensor:
    """The same values, contiguous, `by` elements after the beginning of an allocation."""
    room = torch.empty(x.numel() + by, dtype=x.dtype, device=device)
    room[by:] = x.flatten().to(device)
    return room[by:].view(x.shape)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("H", lambda x: x[0], r"fold: H must be \[B, K, R, D\], got shape \[3, 4, 8\]"),
        ("H", lambda x: x.double(), "fold: H must be float32, got float64"),
        ("H", lambda x: x.transpose(0, 1), "fold: "),
        ("z", lambda x: x[:, :, :3], r"fold: z must have shape \[2, 3, 4\], got \[2, 3, 3\]"),
        ("z", lambda x: x.half(), "fold: z must be float32, got float16"),
        ("psi_k", lambda x: x.half(), "fold: psi_k must be float32, got float16"),
        ("psi_k", lambda x: x[..., :2], r"fold: psi_k must have shape \[2, 3, 5, 4\]"),
        ("v", lambda x: x.double(), "fold: v must be float32, bfloat16 or float16, got float64"),
        ("v", lambda x: x[..., ::2], "fold: v must have shape"),
        ("v", lambda x: x.mT.contiguous().mT, "fold: v must be contiguous, got strides"),
        ("keep", lambda x: x.int(), "fold: keep must be bool, got int32"),
        ("keep", lambda x: x[:, :1], r"fold: keep must have shape \[2, 3, 5\], got \[2, 1, 5\]"),
    ],
)
def test_fold_refuses_bad_input_and_writes_nothing(name: str, change, message: str) -> None:
    a = make((2, 3, 5, 4, 8))
    before = a["H"].clone(), a["z"].clone()
    bad = {**a, name: change(a[name])}
    with pytest.raises(RuntimeError, match=message):
        ops.fold(**bad)
    assert torch.equal(a["H"], before[0])
    assert torch.equal(a["z"], before[1])


@pytest.mark.parametrize("masked", [False, True])
def test_fold_passes_opcheck(masked: bool) -> None:
    a = make((2, 3, 5, 4, 8))
    args = (a["H"], a["z"], a["psi_k"], a["v"], a["keep"] if masked else None)
    torch.library.opcheck(torch.ops.less.fold.default, args)


@pytest.mark.parametrize(
    ("name", "other"), [("H", "z"), ("H", "psi_k"), ("H", "v"), ("z", "psi_k"), ("z", "keep")]
)
def test_sums_lie_apart_from_each_other_and_from_what_is_read(
    device: torch.device, name: str, other: str
) -> None:
    a = moved(make((2, 3, 5, 8, 64)), device)
    length = max(a[name].nbytes, a[other].nbytes)
    memory = torch.zeros(length, dtype=torch.uint8, device=device)
    for n in (name, other):
        x = memory[: a[n].nbytes].view(a[n].dtype).view_as(a[n])
        x.copy_(a[n])
        a[n] = x
    before = memory.clone()
    with pytest.raises(RuntimeError, match=f"fold: {name} must not overlap {other}"):
        ops.fold(a["H"], a["z"], a["psi_k"], a["v"], a["keep"])
    assert torch.equal(memory, before)
