"""Tensor parallel: a model that transformers has sharded over two processes, on this machine."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

import less.hf
from less import Sidekick
from less.evaluate.families import K, build
from less.evaluate.matrix import SMALL, sidekick_for
from less.hf.parallel import part_of
from tests import tp_worker

ROOT = Path(__file__).parents[1]
WORLD = 2
GATHERED = ("phi3-gathered",)


def built(family):
    one_head = {"num_key_value_heads": 1} if family == "llama-mqa" else {}
    model = build(family.removesuffix("-mqa"), **one_head)
    return model, sidekick_for(model)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each of two processes computed, every case."""
    root = tmp_path_factory.mktemp("sharded")
    for family in {family for family, _ in tp_worker.CASES.values()} | {"llama-mqa"}:
        model, sidekick = built(family)
        model.save_pretrained(root / family)
        sidekick.save_pretrained(root / family / "sidekick")
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    run = subprocess.run(
        [*start, f"--nproc-per-node={WORLD}", "-m", "tests.tp_worker", str(root)],
        cwd=ROOT,
        # No GPU: transformers would put one process on each, and there may be one.
        env=os.environ
        | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr[-6000:]
    return [torch.load(root / f"rank{i}.pt") for i in range(WORLD)]


@pytest.mark.parametrize("case", tp_worker.CASES)
def test_two_processes_generate_what_one_generates(ranks, case):
    family, options = tp_worker.CASES[case]
    want = tp_worker.run(*built(family), options)
    for rank in ranks:
        assert torch.equal(rank[case]["tokens"], want["tokens"])
    # Each holds its own heads: the same tokens kept, and the same state up to the order of sums
    # over processes, which the exponential of the maps magnifies.
    for field in ("positions", "state"):
        for layer, whole in enumerate(want[field]):
            parts = [rank[case][field][layer] for rank in ranks]
            together = parts[0] if case in GATHERED else torch.cat(parts, 1)
            torch.testing.assert_close(
                together, whole, rtol=0, atol=1e-4 * float(whole.abs().max())
            )


@pytest.mark.parametrize("case", tp_worker.CASES)
def test_each_process_holds_its_share_of_the_bytes(ranks, case):
    family, options = tp_worker.CASES[case]
    whole = tp_worker.run(*built(family), options)["memory"]
    share = 1 if case in GATHERED else WORLD
    for rank in ranks:
        assert rank[case]["kv_heads"] == K // share
        memory = rank[case]["memory"]
        for purpose in ("slots", "state", "native", "full"):
            assert memory[purpose] * share == whole[purpose], purpose
        # Each tensor of the maps is filled up to 128 bytes in every part.
        assert whole["maps"] <= memory["maps"] * share <= 1.1 * whole["maps"] + 128 * 13 * share * 4


def test_each_process_deals_its_bytes_to_its_heads(ranks):
    whole, _ = tp_worker.dealt(built("llama")[0])
    slots = [rank["dealt"][0] for rank in ranks]
    for rank in ranks:
        assert 39_000 < rank["dealt"][1] <= 40_000
    assert slots[0] != slots[1]  # by its own curves
    for layer, parts in enumerate(zip(*slots, strict=True)):
        assert sum(map(len, parts)) == len(whole[layer]) == K


def test_a_part_for_another_process_is_refused(ranks):
    for i, rank in enumerate(ranks):
        assert f"computes part ({i}, 2) (rank, world) of its heads here" in rank["wrong part"]
        assert f"the sidekick is of part ({1 - i}, 2)" in rank["wrong part"]


def test_heads_that_cannot_be_dealt_out_are_refused_by_name(ranks):
    for rank in ranks:
        assert rank["one kv head"].startswith("UnsupportedModelError: cache_for: LlamaForCausalLM")
        assert "1 kv heads cannot be dealt out evenly to 2 processes" in rank["one kv head"]


class Plan:
    """As much of a sharded model as is asked."""

    def __init__(self, size=2, **styles):
        self.tp_size = size
        self.tp_plan = {f"model.layers.*.self_attn.{name}": s for name, s in styles.items()}

    def named_parameters(self):
        return iter(())


def test_a_plan_that_gathers_the_heads_leaves_them_whole():
    assert part_of(Plan(), 4, 2) == (0, 1)
    assert part_of(Plan(qkv_proj="colwise_gather_output"), 4, 2) == (0, 1)
    assert part_of(Plan(size=None, q_proj="colwise"), 4, 2) == (0, 1)


@pytest.mark.parametrize(
    "plan",
    [
        {"q_proj": "colwise", "k_proj": "colwise"},
        {"q_proj": "colwise", "k_proj": "colwise_gather_output", "v_proj": "colwise"},
        {"qkv_proj": "packed_colwise"},
    ],
)
def test_a_plan_that_cuts_queries_and_keys_apart_is_refused(plan):
    with pytest.raises(ValueError, match="must cut q_proj, k_proj and v_proj alike"):
        part_of(Plan(**plan), 4, 2)


def test_a_plan_without_sharded_weights_is_refused():
    plan = dict.fromkeys(("q_proj", "k_proj", "v_proj"), "colwise")
    with pytest.raises(ValueError, match="weights are not sharded"):
        part_of(Plan(**plan), 4, 2)


@pytest.mark.parametrize("kind", ["paper", "exp", "centroid"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
def test_parts_of_a_sidekick_make_up_the_whole(tmp_path, kind, dtype):
    whole = Sidekick.random(2, 8, 4, 6, rank=3, hidden=5, kind=kind, generator=1).to(dtype)
    whole.save_pretrained(tmp_path)
    read = [Sidekick.from_pretrained(tmp_path, shard=(i, 4)) for i in range(4)]
    cut = [whole.shard(i, 4) for i in range(4)]
    for i, (a, b) in enumerate(zip(read, cut, strict=True)):
        assert (a.part, a.q_heads, a.kv_heads, a.dtype) == ((i, 4), 2, 1, dtype)
        assert b.part == b.to(torch.float32).part == (i, 4)
        for layer in range(2):
            for name, x in a[layer].items():
                assert torch.equal(x, b[layer][name])
    for layer in range(2):
        for name, x in whole[layer].items():
            assert torch.equal(torch.cat([part[layer][name] for part in read]), x)


def test_what_is_no_part_is_refused(tmp_path):
    whole = Sidekick.random(1, 4, 2, 6, rank=3, hidden=5, generator=1)
    whole.save_pretrained(tmp_path)
    for cut in (whole.shard, lambda *part: Sidekick.from_pretrained(tmp_path, shard=part)):
        with pytest.raises(ValueError, match="rank must be in 0 .. world - 1, got rank 2 of wor"):
            cut(2, 2)
        with pytest.raises(ValueError, match="kv_heads must be a multiple of world = 4, got 2"):
            cut(0, 4)
        with pytest.raises(ValueError, match="world must be a whole number, got 2.0"):
            cut(0, 2.0)
    part = whole.shard(1, 2)
    with pytest.raises(ValueError, match=r"this is part \(1, 2\) already"):
        part.shard(0, 1)
    with pytest.raises(ValueError, match="save the whole one"):
        part.save_pretrained(tmp_path / "part")
    assert not (tmp_path / "part").exists()


def test_a_part_does_not_fit_a_whole_model():
    model, sidekick = built("llama")
    with pytest.raises(
        ValueError, match=r"computes part \(0, 1\).*the sidekick is of part \(1, 2\)"
    ):
        sidekick.shard(1, 2).check_model(model)
    with pytest.raises(ValueError, match="q_heads"):
        less.hf.cache_for(model, SMALL, sidekick.shard(1, 2))


def test_a_snapshot_is_of_one_process_and_a_cache_too():
    model, sidekick = built("llama")
    caches = [less.hf.cache_for(model, SMALL, sidekick) for _ in range(2)]
    caches[0].part, caches[1].part = (0, 2), (1, 2)
    with pytest.raises(ValueError, match=r"part must be \[1, 2\], got \[0, 2\]"):
        caches[1].load_state_dict(caches[0].state_dict())
    with (
        pytest.raises(ValueError, match=r"cache.part must be \(0, 1\) \(rank, world\)"),
        less.hf.attach(model, caches[1]),
    ):
        pass
