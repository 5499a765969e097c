"""The simulator is held to the real cache, token by token."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

if not any(map(shutil.which, ("c++", "g++"))):
    pytest.skip("no C++ compiler", allow_module_level=True)

from bench.simulate import __main__ as simulate_command
from bench.simulate import quantizers, rounding
from bench.simulate.measure import Measurement, Setting
from bench.simulate.native import VICTIMS, Cache, Features, Quantizer, round_rows, simulate
from bench.simulate.space import SPACES, Space, moments, rotation
from less import H2O, LessKVCache, Sidekick, SinkRecent
from less.budget import most_within, page_bytes
from less.evaluate.perplexity import full_attention, through_caches
from less.fit.text import repeat_passage
from less.hf import cache_for
from less.layer import Maps
from less.policies import Policy
from less.reference.maps import phi, psi
from tests.helpers import TOLERANCE, assert_close, random_maps, random_qkv
from tests.tiny_model import TEXT, save_tiny, tiny_model

Q, K, T = 6, 2, 90
# dtype of the real cache, and the rows that it holds
FORMATS: list[tuple[Any, Quantizer]] = [
    (torch.float32, quantizers.EXACT),
    (torch.float16, quantizers.HALF),
    (torch.bfloat16, quantizers.BRAIN),
    (torch.int8, quantizers.INT8),
]
POLICIES = [
    H2O(heavy=9, recent=12),
    H2O(heavy=9, recent=12, sinks=3, decay=0.9),
    SinkRecent(sinks=4, recent=13),
]


def simulated(policy: Policy, rows: Quantizer) -> Cache:
    """The cache of a policy whose rows are all of one format."""
    rule = policy.rule
    assert rule is not None
    return Cache(
        rows, rows, policy.capacity, rows, sinks=0, hot=0,
        recent=rule.recent, protect=rule.sinks, decay=policy.decay,
    )  # fmt: skip


def real(
    policy: Policy, dtype: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **more: Any
):
    D = q.shape[-1]
    cache = LessKVCache(1, Q, K, D, 1, policy, dtype=dtype, backend="reference", **more)
    steps = [cache.attend(0, *(x[:, :, t : t + 1] for x in (q, k, v))) for t in range(T)]
    return torch.cat(steps, 2)


@pytest.mark.parametrize(("dtype", "rows"), FORMATS, ids=lambda x: str(getattr(x, "kind", x)))
@pytest.mark.parametrize("policy", POLICIES, ids=str)
@pytest.mark.parametrize("D", [16, 40, 64])
def test_the_simulator_answers_as_the_cache_does(
    D: int, policy: Policy, dtype: Any, rows: Quantizer
) -> None:
    q, k, v = random_qkv(1, Q, K, T, D, seed=D)
    ours = simulate(q[0], k[0], v[0], simulated(policy, rows), D**-0.5)
    assert_close(ours, real(policy, dtype, q, k, v)[0], torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("policy", POLICIES[:2], ids=str)
def test_rows_merge_as_the_cache_merges_them(policy: Policy, dtype: torch.dtype) -> None:
    q, k, v = random_qkv(1, Q, K, T, 16)
    rows = quantizers.EXACT if dtype == torch.float32 else quantizers.HALF
    forgetting = simulated(policy, rows)
    ours = simulate(q[0], k[0], v[0], replace(forgetting, victim="merge"), 0.25)
    assert_close(ours, real(policy, dtype, q, k, v, victim="merge")[0], torch.float32)
    assert (ours - simulate(q[0], k[0], v[0], forgetting, 0.25)).abs().max() > 0.1


@pytest.mark.parametrize("victim", VICTIMS)
@pytest.mark.parametrize("rows", ["k4v4", "k4v3", "k3v3", "k2v2"])
def test_packed_rows_of_heads_of_their_own_are_the_cache_s(rows: str, victim: str) -> None:
    D, hot, capacities = 64, {"sinks": 2, "hot": 6}, (16, 26)
    q, k, v = random_qkv(1, Q, K, T, D)
    policy = H2O(heavy=9, recent=12, decay=0.9)
    more = {**hot, "victim": victim, "capacities": [capacities]}
    wanted = real(policy, rows, q, k, v, **more)[0]
    packed = (quantizers.named("max", int(rows[i]), D) for i in (1, 3))
    cache = Cache(
        *packed, [S - 8 for S in capacities], **hot,
        recent=[12 * S // 21 for S in capacities], decay=0.9, half_scores=True, int8_queries=True,
        victim=victim,
    )  # fmt: skip
    space = Space(K, D)
    ours = space.leave(simulate(*space.enter(q[0], k[0], v[0]), cache, D**-0.5))
    assert_close(ours, wanted, torch.float32, 4)


def test_tokens_that_leave_join_a_state_as_in_the_cache() -> None:
    q, k, v = random_qkv(1, Q, K, T, 16)
    policy, tensors = H2O(heavy=9, recent=12, decay=0.9), random_maps(Q, K, 16, 8, 5, "exp")
    sidekick = Sidekick([tensors], "exp")
    maps = Maps("exp", tensors)
    features = Features(phi(q, maps)[0], psi(k, maps)[0])
    cache = simulated(policy, quantizers.EXACT)
    ours = simulate(q[0], k[0], v[0], cache, 0.25, features=features)
    assert_close(ours, real(policy, torch.float32, q, k, v, sidekick=sidekick)[0], torch.float32)
    assert (ours - simulate(q[0], k[0], v[0], cache, 0.25)).abs().max() > 0.1
    with pytest.raises(ValueError, match="victim 'merge' and a low-rank state exclude"):
        simulate(q[0], k[0], v[0], replace(cache, victim="merge"), 0.25, features=features)


def test_each_head_has_slots_of_its_own() -> None:
    q, k, v = random_qkv(1, Q, K, T, 16)
    exact = quantizers.EXACT
    several = Cache(exact, exact, [9, 30], exact, recent=[4, 10])
    ours = simulate(q[0], k[0], v[0], several, 0.25)
    for h, (cold, recent) in enumerate([(9, 4), (30, 10)]):
        own = slice(h * Q // K, (h + 1) * Q // K)
        alone = replace(several, cold=cold, recent=recent)
        assert torch.equal(
            ours[own], simulate(q[0, own], k[0, h : h + 1], v[0, h : h + 1], alone, 0.25)
        )
    with pytest.raises(ValueError, match="cold must be one number or 2"):
        simulate(q[0], k[0], v[0], replace(several, cold=[9]), 0.25)


def test_a_cache_that_holds_everything_is_full_attention() -> None:
    q, k, v = random_qkv(1, Q, K, T, 48)
    everything = Cache(quantizers.EXACT, quantizers.EXACT, T, quantizers.EXACT)
    expected = torch.nn.functional.scaled_dot_product_attention(
        q, k.repeat_interleave(Q // K, 1), v.repeat_interleave(Q // K, 1), is_causal=True
    )
    assert_close(simulate(q[0], k[0], v[0], everything, 48**-0.5), expected[0], torch.float32)


def test_sinks_and_last_tokens_are_hot_and_all_others_cold() -> None:
    D, hot, sinks = 16, 5, 3
    q, k, v = random_qkv(1, 1, 1, 30, D)
    cold = quantizers.named("lloyd", 2, D)
    cache = Cache(cold, cold, 30, quantizers.INT8, sinks=sinks, hot=hot)
    ours = simulate(q[0], k[0], v[0], cache, D**-0.5)
    for t in range(30):
        at = torch.arange(t + 1)
        is_hot = ((at < sinks) | (at >= t - hot))[:, None]
        keys, values = (
            torch.where(is_hot, y, round_rows(y, cold))
            for y in (round_rows(x[0, 0, : t + 1], quantizers.INT8) for x in (k, v))
        )
        weight = torch.softmax(keys @ q[0, 0, t] * D**-0.5, 0)
        assert_close(ours[0, t], weight @ values, torch.float32)


def test_a_hot_token_leaves_for_the_cold_slots_in_the_order_of_scores() -> None:
    q, k, v = random_qkv(1, Q, K, T, 16)
    plain = Cache(
        quantizers.EXACT, quantizers.EXACT, 20, quantizers.EXACT, sinks=0, hot=0, recent=8
    )
    # Exact rows: a hot window is then but another protection of the last tokens.
    windowed = replace(plain, cold=12, hot=8, recent=0)
    ours = simulate(q[0], k[0], v[0], windowed, 0.25)
    assert_close(ours, simulate(q[0], k[0], v[0], plain, 0.25), torch.float32)


@pytest.mark.parametrize("D", [16, 48, 64, 80])
def test_the_space_changes_nothing_but_rounding(D: int) -> None:
    q, k, v = random_qkv(1, Q, K, T, D)
    k, v = k + 5 * torch.randn(1, K, 1, D), v * torch.rand(1, K, 1, D)
    space = Space(K, D, moments(q, k, v, torch.randn(7, Q * D)))
    everything = Cache(quantizers.EXACT, quantizers.EXACT, T, quantizers.EXACT)
    inside = space.leave(simulate(*space.enter(q[0], k[0], v[0]), everything, D**-0.5))
    plain = simulate(q[0], k[0], v[0], everything, D**-0.5)
    assert (inside - plain).abs().max() < 10 * TOLERANCE[torch.float32] * plain.abs().max()
    assert torch.allclose(rotation(D) @ rotation(D).T, torch.eye(D), atol=1e-6)


def encoded(x: torch.Tensor, rows: Quantizer) -> torch.Tensor:
    """A row by the definition: nearest level of x / unit, then the least-squares scale in fp16."""
    level = torch.tensor(rows.levels)
    unit = x.abs().amax(-1, True) if rows.by_max else x.square().mean(-1, True).sqrt()
    cuts = (level[1:] + level[:-1]) / 2
    unit = unit * rows.unit
    code = (x[..., None] > cuts * unit[..., None]).sum(-1)
    chosen = level[code]
    match = (x * chosen).sum(-1, True)
    scale = {
        "none": unit,
        "square": match / chosen.square().sum(-1, True),
        "product": x.square().sum(-1, True) / match,
    }
    return scale[rows.fit].half().float() * chosen


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("name", [*quantizers.RULES, "lloyd:none", "lloyd:product", "max/32"])
def test_a_row_is_rounded_by_its_definition(name: str, bits: int) -> None:
    x = torch.randn(200, 64, generator=torch.Generator().manual_seed(bits)) * 3
    rows = quantizers.named(name, bits, 64)
    shape = (200, -1, rows.group or 64)
    expected = encoded(x.view(shape), replace(rows, group=0)).view(200, 64)
    ours = round_rows(x, rows)
    assert ((ours - expected).abs() > 1e-5).float().mean() < 1e-3  # a number upon a threshold
    assert torch.equal(round_rows(torch.zeros(1, 64), rows), torch.zeros(1, 64))


def test_lloyd_max_levels_are_the_known_ones() -> None:
    assert quantizers.lloyd_max(2)[2:] == pytest.approx((0.4528, 1.5104), abs=1e-4)
    assert quantizers.lloyd_max(4)[-1] == pytest.approx(2.7326, abs=1e-4)


def test_wrong_sizes_are_refused_by_name() -> None:
    q, k, v = random_qkv(1, Q, K, 5, 16)
    exact = quantizers.EXACT
    with pytest.raises(ValueError, match="k and v must be"):
        simulate(q[0], k[0], v[0, :, :3], Cache(exact, exact, 4), 1.0)
    with pytest.raises(ValueError, match="cold must be 1 or more, got 0"):
        simulate(q[0], k[0], v[0], Cache(exact, exact, 0), 1.0)
    with pytest.raises(ValueError, match="groups must divide"):
        round_rows(k, quantizers.named("lloyd/5", 4, 16))


@pytest.fixture(scope="module")
def tiny() -> Measurement:
    chunks = torch.randint(0, 256, (2, 80), generator=torch.Generator().manual_seed(3))
    training = chunks.flip(1)
    return Measurement(tiny_model(), chunks, 20, training, repeat_passage(training))


def test_a_model_on_simulated_caches_costs_what_it_costs_on_real_ones(tiny: Measurement) -> None:
    cache = cache_for(tiny.model, H2O(8, 8), batch=2, dtype=torch.float16)
    (real,) = through_caches(tiny.model, tiny.chunks, [cache])
    loss = tiny.h2o(16).per_chunk(20) - real.per_chunk(20)
    assert loss.abs().max() < 1e-4
    full = full_attention(tiny.model, tiny.chunks)
    assert (tiny.full.per_chunk(20) - full.per_chunk(20)).abs().max() < 1e-5
    assert (tiny.h2o(16).per_chunk(20) - full.per_chunk(20)).abs().max() > 1e-2


SETTING = Setting("k16v16", 0, hot=0, sinks=0)


@pytest.mark.parametrize("space", SPACES)
def test_rows_of_16_bits_lose_next_to_nothing_in_any_space(tiny: Measurement, space: str) -> None:
    row, record = tiny.measure(replace(SETTING, space=space))
    assert max(map(abs, record["loss"])) < 5e-3
    assert record["slots"] == 80
    assert record["h2o"] is None
    assert f"k16v16 max, {space}, {SETTING.victim}, hot 0" in row


@pytest.mark.parametrize("rows", ["k4v4", "k3v3", "k2v2", "k8v4"])
@pytest.mark.parametrize("bytes_of", [32, 64, 205])
def test_bytes_buy_as_many_slots_as_pages_have_room_for(rows: str, bytes_of: int) -> None:
    room = page_bytes(1, 64, torch.float16, bytes_of)
    bought = most_within(room, lambda slots: page_bytes(1, 64, rows, max(slots, 21)))
    assert Setting(rows, bytes_of).slots(64, 1024) == bought


def test_settings_that_cannot_be_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="--bytes-of must leave cold slots"):
        Setting("k4v4", 8).cache(64, [12])
    with pytest.raises(ValueError, match=r"quantizer must be .*, got 'lloid'"):
        quantizers.named("lloid", 4, 16)
    exact = quantizers.EXACT
    with pytest.raises(ValueError, match="victim must be of .*, got 'fold'"):
        simulate(*torch.ones(3, 1, 2, 16), Cache(exact, exact, 4, victim="fold"), 1.0)


def test_budgets_keep_to_the_bytes(tiny: Measurement) -> None:
    setting = Setting("k4v4", 30, budgets=True, sinks=2, hot=4)
    D, dealt = tiny.head_dim, tiny.capacities(setting)
    heads = [S for layer in dealt.values() for S in layer]
    assert len(heads) == 2 * tiny.kv_heads
    assert len(set(heads)) > 1
    spent = sum(setting.head_bytes(D, S) for S in heads)
    assert 0.9 < spent / (len(heads) * setting.room(D)) <= 1


def test_both_commands_print_a_table_of_a_model_and_a_text(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, text, lines = tmp_path / "model", tmp_path / "text.txt", tmp_path / "rows.jsonl"
    save_tiny(model)
    text.write_text(TEXT * 30)
    where = ["--model", str(model), "--text", str(text), "--training", str(text)]
    small = ["--length", "300", "--chunks", "2"]
    simulate_command.main(
        [*where, *small, "--rows", "k4v4", "k2v2", "--bytes-of", "0", "60", "--json", str(lines)]
    )
    out = capsys.readouterr().out.splitlines()
    assert len(out) == 2 + 2 + 4  # head, full attention and H2O, four caches
    assert len({len(line.split("|")) for line in out}) == 1
    records = [json.loads(line) for line in lines.read_text().splitlines()]
    assert [record["rows"] for record in records] == ["k4v4", "k4v4", "k2v2", "k2v2"]
    assert all(len(record["loss"]) == 2 for record in records)
    sidekick = tmp_path / "sidekick"
    maps = Sidekick.random(2, 4, 2, 16, 4, 1, "centroid", 0)
    maps.save_pretrained(sidekick, dtype=torch.int8)
    folds = ["--bytes-of", "60", "--victim", "fold", "forget", "--sidekick", str(sidekick)]
    simulate_command.main([*where, *small, *folds, "--json", str(lines)])
    capsys.readouterr()
    fold, forget = [json.loads(line) for line in lines.read_text().splitlines()[-2:]]
    spare = forget["slots"] - fold["slots"]  # of 16 dims: 36 bytes each, and padding
    assert fold["state"] - 128 <= 36 * spare <= fold["state"] + 128 * 10
    assert fold["loss"] != forget["loss"]
    with pytest.raises(ValueError, match="--victim fold needs --sidekick"):
        simulate_command.main([*where, *small, *folds[:-2]])
    rounding.main([*where, *small, "--quantizer", "lloyd", "max"])
    _, _, *table = capsys.readouterr().out.splitlines()
    errors = [[float(cell) for cell in line.split("|")[3:8]] for line in table]
    assert len(errors) == 6
    assert all(fine < coarse for fine, coarse in zip(errors[0], errors[4], strict=True))
