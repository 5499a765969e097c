"""Caches with int8 slots: the rounded rows are all that differs."""

import copy

import pytest
import torch

from less import H2O, LessKVCache, Policy, Sidekick, SinkRecent
from less.layer import PageLayout
from tests.helpers import assert_close, held, random_maps, random_qkv
from tests.ops import flat_reference as reference

POLICIES = [
    H2O(heavy=9, recent=12),
    H2O(heavy=9, recent=12, sinks=3, decay=0.95),
    H2O(heavy=9, recent=12, per_age=True),
    SinkRecent(sinks=4, recent=13),
]
BACKENDS = ["native", "reference"]
CALLS = [11, 1, 1, 30, 1, 5, 1, 70, 1, 1]


def build(policy=POLICIES[1], backend="reference", dtype=torch.int8, B=2, kind="exp", D=16):
    maps = [random_maps(6, 2, D, 12, 5, kind, seed=i) for i in range(1)] if kind else None
    sidekick = Sidekick(layers=maps, kind=kind) if maps else None
    return LessKVCache(1, 6, 2, D, B, policy, sidekick, dtype=dtype, backend=backend)


def rounded(x):
    return reference.dequantize(*reference.quantize(x))


def parts(calls, *tensors):
    start = 0
    for T in calls:
        yield [x[:, :, start : start + T] for x in tensors]
        start += T


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("policy", POLICIES, ids=str)
@pytest.mark.parametrize("kind", ["paper", "exp", "centroid", ""])
def test_an_int8_cache_is_a_float32_cache_of_the_rounded_rows(backend, policy, kind):
    eight = build(policy, backend, kind=kind)
    plain = build(policy, "reference", torch.float32, kind=kind)
    q, k, v = random_qkv(2, 6, 2, sum(CALLS), 16, seed=1)
    for a, b in zip(parts(CALLS, q, k, v), parts(CALLS, q, rounded(k), rounded(v)), strict=True):
        assert_close(eight.attend(0, *a), plain.attend(0, *b), torch.float32)
        assert torch.equal(eight.positions(0).sort(-1).values, plain.positions(0).sort(-1).values)
        if kind:
            for x, y in zip(eight.state(0), plain.state(0), strict=True):
                assert_close(x, y, torch.float32)
    assert eight.stats()["kept"] == plain.stats()["kept"]
    at = held(eight, 0)
    keys = reference.dequantize(at["k"], at["k_scale"])
    for b in range(2):
        for h in range(2):
            where = at["position"][b, h].long()
            assert torch.equal(keys[b, h][where >= 0], rounded(k)[b, h, where[where >= 0]])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_what_a_prompt_within_the_budget_loses_is_the_rounding(backend, dtype):
    cache = build(H2O(40, 40), backend)
    q, k, v = random_qkv(2, 6, 2, 60, 16, seed=2, dtype=dtype)
    out = cache.attend(0, q, k, v)
    assert out.dtype == dtype
    scores = torch.nn.functional.scaled_dot_product_attention
    want = scores(q.float(), k.float(), v.float(), is_causal=True, enable_gqa=True)
    # Half a step of v, and of a logit half a step of k times |q|_1, either way of the softmax.
    step = v.float().abs().amax(-1).amax() / 254
    logit = (q.float().abs().sum(-1).amax() * k.float().abs().amax() / 254 / 4).item()
    bound = step + 2 * logit * v.float().abs().amax()
    error = (out.float() - want).abs()
    assert error.max() < bound
    assert error.mean() < 0.05 * want.abs().mean()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("policy", POLICIES[1:3], ids=str)
def test_rows_of_an_int8_batch_equal_themselves_alone(backend, policy):
    valid = torch.ones(3, sum(CALLS), dtype=torch.bool)
    valid[0, :7] = False
    valid[1, 11] = valid[2, 20:43] = False
    q, k, v = random_qkv(3, 6, 2, sum(CALLS), 16, seed=6)
    batch = build(policy, backend, B=3)
    out, start = [], 0
    for part in parts(CALLS, q, k, v):
        T = part[0].shape[2]
        out.append(batch.attend(0, *part, valid=valid[:, start : start + T]))
        start += T
    whole = torch.cat(out, 2)
    for row in range(3):
        alone, got, start = build(policy, backend, B=1), [], 0
        for T in CALLS:
            index = start + valid[row, start : start + T].nonzero()[:, 0]
            start += T
            if len(index):
                got.append(alone.attend(0, *(x[row : row + 1, :, index] for x in (q, k, v))))
        want = torch.cat(got, 2)[0]
        assert_close(whole[row][:, valid[row]], want, torch.float32)
        assert torch.equal(batch.positions(0)[row], alone.positions(0)[0])
        if backend == "native":
            assert torch.equal(whole[row][:, valid[row]], want)
            tensors = zip(batch.state(0), alone.state(0), strict=True)
            assert all(torch.equal(a[row], b[0]) for a, b in tensors)


@pytest.mark.parametrize("backend", BACKENDS)
def test_memory_of_int8_slots_counts_their_scales(backend):
    cache = build(backend=backend, D=64, kind="")
    at_first = cache.memory()

    # k and v, then position, score, log-weight and two scales; and what pads a head.
    head = 2 * 21 * 64 + 5 * 21 * 4
    assert 2 * 2 * head <= at_first["slots"] < 2 * 2 * (head + 6 * 64 + 128)
    layout = PageLayout(2, 64, 21, torch.int8)
    assert at_first["slots"] == 2 * (layout.nbytes - layout.header_bytes)
    half = build(backend=backend, D=64, kind="", dtype=torch.float16)
    q, k, v = random_qkv(2, 6, 2, 50, 64)
    for c in (cache, half):
        c.attend(0, q, k, v)
    assert cache.memory() == {**at_first, "full": half.memory()["full"]}
    assert half.memory()["full"] == 2 * 50 * 2 * 2 * 64 * 2


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("way", ["state_dict", "deepcopy", "file"])
def test_an_int8_snapshot_continues_bit_for_bit(backend, way, tmp_path):
    cache = build(backend=backend)
    q, k, v = random_qkv(2, 6, 2, 60, 16)
    cache.attend(0, q[:, :, :50], k[:, :, :50], v[:, :, :50])
    if way == "deepcopy":
        other = copy.deepcopy(cache)
    else:
        d = cache.state_dict()
        assert d["tensors"].keys() == {"0.page"}
        if way == "file":
            torch.save(d, tmp_path / "cache.pt")
            d = torch.load(tmp_path / "cache.pt", weights_only=True)
        other = build(backend=backend)
        other.load_state_dict(d)
    for t in range(50, 60):
        step = [x[:, :, t : t + 1] for x in (q, k, v)]
        assert torch.equal(cache.attend(0, *step), other.attend(0, *step))
    for name, x in cache.state_dict()["tensors"].items():
        assert torch.equal(x, other.state_dict()["tensors"][name]), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_scales_follow_their_rows_and_are_forgotten_by_reset(backend):
    cache, new = build(backend=backend, B=3), build(backend=backend, B=3)
    q, k, v = random_qkv(3, 6, 2, 40, 16)
    cache.attend(0, q, k, v)
    before = cache.state_dict()["tensors"]
    cache.reorder(torch.tensor([2, 0, 2]))
    for name, x in cache.state_dict()["tensors"].items():
        assert torch.equal(x, before[name][[2, 0, 2]]), name
    cache.reset()
    for name, x in new.state_dict()["tensors"].items():
        assert torch.equal(x, cache.state_dict()["tensors"][name]), name


class Longest(Policy):
    """Keeps the keys with the largest norm, and notes what it was shown."""

    capacity = 8
    shown = None

    def rank(self, tokens):
        self.shown = tokens
        return tokens.k.float().norm(dim=-1)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_policy_is_shown_the_numbers_that_int8_rows_stand_for(backend):
    policy = Longest()
    cache = build(policy, backend, kind="")
    q, k, v = random_qkv(2, 6, 2, 30, 16)
    cache.attend(0, q[:, :, :29], k[:, :, :29], v[:, :, :29])
    kept = cache.positions(0).long()
    cache.attend(0, q[:, :, 29:], k[:, :, 29:], v[:, :, 29:])
    assert torch.equal(policy.shown.k[:, :, 8:], rounded(k[:, :, 29:]))
    wanted = rounded(v)[:, :, :29].gather(2, kept[..., None].expand(-1, -1, -1, 16))
    assert torch.equal(policy.shown.v[:, :, :8], wanted)


def test_int8_tokens_are_refused():
    cache = build()
    q, k, v = random_qkv(2, 6, 2, 3, 16)
    with pytest.raises(ValueError, match="attend: k must have dtype torch.float32, torch.bfloat16"):
        cache.attend(0, q, k.to(torch.int8), v.to(torch.int8))
    with pytest.raises(ValueError, match="dtype must be 'torch.int8', got 'torch.float32'"):
        cache.load_state_dict(build(dtype=torch.float32).state_dict())
