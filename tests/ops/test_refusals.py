"""What the ops of a layer's pool refuse: by name, before a byte is written."""

from __future__ import annotations

import struct

import pytest
import torch

from tests.helpers import misplaced, random_maps

pytest.importorskip("less._C")
from less.layer import PackedMaps, encode
from less.layer.kinds import ORDER
from less.layer.layout import aligned
from less.layer.pieces import PIECE_ALIGN
from tests.ops import pages
from tests.ops.common import MISALIGNED
from tests.ops.pages import OPS, B, D, K, N, Q

FIELDS = pages.layer_fields()


def storages(args):
    """The bytes of all memory that the tensors of a call lie in, guard bytes among them."""
    return {
        n: torch.tensor([], dtype=torch.uint8, device=x.device).set_(x.untyped_storage()).clone()
        for n, x in args.items()
        if isinstance(x, torch.Tensor)
    }


def assert_refused(op, args, message):
    """The op says ``<op>: <message>``, a regular expression, and has written nothing."""
    before = storages(args)
    with pytest.raises(RuntimeError, match=f"{op}: {message}"):
        pages.call(op, args)
    after = storages(args)
    assert [n for n in before if not torch.equal(before[n], after[n])] == []


def changed(args, name, change):
    return args | {name: change(args[name])}


@pytest.mark.parametrize("dtype", [torch.float16, torch.int8], ids=str)
@pytest.mark.parametrize("op", OPS)
def test_what_every_refusal_starts_from_is_taken(op, dtype):
    args = pages.arguments(op, dtype=dtype)
    before = storages(args)
    pages.call(op, args)
    after = storages(args)
    written = {n for n in before if not torch.equal(before[n], after[n])}
    assert (
        written
        == {
            "decode_step": {"out", "pool"},
            "chunk_attention": {"out"},
            "compact": {"pool"},
        }[op]
    )


# -- pool and rows ---------------------------------------------------------------------------------


def strided(x, sizes, strides, offset=0):
    """Memory of its own that holds ``sizes`` at these strides."""
    last = offset + sum((n - 1) * s for n, s in zip(sizes, strides, strict=True))
    return torch.zeros(last + 1, dtype=x.dtype, device=x.device).as_strided(sizes, strides, offset)


POOLS = {
    "of int8": (lambda x: x.view(torch.int8), r"pool must be uint8 \[N, \d+\], got int8 "),
    "of float32": (lambda x: x.view(torch.float32), r"pool must be uint8 \[N, \d+\], got float32"),
    "of one dim": (lambda x: x.flatten(), r"pool must be \[N, page\], got shape \[\d+\]"),
    "of three": (lambda x: x[:, None], r"pool must be \[N, page\], got shape \[5, 1, \d+\]"),
    "a page too small": (lambda x: x[:, :-128], r"pool must be uint8 \[N, (\d+)\], got uint8 "),
    "a page too large": (
        lambda x: strided(x, (N, x.shape[1] + 128), (x.shape[1] + 128, 1)),
        r"pool must be uint8 \[N, (\d+)\], got uint8 ",
    ),
    "pages that overlap": (
        lambda x: x.as_strided((N - 1, x.shape[1]), (x.shape[1] - 128, 1)),
        r"pool's pages must be contiguous and begin at multiples of 128 bytes, got strides",
    ),
    "one page again and again": (
        lambda x: x[:1].expand(N, -1),
        r"pool's pages must be contiguous and begin at multiples of 128 bytes, got strides \[0, 1]",
    ),
    "a stride of no fields": (
        lambda x: strided(x, x.shape, (x.shape[1] + 64, 1)),
        r"pool's pages must be contiguous and begin at multiples of 128 bytes, got strides",
    ),
    "bytes apart": (
        lambda x: strided(x, x.shape, (2 * x.shape[1], 2)),
        r"pool's pages must be contiguous and begin at multiples of 128 bytes, got strides",
    ),
    "a base at 8 bytes": (
        lambda x: strided(x, x.shape, x.stride(), offset=8),
        "pool must begin at a multiple of 16 bytes",
    ),
}


@pytest.mark.parametrize(("change", "message"), POOLS.values(), ids=POOLS)
@pytest.mark.parametrize("op", OPS)
def test_a_pool_that_is_none_of_the_layers_is_refused(op, change, message):
    assert_refused(op, changed(pages.arguments(op), "pool", change), message)


@pytest.mark.parametrize("op", OPS)
def test_without_rows_a_pool_needs_a_page_for_each(op):
    args = pages.arguments(op) | {"rows": None}
    pages.call(op, args)
    args["pool"] = args["pool"][:1]
    assert_refused(op, args, "pool must have a page for each of 2 rows, got 1")


def int32(*lists):
    return lambda x: torch.tensor(lists, dtype=torch.int32, device=x.device)


ROWS = {
    "of one dim": (lambda x: x[0], r"rows must be \[1 or 2, B\], got shape \[2\]"),
    "three lists": (int32([3, 1], [0, 0], [0, 0]), r"rows must be \[1 or 2, B\], got 3 lists"),
    "no list": (lambda x: x[:0], r"rows must be \[1 or 2, B\], got 0 lists"),
    "of another B": (int32([3, 1, 2]), r"rows must have shape \[1, 2\], got \[1, 3\]"),
    "int64": (lambda x: x.long(), "rows must be int32, got int64"),
    "apart": (lambda x: x.repeat(1, 2)[:, ::2], "rows must be contiguous, got strides"),
    "beyond the pool": (int32([3, N]), "pages must be below 5, .* got 5 in row 1"),
    "far beyond it": (int32([2**31 - 1, 1]), "pages must be below 5, .* got 2147483647 in row 0"),
    "twice": (int32([3, 3]), "pages must differ, got 3 for row 1 and for one before it"),
    "twice, one begins": (int32([3, 3], [0, 1]), "pages must differ, got 3 for row 1"),
    "beyond, one begins": (int32([3, N], [1, 0]), "pages must be below 5"),
}


@pytest.mark.parametrize(("change", "message"), ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("op", OPS)
def test_rows_of_no_page_or_of_one_twice_are_refused(op, change, message):
    assert_refused(op, changed(pages.arguments(op), "rows", change), message)


@pytest.mark.parametrize("null_page", [-1, 3, N + 7])
@pytest.mark.parametrize("op", OPS)
def test_the_null_page_may_stand_twice_and_beyond_the_pool(op, null_page):
    args = pages.arguments(op, null_page=null_page)
    args["rows"] = torch.full((2, B), null_page, dtype=torch.int32)
    args["rows"][1] = 1  # nothing begins there either
    before = storages(args)
    pages.call(op, args)
    assert torch.equal(storages(args)["pool"], before["pool"])
    if "out" in args:
        assert (args["out"] == 0).all()


@pytest.mark.parametrize("op", OPS)
def test_a_call_that_is_refused_leaves_a_page_that_begins_as_it_was(op):
    args = changed(pages.arguments(op), "rows", int32([3, 1], [1, 1]))
    wrong = changed(args, "v", lambda x: x[..., :-1])
    assert_refused(op, wrong, "v must have shape")
    pages.call(op, args)


@pytest.mark.parametrize("op", OPS)
def test_a_tensor_without_values_among_others_is_refused(op):
    """torch runs the op's fake kernel then, whose result is memory that nobody wrote."""
    args = pages.arguments(op)
    for name, x in args.items():
        if isinstance(x, torch.Tensor) and name not in ("q", "k", "layer"):
            before = storages(args)
            with pytest.raises(
                RuntimeError, match=f"{op}: {name} must be on the device of [qk], cpu"
            ):
                pages.call(op, args | {name: x.to("meta")})
            assert all(torch.equal(y, before[n]) for n, y in storages(args).items())
    with pytest.raises(RuntimeError, match=f"{op}: layer must be on a CPU, got meta"):
        pages.call(op, args | {"layer": args["layer"].to("meta")})


def test_a_pool_lies_apart_from_what_is_read_while_it_is_written():
    args = pages.arguments("compact", dtype=torch.float32)
    memory = args["pool"].view(-1)
    floats = memory.view(torch.float32)[: args["score"].numel()].view_as(args["score"])
    for name, x in (("maps", memory[-args["maps"].numel() :]), ("score", floats)):
        assert_refused("compact", args | {name: x}, f"pool must not overlap {name}")


# -- the layer -------------------------------------------------------------------------------------


def number(x):
    """The bits of a float64, as the layer holds them."""
    return struct.unpack("<q", struct.pack("<d", x))[0]


# Field -> numbers that it may not be, and what is said.
LAYERS = {
    "version": ([0, 3, 5], "layer must be of version 4, got"),
    "Q": ([0, -2, 2**21, 2**60], "layer's Q must be in 1 .. "),
    "K": ([0, -1, 129, 2**40], "layer's K must be in 1 .. 128, got"),
    "D": ([0, -64, 2**17, 2**62], "layer's D must be in 1 .. 65536, got"),
    "k_dtype": ([-1, 8], "layer's k_dtype must be in 0 .. 7, got"),
    "v_dtype": ([-1, 8], "layer's v_dtype must be in 0 .. 7, got"),
    "call_dtype": ([-1, 8], "layer's call_dtype must be in 0 .. 7, got"),
    "hot_sinks": ([-1, 1], "layer's hot_sinks must be in 0 .. 0, got"),
    "hot": ([-1, 1], "layer's hot must be in 0 .. 0, got"),
    "weights": ([-1, 0, 2], "layer's weights must be in 1 .. 1, got"),
    "R": ([-1, 2**17], "layer's R must be in 0 .. 65536, got"),
    "victim": ([-1, 4], "layer's victim must be in 0 .. 3, got"),
    "scores": ([-1, 2], "layer's scores must be in 0 .. 1, got"),
    "dependent": ([-1, 2], "layer's dependent must be in 0 .. 1, got"),
    "null_page": ([-(2**31) - 1, 2**31], "layer's null_page must be in "),
    "has_rule": ([-1, 2], "layer's has_rule must be in 0 .. 1, got"),
    "recent": ([-1], "layer's recent must be in 0 .. "),
    "sinks": ([-1], "layer's sinks must be in 0 .. "),
    "by_score": ([-1, 2], "layer's by_score must be in 0 .. 1, got"),
    "per_age": ([-1, 2], "layer's per_age must be in 0 .. 1, got"),
    "rule_capacity": ([-1, 2**31], "layer's rule's capacity must be in "),
    "scale": (
        [number(x) for x in (0.0, -1.0, float("inf"), float("nan"), 1e300, 1e-300)],
        "scale must be finite and positive, got",
    ),
    "softcap": (
        [number(x) for x in (-1.0, float("inf"), float("nan"))],
        r"softcap must be 0 \(none\) or a positive number, got",
    ),
    "decay": (
        [number(x) for x in (0.0, -0.5, 1.5, float("nan"))],
        r"decay must be in \(0, 1\], got",
    ),
    "kind": ([-2, 3], "layer's kind must be in -1 .. 2, got"),
    "w_dtype": ([-1, 4], "layer's dtype of maps must be in 0 .. 3, got"),
    "E": ([-1, 2**21], "layer's hidden width must be in 0 .. "),
    "map_rank": ([-1, 3, 5], "maps must have the state's rank, 4, got"),
    "present": ([0], "maps must have w1 and w2"),
}


def with_field(args, i, value):
    layer = args["layer"][0, 0].clone()
    layer[i] = value
    return args | {"layer": layer.expand(args["layer"].shape)}


def test_every_number_of_a_layer_has_a_row_in_this_table():
    assert list(LAYERS) == FIELDS


@pytest.mark.parametrize(
    ("op", "field"),
    [
        (op, field)
        for op in OPS
        for field in LAYERS
        if not (op == "chunk_attention" and field == "present")  # which reads no maps
    ],
)
def test_a_layer_with_a_number_that_is_none_of_its_field_is_refused(op, field):
    values, message = LAYERS[field]
    args = pages.arguments(op)
    for value in values:
        assert_refused(op, with_field(args, FIELDS.index(field), value), message)


@pytest.mark.parametrize("field", ["K", "D", "R", "k_dtype", "v_dtype", "call_dtype"])
@pytest.mark.parametrize("op", OPS)
def test_a_layer_of_other_sizes_than_the_call_is_refused(op, field):
    args = pages.arguments(op)
    i = FIELDS.index(field)
    other = {"K": 1, "D": 32, "R": 3}.get(field, 0)
    assert_refused(op, with_field(args, i, other), "")


@pytest.mark.parametrize("op", OPS)
def test_query_heads_are_a_multiple_of_kv_heads(op):
    args = with_field(pages.arguments(op), FIELDS.index("Q"), 5)
    assert_refused(op, args, "q's heads must be a multiple of 2, got 5")


@pytest.mark.parametrize("slots", [0, -9, 2**31, 2**62])
@pytest.mark.parametrize("op", OPS)
def test_heads_with_no_slots_or_too_many_are_refused(op, slots):
    for head in range(K):
        args = with_field(pages.arguments(op), len(FIELDS) + head, slots)
        assert_refused(op, args, "layer's slots must be in 1 .. 1073741823, got")


@pytest.mark.parametrize("op", OPS)
def test_a_page_beyond_all_memory_is_refused(op):
    args = with_field(pages.arguments(op), len(FIELDS), 2**30 - 1)
    assert_refused(op, args, "layer's page must have at most 137438953472 bytes")


SHAPES = {
    "int32": (lambda x: x.int(), "got int32"),
    "float64": (lambda x: x.double(), "got float64"),
    "of one dim": (lambda x: x[0, 0], r"got int64 \[31\]"),
    "without heads": (lambda x: x[..., : len(FIELDS)], r"got int64 \[5, 9, 29\]"),
    "empty": (lambda x: x[:0], r"got int64 \[0, 9, 31\]"),
    "apart": (lambda x: x.repeat(1, 1, 2)[..., ::2], r"got int64 \[5, 9, 31\]"),
}


@pytest.mark.parametrize(("change", "message"), SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("op", [*OPS, "feature_map"])
def test_a_layer_that_encode_never_made_is_refused(op, change, message):
    wanted = f"layer must be what less.layer.encode makes, int64 .* on a CPU, {message}"
    assert_refused(op, changed(pages.arguments(op), "layer", change), wanted)


@pytest.mark.parametrize("op", OPS)
def test_a_layer_whose_shape_belies_its_numbers_is_refused(op):
    for change in (lambda x: x[:-1], lambda x: x[:, :-1]):
        args = changed(pages.arguments(op), "layer", change)
        assert_refused(op, args, "layer's shape must begin with 5, 9, got ")
    for change in (lambda x: x[..., :-1], lambda x: torch.cat([x, x[..., -1:]], -1)):
        args = changed(pages.arguments(op), "layer", change)
        assert_refused(op, args, "layer must list the slots of 2 kv heads, got [13]")


# -- maps ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", ["decode_step", "compact"])
def test_maps_come_where_the_layer_has_some_and_only_there(op):
    message = "maps must be given where the layer has some, and only there"
    args = pages.arguments(op)
    assert_refused(op, args | {"maps": None}, message)
    assert_refused(op, pages.arguments(op, state=False) | {"maps": args["maps"]}, message)


@pytest.mark.parametrize("op", ["decode_step", "compact"])
def test_a_victim_is_folded_only_through_maps(op):
    args = with_field(pages.arguments(op, state=False), FIELDS.index("victim"), 2)
    assert_refused(op, args, r".*victim 2 \(fold\),? (needs a layer with|must have) maps")


def test_a_step_over_a_state_needs_maps():
    args = pages.arguments("decode_step", victim="forget")
    args = with_field(args | {"maps": None}, FIELDS.index("kind"), -1)
    assert_refused("decode_step", args, "a layer with a state, .* must have maps")


MAPS = {
    "of int8": (lambda x: x.view(torch.int8), "maps must be uint8, got int8"),
    "of two dims": (lambda x: x[None], r"maps must be \[bytes\], got shape \[1, \d+\]"),
    "too small": (lambda x: x[:-128], r"maps must have shape \[\d+\], got \[\d+\]"),
    "too large": (lambda x: x.repeat(2), r"maps must have shape \[\d+\], got \[\d+\]"),
    "apart": (lambda x: x.repeat_interleave(2)[::2], r"maps must be contiguous, got strides \[2\]"),
    "a base at 1 byte": (misplaced, "maps must begin at a multiple of 16 bytes"),
}


@pytest.mark.parametrize(("change", "message"), MAPS.values(), ids=MAPS)
@pytest.mark.parametrize("op", ["decode_step", "compact", "feature_map"])
def test_maps_that_are_none_of_the_layers_are_refused(op, change, message):
    assert_refused(op, changed(pages.arguments(op), "maps", change), message)


def packed(kind, **tensors):
    """A layer whose maps have other tensors than their kind: None takes one away."""
    made = random_maps(Q, K, D, 16, 4, kind) | tensors
    made = {n: made[n] for n in ORDER if made.get(n) is not None}
    memory = torch.zeros(
        sum(aligned(x.nbytes, PIECE_ALIGN) for x in made.values()), dtype=torch.uint8
    )
    plan = pages.plan_of()
    return encode(plan.spec, plan.layout, PackedMaps(kind, made, memory)), memory


MIX = {"k_mix": torch.ones(K, 4, 4), "k_scale": torch.ones(K, 4), "k_mix_scale": torch.ones(K, 4)}
SCALED = "w1_scale and w2_scale belong to int8 weights, and must be given with them"
TENSORS = {
    "int8 without scales": ("exp", {"q_w1": torch.zeros(Q, D, 16, dtype=torch.int8)}, SCALED),
    "scales of float32": ("exp", {"q_w1_scale": torch.ones(Q, 16)}, SCALED),
    "half of the scales": ("exp", {"k_w2_scale": torch.ones(K, 4)}, SCALED),
    "a bias of the paper's": (
        "paper", {"q_bias": torch.ones(Q, 4)}, r"bias belongs to kind 1 \(exp\) alone"
    ),
    "a mix of exp": ("exp", MIX, r"mix belongs to kind 0 \(paper\) alone"),
    "a mix without its scale": (
        "paper", {"k_mix_scale": None}, "mix, scale and mix_scale must be given together"
    ),
    "a scale without a mix": (
        "paper", {"k_mix": None}, "mix, scale and mix_scale must be given together"
    ),
    "centroids of exp": (
        "exp",
        {"centroids": torch.ones(K, D, 4)},
        r"centroids, factors, weight and offset belong to kind 2 \(centroid\) alone",
    ),
    "centroids without a factor": (
        "centroid", {"q_factor": None}, r"kind 2 \(centroid\) must have centroids, factors, biases"
    ),
    "centroids without a bias": (
        "centroid", {"k_bias": None}, r"kind 2 \(centroid\) must have centroids, factors, biases"
    ),
    "int8 centroids without a scale": (
        "centroid",
        {"centroids": torch.zeros(K, D, 4, dtype=torch.int8)},
        "centroids_scale belongs to int8 centroids, and must be given with them",
    ),
    "a scale of float centroids": (
        "centroid",
        {"centroids_scale": torch.ones(K, 4)},
        "centroids_scale belongs to int8 centroids, and must be given with them",
    ),
    "a w1 of centroids": (
        "centroid",
        {"q_w1": torch.ones(Q, D, 4)},
        r"kind 2 \(centroid\) must have no w1, w2 and mix",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("kind", "tensors", "message"), TENSORS.values(), ids=TENSORS)
@pytest.mark.parametrize("op", ["decode_step", "compact", "feature_map"])
def test_tensors_that_do_not_make_a_map_are_refused(op, kind, tensors, message):
    layer, memory = packed(kind, **tensors)
    assert_refused(op, pages.arguments(op) | {"layer": layer, "maps": memory}, message)


def test_a_layer_that_lists_fewer_tensors_than_its_maps_hold_is_refused():
    args = pages.arguments("decode_step")
    present = int(args["layer"][0, 0, FIELDS.index("present")])
    bits = [bit for bit in range(64) if present >> bit & 1]
    assert len(bits) == 6  # w1, w2 and bias of phi and psi
    for bit in bits:
        without = with_field(args, FIELDS.index("present"), present & ~(1 << bit))
        assert_refused("decode_step", without, "maps must have (w1 and w2|shape)")


# -- what a call brings ----------------------------------------------------------------------------


def over_heads(x):
    return x[:, :1].expand(x.shape)


def in_columns(x):
    return x.mT.contiguous().mT if x.shape[2] > 1 else strided(x, x.shape, (4096, 1024, 1, 4))


def halves(x):
    return x.to(torch.bfloat16)


ROWS_OF = r"rows must be contiguous, got strides"
APART = r"rows must not overlap, got strides"
CALLS = [
    ("decode_step", "q", lambda x: x[..., 0], r"q must be \[B, Q, 1, D\], got shape \[2, 4, 1\]"),
    ("decode_step", "q", lambda x: x[:, :3], r"q must have shape \[2, 4, 1, 64\], got \[2, 3, 1, "),
    ("decode_step", "q", lambda x: x.repeat(1, 1, 2, 1), r"q must have shape \[2, 4, 1, 64\], got"),
    ("decode_step", "q", lambda x: x[..., :-1], r"q must have shape \[2, 4, 1, 64\], got"),
    ("decode_step", "q", lambda x: x.double(), "q must be float32, bfloat16 or float16, got float"),
    ("decode_step", "q", lambda x: x.to(torch.int8), "q must be float32, .* got int8"),
    ("decode_step", "q", over_heads, f"q's {APART}"),
    ("decode_step", "q", in_columns, f"q's {ROWS_OF}"),
    ("decode_step", "k", lambda x: x[:1], r"k must have shape \[2, 2, 1, 64\], got \[1, 2, 1, 64"),
    ("decode_step", "k", lambda x: x.repeat(1, 2, 1, 1), r"k must have shape \[2, 2, 1, 64\], got"),
    ("decode_step", "k", lambda x: x.to(torch.int8), "k must be float32, bfloat16 or float16, got"),
    ("decode_step", "k", halves, "v must be bfloat16, got float16"),
    ("decode_step", "k", over_heads, f"k's {APART}"),
    ("decode_step", "k", in_columns, f"k's {ROWS_OF}"),
    ("decode_step", "v", lambda x: x[:, :, :0], r"v must have shape \[2, 2, 1, 64\], got \[2, 2"),
    ("decode_step", "v", halves, "v must be float16, got bfloat16"),
    ("decode_step", "v", over_heads, f"v's {APART}"),
    ("decode_step", "v", in_columns, f"v's {ROWS_OF}"),
    ("decode_step", "out", lambda x: x[:, :1], r"out must have shape \[2, 4, 1, 64\], got \[2, 1"),
    ("decode_step", "out", lambda x: x.float(), "out must be float16, got float32"),
    ("decode_step", "out", over_heads, f"out's {APART}"),
    ("decode_step", "out", in_columns, f"out's {ROWS_OF}"),
    ("decode_step", "valid", lambda x: x[0], r"valid must have shape \[2, 1\], got \[1\]"),
    ("decode_step", "valid", lambda x: x.int(), "valid must be bool, got int32"),
    ("decode_step", "valid", lambda x: x[:1].expand(2, 1), "valid must be contiguous, got strides"),
    ("chunk_attention", "q", lambda x: x[0], r"q must be \[B, Q, T, D\], got shape \[4, 5, 64\]"),
    ("chunk_attention", "q", lambda x: x[:, :3], r"q must have shape \[2, 4, 5, 64\], got \[2, 3"),
    ("chunk_attention", "q", lambda x: x.double(), "q must be float32, .* got float64"),
    ("chunk_attention", "q", over_heads, f"q's {APART}"),
    ("chunk_attention", "q", in_columns, f"q's {ROWS_OF}"),
    ("chunk_attention", "k", lambda x: x[:, :, :4], r"k must have shape \[2, 2, 5, 64\], got \[2"),
    ("chunk_attention", "k", halves, "k must have the slots' dtype, got bfloat16"),
    ("chunk_attention", "k", lambda x: x.double(), "k must be float32, .* got float64"),
    ("chunk_attention", "k", over_heads, f"k's {APART}"),
    ("chunk_attention", "k", in_columns, f"k's {ROWS_OF}"),
    ("chunk_attention", "v", lambda x: x[..., 1:], r"v must have shape \[2, 2, 5, 64\], got"),
    ("chunk_attention", "v", halves, "v must have the slots' dtype, got bfloat16"),
    ("chunk_attention", "v", in_columns, f"v's {ROWS_OF}"),
    ("chunk_attention", "out", lambda x: x[:, :, :4], r"out must have shape \[2, 4, 5, 64\], got"),
    ("chunk_attention", "out", halves, "out must be float16, got bfloat16"),
    ("chunk_attention", "out", over_heads, f"out's {APART}"),
    ("chunk_attention", "out", in_columns, f"out's {ROWS_OF}"),
    ("chunk_attention", "valid", lambda x: x[:, :4], r"valid must have shape \[2, 5\], got \[2, 4"),
    ("chunk_attention", "valid", lambda x: x.int(), "valid must be bool, got int32"),
    ("chunk_attention", "valid", lambda x: x.mT.contiguous().mT, "valid must be contiguous"),
    ("chunk_attention", "phi_q", lambda x: x[..., :3], r"phi_q must have shape \[2, 4, 5, 4\]"),
    ("chunk_attention", "phi_q", lambda x: x.half(), "phi_q must be float32, got float16"),
    ("chunk_attention", "phi_q", over_heads, "phi_q must be contiguous, got strides"),
    ("compact", "k", lambda x: x[0], r"k must be \[B, K, T, D\], got shape \[2, 5, 64\]"),
    ("compact", "k", lambda x: x[:, :1], r"k must have shape \[2, 2, 5, 64\], got \[2, 1, 5, 64\]"),
    ("compact", "k", halves, "k must have the slots' dtype, got bfloat16"),
    ("compact", "k", over_heads, f"k's {APART}"),
    ("compact", "k", in_columns, f"k's {ROWS_OF}"),
    ("compact", "v", lambda x: x[:, :1], r"v must have shape \[2, 2, 5, 64\], got \[2, 1, 5, 64\]"),
    ("compact", "v", lambda x: x.to(torch.int8), "v must have the slots' dtype, got int8"),
    ("compact", "v", in_columns, f"v's {ROWS_OF}"),
    ("compact", "valid", lambda x: x[:, :2], r"valid must have shape \[2, 5\], got \[2, 2\]"),
    ("compact", "valid", lambda x: x.float(), "valid must be bool, got float32"),
    ("compact", "score", lambda x: x[..., 9:], r"score must have shape \[2, 2, 14\], got \[2, 2"),
    ("compact", "score", lambda x: x.double(), "score must be float32, got float64"),
    ("compact", "score", over_heads, "score must be contiguous, got strides"),
    ("compact", "rank", lambda x: torch.rand(B, K, 5), r"rank must have shape \[2, 2, 14\], got"),
    ("compact", "rank", lambda x: torch.rand(B, K, 14).half(), "rank must be float32, got float16"),
    ("compact", "rank", lambda x: over_heads(torch.rand(B, K, 14)), "rank must be contiguous"),
    ("feature_map", "x", lambda x: x[0], r"x must be \[B, heads, T, D\], got shape \[4, 5, 64\]"),
    ("feature_map", "x", lambda x: x[:, :K], r"x must have shape \[2, 4, 5, 64\], got \[2, 2"),
    ("feature_map", "x", lambda x: x.double(), "x must be float32, bfloat16 or float16, got float"),
    ("feature_map", "x", in_columns, f"x's {ROWS_OF}"),
]  # fmt: skip


@pytest.mark.parametrize(("op", "name", "change", "message"), CALLS)
def test_a_tensor_of_a_call_that_does_not_fit_is_refused(op, name, change, message):
    assert_refused(op, changed(pages.arguments(op), name, change), message)


@pytest.mark.parametrize("op", ["chunk_attention", "compact"])
def test_scales_come_with_rows_of_8_bits_and_only_with_them(op):
    eight, plain = pages.arguments(op, dtype=torch.int8), pages.arguments(op)
    pages.call(op, eight)
    belong = "scales belong to rows of 8 bits, and must be given with them"
    assert_refused(op, eight | {"scales": None}, belong)
    assert_refused(op, plain | {"scales": eight["scales"]}, belong)
    assert_refused(op, eight | {"k": plain["k"]}, "k must have the slots' dtype, got float16")
    for change, message in (
        (lambda x: x[0], r"scales must have shape \[2, 2, 2, 5\], got \[2, 2, 5\]"),
        (lambda x: x[..., :4], r"scales must have shape \[2, 2, 2, 5\], got \[2, 2, 2, 4\]"),
        (lambda x: x.half(), "scales must be float32, got float16"),
        (lambda x: x.mT.contiguous().mT, "scales must be contiguous, got strides"),
    ):
        assert_refused(op, changed(eight, "scales", change), message)


def test_features_belong_to_a_layer_with_a_state():
    args = pages.arguments("chunk_attention", state=False) | {"phi_q": torch.rand(B, Q, 5, 4)}
    assert_refused("chunk_attention", args, "phi_q belongs to a layer with a state")


def test_fp8_slots_are_refused_on_a_cpu():
    for op in OPS:
        args = pages.arguments(op, dtype=torch.int8)
        for field in ("k_dtype", "v_dtype", "call_dtype"):
            args = with_field(args, FIELDS.index(field), 4)
        assert_refused(op, args, "layer's k_dtype has no kernels: 4")


# Formats of keys, values and a call's rows; sinks; hot rows; head dim.
FEW = {
    "packed keys with plain values": ((5, 2, 3), 0, 1, 64, "dtypes do not go together"),
    "packed hot rows": ((5, 5, 5), 0, 1, 64, "dtypes do not go together"),
    "a head dim of no whole bytes": ((5, 5, 3), 0, 1, 20, "dtypes do not go together"),
    "packed rows without hot ones": ((5, 5, 3), 4, 0, 64, "hot must be in 1 .. 1048576, got 0"),
    "no slot beside the hot ones": ((5, 5, 3), 4, 5, 64, "slots must be in 10 .. "),
    "keys of another dtype": ((3, 2, 2), 0, 0, 64, "dtypes do not go together"),
    "a call of another dtype": ((2, 2, 3), 0, 0, 64, "dtypes do not go together"),
}


@pytest.mark.parametrize(("dtypes", "sinks", "hot", "dim", "message"), FEW.values(), ids=FEW)
@pytest.mark.parametrize("op", OPS)
def test_formats_that_do_not_go_together_are_refused(op, dtypes, sinks, hot, dim, message):
    args = pages.arguments(op)
    fields = dict(zip(("k_dtype", "v_dtype", "call_dtype"), dtypes, strict=True))
    for field, value in (fields | {"hot_sinks": sinks, "hot": hot, "D": dim}).items():
        args = with_field(args, FIELDS.index(field), value)
    assert_refused(op, args, f"layer's {message}")


def test_a_layer_without_a_rule_needs_ranks():
    args = pages.arguments("compact", rule=None)
    assert_refused("compact", args, "rank must be given where the layer has no rule")
    pages.call("compact", args | {"rank": torch.rand(B, K, 14)})
    args = pages.arguments("decode_step", rule=None)
    assert_refused("decode_step", args, "layer must have a rule")
    pages.call("decode_step", pages.arguments("decode_step", rule=None, victim="none"))


def test_attention_alone_lets_no_token_join():
    args = pages.arguments("compact", victim="none")
    assert_refused("compact", args, r"victim 0 \(none\) lets no token join")


# -- where kernels are launched --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("op", "name"),
    [
        *((op, name) for op in ("decode_step", "chunk_attention") for name in ("q", "k", "v")),
        *(("compact", name) for name in ("k", "v")),
        *((op, "out") for op in ("decode_step", "chunk_attention")),
        ("decode_step", "workspace"),
    ],
)
def test_a_launch_refuses_rows_that_do_not_begin_at_16_bytes(launched, op, name):
    args = pages.arguments(op, device=launched)
    if "workspace" in args:
        size = torch.ops.less.decode_step_workspace(args["pool"], args["layer"], B)
        args["workspace"] = torch.zeros(max(size, 16), dtype=torch.uint8, device=launched)
    pages.call(op, args)
    assert_refused(op, changed(args, name, misplaced), MISALIGNED)


@pytest.mark.parametrize(
    ("op", "name"),
    [("decode_step", "q"), ("decode_step", "v"), ("chunk_attention", "k"), ("compact", "v")],
)
def test_a_launch_refuses_strides_of_no_16_bytes(launched, op, name):
    args = pages.arguments(op, device=launched)
    apart = torch.zeros(*args[name].shape[:-1], D + 1, dtype=args[name].dtype, device=launched)
    message = f"{name}'s rows must begin at multiples of 16 bytes on a GPU, got strides"
    assert_refused(op, args | {name: apart[..., :D]}, message)


@pytest.mark.parametrize("op", OPS)
def test_a_launch_refuses_the_memory_of_another_layer(launched, op):
    args = pages.arguments(op, device=launched)
    for name, table in (("pool", POOLS), ("maps", MAPS)):
        for change, message in table.values() if name in args else ():
            assert_refused(op, changed(args, name, change), message)


def test_an_emulated_launch_refuses_pages_of_none_and_the_same_twice(emulator):
    for op in OPS:
        for change, message in ROWS.values():
            assert_refused(op, changed(pages.arguments(op), "rows", change), message)
