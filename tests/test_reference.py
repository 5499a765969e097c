"""The reference against the mathematics: written out loops in float64, and its own other forms."""

import math

import pytest
import torch

from less import H2O, SinkRecent
from tests.helpers import random_maps, random_qkv
from tests.ops import flat_reference as reference

POLICIES = [
    H2O(heavy=3, recent=4),
    H2O(heavy=4, recent=3, sinks=2),
    H2O(heavy=3, recent=4, decay=0.9),
    H2O(heavy=3, recent=4, per_age=True),
    H2O(heavy=0, recent=5),
    H2O(heavy=5, recent=0),
    SinkRecent(sinks=2, recent=4),
    SinkRecent(sinks=0, recent=5),
]


def naive_feature(x, maps, side, kind):
    """One head's feature map by scalar arithmetic; x [D], maps of that head."""

    def gelu(a):
        return 0.5 * a * (1.0 + math.erf(a / math.sqrt(2.0)))

    if kind == "centroid":
        D, R = maps["centroids"].shape
        near = [
            maps["factor"] * sum(x[d] * maps["centroids"][d][r] for d in range(D)) + maps["bias"][r]
            for r in range(R)
        ]
        if side == "q":
            return [math.exp(min(15.0, max(-15.0, a))) for a in near]
        total = sum(math.exp(a) for a in near)
        mass = sum(x[d] * maps["weight"][d] for d in range(D)) + maps["offset"]
        return [math.exp(a) / total * math.exp(min(15.0, max(-15.0, mass))) for a in near]
    D, E = maps["w1"].shape
    R = maps["w2"].shape[1]
    hidden = [gelu(sum(x[d] * maps["w1"][d][e] for d in range(D))) for e in range(E)]
    y = [float(sum(hidden[e] * maps["w2"][e][r] for e in range(E))) for r in range(R)]
    if kind == "exp":
        return [math.exp(min(15.0, max(-15.0, y[r] + maps["bias"][r]))) for r in range(R)]
    y = [gelu(a) for a in y]
    if side == "q":
        return [abs(a) for a in y]
    h = [abs(maps["scale"][r]) * y[r] for r in range(R)]
    mixed = [sum(h[i] * maps["mix"][i][r] for i in range(R)) for r in range(R)]
    return [abs(h[r] + mixed[r] * maps["mix_scale"][r]) for r in range(R)]


def head_maps(maps, side, head, group=1):
    """A head's maps; `group`: heads that share a matrix of centroids."""
    own = {n[2:]: t[head].double() for n, t in maps.items() if n.startswith(side + "_")}
    if "centroids" in maps:
        own["centroids"] = maps["centroids"][head // group].double()
    return own


def naive_run(q, k, v, policy, maps, kind, prompt, softcap=0.0):
    """Design order, one row, one kv head group, python lists; q [G,T,D], k and v [T,D]."""
    G, T, D = q.shape
    held, score = [], {}
    H = z = None
    out = torch.zeros(G, T, D, dtype=torch.float64)
    history = []
    start = 0
    while start < T:
        stop = prompt if start == 0 else start + 1
        weights = dict.fromkeys(held + list(range(start, stop)), 0.0)
        for t in range(start, stop):
            tokens = held + list(range(start, t + 1))
            for g in range(G):
                logit = {p: float(q[g, t] @ k[p]) / math.sqrt(D) for p in tokens}
                if softcap:
                    logit = {p: softcap * math.tanh(x / softcap) for p, x in logit.items()}
                mass = {p: math.exp(x) for p, x in logit.items()}
                total = sum(mass.values())
                num = sum(mass[p] * v[p] for p in tokens)
                den = total
                if H is not None:
                    f = torch.tensor(
                        naive_feature(q[g, t], maps["q"][g], "q", kind), dtype=torch.float64
                    )
                    num = num + f @ H
                    den = den + float(f @ z)
                out[g, t] = num / den
                for p in tokens:
                    weights[p] += policy.decay ** (stop - 1 - t) * mass[p] / total
        for p in weights:
            score[p] = score.get(p, 0.0) * policy.decay ** (stop - start) + weights[p]
        tokens = held + list(range(start, stop))
        n = stop
        if len(tokens) > policy.capacity:
            protected = [p for p in tokens if p >= n - policy.recent]
            others = [p for p in tokens if p < n - policy.recent]
            if isinstance(policy, H2O):
                sinks = [p for p in others if p < policy.sinks]
                rest = [p for p in others if p >= policy.sinks]
                worth = {p: score[p] / (n - p) if policy.per_age else score[p] for p in rest}
                rest.sort(key=lambda p: (worth[p], p), reverse=True)
                stay = protected + sinks + rest[: policy.heavy - len(sinks)]
            else:
                stay = protected + [p for p in others if p < policy.sinks]
            for p in sorted(set(tokens) - set(stay)):
                if maps is not None:
                    f = torch.tensor(naive_feature(k[p], maps["k"], "k", kind), dtype=torch.float64)
                    H = f[:, None] * v[p] + (0 if H is None else H)
                    z = f + (0 if z is None else z)
            held = sorted(stay)
        else:
            held = tokens
        history.append(set(held))
        start = stop
    return out, history, H, z


@pytest.mark.parametrize("policy", POLICIES, ids=str)
@pytest.mark.parametrize("kind", ["paper", "exp", "centroid"])
@pytest.mark.parametrize(("prompt", "softcap"), [(1, 0.0), (3, 0.8), (12, 0.0)])
def test_run_equals_the_design_written_as_scalar_loops(policy, kind, prompt, softcap):
    B, Q, K, T, D = 1, 4, 2, 22, 4
    q, k, v = random_qkv(B, Q, K, T, D, seed=prompt, dtype=torch.float64)
    maps = random_maps(Q, K, D, E=3, R=2, kind=kind, dtype=torch.float64)
    got = reference.run(q, k, v, policy, maps, kind, prompt=prompt, softcap=softcap)
    for head in range(K):
        group = range(head * 2, head * 2 + 2)
        ours = {"q": [head_maps(maps, "q", g, 2) for g in group], "k": head_maps(maps, "k", head)}
        out, history, H, z = naive_run(
            q[0, list(group)], k[0, head], v[0, head], policy, ours, kind, prompt, softcap
        )
        torch.testing.assert_close(got.out[0, list(group)], out, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(got.H[0, head], H, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(got.z[0, head], z, rtol=1e-10, atol=1e-12)
        for step, want in zip(got.positions, history, strict=True):
            held = step[0, head]
            assert set(held[held >= 0].tolist()) == want


@pytest.mark.parametrize("policy", POLICIES, ids=str)
@pytest.mark.parametrize("kind", ["paper", "exp", "centroid"])
@pytest.mark.parametrize("prompt", [1, 12])
def test_parallel_form_equals_recurrent_form(policy, kind, prompt):
    q, k, v = random_qkv(2, 4, 2, 40, 8, seed=5, dtype=torch.float64)
    maps = random_maps(4, 2, 8, E=6, R=3, kind=kind, dtype=torch.float64)
    recurrent = reference.run(q, k, v, policy, maps, kind, prompt=prompt)
    left = reference.evict_schedule(q, k, v, policy, prompt=prompt)
    assert torch.equal(left, recurrent.left)
    whole = reference.parallel(q, k, v, left, maps, kind)
    torch.testing.assert_close(whole, recurrent.out, rtol=1e-9, atol=1e-12)
    rows = torch.tensor([39, 3, 17])
    some = reference.parallel(q, k, v, left, maps, kind, rows=rows)
    torch.testing.assert_close(some, whole[:, :, rows], rtol=1e-12, atol=1e-14)
    alone = reference.parallel(q, k, v, left)
    torch.testing.assert_close(
        alone, reference.run(q, k, v, policy, prompt=prompt).out, rtol=1e-9, atol=1e-12
    )


def test_parallel_form_equals_recurrent_form_under_a_soft_cap():
    q, k, v = random_qkv(2, 4, 2, 40, 8, seed=5, dtype=torch.float64)
    maps = random_maps(4, 2, 8, E=6, R=3, kind="exp", dtype=torch.float64)
    options = {"prompt": 7, "scale": 1.0, "softcap": 1.5}
    recurrent = reference.run(q, k, v, POLICIES[0], maps, **options)
    left = reference.evict_schedule(q, k, v, POLICIES[0], **options)
    assert torch.equal(left, recurrent.left)
    del options["prompt"]
    whole = reference.parallel(q, k, v, left, maps, **options)
    torch.testing.assert_close(whole, recurrent.out, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", ["paper", "exp", "centroid"])
def test_parallel_form_has_the_gradient_of_finite_differences(kind):
    q, k, v = random_qkv(1, 2, 1, 9, 4, seed=1, dtype=torch.float64)
    maps = random_maps(2, 1, 4, E=3, R=2, kind=kind, dtype=torch.float64)
    left = reference.evict_schedule(q, k, v, H2O(heavy=2, recent=2))
    names = sorted(maps)

    def f(*tensors):
        return reference.parallel(q, k, v, left, dict(zip(names, tensors, strict=True)), kind)

    inputs = [maps[n].clone().requires_grad_() for n in names]
    assert torch.autograd.gradcheck(f, inputs)


@pytest.mark.parametrize("kind", ["paper", "exp", "centroid"])
@pytest.mark.parametrize("prompt", [1, 12])
def test_a_key_of_nan_shows_in_every_output_from_its_token_on(kind, prompt):
    q, k, v = random_qkv(1, 4, 2, 22, 4, dtype=torch.float64)
    maps = random_maps(4, 2, 4, E=3, R=2, kind=kind, dtype=torch.float64)
    k[0, 1, 3, 2] = torch.nan
    got = reference.run(q, k, v, SinkRecent(1, 4), maps, kind, prompt=prompt)
    assert got.left[0, 1, 3] < 22
    nan = torch.zeros(1, 4, 22, 4, dtype=torch.bool)
    nan[:, 2:, 3:] = True
    assert torch.equal(got.out.isnan(), nan)


def test_nothing_overflows_at_extreme_logits():
    q, k, v = random_qkv(1, 2, 1, 30, 4, seed=2)
    maps = random_maps(2, 1, 4, E=3, R=2, kind="exp")
    maps = {n: t * (30.0 if n.endswith("bias") else 1.0) for n, t in maps.items()}
    for factor in (1e-4, 1.0, 300.0):
        out = reference.run(q * factor, k * factor, v, H2O(heavy=2, recent=2), maps, "exp").out
        assert out.isfinite().all()
        assert out.abs().max() <= v.abs().max() * (1 + 1e-5)


def test_the_parallel_form_bears_logits_far_below_zero():
    q, k, v = random_qkv(1, 1, 1, 12, 4, seed=2)
    q, k = torch.full_like(q, 30.0), torch.full_like(k, -30.0) + k
    maps = random_maps(1, 1, 4, E=3, R=2, kind="exp")
    maps = {n: t - 40.0 if n == "k_bias" else t for n, t in maps.items()}
    want = reference.run(q, k, v, H2O(heavy=2, recent=2), maps, "exp")
    got = reference.parallel(q, k, v, want.left, maps, "exp")
    assert got.isfinite().all()
    torch.testing.assert_close(got, want.out, rtol=1e-4, atol=1e-5)


def test_a_low_rank_part_without_mass_is_skipped():
    q, k, v = random_qkv(1, 2, 1, 20, 4, seed=3)
    maps = random_maps(2, 1, 4, E=3, R=2, kind="paper")
    maps["q_w2"] = torch.zeros_like(maps["q_w2"])
    policy = H2O(heavy=2, recent=2)
    with_state = reference.run(q, k, v, policy, maps, "paper").out
    assert torch.equal(with_state, reference.run(q, k, v, policy).out)


def test_survivors_break_ties_by_age_and_put_nan_last():
    position = torch.tensor([[[4, 0, -1, 2, 3, 1]]], dtype=torch.int32)
    rank = torch.zeros(1, 1, 6)
    kept = reference.survivors(position, rank, 2)
    assert position[kept].tolist() == [4, 3]
    rank[0, 0, 0] = torch.nan
    rank[0, 0, 2] = torch.inf
    kept = reference.survivors(position, rank, 4)
    assert sorted(position[kept].tolist()) == [0, 1, 2, 3]
    assert reference.survivors(position, rank, 9).sum() == 5


def test_chunked_prompt_equals_whole_prompt_when_nothing_is_evicted():
    q, k, v = random_qkv(2, 4, 2, 20, 8, seed=4, dtype=torch.float64)
    policy = H2O(heavy=10, recent=10, decay=0.9)
    whole = reference.run(q, k, v, policy, prompt=20)
    for chunk in (1, 3, 7):
        parts = reference.run(q, k, v, policy, prompt=chunk, chunk=chunk)
        torch.testing.assert_close(parts.out, whole.out, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(parts.scores[-1], whole.scores[-1], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dim", [-1, -2, 0])
def test_quantised_rows_are_within_half_a_step(dtype, dim):
    x = (torch.randn(5, 7, 33, dtype=torch.float64) * 1e3).to(dtype)
    if dim != 0:
        x[2] = 0
    eight, scale = reference.quantize(x, dim)
    assert (eight.dtype, eight.shape) == (torch.int8, x.shape)
    assert scale.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.equal(scale, x.to(scale.dtype).abs().amax(dim) / 127)
    error = (reference.dequantize(eight, scale, dim) - x).abs()
    assert (error <= scale.unsqueeze(dim) * (0.5 + 1e-4)).all()
    largest = eight.abs().amax(dim)
    assert ((largest == 127) | (scale == 0)).all()
    assert (largest[scale == 0] == 0).all()


def test_ties_of_quantised_rows_go_to_the_even_number():
    x = torch.tensor([127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -126.5])
    eight, scale = reference.quantize(x)
    assert scale.item() == 1.0
    assert eight.tolist() == [127, 0, 2, 2, 0, -2, -126]


def test_rows_that_cannot_be_quantised_stay_visible():
    x = torch.ones(4, 3)
    x[0, 1], x[1, 1], x[2] = torch.nan, torch.inf, 1e-45
    eight, scale = reference.quantize(x)
    back = reference.dequantize(eight, scale)
    assert back[:2].isnan().any(1).all()
    assert (back[2] == 0).all()
    assert torch.equal(back[3], x[3])
