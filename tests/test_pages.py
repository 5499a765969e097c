"""Pages: sequences that share a pool are as if each had a cache of its own."""

from __future__ import annotations

import copy
import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from bench.compare import allocations
from less import H2O, Full, LessKVCache, PageLayout, Sidekick, SinkRecent
from less.cache.paged import PagedLayer
from less.layer import PageRows
from tests.conftest import Computing
from tests.helpers import HeavyValues, assert_close, random_maps, random_qkv

Q, K, D = 4, 2, 64
POLICY = H2O(heavy=5, recent=4, decay=0.97)
CALLS = (14, 1, 1, 5, 1)  # a prompt, tokens, a chunk, a token
NOT_A_NUMBER = 0x7FF0000000000001  # of float64, one that any sum would change


def maps_of(kind="exp", q_heads=Q, kv_heads=K):
    return random_maps(q_heads, kv_heads, D, 16, 4, kind, seed=1)


def layer_of(where, dtype=torch.float16, state=True, policy=POLICY, kind="exp", **options):
    layout = PageLayout(K, D, policy.capacity, dtype, 4 if state else 0)
    maps = maps_of(kind) if state else None
    return PagedLayer(
        policy, layout, Q, maps=maps, kind=kind, device=where.device, backend=where.backend,
        **options,
    )  # fmt: skip


def cache_of(where, batch=1, dtype=torch.float16, state=True, policy=POLICY, kind="exp"):
    sidekick = Sidekick(layers=[maps_of(kind)], kind=kind) if state else None
    return LessKVCache(
        1, Q, K, D, batch, policy, sidekick, dtype=dtype, device=where.device,
        backend=where.backend,
    )  # fmt: skip


def tokens(where, B, T, seed, dtype=torch.float16, heads=(Q, K)):
    return [x.to(where.device) for x in random_qkv(B, *heads, T, D, seed=seed, dtype=dtype)]


def int32(where, pages):
    return torch.as_tensor(pages, dtype=torch.int32, device=where.device)


def poisoned(layout, pages, where, value=0xFF):
    """A pool of nothing but NaN."""
    return torch.full((pages, layout.nbytes), value, dtype=torch.uint8, device=where.device)


def assert_as_alone(where, got, want):
    """Kernels give a row the bits that it has alone; torch's sums depend on the batch."""
    if where.backend == "native":
        assert torch.equal(got, want)
    else:
        assert_close(got, want, torch.float16)


def assert_same_page(where, layout, page, cache):
    """A page, uint8 [page], holds what the cache of one row does."""
    own = cache.pools[0][0]
    if where.backend == "native":
        assert torch.equal(page, own)
        return
    for mine, its in zip(layout.views(page[None]), layout.views(own[None]), strict=True):
        for name, x in its.tensors().items():
            assert_close(mine.tensors()[name], x, torch.float16)


class Alone:
    """A cache for each row; with the reference one of all rows, which has the same bits."""

    def __init__(self, where, rows, *settings):
        together = rows if where.backend == "reference" else 1
        self.caches = [cache_of(where, together, *settings) for _ in range(rows // together)]

    def attend(self, q, k, v, valid):
        """[B, Q, T, D]."""
        n = len(self.caches)
        calls = zip(self.caches, *(x.chunk(n) for x in (q, k, v, valid)), strict=True)
        return torch.cat([cache.attend(0, *call) for cache, *call in calls])

    @property
    def pages(self):
        """uint8 [B, page]."""
        return torch.cat([cache.pools[0] for cache in self.caches])


# -- one pool, many sequences ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "state", "policy"),
    [
        (torch.float16, True, POLICY),
        (torch.float32, False, SinkRecent(sinks=2, recent=7)),
        (torch.int8, True, POLICY),
        (torch.float16, True, HeavyValues(9)),
    ],
    ids=["fp16", "no-state", "int8", "own-policy"],
)
def test_64_pages_in_shuffled_order_are_64_caches(backend, request, dtype, state, policy):
    emulated = request.node.callspec.params["backend"] == "emulated"
    layer = layer_of(backend, dtype, state, policy)
    pool = layer.new_pool(64)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(5))
    order = order[:8] if emulated else order
    B = len(order)
    rest = torch.ones(64, dtype=torch.bool).index_fill_(0, order, False)
    pool[rest] = 0xA5
    alone = Alone(backend, B, dtype, state, policy)
    g = torch.Generator().manual_seed(6)
    for seed, T in enumerate(CALLS):
        q, k, v = tokens(backend, B, T, seed)
        valid = (torch.rand(B, T, generator=g) < 0.8).to(backend.device)
        out = layer.attend(pool, q, k, v, pages=int32(backend, order), valid=valid)
        assert torch.equal(out, alone.attend(q, k, v, valid))
        assert torch.equal(pool[order], alone.pages)
    assert (pool[rest] == 0xA5).all()


def test_rows_come_and_go_between_calls(backend):
    """A sequence keeps its page, whichever row of a call it is."""
    layer = layer_of(backend)
    pool, calls = layer.new_pool(6), [[4, 1, 5], [1], [5, 4], [4, 5, 1], [5]]
    own = {page: cache_of(backend) for page in (1, 4, 5)}
    for seed, (T, pages) in enumerate(zip(CALLS, calls, strict=True)):
        q, k, v = tokens(backend, len(pages), T, seed)
        out = layer.attend(pool, q, k, v, pages=int32(backend, pages))
        for b, page in enumerate(pages):
            want = own[page].attend(0, *(x[b : b + 1] for x in (q, k, v)))
            assert_as_alone(backend, out[b : b + 1], want)
    for page, cache in own.items():
        assert_same_page(backend, layer.layout, pool[page], cache)


@pytest.mark.parametrize("policy", [POLICY, HeavyValues(9)], ids=["rule", "own-policy"])
@pytest.mark.parametrize("T", [1, 6])
def test_a_row_without_a_page_neither_reads_nor_writes(backend, T, policy):
    layer = layer_of(backend, policy=policy, null_page=0)
    nbytes = layer.layout.nbytes
    wide = torch.full((6, nbytes + 256), 0xA5, dtype=torch.uint8, device=backend.device)
    pool = wide[1:5, 128 : 128 + nbytes]
    pool.view(torch.int64).fill_(NOT_A_NUMBER)
    layer.layout.clear(pool[2:3])
    q, k, v = tokens(backend, 4, 20, 0)
    alone = cache_of(backend, policy=policy)
    layer.attend(pool, *(x[2:3] for x in (q, k, v)), pages=int32(backend, [2]))
    alone.attend(0, *(x[2:3] for x in (q, k, v)))
    before = wide.clone()
    q, k, v = tokens(backend, 4, T, 1)
    for x in (q, k, v):
        x[[0, 1, 3]] = torch.nan
    pages, fresh = int32(backend, [-1, 0, 2, 0]), torch.tensor([True, True, False, True])
    out = layer.attend(pool, q, k, v, pages=pages, fresh=fresh.to(backend.device))
    assert (out[[0, 1, 3]] == 0).all()
    assert_as_alone(backend, out[2:3], alone.attend(0, *(x[2:3] for x in (q, k, v))))
    assert_same_page(backend, layer.layout, pool[2], alone)
    pool[2] = before[3, 128 : 128 + nbytes]
    assert torch.equal(wide, before)


def test_a_layer_that_keeps_all_counts_no_tokens_of_the_null_page(backend):
    layer = layer_of(backend, state=False, policy=Full(6), null_page=1)
    pool = layer.new_pool(2)
    pool[1].view(torch.int64).fill_(NOT_A_NUMBER)
    for T in (4, 1):
        out = layer.attend(pool, *tokens(backend, 2, T, T), pages=int32(backend, [0, 1]))
        assert (out[1] == 0).all()
        assert (out[0] != 0).any()


@pytest.mark.parametrize("T", [1, 14])
@pytest.mark.parametrize("dtype", [torch.float16, torch.int8], ids=str)
def test_a_fresh_row_is_an_empty_sequence_whatever_its_page_holds(backend, dtype, T):
    layer = layer_of(backend, dtype)
    pool, clean = poisoned(layer.layout, 4, backend), layer.new_pool(4)
    pages = int32(backend, [3, 1])
    for seed, (length, fresh) in enumerate([(T, [True, True]), (1, [False, True]), (3, None)]):
        if fresh is not None:
            fresh = torch.tensor(fresh, device=backend.device)
            for page in pages[fresh].tolist():
                layer.layout.clear(clean[page : page + 1])
        call = tokens(backend, 2, length, seed)
        out = layer.attend(pool, *call, pages=pages, fresh=fresh)
        assert torch.equal(out, layer.attend(clean, *call, pages=pages))
        assert torch.equal(pool[[1, 3]], clean[[1, 3]])
    assert (pool[[0, 2]] == 0xFF).all()


def strided(layout, where):
    wide = torch.full((3, layout.nbytes + 384), 0xA5, dtype=torch.uint8, device=where.device)
    return wide, wide[:, 128 : 128 + layout.nbytes]


def engines(layout, where):
    """As vLLM gives a layer its memory."""
    memory = torch.zeros(3, 1, 1, layout.nbytes, dtype=torch.int8, device=where.device)
    return memory, memory


def halves(layout, where):
    memory = torch.zeros(3, 2, layout.nbytes // 2, dtype=torch.uint8, device=where.device)
    return memory, memory


@pytest.mark.parametrize("made", [strided, engines, halves])
def test_a_pool_may_lie_in_memory_of_another_shape(backend, made):
    layer = layer_of(backend)
    memory, pool = made(layer.layout, backend)
    before, want = memory.clone(), layer.new_pool(3)
    rows = int32(backend, [2, 0])
    begins = torch.tensor([True, True], device=backend.device)
    for seed, T in enumerate(CALLS):
        call = tokens(backend, 2, T, seed)
        fresh = begins if seed == 0 else None
        out = layer.attend(pool, *call, pages=rows, fresh=fresh)
        assert torch.equal(out, layer.attend(want, *call, pages=rows, fresh=fresh))
    held = pool.view(torch.uint8).reshape(3, -1)
    assert torch.equal(held[[0, 2]], want[[0, 2]])
    if made is strided:
        outside = torch.ones(memory.shape, dtype=torch.bool, device=backend.device)
        outside[[0, 2], 128 : 128 + layer.layout.nbytes] = False
        assert torch.equal(memory[outside], before[outside])


def test_a_pool_that_would_have_to_be_copied_is_refused():
    layout = PageLayout(K, D, 9)
    half = layout.nbytes // 2
    apart = torch.zeros(3, 2, half + 128, dtype=torch.uint8)[..., :half]
    with pytest.raises(ValueError, match="attend: pool's pages must be contiguous and apart"):
        layout.check_pool("attend", apart)


# -- heads with slots of their own -----------------------------------------------------------------


@pytest.mark.parametrize("own_policy", [False, True], ids=["rule", "own-policy"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.int8], ids=str)
def test_ragged_heads_are_one_cache_per_head(backend, dtype, own_policy):
    capacities, heads, group = (5, 11, 11, 8), 4, 2
    maps = maps_of("exp", heads * group, heads)

    def policy(capacity):
        recent = 4 * capacity // 5  # in proportion, in a head as in a cache of its own
        return HeavyValues(capacity) if own_policy else H2O(capacity - recent, recent, decay=0.97)

    options = {"device": backend.device, "backend": backend.backend}
    ragged = PagedLayer(
        policy(5), PageLayout(heads, D, capacities, dtype, 4), heads * group, maps=maps, **options
    )
    pool, pages = ragged.new_pool(3), int32(backend, [2, 0])
    singles, pools = [], []
    for h, capacity in enumerate(capacities):
        own = {
            n: x[h * group : (h + 1) * group] if n.startswith("q_") else x[h : h + 1]
            for n, x in maps.items()
        }
        layout = PageLayout(1, D, capacity, dtype, 4)
        singles.append(PagedLayer(policy(capacity), layout, group, maps=own, **options))
        pools.append(singles[-1].new_pool(3))
    for seed, T in enumerate(CALLS):
        q, k, v = tokens(backend, 2, T, seed, heads=(heads * group, heads))
        valid = torch.ones(2, T, dtype=torch.bool, device=backend.device)
        valid[1, : T // 3] = False
        out = ragged.attend(pool, q, k, v, pages=pages, valid=valid)
        for h, (single, one) in enumerate(zip(singles, pools, strict=True)):
            queries = slice(h * group, (h + 1) * group)
            want = single.attend(
                one, q[:, queries], k[:, h : h + 1], v[:, h : h + 1], pages=pages, valid=valid
            )
            assert_as_alone(backend, out[:, queries], want)
    for views in ragged.layout.views(pool):
        for h in range(views.heads.start, views.heads.stop):
            (own,) = singles[h].layout.views(pools[h])
            for name, x in own.tensors().items():
                mine = views.tensors()[name]
                mine = mine if name == "seen" else mine[:, h - views.heads.start][:, None]
                assert_as_alone(backend, mine, x)


# -- where tokens lie before heads -----------------------------------------------------------------


def token_major(x):
    """The same numbers, as a view of [B, T, heads, D]."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


class Watched(TorchDispatchMode):
    """Notes the ops of less that run, and where their arguments lie."""

    def __init__(self):
        super().__init__()
        self.arguments = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace.startswith("less"):
            names = [a.name for a in func._schema.arguments]
            for name, x in zip(names, args, strict=False):
                if isinstance(x, torch.Tensor):
                    self.arguments.setdefault((func._schema.name.split("::")[1], name), x)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float16, torch.int8], ids=str)
def test_tokens_before_heads_change_no_bit_and_are_not_copied(backend, dtype):
    layer = layer_of(backend, dtype)
    pool, other = layer.new_pool(2), layer.new_pool(2)
    for seed, T in enumerate(CALLS):
        call = tokens(backend, 2, T, seed)
        views = [token_major(x) for x in call]
        assert T == 1 or not views[0].is_contiguous()
        out = token_major(torch.full_like(call[0], torch.nan))
        with Watched() as watched:
            got = layer.attend(other, *views, out=out)
        assert torch.equal(got, layer.attend(pool, *call))
        assert got.data_ptr() == out.data_ptr()
        assert torch.equal(pool, other)
        if backend.backend == "native":
            op = "decode_step" if T == 1 else "chunk_attention"
            given = {"q": views[0], "k": views[1], "v": views[2], "out": out}
            eight = dtype == torch.int8 and T > 1
            for name, x in given.items():
                if not (eight and name in ("k", "v")):
                    assert watched.arguments[op, name].data_ptr() == x.data_ptr(), name
            if eight:  # the first of two is of keys
                assert watched.arguments["quantize", "x"].data_ptr() == views[1].data_ptr()


def test_an_output_that_is_not_given_lies_as_the_queries_do(backend):
    layer = layer_of(backend)
    for T in (6, 1):
        views = [token_major(x) for x in tokens(backend, 2, T, T)]
        out = layer.attend(layer.new_pool(2), *views)
        if backend.backend == "native":
            assert out.transpose(1, 2).is_contiguous()
        assert out.shape == (2, Q, T, D)


# -- bytes -----------------------------------------------------------------------------------------


@st.composite
def layouts(draw):
    kv_heads = draw(st.integers(1, 5))
    slots = st.integers(1, 70)
    ragged = st.lists(slots, min_size=kv_heads, max_size=kv_heads).map(tuple)
    return PageLayout(
        kv_heads,
        draw(st.integers(1, 40)),
        draw(slots | ragged),
        draw(st.sampled_from([torch.float32, torch.float16, torch.int8, torch.float8_e4m3fn])),
        draw(st.integers(0, 6)),
    )


@settings(max_examples=60, deadline=None, derandomize=True)
@given(layouts())
def test_fields_of_any_layout_fill_a_page_and_never_overlap(layout):
    assert layout.nbytes % 128 == 0
    every = [f for head in layout.heads for f in head]
    assert layout.header_bytes + layout.bytes_of(*set(every)) == layout.nbytes
    for head in layout.heads:
        assert head["position"].offset % 128 == 0
        end = head["position"].offset
        for field in head.values():
            row = field.dtype.itemsize * math.prod(field.shape[1:])
            power = max(p for p in (1, 2, 4, 8, 16, 32, 64, 128) if row % p == 0)
            begins_at = max(16, power)
            assert field.offset % begins_at == 0
            assert 0 <= field.offset - end < begins_at
            end = field.offset + field.nbytes
    pool = torch.zeros(3, layout.nbytes, dtype=torch.uint8)
    views = [(run.heads, run.tensors()) for run in layout.views(pool)]
    written = []
    for heads, tensors in views:
        for name, x in tensors.items():
            for h in range(heads.stop - heads.start) if name != "seen" else [0]:
                own = x[1] if name == "seen" else x[1, h]
                if (name, own.data_ptr()) not in [(n, y.data_ptr()) for n, y in written]:
                    written.append((name, own))
    fields = len(every) + layout.kv_heads + 1  # share of each head, and seen
    assert len(written) == fields
    wanted = [torch.full(x.shape, i % 15 + 1.0).to(x.dtype) for i, (_, x) in enumerate(written)]
    for (_, own), want in zip(written, wanted, strict=True):
        own.copy_(want)
    for (name, own), want in zip(written, wanted, strict=True):
        assert torch.equal(own.float(), want.float()), name
    assert (pool[[0, 2]] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.int8], ids=str)
def test_a_step_into_an_output_allocates_nothing(dtype):
    pytest.importorskip("less._C")
    where = Computing("native", torch.device("cpu"))
    q, k, v = tokens(where, 3, 1, 0)
    out = torch.empty_like(q)
    cache = cache_of(where, 3, dtype)
    layer = layer_of(where, dtype)
    pool, rows = layer.new_pool(8), PageRows(int32(where, [6, -1, 2]))
    attend = partial(layer.attend, pool, q, k, v, pages=rows)
    cache.attend(0, q, k, v, out=out)
    attend(out=out)
    assert allocations(lambda: cache.attend(0, q, k, v, out=out), 10) == 0
    assert allocations(lambda: attend(out=out), 10) == 0
    assert allocations(attend, 10) == 10  # of its output, which shows that they are counted


@pytest.mark.parametrize("state", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int8], ids=str)
def test_memory_is_the_bytes_of_pools_and_maps(backend, dtype, state):
    policies = [POLICY, H2O(heavy=20, recent=11), SinkRecent(sinks=1, recent=6)]
    sidekick = Sidekick(layers=[maps_of()] * 3, kind="exp") if state else None
    cache = LessKVCache(
        3, Q, K, D, 2, policies, sidekick, dtype=dtype, device=backend.device,
        backend=backend.backend,
    )  # fmt: skip
    pools = sum(pool.nbytes for pool in cache.pools.values())
    assert pools == 2 * sum(layout.nbytes for layout in cache.layouts)
    memory = cache.memory()
    scratch = memory["total"] - pools - memory["maps"]
    held = cache.held[0].backend.workspace
    assert scratch == held
    packed = [at.plan.maps.memory.nbytes for at in cache.held if at.plan.maps is not None]
    assert len(packed) == (3 if state else 0)
    assert memory["maps"] == sum(packed)


# -- moving ----------------------------------------------------------------------------------------


def continued(cache, where, seed=100):
    return [cache.attend(0, *tokens(where, cache.batch, T, seed + T)) for T in (1, 4, 1)]


def assert_same(a, b):
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("way", ["snapshot", "deepcopy", "to", "pages"])
def test_a_sequence_continues_wherever_its_page_goes(backend, way):
    cache = cache_of(backend, 2)
    cache.attend(0, *tokens(backend, 2, 30, 0))
    held = cache.pools[0].clone()
    if way == "pages":  # an engine's pool takes them, in other places
        layer = layer_of(backend)
        pool = poisoned(layer.layout, 5, backend)
        pool[[4, 1]] = cache.pools[0]
        rows = int32(backend, [4, 1])
        got = [layer.attend(pool, *tokens(backend, 2, T, 100 + T), pages=rows) for T in (1, 4, 1)]
        assert_same(got, continued(cache, backend))
        assert torch.equal(pool[[4, 1]], cache.pools[0])
        return
    if way == "snapshot":
        snapshot = cache.state_dict()
        assert list(snapshot["tensors"]) == ["0.page"]
        assert torch.equal(snapshot["tensors"]["0.page"], held)
        other = cache_of(backend, 2)
        other.load_state_dict(snapshot)
    elif way == "deepcopy":
        other = copy.deepcopy(cache)
        assert other.pools[0].data_ptr() != cache.pools[0].data_ptr()
    else:
        other = copy.deepcopy(cache).to("cpu") if backend.device.type == "cpu" else cache
        if other is cache:
            other = copy.deepcopy(cache).to("cpu").to(backend.device)
    assert torch.equal(other.pools[0], held)
    assert_same(continued(other, backend), continued(cache, backend))
    assert torch.equal(other.pools[0], cache.pools[0])


def test_rows_that_are_reordered_are_pages_that_are_copied(backend):
    cache = cache_of(backend, 3)
    cache.attend(0, *tokens(backend, 3, 30, 0))
    held = cache.pools[0].clone()
    cache.reorder(torch.tensor([2, 0, 2]))
    assert torch.equal(cache.pools[0], held[[2, 0, 2]])


def test_a_snapshot_of_another_format_is_refused_by_name():
    cache = LessKVCache(1, Q, K, D, 1, POLICY)
    snapshot = cache.state_dict()
    snapshot["cache"]["format"] = 2
    before = cache.pools[0].clone()
    with pytest.raises(ValueError, match="load_state_dict: format must be 6, got 2"):
        cache.load_state_dict(snapshot)
    assert torch.equal(cache.pools[0], before)


def test_the_thread_count_changes_no_bit_of_any_page(with_threads):
    pytest.importorskip("less._C")
    results = []
    for threads in (1, 2, 5):
        with_threads(threads)
        layout = PageLayout(K, D, (40, 23), torch.float16, 4)
        layer = PagedLayer(H2O(20, 20), layout, Q, maps=maps_of(), backend="native")
        pool, rows = layer.new_pool(12), torch.tensor([9, -1, 2, 11, 4], dtype=torch.int32)
        outs = []
        for seed, T in enumerate((300, 1, 20, 1, 1)):
            call = random_qkv(5, Q, K, T, D, seed=seed, dtype=torch.float16)
            outs.append(layer.attend(pool, *call, pages=rows))
        results.append([*outs, pool])
    for other in results[1:]:
        assert_same(other, results[0])


# -- refusals --------------------------------------------------------------------------------------

LAYOUT = PageLayout(K, D, 9, torch.float16, 4)
LAYOUTS = [
    ({"kv_heads": 0}, "kv_heads must be a whole number >= 1, got 0"),
    ({"kv_heads": 129}, "kv_heads must be at most 128, got 129"),
    ({"kv_heads": 2.0}, "kv_heads must be a whole number >= 1, got 2.0"),
    ({"head_dim": 0}, "head_dim must be a whole number >= 1, got 0"),
    ({"capacity": 0}, "capacity must be a whole number >= 1, got 0"),
    ({"capacity": (4, 0)}, r"capacity\[1\] must be a whole number >= 1, got 0"),
    ({"capacity": (4, 4, 4)}, "capacity must list 2 numbers of slots, one per kv head, got 3"),
    ({"capacity": None}, "capacity must be a whole number >= 1, got None"),
    ({"rank": -1}, "rank must be a whole number >= 0, got -1"),
    ({"rank": True}, "rank must be a whole number >= 0, got True"),
    ({"dtype": torch.int64}, "dtype must be one of float32, .* got torch.int64"),
    ({"dtype": "float16"}, "dtype must be one of float32, .* got float16"),
]


@pytest.mark.parametrize(("change", "message"), LAYOUTS)
def test_a_layout_refuses_what_it_is_not(change, message):
    with pytest.raises(ValueError, match=f"PageLayout: {message}"):
        PageLayout(**{"kv_heads": K, "head_dim": D, "capacity": 9} | change)


LAYERS = [
    ({"policy": "h2o"}, "PagedLayer: policy must be a Policy, got str"),
    ({"layout": 9}, "PagedLayer: layout must be a PageLayout, got int"),
    ({"q_heads": 0}, "PagedLayer: q_heads must be a whole number >= 1, got 0"),
    ({"q_heads": 3}, "q_heads must be a multiple of kv_heads, got 3 and 2"),
    ({"policy": H2O(4, 4)}, "PagedLayer: layout must have the policy's capacity, 8, got 9"),
    ({"maps": None}, "the layout's rank must be that of the maps, 0, got 4"),
    ({"layout": PageLayout(K, D, 9)}, "the layout's rank must be that of the maps, 4, got 0"),
    ({"kind": "cubic"}, "PagedLayer: kind must be one of .*exp.*, got 'cubic'"),
    ({"maps": {"q_w3": torch.zeros(1)}}, r"maps: kind 'exp' has no tensors \['q_w3'\]"),
    ({"maps": {}}, r"maps: kind 'exp' needs tensors \['q_w1', 'q_w2', 'k_w1', 'k_w2'\]"),
    (
        {"maps": random_maps(8, K, D, 16, 4, "exp")},
        r"maps' q_w1 must have shape \[4, 64, 16\], got \[8, 64, 16\]",
    ),
    (
        {"maps": random_maps(Q, K, 32, 16, 4, "exp")},
        r"maps' q_w1 must have shape \[4, 64, 16\], got \[4, 32, 16\]",
    ),
    ({"victim": "blend"}, "victim must be one of none, forget, fold, merge, got 'blend'"),
    ({"maps": None, "layout": PageLayout(K, D, 9), "victim": "fold"}, "victim 'fold' needs maps"),
    ({"scale": 0.0}, "PagedLayer: scale must be finite and positive, got 0.0"),
    ({"scale": "big"}, "PagedLayer: scale must be a number, got 'big'"),
    ({"softcap": -1.0}, "PagedLayer: softcap must be finite and positive, got -1.0"),
    ({"null_page": 1.5}, "PagedLayer: null_page must be a whole number >= -2147483648, got 1.5"),
    ({"null_page": 2**31}, "PagedLayer: null_page must be at most 2147483647, got 2147483648"),
    ({"backend": "cuda"}, "backend must be"),
    (
        {"layout": PageLayout(K, D, 9, torch.float8_e4m3fn, 4), "backend": "native"},
        "PagedLayer: layout's dtype must be one of .* with the native backend on cpu, got torch.fl",
    ),
]


@pytest.mark.parametrize(("change", "message"), LAYERS)
def test_a_paged_layer_refuses_what_it_cannot_be(change, message):
    if change.get("backend") == "native":
        pytest.importorskip("less._C")
    fits = {"policy": POLICY, "layout": LAYOUT, "q_heads": Q, "maps": maps_of()}
    PagedLayer(**fits)
    with pytest.raises(ValueError, match=message):
        PagedLayer(**fits | change)


@pytest.mark.parametrize("pages", [0, -1, 2.0])
def test_a_pool_of_no_pages_is_refused(pages):
    layer = PagedLayer(POLICY, LAYOUT, Q, maps=maps_of())
    with pytest.raises(ValueError, match="new_pool: pages must be a whole number >= 1, got"):
        layer.new_pool(pages)


ROWS = [
    (([0, 1], None), TypeError, "pages must be a torch.Tensor, got list"),
    ((torch.tensor([0, 1]), None), ValueError, r"pages must be int32 \[B\], got torch.int64 \[2\]"),
    ((torch.zeros(1, 2).int(), None), ValueError, r"pages must be int32 \[B\], got .* \[1, 2\]"),
    ((torch.tensor([3, 3]).int(), None), ValueError, r"pages must differ, got \[3, 3\]"),
    ((torch.tensor([3, 1]).int(), True), TypeError, "fresh must be a torch.Tensor, got bool"),
    (
        (torch.tensor([3, 1]).int(), torch.tensor([1, 0])),
        ValueError,
        r"fresh must be bool \[2\], got torch.int64 \[2\]",
    ),
    (
        (torch.tensor([3, 1]).int(), torch.tensor([True])),
        ValueError,
        r"fresh must be bool \[2\], got torch.bool \[1\]",
    ),
    (
        (torch.tensor([3, 1]).int(), torch.ones(2, dtype=torch.bool, device="meta")),
        ValueError,
        "fresh must be on cpu as pages is, got meta",
    ),
]


@pytest.mark.parametrize(("arguments", "error", "message"), ROWS)
def test_rows_that_name_no_pages_are_refused(arguments, error, message):
    with pytest.raises(error, match=f"PageRows: {message}"):
        PageRows(*arguments)


def test_pages_that_are_none_may_stand_twice():
    assert PageRows(torch.tensor([-1, 2, -1, -9]).int()).fresh is None
    PageRows(torch.tensor([0, 2, 0]).int(), null_page=0)


def pages_of(*numbers):
    return torch.tensor(numbers, dtype=torch.int32)


ATTEND = [
    ({"pool": None}, TypeError, "pool must be a torch.Tensor, got NoneType"),
    ({"pool": lambda x: x.float()}, ValueError, "pool must be bytes .* got torch.float32"),
    ({"pool": lambda x: x[:, :-128]}, ValueError, r"pool must have shape \[N, \d+\], got \[4, "),
    ({"pool": lambda x: x.flatten()}, ValueError, r"pool must have shape \[N, \d+\], got \[\d+\]"),
    ({"pool": lambda x: x[:1].expand(4, -1)}, ValueError, "pool's pages must be contiguous and ap"),
    (
        {"pool": lambda x: torch.zeros(4, x.shape[1] + 64, dtype=torch.uint8)[:, : x.shape[1]]},
        ValueError,
        "pool's pages must begin at multiples of 128 bytes, got a stride of",
    ),
    (
        {"pool": lambda x: torch.zeros(x.numel() + 8, dtype=torch.uint8)[8:].view_as(x)},
        ValueError,
        "pool must begin at a multiple of 16 bytes",
    ),
    ({"pages": pages_of(3, 3)}, ValueError, "pages must differ"),
    ({"pages": pages_of(3, 4)}, (ValueError, RuntimeError), "pages must be below 4"),
    ({"pages": PageRows(pages_of(2, 2), check=False)}, (ValueError, RuntimeError), "must differ"),
    ({"pages": pages_of(3)}, ValueError, r"q must have shape \[1, 4, T, 64\], got \[2, 4"),
    ({"pages": pages_of(0, 1, 2)}, ValueError, r"q must have shape \[3, 4, T, 64\], got \[2, 4"),
    ({"pages": [3, 1]}, TypeError, "pages must be a torch.Tensor, got list"),
    ({"fresh": torch.tensor([True, True])}, ValueError, "fresh must come with pages"),
    (
        {"pages": PageRows(pages_of(3, 1)), "fresh": torch.tensor([True, True])},
        ValueError,
        "fresh must be in the PageRows, got both",
    ),
    (
        {"pages": pages_of(3, 1), "fresh": torch.ones(3, dtype=torch.bool)},
        ValueError,
        r"fresh must be bool \[2\]",
    ),
    ({"pool": lambda x: x[:1]}, ValueError, r"q must have shape \[1, 4, T, 64\], got \[2, 4"),
    ({"k": lambda x: x[:, :1]}, ValueError, r"k must have shape \[2, 2, T, 64\], got \[2, 1"),
    ({"v": lambda x: x.float()}, ValueError, "v must have k's dtype torch.float16, got torch.fl"),
    ({"valid": torch.ones(2, 9, dtype=torch.bool)}, ValueError, r"valid must have shape \[2, "),
    ({"out": torch.zeros(2, Q, 1, D)}, ValueError, "out must have"),
]


@pytest.mark.parametrize("T", [1, 6])
@pytest.mark.parametrize(("change", "error", "message"), ATTEND)
def test_a_call_that_does_not_fit_is_refused_and_writes_nothing(backend, change, error, message, T):
    layer = layer_of(backend)
    pool = layer.new_pool(4)
    layer.attend(pool, *tokens(backend, 4, 20, 0))
    before = pool.clone()
    q, k, v = tokens(backend, 2, T, 1)
    call = {"pool": pool, "q": q, "k": k, "v": v}
    call |= {n: x(call[n]) if callable(x) else x for n, x in change.items()}
    on = {n: x.to(backend.device) if isinstance(x, torch.Tensor) else x for n, x in call.items()}
    on["pool"] = call["pool"]
    with pytest.raises(error, match=message):
        layer.attend(**on)
    assert torch.equal(pool, before)
