import pytest
import torch

pytest.importorskip("less._C")
from less import PageLayout, reference
from less.backend import ops
from less.layer import LayerPlan, LayerSpec, Space
from less.reference.codec import ROTATIONS

B, Q, K, T = 2, 6, 2, 5
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def space_of(D, seed=0):
    g = torch.Generator().manual_seed(seed)
    return Space.of(
        K,
        D,
        key_mean=3 * torch.randn(K, D, generator=g),
        key_scale=(0.5 * torch.randn(K, D, generator=g)).exp(),
        value_mean=torch.randn(K, D, generator=g),
        value_scale=(0.5 * torch.randn(K, D, generator=g)).exp(),
    )


def plan_of(space, device="cpu"):
    layout = PageLayout(K, space.key_mean.shape[1], 9, torch.float32)
    spec = LayerSpec(Q, scale=0.2, decay=1.0, rule=None, victim="forget")
    return LayerPlan(spec, layout, space=None if space is None else space.to(device))


def heads_of(rotation):
    return K if rotation in ("key", "value") else Q


def rows_of(rotation, D, dtype=torch.float32, seed=1):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(B, heads_of(rotation), T, D, generator=g).to(dtype)


def assert_bits(got, want):
    assert got.dtype == torch.float32
    assert torch.equal(got.cpu().view(torch.int32), want.view(torch.int32))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rotation", ["query", "key", "value"])
@pytest.mark.parametrize("D", [64, 80, 96, 128, 256])
def test_rows_that_enter_a_space_have_the_bits_of_the_reference(device, D, rotation, dtype):
    space, x = space_of(D), rows_of(rotation, D, dtype)
    got = ops.rotate(x.to(device), plan_of(space, device), rotation)
    assert_bits(got, reference.rotate(x, space, rotation))


@pytest.mark.parametrize("D", [64, 80, 96, 128, 256])
def test_output_leaves_a_space_within_rounding(device, D):
    space, x = space_of(D), rows_of("output", D)
    got = ops.rotate(x.to(device), plan_of(space, device), "output").cpu()
    want = reference.rotate(x.double(), space, "output")
    assert (got - want).abs().max() <= 2e-6 * want.abs().max()


def test_rows_of_any_width_have_the_bits_of_the_reference(simd):
    for D in (1, 2, 6, 8, 12, 24, 32, 43, 72, 112, 160, 512, 1024):
        space = space_of(D)
        for rotation in ROTATIONS[:3]:
            x = rows_of(rotation, D, seed=D)
            assert_bits(
                ops.rotate(x, plan_of(space), rotation), reference.rotate(x, space, rotation)
            )


@pytest.mark.parametrize("D", [64, 80])
def test_dot_products_survive_the_space(simd, D):
    space = space_of(D)
    plan = plan_of(space)
    q, k, v = (rows_of(rotation, D, seed=i) for i, rotation in enumerate(ROTATIONS[:3]))
    into = [ops.rotate(x, plan, r) for x, r in zip((q, k, v), ROTATIONS, strict=False)]
    shift = reference.query_shift(q, space, 1.0)
    wide = q.double().view(B, K, Q // K, T, D)
    want = torch.einsum("bkgtd,bknd->bkgtn", wide, k.double()).view(B, Q, T, T)
    got = torch.einsum(
        "bkgtd,bknd->bkgtn", into[0].double().view(B, K, Q // K, T, D), into[1].double()
    ).view(B, Q, T, T)
    got = got + shift.double().unsqueeze(-1)
    assert (got - want).abs().max() <= 1e-5 * want.abs().max()
    back = ops.rotate(into[2].repeat_interleave(Q // K, 1), plan, "output")
    assert torch.allclose(back, v.repeat_interleave(Q // K, 1), atol=2e-5)


@pytest.mark.parametrize("rotation", ROTATIONS)
def test_padding_is_zero_whatever_it_was(device, rotation):
    space, x = space_of(64), rows_of(rotation, 64)
    valid = torch.tensor([[True, False, True, True, False], [False] * 4 + [True]])
    x = torch.where(valid[:, None, :, None], x, torch.nan)
    y = ops.rotate(x.to(device), plan_of(space, device), rotation, valid.to(device))
    assert_bits(y, reference.rotate(x, space, rotation, valid))
    assert bool((y.cpu()[~valid[:, None].expand(B, heads_of(rotation), T)] == 0).all())


@pytest.mark.parametrize("rotation", ROTATIONS)
def test_tokens_may_lie_before_heads(device, rotation):
    space, x = space_of(64), rows_of(rotation, 64).to(device)
    plan = plan_of(space, device)
    tokens_first = x.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(ops.rotate(tokens_first, plan, rotation), ops.rotate(x, plan, rotation))


def test_rows_are_the_same_alone_and_for_any_thread_count(simd, with_threads):
    plan = plan_of(space_of(64))
    x = torch.randn(2, K, 3000, 64)
    with_threads(1)
    y = ops.rotate(x, plan, "key")
    with_threads(3)
    assert torch.equal(ops.rotate(x, plan, "key"), y)
    assert torch.equal(ops.rotate(x[1:, :, 77:78], plan, "key")[0, :, 0], y[1, :, 77])


@pytest.mark.parametrize("shape", [(0, K, 3, 64), (1, K, 0, 64)])
def test_nothing_to_rotate_is_no_error(device, shape):
    plan = plan_of(space_of(64), device)
    assert ops.rotate(torch.zeros(shape, device=device), plan, "key").shape == shape


def test_rotate_passes_opcheck():
    plan = plan_of(space_of(64))
    args = (rows_of("query", 64), None, plan.memory, plan.encoded, 0)
    torch.library.opcheck(torch.ops.less.rotate.default, args)


def test_a_layer_without_a_space_is_refused():
    layout = PageLayout(K, 64, 9, torch.float32)
    plan = LayerPlan(LayerSpec(Q, scale=0.2, decay=1.0, rule=None, victim="forget"), layout)
    memory = plan_of(space_of(64)).memory
    with pytest.raises(RuntimeError, match="rotate: maps must be given where the layer has some"):
        torch.ops.less.rotate(rows_of("key", 64), None, memory, plan.encoded, 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(3, 64)}, r"x must be \[B, heads, T, D\], got shape \[3, 64\]"),
        ({"x": torch.zeros(B, K, T, 64).double()}, "x must be float32, bfloat16 or float16"),
        ({"x": torch.zeros(B, Q, T, 64)}, r"x must have shape \[2, 2, 5, 64\]"),
        ({"x": torch.zeros(B, K, T, 32)}, r"x must have shape \[2, 2, 5, 64\]"),
        ({"valid": torch.ones(B, T + 1, dtype=torch.bool)}, r"valid must have shape \[2, 5\]"),
        ({"rotation": 5}, r"rotation must be in 0 .. 4, got 5"),
        ({"rotation": -1}, r"rotation must be in 0 .. 4, got -1"),
    ],
)
def test_rotate_refuses_bad_input(change, message):
    plan = plan_of(space_of(64))
    args = {
        "x": rows_of("key", 64),
        "valid": None,
        "maps": plan.memory,
        "layer": plan.encoded,
        "rotation": 1,
    }
    with pytest.raises(RuntimeError, match=f"rotate: {message}"):
        torch.ops.less.rotate(*(args | change).values())


def test_a_rotation_without_a_name_is_refused_by_the_reference():
    with pytest.raises(ValueError, match=r"rotation must be one of .*, got 'keys'"):
        reference.rotate(rows_of("key", 64), space_of(64), "keys")
