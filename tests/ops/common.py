"""A layer of a cache in mid-life, as keyword tensors for the ops."""

import torch

from less.layer import Space
from tests.helpers import random_maps, random_qkv
from tests.ops import flat_reference as reference


def layer(B=2, Q=6, K=2, T=5, S=9, D=16, R=4, E=10, kind="exp", dtype=torch.float32, seed=0):
    """Slots of which some are empty, a call of T tokens, state and maps."""
    g = torch.Generator().manual_seed(seed)
    q, k, v = random_qkv(B, Q, K, T, D, seed=seed, dtype=dtype)
    _, slot_k, slot_v = random_qkv(B, Q, K, S, D, seed=seed + 1, dtype=dtype)
    seen = torch.full((B,), 3 * S, dtype=torch.int64)
    position = torch.stack([torch.randperm(3 * S, generator=g)[:S] for _ in range(B * K)]).reshape(
        B, K, S
    )
    position = torch.where(torch.rand(B, K, S, generator=g) < 0.2, -1, position)
    valid = torch.rand(B, T, generator=g) < 0.8
    return {
        "q": q,
        "k": k,
        "v": v,
        "valid": valid,
        "slot_k": slot_k,
        "slot_v": slot_v,
        "position": position.to(torch.int32),
        "score": torch.where(position >= 0, torch.rand(B, K, S, generator=g), 0.0),
        "weight": torch.where(position >= 0, torch.rand(B, K, S, generator=g), 0.0),
        "seen": seen,
        "phi_q": torch.rand(B, Q, T, R, generator=g),
        "H": torch.randn(B, K, R, D, generator=g) * 3,
        "z": torch.rand(B, K, R, generator=g) * 3,
        "maps": random_maps(Q, K, D, E, R, kind, seed=seed),
    }


# What a launcher says that refuses rows which do not begin at a multiple of 16 bytes.
MISALIGNED = "the launch failed: .*(misaligned|error 716)"

SCALES = ("chunk_k_scale", "chunk_v_scale", "k_scale", "v_scale")


def in_int8(a):
    """The same layer with int8 rows and their scales, and with the numbers that those stand for."""
    eight, plain = dict(a), dict(a)
    for name, scale in zip(("k", "v", "slot_k", "slot_v"), SCALES, strict=True):
        eight[name], eight[scale] = reference.quantize(a[name])
        plain[name] = reference.dequantize(eight[name], eight[scale])
    return eight, plain


def in_fp8(a):
    """The same with rows of float8_e4m3fn, and with the numbers that those stand for."""
    eight, plain = dict(a), dict(a)
    for name, scale in zip(("k", "v", "slot_k", "slot_v"), SCALES, strict=True):
        eight[name], eight[scale] = reference.quantize(a[name], dtype=torch.float8_e4m3fn)
        plain[name] = reference.dequantize(eight[name].float(), eight[scale])
    return eight, plain


def assert_rounded(got, want):
    """Equal to float64's result but for one rounding to got's dtype, and 1e-5 of the largest."""
    unit = torch.finfo(got.dtype).eps / 2
    error = ((got.cpu().double() - want).abs() - unit * want.abs()).max().item()
    bound = 1e-5 * max(1e-30, want.abs().max().item())
    assert error <= bound, f"off by {error:.3g} more than a rounding"


def space_of(K, D):
    """A layer's space with means and scales of its own."""
    g = torch.Generator().manual_seed(5)
    mean, scale = torch.randn(2, K, D, generator=g), torch.rand(2, K, D, generator=g) + 0.5
    return Space.of(
        K, D, key_mean=mean[0], key_scale=scale[0], value_mean=mean[1], value_scale=scale[1]
    )


def assert_alone_as_in_a_batch(native, lengths):
    """A row's output and page have the same bits alone as in a batch of three.

    Args:
        native: A ``PagedLayer`` of kernels that are launched.
        lengths: Tokens of the calls.
    """
    shape = native.plan.spec.q_heads, native.layout.kv_heads
    calls = [
        random_qkv(3, *shape, T, native.layout.head_dim, seed=i) for i, T in enumerate(lengths)
    ]

    def run(rows):
        pool = native.new_pool(len(range(3)[rows]))
        outs = [native.attend(pool, *(x[rows].to(native.device) for x in call)) for call in calls]
        return torch.cat(outs, 2), pool

    out, pool = run(slice(0, 3))
    for b in range(3):
        alone, own = run(slice(b, b + 1))
        assert torch.equal(alone[0], out[b])
        assert torch.equal(own[0], pool[b])
