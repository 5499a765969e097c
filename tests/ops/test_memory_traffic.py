"""What the kernels ask of memory, counted by the emulator: banks, sectors, bytes.

The tier track counts; in the others nothing here runs.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from less.layer.kinds import KINDS
from less.policies import Rule
from tests.helpers import random_maps, random_qkv
from tests.ops.common import SCALES, in_int8, layer

pytest.importorskip("less._C")
from tests.ops import flat as ops

B, Q, K, D, R, E = 1, 8, 2, 64, 8, 128
MATRICES = KINDS["exp"].matrices
WIDTH = {torch.float32: 4, torch.bfloat16: 2, torch.float16: 2, torch.int8: 1}


def conflicts(profile: dict[str, Any]) -> set[str]:
    """The files whose accesses of shared memory took longer than without bank conflicts."""
    return {
        i["where"].split(":")[0]
        for i in profile["instructions"]
        if i["memory"] == "shared" and i["wavefronts"] > i["ideal_wavefronts"]
    }


def partial(profile: dict[str, Any]) -> set[tuple[str, int]]:
    """Those that touched sectors of global memory for less than all of their bytes, and widths."""
    return {
        (i["where"].split(":")[0], i["bytes_per_lane"])
        for i in profile["instructions"]
        if i["memory"] == "global" and i["sectors"] > i["ideal_sectors"]
    }


def read(profile: dict[str, Any]) -> int:
    """Bytes that the kernels read, each kernel's once."""
    return 32 * int(profile["load"]["distinct_sectors"])


def attended(dtype: torch.dtype, T: int, S: int) -> dict[str, Any]:
    a = layer(B=B, Q=Q, K=K, T=T, S=S, D=D, R=R, dtype=torch.float16)
    a["position"] = torch.arange(S, dtype=torch.int32).repeat(B, K, 1)
    names = ["q", "k", "v", "slot_k", "slot_v", "position", "score", "weight", "phi_q", "H", "z"]
    if dtype == torch.int8:
        a, _ = in_int8({n: x.float() if n in names[:5] else x for n, x in a.items()})
        a["q"] = a["q"].half()
        names += SCALES
    elif dtype != torch.float16:
        a |= {n: a[n].to(dtype) for n in names[:5]}
    return {n: a[n] for n in names} | {"valid": None, "scale": 0.1}


@pytest.mark.parametrize(("dtype", "T", "S"), [
    (torch.float16, 64, 128),
    (torch.float16, 16, 256),
    pytest.param(torch.bfloat16, 200, 256, marks=pytest.mark.proof),
    pytest.param(torch.int8, 64, 128, marks=pytest.mark.proof),
    pytest.param(torch.float32, 32, 64, marks=pytest.mark.proof),
], ids=str)  # fmt: skip
def test_emulated_chunk_attention_moves_whole_sectors_without_bank_conflicts(counting, dtype, T, S):
    ops.chunk_attention(**attended(dtype, T, S))
    profile = counting.profile()
    assert conflicts(profile) == set()
    assert partial(profile) == set()


def test_emulated_chunk_attention_reads_what_it_must(counting):
    T, S = 64, 128
    ops.chunk_attention(**attended(torch.float16, T, S))
    row = 2 * D
    lists = 4 * K * S
    attend = Q * T * row + 2 * K * (S + T) * row + 4 * K * S + 4 * Q * T * R + 4 * K * R * (D + 1)
    columns = Q * T * row + K * (S + T) * row + 4 * Q * T + 8 * K * S
    assert read(counting.profile()) <= 1.01 * (attend + columns + 3 * lists)


@pytest.mark.parametrize(
    "dtype", [torch.float16, pytest.param(torch.float32, marks=pytest.mark.proof)], ids=str
)
def test_emulated_prompt_scores_reads_what_it_must_in_whole_sectors_without_conflicts(
    counting, dtype
):
    T = 64
    q, k, _ = random_qkv(B, Q, K, T, D, dtype=dtype)
    ops.prompt_scores(q, k, scale=0.1)
    profile = counting.profile()
    assert conflicts(profile) == set()
    assert partial(profile) == set()
    # Twice, for masses and for scores, which read the masses.
    assert read(profile) <= 1.01 * (2 * (Q + K) * T * D * WIDTH[dtype] + 4 * Q * T)


@pytest.mark.parametrize("kind", ["paper", "exp"])
@pytest.mark.parametrize(
    "dtype", [torch.float16, pytest.param(torch.float32, marks=pytest.mark.proof)], ids=str
)
def test_emulated_feature_map_reads_what_it_must_in_whole_sectors_without_conflicts(
    counting, dtype, kind
):
    T = 64
    maps = random_maps(K, K, D, E, R, kind)
    maps |= {n: maps[n].to(dtype) for n in MATRICES}
    ops.psi(torch.randn(B, K, T, D).to(dtype), maps, kind)
    profile = counting.profile()
    # With float weights, the features of four rows meet when a block has its sums, once or, where
    # they are mixed, twice.
    at_the_end = {"feature_map/mma.h", "features.h"} if dtype == torch.float32 else set()
    assert conflicts(profile) <= at_the_end
    assert partial(profile) == set()
    small = 4 * K * R * (R + 2) if kind == "paper" else 4 * K * R
    assert read(profile) <= 1.01 * (K * (T * D + E * (D + R)) * WIDTH[dtype] + small)


@pytest.mark.parametrize(
    "dtype", [torch.float16, pytest.param(torch.int8, marks=pytest.mark.proof)], ids=str
)
def test_emulated_compact_reads_what_it_must_and_only_single_numbers_lie_apart(counting, dtype):
    T, S = 256, 32
    a = layer(B=B, K=K, Q=K, T=T, S=S, D=D, R=R, E=64, dtype=torch.float32)
    a["position"] = torch.arange(S, dtype=torch.int32).repeat(B, K, 1)
    maps = a["maps"] | {n: a["maps"][n].half() for n in MATRICES}
    rows = ("k", "v", "slot_k", "slot_v")
    a = in_int8(a)[0] if dtype == torch.int8 else a | {n: a[n].to(dtype) for n in rows}
    ops.compact(
        a["k"], a["v"], torch.rand(B, K, T), a["score"].clone(), None, a["slot_k"], a["slot_v"],
        a["position"], a["score"], a["weight"], a["seen"], H=a["H"], z=a["z"], maps=maps,
        rule=Rule(recent=16, sinks=0, by_score=True, per_age=False),
        **{n: a[n] for n in SCALES if n in a},
    )  # fmt: skip
    profile = counting.profile()
    # The choice counts ranks in bins, where lanes meet as the ranks have it.
    assert conflicts(profile) <= {"compact/select.h"}
    # A slot's or a token's number, whose neighbours are not this call's.
    assert {width for _, width in partial(profile)} <= {4}
    left = K * T * (2 * D * WIDTH[dtype] + (8 if dtype == torch.int8 else 0))
    joined = K * S * 2 * D * WIDTH[dtype]
    state = 4 * K * R * (D + 1)
    choice = 4 * K * (S + T) * 2
    scratch = 4 * K * T * R + state + 4 * K * (S + T) * 3
    must = left + joined + 2 * K * 64 * (D + R) + state + choice
    assert read(profile) <= 1.05 * (must + scratch)
