"""The native backend against the reference, call by call, and the properties of ``attend``."""

import pytest
import torch

from less import H2O, LessKVCache, Sidekick, SinkRecent
from less.layer import PackedMaps
from tests import helpers
from tests.helpers import assert_close, random_maps, random_qkv
from tests.ops import flat_reference as reference

pytest.importorskip("less._C")
from less.backend import ops

POLICIES = [
    H2O(heavy=9, recent=12),
    H2O(heavy=9, recent=12, sinks=3, decay=0.95),
    H2O(heavy=9, recent=12, per_age=True),
    H2O(heavy=0, recent=17),
    H2O(heavy=17, recent=0),
    SinkRecent(sinks=4, recent=13),
    SinkRecent(sinks=0, recent=17),
]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def sidekick_of(Q, K, D, E, R, kind, layers=1):
    return Sidekick(
        layers=[random_maps(Q, K, D, E, R, kind, seed=i) for i in range(layers)], kind=kind
    )


def pair(policy, B=2, Q=6, K=2, D=16, kind="exp", dtype=torch.float32, E=12, R=5):
    sidekick = sidekick_of(Q, K, D, E, R, kind) if kind else None
    return [
        LessKVCache(1, Q, K, D, B, policy, sidekick, dtype=dtype, backend=b)
        for b in ("native", "reference")
    ]


def held(cache):
    return cache.positions(0).sort(dim=-1).values


@pytest.mark.parametrize("policy", POLICIES, ids=str)
@pytest.mark.parametrize("kind", ["paper", "exp", "centroid", ""])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_native_equals_reference_call_by_call(simd, policy, kind, dtype):
    native, plain = pair(policy, kind=kind, dtype=dtype)
    calls = [11, 1, 1, 30, 1, 1, 1, 5, 1, 70, 1, 1]
    q, k, v = random_qkv(2, 6, 2, sum(calls), 16, seed=1, dtype=dtype)
    start = 0
    for T in calls:
        part = [x[:, :, start : start + T] for x in (q, k, v)]
        a, b = native.attend(0, *part), plain.attend(0, *part)
        assert a.dtype == dtype
        assert_close(a, b, dtype)
        assert torch.equal(native.positions(0), plain.positions(0))
        assert_close(native.scores(0), plain.scores(0), torch.float32)
        if kind:
            for x, y in zip(native.state(0), plain.state(0), strict=True):
                assert_close(x, y, torch.float32)
        start += T
    assert native.stats()["kept"] == plain.stats()["kept"]
    for x, y in zip(native.stats()["memory_share"], plain.stats()["memory_share"], strict=True):
        assert x == pytest.approx(y, abs=1e-4)


@pytest.mark.parametrize("slots", [torch.float32, torch.int8], ids=str)
def test_a_soft_capped_cache_is_the_reference_under_that_cap(slots):
    options = {"dtype": slots, "scale": 1.0}
    native, plain, uncapped = (
        LessKVCache(1, 6, 2, 16, 2, POLICIES[0], sidekick_of(6, 2, 16, 12, 5, "exp"), **o)
        for o in (
            {**options, "backend": "native", "softcap": 2.0},
            {**options, "backend": "reference", "softcap": 2.0},
            {**options, "backend": "reference"},
        )
    )
    q, k, v = random_qkv(2, 6, 2, 60, 16, seed=1)
    for part in zip(*(x.split([30, 1, 1, 20, *[1] * 8], 2) for x in (q, k, v)), strict=True):
        a, b = native.attend(0, *part), plain.attend(0, *part)
        assert_close(a, b, torch.float32)
        assert torch.equal(native.positions(0), plain.positions(0))
        assert (uncapped.attend(0, *part) - b).abs().max() > 1e-2
    with pytest.raises(ValueError, match=r"softcap must be None, got 2\.0"):
        uncapped.load_state_dict(plain.state_dict())


@pytest.mark.parametrize("kind", ["paper", "exp", "centroid"])
@pytest.mark.parametrize("slots", [torch.float32, torch.float16, torch.int8], ids=str)
@pytest.mark.parametrize("maps", [torch.bfloat16, torch.float16, torch.int8], ids=str)
def test_small_maps_serve_slots_of_any_dtype(simd, kind, slots, maps):
    sidekick = sidekick_of(6, 2, 16, 12, 5, kind).to(maps)
    native, plain = (
        LessKVCache(1, 6, 2, 16, 2, POLICIES[1], sidekick, dtype=slots, backend=b)
        for b in ("native", "reference")
    )
    packed = PackedMaps.pack(sidekick[0], kind)
    assert native.memory()["maps"] == plain.memory()["maps"] == packed.memory.nbytes
    calls = [30, 1, 1, 5, 1, 40, 1]
    q, k, v = random_qkv(2, 6, 2, sum(calls), 16, seed=4)
    start = 0
    for T in calls:
        part = [x[:, :, start : start + T] for x in (q, k, v)]
        assert_close(native.attend(0, *part), plain.attend(0, *part), torch.float32)
        assert torch.equal(held(native), held(plain))
        for x, y in zip(native.state(0), plain.state(0), strict=True):
            assert_close(x, y, torch.float32)
        start += T


@pytest.mark.parametrize("shape", [(1, 1, 1), (4, 4, 8), (6, 3, 20), (8, 1, 64), (40, 2, 128)])
@pytest.mark.parametrize("kind", ["paper", "exp", "centroid"])
def test_native_equals_float64_for_every_shape(simd, shape, kind):
    Q, K, D = shape
    policy = H2O(heavy=6, recent=6, decay=0.97)
    maps = random_maps(Q, K, D, 24, 8, kind)
    native = LessKVCache(
        1, Q, K, D, 1, policy, Sidekick(layers=[maps], kind=kind), backend="native"
    )
    q, k, v = random_qkv(1, Q, K, 60, D, seed=3)
    q = q / D**0.25
    wide = {n: t.double() for n, t in maps.items()}
    want = reference.run(q.double(), k.double(), v.double(), policy, wide, kind, prompt=20)
    got = [native.attend(0, q[:, :, :20], k[:, :, :20], v[:, :, :20])]
    for t in range(20, 60):
        got.append(native.attend(0, *(x[:, :, t : t + 1] for x in (q, k, v))))
        step = t - 19
        assert torch.equal(held(native), want.positions[step].sort(dim=-1).values)
    assert_close(torch.cat(got, 2), want.out, torch.float32)
    assert_close(native.state(0)[0], want.H, torch.float32)
    assert_close(native.state(0)[1], want.z, torch.float32)


@pytest.mark.parametrize("policy", [H2O(heavy=100, recent=100), SinkRecent(4, 196)], ids=str)
@pytest.mark.parametrize("chunk", [1, 7, 64, 200])
def test_nothing_evicted_equals_full_attention(simd, policy, chunk):
    cache, _ = pair(policy, D=32)
    q, k, v = random_qkv(2, 6, 2, 200, 32, seed=2)
    out = torch.cat(
        [
            cache.attend(0, *(x[:, :, t : t + chunk] for x in (q, k, v)))
            for t in range(0, 200, chunk)
        ],
        2,
    )
    full = torch.nn.functional.scaled_dot_product_attention(
        q.double(), k.double(), v.double(), is_causal=True, enable_gqa=True
    )
    torchs = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, is_causal=True, enable_gqa=True
    )

    def error(x):
        return float(((x.double() - full).norm(dim=-1) / full.norm(dim=-1)).max())

    assert error(out) <= max(1e-6, error(torchs))
    assert cache.stats()["evictions"] == [0]


def run_rows(cache, q, k, v, valid, calls):
    out, start = [], 0
    for T in calls:
        part = [x[:, :, start : start + T] for x in (q, k, v)]
        out.append(cache.attend(0, *part, valid=valid[:, start : start + T]))
        start += T
    return torch.cat(out, 2)


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_a_padded_batch_equals_its_rows_alone(backend, policy):
    calls = [40, 1, 1, 9, 1, 1, 1]
    total = sum(calls)
    valid = torch.ones(3, total, dtype=torch.bool)
    valid[0, :17] = False  # left padding
    valid[1, 20:40] = False  # right padding of the prompt
    valid[2, 41] = valid[2, 45:48] = False  # rows that skip steps
    sidekick = sidekick_of(6, 2, 16, 12, 5, "exp")
    make = lambda B: LessKVCache(1, 6, 2, 16, B, policy, sidekick, backend=backend)  # noqa: E731
    q, k, v = random_qkv(3, 6, 2, total, 16, seed=6)
    q, k, v = (x.masked_fill(~valid[:, None, :, None], torch.nan) for x in (q, k, v))
    batch = make(3)
    if backend == "native":
        out = run_rows(batch, q, k, v, valid, calls)
    else:  # the reference multiplies by masks, so its padding must be finite
        out = run_rows(batch, *(x.nan_to_num(9.0) for x in (q, k, v)), valid, calls)
    assert batch.seen.tolist() == valid.sum(1).tolist()
    for row in range(3):
        alone = make(1)
        keep = valid[row]
        start, parts = 0, []
        for T in calls:
            index = start + keep[start : start + T].nonzero()[:, 0]
            start += T
            if len(index):
                parts.append(alone.attend(0, *(x[row : row + 1, :, index] for x in (q, k, v))))
        want = torch.cat(parts, 2)[0]
        if backend == "native":
            assert torch.equal(out[row][:, keep], want)
            assert torch.equal(batch.positions(0)[row], alone.positions(0)[0])
            for a, b in zip(batch.state(0), alone.state(0), strict=True):
                assert torch.equal(a[row], b[0])
        else:
            assert_close(out[row][:, keep], want, torch.float32)
        assert (out[row][:, ~keep] == 0).all()


@pytest.mark.parametrize("dtype", [*DTYPES, torch.int8], ids=str)
def test_thread_count_never_changes_a_bit(simd, with_threads, dtype):
    results = []
    for threads in (1, 2, 3):
        with_threads(threads)
        cache, _ = pair(H2O(heavy=40, recent=40), B=3, D=64, dtype=dtype)
        q, k, v = random_qkv(3, 6, 2, 420, 64, seed=7)
        q, k, v = (x if dtype == torch.int8 else x.to(dtype) for x in (q, k, v))
        outs = [cache.attend(0, q[:, :, :400], k[:, :, :400], v[:, :, :400])]
        outs += [cache.attend(0, *(x[:, :, t : t + 1] for x in (q, k, v))) for t in range(400, 420)]
        results.append([*outs, cache.positions(0), cache.scores(0), *cache.state(0)])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_a_slot_log_weight_counts_as_that_many_equal_tokens():
    q, k, v = random_qkv(1, 2, 1, 4, 8, seed=8)
    twice = LessKVCache(1, 2, 1, 8, 1, H2O(2, 2))
    once = LessKVCache(1, 2, 1, 8, 1, H2O(2, 2))
    twice.attend(0, q[:, :, :3], *(x[:, :, [0, 0, 1]] for x in (k, v)))
    once.attend(0, q[:, :, :2], k[:, :, :2], v[:, :, :2])
    helpers.held(once, 0)["weight"][0, 0, 0] = torch.log(torch.tensor(2.0))
    assert once.weights(0)[0, 0, 0] > 0
    last = [x[:, :, 3:4] for x in (q, k, v)]
    assert_close(once.attend(0, *last), twice.attend(0, *last), torch.float32)


def test_every_output_is_written_over_poison():
    cache, _ = pair(H2O(heavy=4, recent=4))
    q, k, v = random_qkv(2, 6, 2, 70, 16)
    valid = torch.ones(2, 70, dtype=torch.bool)
    valid[0, :30] = False
    valid[1, :] = False
    poison = [torch.full((2, 6, 70, 16), torch.nan) for _ in range(50)]
    del poison  # freed blocks of the same size, full of NaN, are what the op's outputs get
    out = cache.attend(0, q, k, v, valid=valid)
    assert out.isfinite().all()
    assert cache.scores(0).isfinite().all()
    assert (out[1] == 0).all()
    assert cache.seen.tolist() == [40, 0]


def test_an_empty_state_is_not_looked_at(monkeypatch):
    maps = [random_maps(4, 2, 16, 12, 4, "exp", seed=1)]
    cache = LessKVCache(
        1, 4, 2, 16, 1, H2O(heavy=4, recent=4), sidekick=Sidekick(layers=maps, kind="exp")
    )
    looked = []
    phi = ops.phi
    monkeypatch.setattr(ops, "phi", lambda *a: (looked.append(cache.columns), phi(*a))[1])
    q, k, v = random_qkv(1, 4, 2, 40, 16)
    for begin, end in ((0, 3), (3, 8), (8, 20), (20, 30), (30, 40)):
        cache.attend(0, *(x[:, :, begin:end] for x in (q, k, v)))
    assert looked == [30, 40]  # with the tokens of the call itself
