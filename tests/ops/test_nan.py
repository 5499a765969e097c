"""NaN in a key, a feature or the state: out shows it, the same on every device."""

import pytest
import torch

from less.policies import Rule
from tests.helpers import assert_close, random_maps
from tests.ops import flat_reference as reference
from tests.ops.common import layer
from tests.ops.test_chunk_attention import arguments, widened
from tests.ops.test_compact import run_both
from tests.ops.test_decode_step_launched import expected, make, next_token, on, run
from tests.ops.test_feature_map import narrowed

pytest.importorskip("less._C")
from tests.ops import flat as ops

OLDEST_LEAVES = Rule(recent=0, sinks=0, by_score=False, per_age=False)
FLOATS = [torch.float32, torch.bfloat16, torch.float16]
PLACES = {"q": (0, 1, 0, 3), "phi_q": (0, 1, 0, 2), "z": (1, 0, 3), "H": (0, 1, 2, 5)}


def assert_same_numbers(got, want, dtype):
    """NaN in the same places, and elsewhere within the dtype's tolerance."""
    assert torch.equal(got.isnan().cpu(), want.isnan())
    assert_close(got.cpu().nan_to_num(0.0), want.nan_to_num(0.0), dtype)


@pytest.mark.parametrize("w_dtype", [*FLOATS, torch.int8], ids=str)
@pytest.mark.parametrize("x_dtype", FLOATS, ids=str)
@pytest.mark.parametrize("kind", ["paper", "exp", "centroid"])
def test_the_features_of_a_row_with_nan_are_nan_and_no_others(device, kind, x_dtype, w_dtype):
    maps, _ = narrowed(random_maps(2, 2, 64, 24, 8, kind), w_dtype)
    maps = {n: x.to(device) for n, x in maps.items()}
    x = torch.randn(2, 2, 5, 64, generator=torch.Generator().manual_seed(1)).to(device, x_dtype)
    want = torch.zeros(2, 2, 5, dtype=torch.bool)
    for b, n, t, d in ((0, 0, 3, 7), (1, 1, 0, 63)):
        x[b, n, t, d] = torch.nan
        want[b, n, t] = True
    for side in (ops.phi, ops.psi):
        nan = side(x, maps, kind).isnan().cpu()
        assert torch.equal(nan, want[..., None].expand_as(nan))


@pytest.mark.parametrize("T", [1, 5, 70])
@pytest.mark.parametrize("name", ["q", "k", "slot_k"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_a_query_or_key_of_nan_is_nan_where_it_is_seen(device, dtype, name, T):
    a = layer(B=3, T=T, S=40, D=64, dtype=dtype)
    a["valid"][0], a["position"][0, 1, 2] = True, 0
    a[name][0, 1, 2 if name == "slot_k" else T // 2, 3] = torch.nan
    args = arguments(a)
    want = reference.chunk_attention(**widened(args)).out
    assert want.isnan().any()
    args = {n: x.to(device) if isinstance(x, torch.Tensor) else x for n, x in args.items()}
    assert_same_numbers(ops.chunk_attention(**args)[0], want, dtype)


@pytest.mark.parametrize("mass", [True, False])
@pytest.mark.parametrize("T", [1, 5, 70])
@pytest.mark.parametrize("name", ["phi_q", "z", "H"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_nan_in_the_state_of_a_chunk_is_nan_in_out(device, dtype, name, T, mass):
    a = layer(B=3, T=T, S=40, D=64, dtype=dtype)
    a["valid"][0, 0] = True
    if not mass:
        a["z"].zero_()
    a[name][PLACES[name]] = torch.nan
    args = arguments(a)
    want = reference.chunk_attention(**widened(args))
    assert want.out.isnan().any()
    assert not want.out[~a["valid"][:, None].expand(want.out.shape[:3])].isnan().any()
    args = {n: x.to(device) if isinstance(x, torch.Tensor) else x for n, x in args.items()}
    out, slot_score, chunk_score, share = ops.chunk_attention(**args)
    assert_same_numbers(out, want.out, dtype)
    assert_same_numbers(share, want.share, torch.float32)
    assert_same_numbers(slot_score, want.slot_score, torch.float32)
    assert_same_numbers(chunk_score, want.chunk_score, torch.float32)


@pytest.mark.parametrize("mass", [True, False])
@pytest.mark.parametrize("name", ["q", "z", "H"])
@pytest.mark.parametrize("dtype", [*FLOATS, torch.int8], ids=str)
def test_nan_in_a_query_or_the_state_of_a_step_is_nan_in_out(device, dtype, name, mass):
    a = make(dtype, B=2, Q=6, K=2, D=64, S=40, device="cpu")
    if not mass:
        a["z"].zero_()
    a[name][PLACES[name]] = torch.nan
    attended, _ = expected(a, OLDEST_LEAVES)
    a = run(on(device, a), OLDEST_LEAVES)
    assert attended.out.isnan().any()
    assert_same_numbers(a["out"], attended.out, a["out"].dtype)


@pytest.mark.parametrize("dtype", [*FLOATS, torch.int8], ids=str)
@pytest.mark.parametrize("kind", ["paper", "exp", "centroid"])
def test_a_key_of_nan_that_has_left_shows_in_every_step(device, kind, dtype):
    a = make(dtype, B=1, Q=4, K=2, D=64, S=20, kind=kind)
    oldest = a["position"][0, 1].masked_fill(a["position"][0, 1] < 0, 99).argmin()
    a["slot_k" if dtype != torch.int8 else "k_scale"][0, 1, oldest] = torch.nan
    a = on(device, a)
    for step in range(3):
        next_token(a, step)
        run(a, OLDEST_LEAVES)
        assert a["out"][:, 2:].isnan().all()
        assert a["out"][:, :2].isfinite().all()
    assert not a["slot_k"].float().isnan().any()
    assert a["z"][0, 1].isnan().all()
    assert a["H"][0, 1].isnan().all()
    assert a["H"][0, 0].isfinite().all()


@pytest.mark.parametrize("kind", ["paper", "exp", "centroid"])
def test_a_key_of_nan_that_leaves_a_call_of_many_tokens_is_folded(device, kind):
    a = layer(T=30, S=9, D=64, E=32, kind=kind)
    a["valid"][:] = True
    a["k"][0, 1, 3] = torch.nan
    got, want = run_both(a, device, kind=kind, rule=OLDEST_LEAVES)
    assert want.z[0, 1].isnan().all()
    assert_same_numbers(got["z"], want.z, torch.float32)
    assert_same_numbers(got["H"], want.H, torch.float32)
