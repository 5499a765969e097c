"""Runs an op of the emulator's library that is given, on a small layer: ``library op``.

A process of its own: one process can load one library of ops. Prints what the emulator found, or
its profile as JSON.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from less import ops
from less.policies import Rule
from tests.emulated import Emulator
from tests.helpers import random_maps
from tests.ops.common import layer


def feature_map() -> None:
    """More rows than a warp's, two chunks of hidden columns, of which the last is not full."""
    maps = random_maps(1, 1, 64, 72, 8, "paper")
    narrow = {n: x.half() if n in ("k_w1", "k_w2") else x for n, x in maps.items()}
    ops.psi(torch.randn(1, 1, 20, 64).half(), narrow, "paper")


def compact() -> None:
    """Some of a few heads' tokens stay; more leave than a tile of the fold takes."""
    a = layer(B=1, K=2, Q=2, T=60, S=9)
    ops.compact(
        a["k"], a["v"], torch.rand(1, 2, 60), a["score"].clone(), None, a["slot_k"], a["slot_v"],
        a["position"], a["score"], a["weight"], a["seen"], H=a["H"], z=a["z"], maps=a["maps"],
        rule=Rule(recent=2, sinks=0, by_score=True, per_age=False),
    )  # fmt: skip


def main(library: str, op: str) -> None:
    """See the module."""
    emulator = Emulator(Path(library))
    emulator.set(profile=1)
    torch.ops.less = torch.ops.less_emulated
    try:
        {"feature_map": feature_map, "compact": compact}[op]()
    except RuntimeError as error:
        print(error)
    else:
        print(json.dumps(emulator.profile()))


if __name__ == "__main__":
    main(*sys.argv[1:])
