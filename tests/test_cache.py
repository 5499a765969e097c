"""LessKVCache as its users meet it."""

import copy
import os
import subprocess
import sys
import textwrap

import pytest
import torch

from less import H2O, LessKVCache, Sidekick, SinkRecent
from tests.helpers import random_maps, random_qkv


def build(batch=2, layers=2, policy=None, kind="exp", **kw):
    maps = [random_maps(4, 2, 8, 6, 3, kind, seed=i) for i in range(layers)]
    return LessKVCache(
        layers, 4, 2, 8, batch, policy or H2O(4, 4), Sidekick(layers=maps, kind=kind), **kw
    )


def feed(cache, T, seed=0, valid=None):
    outs = []
    for layer in range(cache.layers):
        qkv = random_qkv(cache.batch, 4, 2, T, 8, seed=seed + 100 * layer)
        outs.append(cache.attend(layer, *qkv, valid=valid))
    return torch.stack(outs)


def test_memory_is_what_the_tensors_take_and_never_grows():
    cache = build(dtype=torch.float16)
    at_first = cache.memory()

    def padded(*sizes: int) -> int:
        """Bytes of what begins at a multiple of 128 each."""
        return sum(-(-n // 128) * 128 for n in sizes)

    rows, numbers = 8 * 8 * 2, 8 * 4  # of a head: k or v in fp16; position, score or log-weight
    z, H = 3 * 4 + 4 + 16, 3 * 8 * 4  # z is followed by 4 bytes up to 16, and 16 up to H's 32
    head = padded(2 * rows + 3 * numbers + z + H)
    assert at_first["state"] == 2 * 2 * 2 * (z + H)
    assert at_first["slots"] == 2 * 2 * 2 * (head - z - H)
    assert at_first["workspace"] == 2 * 2 * padded(16 + 2 * 8)  # seen, share
    sides = [[n * 8 * 6 * 4, n * 6 * 3 * 4, n * 3 * 4] for n in (4, 2)]
    assert at_first["maps"] == 2 * sum(padded(*side) for side in sides)
    pages = sum(layout.nbytes for layout in cache.layouts)
    assert sum(at_first[n] for n in ("slots", "state", "workspace")) == 2 * pages
    assert at_first["full"] == 0
    feed(cache, 100)
    feed(cache, 1)
    after = cache.memory()
    assert after["full"] == 2 * 2 * 101 * 2 * 2 * 8 * 2
    assert {**after, "full": 0} == at_first
    assert after["total"] == sum(after[n] for n in ("slots", "state", "maps", "workspace"))


def test_stats_count_tokens_seen_kept_and_evicted():
    cache = build()
    valid = torch.ones(2, 20, dtype=torch.bool)
    valid[1, :15] = False
    feed(cache, 20, valid=valid)
    stats = cache.stats()
    assert stats["seen"] == [25, 25]
    assert stats["kept"] == [13, 13]
    assert stats["evictions"] == [12, 12]
    assert stats["memory_share"] == [0.0, 0.0]  # a prompt is exact
    feed(cache, 1)
    assert all(0 < s < 1 for s in cache.stats()["memory_share"])
    assert cache.seen.tolist() == [21, 6]
    assert cache.columns == 21


def test_reset_makes_a_cache_like_new():
    used, new = build(), build()
    feed(used, 30)
    used.reset()
    assert used.seen.tolist() == [0, 0]
    for seed, T in ((1, 17), (2, 1), (3, 1)):
        assert torch.equal(feed(used, T, seed), feed(new, T, seed))
    assert torch.equal(used.positions(1), new.positions(1))


def test_reorder_makes_rows_what_others_were():
    cache = build(batch=3)
    feed(cache, 30)
    before = cache.state_dict()["tensors"]
    cache.reorder(torch.tensor([2, 0, 2]))
    for name, x in cache.state_dict()["tensors"].items():
        assert torch.equal(x, before[name][[2, 0, 2]]), name


@pytest.mark.parametrize("way", ["state_dict", "deepcopy", "file"])
def test_a_snapshot_continues_bit_for_bit(way, tmp_path):
    cache = build()
    feed(cache, 30)
    if way == "deepcopy":
        other = copy.deepcopy(cache)
    else:
        d = cache.state_dict()
        if way == "file":
            torch.save(d, tmp_path / "cache.pt")
            d = torch.load(tmp_path / "cache.pt", weights_only=True)
        other = build()
        other.load_state_dict(d)
    for seed in range(5):
        assert torch.equal(feed(cache, 1, seed), feed(other, 1, seed))
    assert torch.equal(cache.state(1)[0], other.state(1)[0])
    assert cache.stats() == other.stats()


def test_what_a_cache_hands_out_is_a_copy():
    cache = build()
    feed(cache, 20)
    for x in (cache.positions(0), cache.scores(0), cache.weights(0), *cache.state(0), cache.seen):
        x.fill_(7)
    assert (cache.positions(0) != 7).any()
    assert cache.seen.tolist() == [20, 20]


def test_queries_keys_and_values_may_be_views():
    cache, other = build(layers=1), build(layers=1)
    q, k, v = random_qkv(2, 4, 2, 12, 8)
    views = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    assert not views[0].is_contiguous()
    assert torch.equal(cache.attend(0, *views), other.attend(0, q, k, v))


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_nan_in_a_row_stays_in_that_row(name):
    clean, spoiled = build(), build()
    for cache in (clean, spoiled):
        feed(cache, 20)
    rows = dict(zip("qkv", random_qkv(2, 4, 2, 1, 8, seed=3), strict=True))
    want = clean.attend(0, **rows)
    rows[name][1] = float("nan")
    got = spoiled.attend(0, **rows)
    assert got[1].isnan().all()
    assert torch.equal(got[0], want[0])
    for T in (1, 3, 1):
        got, want = feed(spoiled, T, seed=T)[0], feed(clean, T, seed=T)[0]
        assert torch.equal(got[0], want[0])
        if name == "v":
            assert got[1].isnan().any()


def test_half_slots_under_a_float_model_round_keys_and_values_once():
    half = build(layers=1, dtype=torch.float16)
    q, k, v = random_qkv(2, 4, 2, 40, 8)
    same = build(layers=1, dtype=torch.float16)
    a = half.attend(0, q, k, v)
    b = same.attend(0, q, k.half(), v.half())
    assert a.dtype == torch.float32
    assert torch.equal(a, b)


def test_a_cache_without_sidekick_is_eviction_alone():
    cache = LessKVCache(1, 4, 2, 8, 1, SinkRecent(2, 4))
    q, k, v = random_qkv(1, 4, 2, 30, 8)
    cache.attend(0, q, k, v)
    memory = cache.memory()
    assert memory["state"] == memory["maps"] == 0
    assert cache.stats()["memory_share"] == [0.0]


def test_a_missing_kernel_is_said_aloud(monkeypatch):
    from less.backend import ops

    monkeypatch.setattr(ops, "missing", lambda device: "the native kernels were not built")
    with pytest.warns(RuntimeWarning, match="the native kernels were not built; using the plain"):
        cache = build()
    assert cache.backend == "reference"
    with pytest.raises(ValueError, match="backend 'native' is not available on cpu: the native"):
        build(backend="native")


SOAK = """
    import resource, torch
    from less import H2O, LessKVCache, Sidekick
    from tests.helpers import random_maps

    def rss():
        with open("/proc/self/statm") as f:
            return int(f.read().split()[1]) * resource.getpagesize()

    torch.set_num_threads(1)
    torch.manual_seed(0)
    budget = 256
    maps = random_maps(9, 3, 64, 64, 8, "exp")
    cache = LessKVCache(1, 9, 3, 64, 1, H2O(budget // 2, budget // 2),
                        Sidekick(layers=[maps], kind="exp"), dtype=torch.float16)
    at = {}
    for t in range(20_000):
        q, k, v = torch.randn(9, 64), torch.randn(3, 64), torch.randn(3, 64)
        cache.attend(0, q.view(1, 9, 1, 64), k.view(1, 3, 1, 64), v.view(1, 3, 1, 64))
        if t in (2 * budget, 19_999):
            at[t] = rss()
    full = cache.memory()["full"]
    grown = at[19_999] - at[2 * budget]
    print(f"grown {grown} bytes; a full cache would hold {full}")
    assert cache.seen.item() == 20_000
    assert grown <= 1 << 20, grown
    assert full == 20_000 * 2 * 3 * 64 * 2
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_process_memory_stays_flat_over_a_long_decode():
    pytest.importorskip("less._C")
    env = {**os.environ, "PYTHONPATH": os.getcwd()}
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(SOAK)], env=env, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout + run.stderr
    print(run.stdout)


def test_a_long_prompt_needs_no_square_of_memory():
    pytest.importorskip("less._C")
    code = """
        import resource, torch
        from less import H2O, LessKVCache
        torch.set_num_threads(2)
        cache = LessKVCache(1, 2, 1, 8, 1, H2O(64, 64))
        q, k, v = torch.randn(1, 2, 8192, 8), torch.randn(1, 1, 8192, 8), torch.randn(1, 1, 8192, 8)
        cache.attend(0, q[:, :, :64], k[:, :, :64], v[:, :, :64])
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        cache.attend(0, q, k, v)
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        assert grown < 16_384, f"{grown} KiB; T x T floats would be 262144 KiB"
    """
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout + run.stderr
