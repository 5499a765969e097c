"""Caches of packed rows: hot rows, codes and the space that they live in, through the interface."""

import copy
import json
import warnings

import pytest
import torch

from less import H2O, Calibration, Full, LessConfig, LessKVCache, PageLayout, Sidekick, SinkRecent
from less.calibration import NAMES
from less.dtypes import FORMATS
from less.layer import Space
from tests.helpers import HeavyValues, assert_close, held, random_maps, random_qkv

Q, K, D = 6, 2, 16
HOT = {"sinks": 2, "hot": 6}
BACKENDS = ["native", "reference"]
POLICIES = [
    H2O(heavy=9, recent=12),
    H2O(heavy=9, recent=12, sinks=3, decay=0.95),
    H2O(heavy=9, recent=12, per_age=True),
    H2O(heavy=20, recent=1, decay=0.9),  # fewer protected tokens than hot ones
    SinkRecent(sinks=4, recent=17),
    HeavyValues(21),
]
CALLS = [11, 1, 1, 30, 1, 5, 1, 40, 1, 1]
#: Mean error of an output, relative to its mean, of standard normal values where all are cold.
ERROR = {
    "k8v4": 0.1,
    "k4v4": 0.2,
    "k4v3": 0.3,
    "k4v2": 0.42,
    "k3v3": 0.35,
    "k3v2": 0.5,
    "k2v2": 0.65,
}


def calibration_of(layers=1, heads=K, dim=D, seed=3):
    """Means and scales that differ by channel, as a model's do."""
    g = torch.Generator().manual_seed(seed)

    def normal(factor):
        return torch.randn(heads, dim, generator=g) * factor

    def layer():
        scales = normal(0.4).exp(), normal(0.4).exp()
        return dict(zip(NAMES, (normal(2.0), scales[0], normal(0.5), scales[1]), strict=True))

    return Calibration([layer() for _ in range(layers)])


def sidekick_of(layers=1):
    return Sidekick(
        layers=[random_maps(Q, K, D, 12, 5, "exp", seed=i) for i in range(layers)], kind="exp"
    )


def build(policy=POLICIES[1], backend="native", dtype="k4v4", B=2, layers=1, **settings):
    packed = HOT if dtype in FORMATS else {}
    return LessKVCache(
        layers, Q, K, D, B, policy, dtype=dtype, backend=backend, **{**packed, **settings}
    )


def parts(calls, *tensors):
    start = 0
    for T in calls:
        yield [x[:, :, start : start + T] for x in tensors]
        start += T


def feed(cache, calls, q, k, v):
    return torch.cat([cache.attend(0, *part) for part in parts(calls, q, k, v)], 2)


def exact(q, k, v):
    attend = torch.nn.functional.scaled_dot_product_attention
    return attend(q, k, v, is_causal=True, enable_gqa=True)


def content(cache, layer=0):
    """What the pages hold of tokens, by position: what lies in empty slots is nobody's."""
    at = held(cache, layer)
    W = cache.layouts[layer].hot_slots
    found = {}
    for b in range(cache.batch):
        for h in range(cache.kv_heads):
            for s, position in enumerate(at["position"][b, h].tolist()):
                if position < 0:
                    continue
                fields = (
                    {n: x[b, h, s] for n, x in at.items() if n.startswith("hot_")}
                    if s < W
                    else {n: at[n][b, h, s - W] for n in ("k", "k_scale", "v", "v_scale")}
                )
                found[b, h, position] = {n: x.tolist() for n, x in fields.items()}
    return found


# -- attention -----------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", FORMATS)
def test_where_nothing_is_evicted_attention_is_exact_within_the_formats_error(backend, dtype):
    q, k, v = random_qkv(2, Q, K, 70, D, seed=1)
    cache = build(H2O(40, 40), backend, dtype)
    out = feed(cache, [1] * 70, q, k, v)
    assert sorted(cache.positions(0)[0, 0].tolist()) == [-1] * 10 + list(range(70))
    error, size = (out - exact(q, k, v)).abs(), exact(q, k, v).abs().mean()
    assert error[:, :, 20:].mean() < ERROR[dtype] * size
    # Tokens whose past is hot have int8's error alone.
    assert error[:, :, :8].mean() < 0.02 * size


@pytest.mark.parametrize("backend", BACKENDS)
def test_more_bits_lose_less(backend):
    q, k, v = random_qkv(2, Q, K, 70, D, seed=1)
    want = exact(q, k, v)
    lost = {
        dtype: (feed(build(H2O(40, 40), backend, dtype), [1] * 70, q, k, v) - want).abs().mean()
        for dtype in FORMATS
    }
    assert lost["k8v4"] < lost["k4v4"] < lost["k3v3"] < lost["k3v2"] < lost["k2v2"]
    assert lost["k4v4"] < lost["k4v3"] < lost["k4v2"] < lost["k3v2"]
    assert lost["k4v3"] < lost["k3v3"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("hot_dtype", [torch.float32, torch.float16])
def test_hot_rows_of_more_bits_are_more_exact(backend, hot_dtype):
    q, k, v = random_qkv(2, Q, K, 8, D, seed=2)
    want = exact(q, k, v)

    def error(hot_dtype):
        return (build(backend=backend, hot_dtype=hot_dtype).attend(0, q, k, v) - want).abs().mean()

    assert error(hot_dtype) < 0.8 * error(torch.int8)
    assert error(hot_dtype) < 0.006 * want.abs().mean()  # of queries in 8 bits


def means_in(q, k, v, calibration):
    """The same tokens with the calibration's means added, as a model with biases has them."""
    layer = calibration[0]
    k = k / layer["key_scale"][:, None] + layer["key_mean"][:, None]
    return q, k, v / layer["value_scale"][:, None] + layer["value_mean"][:, None]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", ["k4v4", "k3v3"])
def test_a_calibration_takes_large_means_out_of_the_rows(backend, dtype):
    calibration = calibration_of()
    q, k, v = means_in(*random_qkv(2, Q, K, 70, D, seed=1), calibration)
    want = exact(q, k, v)

    def lost(**settings):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            out = feed(build(H2O(40, 40), backend, dtype, **settings), [1] * 70, q, k, v)
        return (out - want).abs().mean()

    assert lost(calibration=calibration) < 0.8 * lost()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("policy", POLICIES, ids=str)
@pytest.mark.parametrize("state", [False, True])
@pytest.mark.parametrize("softcap", [None, 20.0])
def test_float32_rows_in_a_calibrations_space_change_nothing_but_rounding(
    backend, policy, state, softcap
):
    q, k, v = random_qkv(2, Q, K, sum(CALLS), D, seed=4)
    plain, spaced = (
        build(
            policy,
            backend,
            torch.float32,
            sidekick=sidekick_of() if state else None,
            softcap=softcap,
            calibration=calibration,
        )
        for calibration in (None, calibration_of())
    )
    for part in parts(CALLS, q, k, v):
        assert_close(spaced.attend(0, *part), plain.attend(0, *part), torch.float32)
        assert torch.equal(spaced.positions(0), plain.positions(0))
    if state:
        assert_close(spaced.state(0)[1], plain.state(0)[1], torch.float32)


# -- who is where --------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_the_first_and_the_last_tokens_are_always_held(backend, policy):
    cache = build(policy, backend)
    q, k, v = random_qkv(2, Q, K, sum(CALLS), D, seed=5)
    seen = 0
    for part in parts(CALLS, q, k, v):
        cache.attend(0, *part)
        seen += part[0].shape[2]
        positions = cache.positions(0)
        for b in range(2):
            for h in range(K):
                there = positions[b, h][positions[b, h] >= 0].tolist()
                assert len(set(there)) == len(there) == min(seen, 21)
                assert {0, 1, *range(max(0, seen - 6), seen)} <= set(there)
                hot = positions[b, h, :8].tolist()
                assert hot[:2] == [0, 1]
                assert all(p < 0 or (p - 2) % 6 == s for s, p in enumerate(hot[2:]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_capacity_of_sinks_and_recent_is_counted_with_the_hot_slots(backend):
    cache = build(SinkRecent(sinks=4, recent=17), backend)
    feed(cache, CALLS, *random_qkv(2, Q, K, sum(CALLS), D))
    n = sum(CALLS)
    want = [*range(4), *range(n - 17, n)]
    assert all(sorted(at.tolist()) == want for at in cache.positions(0).flatten(0, 1))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", FORMATS)
def test_a_prompt_leaves_the_codes_that_single_tokens_leave(backend, dtype):
    q, k, v = random_qkv(2, Q, K, 50, D, seed=6)
    whole, single = (build(SinkRecent(4, 17), backend, dtype) for _ in range(2))
    feed(whole, [40, *[1] * 10], q, k, v)
    feed(single, [1] * 50, q, k, v)
    assert content(whole) == content(single)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("policy", POLICIES[:4], ids=str)
def test_a_prompt_as_long_as_the_hot_rows_equals_single_tokens(backend, policy):
    whole, single = (build(policy, backend) for _ in range(2))
    assert whole.at_once == 8
    q, k, v = random_qkv(2, Q, K, 60, D, seed=7)
    out = feed(whole, [8, *[1] * 52], q, k, v)
    assert_close(out, feed(single, [1] * 60, q, k, v), torch.float32)
    assert content(whole) == content(single)
    assert_close(whole.scores(0), single.scores(0), torch.float16)  # rounded once a call


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("policy", POLICIES, ids=str)
@pytest.mark.parametrize("state", [False, True])
def test_rows_of_a_batch_equal_themselves_alone(backend, policy, state):
    valid = torch.ones(3, sum(CALLS), dtype=torch.bool)
    valid[0, :7] = False  # rows at different points, and padding in the middle
    valid[1, 11] = valid[2, 20:43] = False
    q, k, v = random_qkv(3, Q, K, sum(CALLS), D, seed=8)
    settings = {"sidekick": sidekick_of() if state else None, "calibration": calibration_of()}
    batch = build(policy, backend, B=3, **settings)
    out, start = [], 0
    for part in parts(CALLS, q, k, v):
        T = part[0].shape[2]
        out.append(batch.attend(0, *part, valid=valid[:, start : start + T]))
        start += T
    whole = torch.cat(out, 2)
    for row in range(3):
        alone, got, start = build(policy, backend, B=1, **settings), [], 0
        for T in CALLS:
            index = start + valid[row, start : start + T].nonzero()[:, 0]
            start += T
            if len(index):
                got.append(alone.attend(0, *(x[row : row + 1, :, index] for x in (q, k, v))))
        want = torch.cat(got, 2)[0]
        mine = whole[row][:, valid[row]]
        assert torch.equal(batch.positions(0)[row], alone.positions(0)[0])
        assert not whole[row][:, ~valid[row]].any()
        if backend == "native":
            assert torch.equal(mine, want)
            fields = zip(held(batch, 0).values(), held(alone, 0).values(), strict=True)
            assert all(torch.equal(x[row], y[0]) for x, y in fields)
        else:
            assert_close(mine, want, torch.float32)


def test_both_backends_hold_the_same():
    q, k, v = random_qkv(2, Q, K, sum(CALLS), D, seed=9)
    native, reference = (
        build(backend=b, calibration=calibration_of(), sidekick=sidekick_of()) for b in BACKENDS
    )
    for part in parts(CALLS, q, k, v):
        got, want = native.attend(0, *part), reference.attend(0, *part)
        assert_close(got, want, torch.float32, factor=10)  # weights may have 15 bits
    assert content(native) == content(reference)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_layer_that_keeps_all_may_have_packed_rows(backend):
    cache = build([Full(64), H2O(9, 12)], backend, layers=2)
    q, k, v = random_qkv(2, Q, K, 60, D, seed=1)
    for layer in range(2):
        for part in parts([40, *[1] * 20], q, k, v):
            out = cache.attend(layer, *part)
        assert out.isfinite().all()
    assert cache.stats()["kept"] == [2 * 60, 2 * 21]
    assert cache.max_columns == 64
    with pytest.raises(ValueError, match="room for 64 tokens"):
        cache.attend(0, *random_qkv(2, Q, K, 5, D))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_policy_without_a_rule_is_shown_the_numbers_outside_of_the_space(backend):
    shown = []

    class Watching(HeavyValues):
        def rank(self, tokens):
            shown.append(tokens)
            return super().rank(tokens)

    cache = build(Watching(21), backend, "k4v4", calibration=calibration_of())
    q, k, v = random_qkv(2, Q, K, 30, D)
    cache.attend(0, q, k, v)
    size = v.abs().mean()
    assert (shown[0].k[:, :, 21:] - k).abs().mean() < 0.03 * k.abs().mean()
    assert (shown[0].v[:, :, 21:] - v).abs().mean() < 0.03 * size
    cache.attend(0, *random_qkv(2, Q, K, 1, D, seed=1))
    at = shown[1].position[:, :, :21].long()
    mine = v.gather(2, at[..., None].expand(-1, -1, -1, D))
    assert 0 < (shown[1].v[:, :, :21] - mine).abs().mean() < 0.3 * size


# -- bytes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dim", "most"), [(64, 74), (128, 138)])
def test_a_slot_of_four_bits_takes_the_bytes_that_are_promised(dim, most):
    one, other = (PageLayout(1, dim, 20 + 256 * n, "k4v4").nbytes for n in (1, 3))
    assert (other - one) / 512 == most


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", FORMATS)
def test_memory_counts_pages_and_the_space(backend, dtype):
    cache = build(backend=backend, dtype=dtype, layers=2, sidekick=sidekick_of(2))
    layout = PageLayout(K, D, 21, dtype, 5, **HOT)
    at_first = cache.memory()
    counters = 2 * 2 * layout.header_bytes
    assert at_first["slots"] + at_first["state"] + counters == 2 * 2 * layout.nbytes
    plain = build(dtype=torch.float16, layers=2, sidekick=sidekick_of(2)).memory()["maps"]
    assert at_first["maps"] == plain + 2 * Space.of(K, D).memory.nbytes
    calibrated = build(
        dtype=dtype, layers=2, sidekick=sidekick_of(2), calibration=calibration_of(2)
    )
    assert calibrated.memory() == at_first
    feed(cache, CALLS, *random_qkv(2, Q, K, sum(CALLS), D))
    full = 2 * K * D * 2 * 2 * sum(CALLS)  # in 16 bits; the other layer has seen nothing
    assert cache.memory() == {**at_first, "full": full}


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("hot", [{}, {"sinks": 0, "hot": 1}, {"hot": 8, "hot_dtype": "float32"}])
def test_a_budget_in_bytes_is_not_exceeded(dtype, hot):
    pytest.importorskip("transformers")
    from tests.tiny_model import tiny_model

    model = tiny_model()
    for budget in (12_000, 20_000, 40_001):
        cache = LessConfig(bytes=budget, rows=dtype, **hot).cache(model, batch=1)
        assert sum(x.nbytes for x in cache.layouts) <= budget
        memory = cache.memory()
        assert memory["slots"] + memory["state"] <= budget
        more = [p.capacity + 1 for p in cache.policies]
        layouts = [
            PageLayout(x.kv_heads, x.head_dim, c, dtype, 0, x.sinks, x.hot, x.hot_dtype)
            for x, c in zip(cache.layouts, more, strict=True)
        ]
        assert sum(x.nbytes for x in layouts) > budget
    with pytest.raises(ValueError, match="bytes=900 cannot hold"):
        LessConfig(bytes=900, rows=dtype, **hot).cache(model)


# -- snapshots -----------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", ["k4v4", "k3v2", "k8v4"])
@pytest.mark.parametrize("way", ["state_dict", "file", "deepcopy", "to"])
def test_a_snapshot_continues_bit_for_bit(backend, dtype, way, tmp_path):
    settings = {"sidekick": sidekick_of(), "calibration": calibration_of()}
    cache = build(backend=backend, dtype=dtype, **settings)
    q, k, v = random_qkv(2, Q, K, 60, D)
    cache.attend(0, q[:, :, :50], k[:, :, :50], v[:, :, :50])
    if way in ("deepcopy", "to"):
        other = copy.deepcopy(cache)
        if way == "to":
            other._move(torch.device("cpu"))
    else:
        d = cache.state_dict()
        assert d["tensors"].keys() == {"0.page"}
        assert json.loads(json.dumps(d["cache"])) == d["cache"]
        if way == "file":
            torch.save(d, tmp_path / "cache.pt")
            d = torch.load(tmp_path / "cache.pt", weights_only=True)
        other = build(backend=backend, dtype=dtype, **settings)
        other.load_state_dict(d)
    for t in range(50, 60):
        step = [x[:, :, t : t + 1] for x in (q, k, v)]
        assert torch.equal(cache.attend(0, *step), other.attend(0, *step))
    for name, x in cache.state_dict()["tensors"].items():
        assert torch.equal(x, other.state_dict()["tensors"][name]), name


def test_a_packed_cache_moves_to_a_gpu_and_back(cuda):
    cache = build()
    feed(cache, CALLS, *random_qkv(2, Q, K, sum(CALLS), D))
    before = cache.state_dict()["tensors"]["0.page"]
    assert torch.equal(cache.to(cuda).to("cpu").state_dict()["tensors"]["0.page"], before)


@pytest.mark.parametrize(
    ("theirs", "message"),
    [
        ({"dtype": "k3v3"}, "dtype must be 'k4v4', got 'k3v3'"),
        ({"dtype": torch.float16}, "dtype must be 'k4v4', got 'torch.float16'"),
        ({"hot": 7}, r"hot must be \[\[2, 6, 'torch.int8'\]\], got \[\[2, 7, 'torch.int8'\]\]"),
        ({"sinks": 1}, r"hot must be \[\[2, 6, .* got \[\[1, 6, "),
        ({"hot_dtype": torch.float16}, r"hot must be .* got \[\[2, 6, 'torch.float16'\]\]"),
        ({"calibration": calibration_of()}, "calibration must be None, got '[0-9a-f]{64}'"),
    ],
)
def test_a_snapshot_of_other_rows_is_refused_by_name(theirs, message):
    cache, other = build(), build(**theirs)
    before = cache.state_dict()["tensors"]["0.page"]
    with pytest.raises(ValueError, match=f"load_state_dict: {message}"):
        cache.load_state_dict(other.state_dict())
    assert torch.equal(cache.state_dict()["tensors"]["0.page"], before)


def test_a_snapshot_of_another_calibration_or_an_older_format_is_refused():
    cache = build(calibration=calibration_of())
    with pytest.raises(ValueError, match="load_state_dict: calibration must be '[0-9a-f]{64}'"):
        cache.load_state_dict(build(calibration=calibration_of(seed=4)).state_dict())
    d = cache.state_dict()
    d["cache"]["format"] = 3
    with pytest.raises(ValueError, match="load_state_dict: format must be 6, got 3"):
        cache.load_state_dict(d)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_are_reordered_whole_and_forgotten_by_reset(backend):
    cache, new = build(backend=backend, B=3), build(backend=backend, B=3)
    cache.attend(0, *random_qkv(3, Q, K, 40, D))
    before = cache.state_dict()["tensors"]["0.page"]
    cache.reorder(torch.tensor([2, 0, 2]))
    assert torch.equal(cache.state_dict()["tensors"]["0.page"], before[[2, 0, 2]])
    cache.reset()
    for name, x in new.state_dict()["tensors"].items():
        assert torch.equal(x, cache.state_dict()["tensors"][name]), name


# -- what is refused, and what is warned of ------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: build(H2O(4, 4)), "capacity must be above 8, the hot slots of k4v4"),
        (lambda: build([Full(9), H2O(4, 4)], layers=2), r"\(sinks 2, hot 6\), got 8"),
        (lambda: LessKVCache(1, 2, 1, 16, 1, H2O(10, 10), dtype="k4v4"), "must be above 20"),
        (
            lambda: LessKVCache(1, 2, 1, 12, 1, H2O(20, 20), dtype="k3v3"),
            "head_dim must be a multiple of 8 for k3v3, got 12",
        ),
        (lambda: build(dtype="k5v5"), "dtype must be one of .*, k2v2.*, got k5v5"),
        (lambda: build(hot=0), "hot must be a whole number >= 1"),
        (lambda: build(sinks=-1), "sinks must be a whole number >= 0"),
        (lambda: build(hot_dtype=torch.bfloat16), "hot_dtype must be one of int8, float16, float"),
        (
            lambda: build(dtype=torch.int8, hot=4),
            "hot belongs to packed formats, not to torch.int8",
        ),
        (lambda: build(calibration=calibration_of(layers=2)), "calibration must have layers=1"),
        (lambda: build(calibration=calibration_of(heads=3)), "calibration must have kv_heads=2"),
        (lambda: build(calibration=calibration_of(dim=8)), "calibration must have head_dim=16"),
        (lambda: build(calibration="a folder"), "calibration must be a Calibration, got str"),
    ],
)
def test_what_cannot_be_is_refused_by_name(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_packed_tokens_are_refused():
    q, k, v = random_qkv(2, Q, K, 3, D)
    with pytest.raises(ValueError, match="attend: k must have dtype torch.float32, torch.bfloat16"):
        build().attend(0, q, k.to(torch.uint8), v.to(torch.uint8))


def test_keys_with_large_means_are_warned_of_once_and_not_where_they_are_calibrated():
    q, k, v = random_qkv(2, Q, K, 40, D)
    k = k + 8
    cache = build()
    with pytest.warns(UserWarning, match="k4v4 rows lose much of what .* less-kv calibrate"):
        cache.attend(0, q, k, v)
    cache.reset()
    quiet = [
        (cache, k),
        (build(calibration=calibration_of()), k),
        (build(dtype=torch.float16), k),
        (build(), k - 8),
        (build(), k[:, :, :3]),
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for each, keys in quiet:
            T = keys.shape[2]
            each.attend(0, q[:, :, :T], keys, v[:, :, :T])


# -- settings ------------------------------------------------------------------------------------


def test_settings_of_rows_go_through_json_and_back(tmp_path):
    config = LessConfig(
        tokens=64, rows="k3v3", sinks=2, hot=8, hot_dtype="float16",
        calibration=str(tmp_path / "mine"),
    )  # fmt: skip
    assert LessConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "less_config.json").read_text())["calibration"] == "mine"
    assert LessConfig.from_pretrained(tmp_path) == config
    assert LessConfig(tokens=64, hot_dtype=torch.float16, rows=torch.int8) == LessConfig(
        tokens=64, hot_dtype="float16", rows="int8"
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rows": "k5v5"}, "rows must be one of float32, .*, k2v2, got 'k5v5'"),
        ({"rows": "k4v4", "dtype": "int8"}, "dtype and rows say the same"),
        ({"rows": "k4v4", "hot": 0}, "hot must be a whole number >= 1"),
        ({"rows": "int8", "hot": 4}, "hot belongs to packed formats"),
        ({"hot": 4}, "hot belongs to packed formats"),
        ({"rows": "k4v4", "hot_dtype": "int4"}, "hot_dtype must be one of int8, float16, float32"),
        ({"rows": "k4v4", "calibration": 3}, "a folder or a shipped name, got int"),
    ],
)
def test_wrong_settings_of_rows_are_refused_by_name(settings, message):
    with pytest.raises(ValueError, match=message):
        LessConfig(tokens=64, **settings)


def test_a_config_builds_the_cache_that_it_describes(tmp_path):
    pytest.importorskip("transformers")
    from tests.tiny_model import tiny_model

    calibration = calibration_of(layers=2)
    calibration.save_pretrained(tmp_path)
    config = LessConfig(tokens=40, rows="k4v2", sinks=1, hot=4, calibration=str(tmp_path))
    cache = config.cache(tiny_model())
    assert cache.calibration.digest == calibration.digest
    assert {(x.dtype, x.sinks, x.hot) for x in cache.layouts} == {("k4v2", 1, 4)}
    with pytest.raises(ValueError, match=r"would keep 5 tokens, and k4v2 keeps 6 or more"):
        LessConfig(tokens=5, rows="k4v2", sinks=1, hot=4).cache(tiny_model())
