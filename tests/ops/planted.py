"""Runs a scenario on the emulator's library that is given: ``library scenario``.

A process of its own: one process can load one library of ops. Prints what the emulator found, or
as JSON the last launch's profile and a digest of what the ops wrote.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from less.backend import ops as less_ops
from less.layer import Paged, Rows
from less.layer.kinds import KINDS
from less.policies import Rule
from tests.emulated import Emulator
from tests.helpers import random_maps, random_qkv
from tests.ops import flat as ops
from tests.ops import flat_reference as reference
from tests.ops.common import SCALES, in_int8, layer
from tests.ops.test_decode_step_launched import RULES, WRITTEN, make, next_token, run
from tests.ops.test_packed_cuda import layers

Written = list[torch.Tensor]


def feature_map() -> None:
    """More rows than a warp's, two chunks of hidden columns, of which the last is not full."""
    maps = random_maps(1, 1, 64, 72, 8, "paper")
    narrow = {n: x.half() if n in KINDS["paper"].matrices else x for n, x in maps.items()}
    ops.psi(torch.randn(1, 1, 20, 64).half(), narrow, "paper")


def compact() -> None:
    """Some of a few heads' tokens stay; more leave than a tile of the fold takes."""
    a = layer(B=1, K=2, Q=2, T=60, S=9)
    ops.compact(
        a["k"], a["v"], torch.rand(1, 2, 60), a["score"].clone(), None, a["slot_k"], a["slot_v"],
        a["position"], a["score"], a["weight"], a["seen"], H=a["H"], z=a["z"], maps=a["maps"],
        rule=Rule(recent=2, sinks=0, by_score=True, per_age=False),
    )  # fmt: skip


def compact_merge() -> Written:
    """Of slots and of the call leave more than a tile takes, and go to more than a tile."""
    a = layer(B=1, K=2, Q=2, T=100, S=70, D=64)
    rule = Rule(recent=2, sinks=0, by_score=True, per_age=False)
    plan = ops.plan_of(2, 2, 64, 70, torch.float32, victim="merge", rule=rule)
    names = {"k": "slot_k", "v": "slot_v"}
    tensors = {n: a[names.get(n, n)] for n in ("k", "v", "position", "score", "weight", "seen")}
    pool, views = ops.filled(plan, tensors)
    score = torch.rand(1, 2, 170, generator=torch.Generator().manual_seed(1))
    less_ops.compact(Rows(a["k"], a["v"]), None, score, Paged(pool), plan)
    return list(views.values())


class WrongError(AssertionError):
    """A result is not the reference's."""


def check(got: torch.Tensor, want: torch.Tensor) -> None:
    error = (got.double() - want.double()).abs().max().item()
    if not error <= 4e-3 * max(1.0, want.abs().max().item()):
        raise WrongError


ROWS = ("q", "k", "v", "slot_k", "slot_v", "position", "score", "weight")


def check_attended(args: dict[str, Any], numbers: dict[str, Any], **options: Any) -> None:
    """Call the op, and compare with the reference over the numbers that its rows stand for."""
    wide = {
        n: x.float() if n in ("q", "k", "v", "slot_k", "slot_v") else x for n, x in numbers.items()
    }
    options |= {"scale": 0.1, "decay": 0.9}
    want = reference.chunk_attention(**wide, **options)
    got = ops.chunk_attention(**args, **options)
    for x, y in zip(got, (want.out, want.slot_score, want.chunk_score, want.share), strict=True):
        check(x, y)


def chunk_attention() -> None:
    """Rows of 8 bits, no state or padding; then fp16 rows of few tokens, of none and of many."""
    eight, plain = in_int8(layer(B=1, Q=2, K=1, T=40, S=70, D=64))
    eight["q"] = plain["q"] = eight["q"].half()
    check_attended({n: eight[n] for n in (*ROWS, *SCALES)}, {n: plain[n] for n in ROWS}, valid=None)
    a = layer(B=3, Q=4, K=2, T=40, S=140, D=64, R=5, dtype=torch.float16)
    valid = torch.arange(40) >= torch.tensor([[38], [40], [3]])
    for state in ((), ("phi_q", "H", "z")):
        args = {n: a[n] for n in (*ROWS, *state)}
        check_attended(args, args, valid=valid)


def prompt_scores() -> None:
    """Floats, then fp16, of more keys than a block's, more queries than a tile's; then padded."""
    for dtype in (torch.float32, torch.float16):
        q, k, _ = random_qkv(2, 2, 1, 100, 64, dtype=dtype)
        valid = torch.arange(100) >= torch.tensor([[0], [7]])
        for mask in (None, valid):
            every = torch.ones_like(valid) if mask is None else mask
            want = reference.prompt_scores(q.float(), k.float(), every, scale=0.1)
            check(ops.prompt_scores(q, k, mask, scale=0.1), want)


def decode(
    G: int = 1,
    empty: float = 0.0,
    clusters: bool = True,
    state: bool = True,
    sms: int = 132,
    **options: object,
) -> Written:
    """Two steps with one workspace, of heads whose last block has few slots.

    Args:
        G: Query heads of a kv head: from 3 on, tensor cores.
        empty: Share of the slots that are empty, and hold NaN.
        clusters: Whether the device has them; else blocks meet in the workspace.
        state: Whether there is a low-rank state.
        sms: Multiprocessors of the device: of one, a block has all of a head's ranges.
        options: Of the op.
    """
    os.environ["LESS_EMULATOR_SMS"] = str(sms)
    os.environ["LESS_EMULATOR_ARCHITECTURE"] = "90" if clusters else "80"
    a = make(B=1, Q=2 * G, K=2, D=64, S=69, empty=empty)
    a["slot_v"][a["position"] < 0] = torch.nan
    a["score"][a["position"] < 0] = 7.0
    size = ops.decode_step_workspace(a["slot_k"], 2 * G, a["maps"] if state else None)
    workspace = torch.zeros(size, dtype=torch.uint8)
    out = []
    for step in range(2):
        next_token(a, step)
        out.append(run(a, RULES[0], state, workspace=workspace, **options)["out"])
    return out + [a[n] for n in WRITTEN if n in a]


def decode_packed(sms: int = 1) -> Written:
    """Two steps on rows of four bits after a prompt.

    Args:
        sms: Multiprocessors of the device: of one, a block has both ranges of a head.
    """
    os.environ["LESS_EMULATOR_SMS"] = str(sms)
    os.environ["LESS_EMULATOR_ARCHITECTURE"] = "90"
    native, _ = layers(Q=4, K=2, capacity=150)
    pool = native.new_pool(1)
    out = []
    for i, T in enumerate((160, 1, 1)):
        q, k, v = random_qkv(1, 4, 2, T, 64, seed=i)
        older = torch.logspace(3, 0, T)[:, None]  # ranges have values of different size
        out.append(native.attend(pool, q * 10**i, k, v * older if T > 1 else v))
    return [*out, pool]


SCENARIOS: dict[str, Callable[[], Written | None]] = {
    "feature_map": feature_map,
    "compact": compact,
    "compact_merge": compact_merge,
    "chunk_attention": chunk_attention,
    "prompt_scores": prompt_scores,
    "decode": decode,
    "decode_mma": partial(decode, G=4),
    "decode_empty": partial(decode, empty=0.3),
    "decode_stateless": partial(decode, state=False),
    "decode_ranges": partial(decode, sms=1),
    "decode_mma_ranges": partial(decode, G=4, sms=1),
    "decode_packed": decode_packed,
    "decode_packed_apart": partial(decode_packed, sms=132),
    "decode_merge": partial(decode, state=False, victim="merge"),
    "decode_workspace": partial(decode, clusters=False),
    "decode_attention": partial(decode, victim="none"),
    "decode_dependent": partial(decode, dependent=True),
    "decode_random": decode,
}
# How a scenario runs, one after the other; otherwise once, in the first schedule.
SCHEDULES = {"decode_random": [{"schedule": "random", "seed": seed} for seed in range(1, 9)]}


def digest(written: Written) -> str:
    data = hashlib.sha256()
    for x in written:
        data.update(x.contiguous().view(torch.uint8).numpy().tobytes())
    return data.hexdigest()


def main(library: str, scenario: str) -> None:
    """See the module."""
    emulator = Emulator(Path(library))
    emulator.set(profile=1)
    torch.ops.less = torch.ops.less_emulated
    try:
        for schedule in SCHEDULES.get(scenario, [{}]):
            emulator.set(**schedule)
            written = SCENARIOS[scenario]()
    except RuntimeError as error:
        print(error)
    except WrongError:
        print('{"kind":"wrong"}')
    else:
        print(json.dumps(emulator.profile() | {"digest": digest(written or [])}))


if __name__ == "__main__":
    main(*sys.argv[1:])
