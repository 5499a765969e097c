"""Damaged files are refused by name, in bounded time and memory, or change nothing that counts.

LESS_FUZZ_FILES is how many files each test damages; ``make soak`` takes more.
"""

from __future__ import annotations

import json
import os
import random
import re
import resource
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from less import H2O, Calibration, LessConfig, LessKVCache, Sidekick
from less.evaluate.cells import Cells
from less.evaluate.tasks.base import UnavailableError
from less.evaluate.tasks.data import _local_rows
from less.files import read_texts
from less.fit.train import _read_layer
from tests.fuzz import files
from tests.helpers import random_maps, random_qkv

COUNT = int(os.environ.get("LESS_FUZZ_FILES", 1000))
SECONDS = 10.0  # of one file, whatever else the machine does
MEMORY = 512 << 10  # KiB that one test may add to the process


def sidekick(folder: Path) -> None:
    maps = [random_maps(2, 1, 8, 6, 3, "exp", seed=i) for i in range(2)]
    config = {"budgets": [8, 16], "training": {"text": {"chunk_tokens": 64}}, "model": {"name": ""}}
    Sidekick(maps, kind="exp", config=config).save_pretrained(folder)


def read_sidekick(folder: Path) -> object:
    held = Sidekick.from_pretrained(folder)
    _ = repr(held), held.name, held.trained_length, held.trained_capacities
    return [{n: x.tolist() for n, x in layer.items()} for layer in held]


def calibration(folder: Path) -> None:
    g = torch.Generator().manual_seed(0)
    names = ("key_mean", "key_scale", "value_mean", "value_scale")
    layers = [{n: torch.rand(2, 8, generator=g) + 0.5 for n in names} for _ in range(2)]
    for layer in layers:
        layer["curve"] = torch.rand(2, 2, generator=g)
    Calibration(layers, {"model": {"name": "m"}}, [4, 8], 64).save_pretrained(folder)


def read_calibration(folder: Path) -> object:
    held = Calibration.from_pretrained(folder)
    layers = [held[i] for i in range(len(held))]
    tensors = [None if x is None else {n: t.tolist() for n, t in x.items()} for x in layers]
    return tensors, held.capacities, held.length


def config(folder: Path) -> None:
    LessConfig(tokens=64, policy=H2O(8, 8)).save_pretrained(folder)


def read_config(folder: Path) -> object:
    return LessConfig.from_pretrained(folder).to_dict()


def cells(folder: Path) -> None:
    at = Cells(folder / "cells.jsonl")
    at.add({"kind": "cell", "key": f"k{i}", "value": 1.0 + i} for i in range(4))


def read_cells(folder: Path) -> object:
    return list(Cells(folder / "cells.jsonl").known)


def task(folder: Path) -> None:
    rows = [{"document": f"d{i}", "summary": "s"} for i in range(3)]
    (folder / "task.json").write_text(json.dumps({"examples": rows}))


def read_task(folder: Path) -> object:
    return list(_local_rows("xsum", folder / "task.json"))


def text(folder: Path) -> None:
    (folder / "text.txt").write_text("Fenchurch Street, 12 o'clock. Überall. " * 4)


def read_text(folder: Path) -> object:
    return read_texts(folder / "text.txt")


def trained(folder: Path) -> None:
    from less.fit.recipe import LayerRecord
    from less.fit.train import _write_layer

    fields = dict.fromkeys(LayerRecord.__dataclass_fields__, 0.0)
    _write_layer(folder / "layer.safetensors", {"k_w1": torch.ones(2, 3)}, LayerRecord(**fields))


def read_trained(folder: Path) -> object:
    maps, _ = _read_layer(folder / "layer.safetensors")
    return {n: x.shape for n, x in maps.items()}


#: What is written, what reads it, and whether what it reads must be what was written.
KINDS = {
    "sidekick": (sidekick, read_sidekick, True),
    "calibration": (calibration, read_calibration, True),
    "config": (config, read_config, False),  # other settings are settings
    "cells": (cells, read_cells, False),
    "task": (task, read_task, False),
    "text": (text, read_text, False),
    "trained": (trained, read_trained, False),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_file_is_refused_by_name(
    kind: str, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    write, read, exact = KINDS[kind]
    write(tmp_path)
    whole = read(tmp_path)
    of = random.Random(kind)
    kept = {p: p.read_bytes() for p in sorted(tmp_path.iterdir())}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused = 0
    for n in range(COUNT):
        path = of.choice(list(kept))
        if of.random() < 0.05:
            files.not_regular(of, path, kept[path])
        else:
            path.write_bytes(files.MUTATIONS[path.suffix](of, kept[path]))
        begin, said = time.monotonic(), None
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                got = read(tmp_path)
        except (ValueError, OSError, UnavailableError) as error:
            refused += 1
            said = str(error)
        else:
            assert not exact or got == whole, f"file {n}, {path.name}: read as something else"
        if said is not None:
            assert re.search(rf"{path.name}|{tmp_path.name}", said), f"file {n}: {said}"
        assert time.monotonic() - begin < SECONDS, f"file {n}"
        files.restore(path, kept[path])
        for other in set(tmp_path.iterdir()) - set(kept):
            raise AssertionError(f"file {n}: {other.name} was made")
    assert read(tmp_path) == whole
    assert refused > COUNT // 8, "the damage is not damage"
    record_property("damaged files and snapshots", COUNT)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < MEMORY


def wrong(of: random.Random, d: dict[str, object]) -> dict[str, object]:
    """A snapshot of which one thing is another."""
    tensors = dict(d["tensors"])
    name = of.choice(list(tensors))
    x = tensors[name].clone()
    way = of.randrange(9)
    if way == 0:
        return {**d, of.choice(list(d)): of.choice(files.HUGE)}
    if way == 1:
        return {n: v for n, v in d.items() if n != of.choice(list(d))}
    if way == 2:
        return {**d, "columns": [of.choice([*files.HUGE, float("nan")]) for _ in d["columns"]]}
    if way == 3:
        return {**d, "cache": files.changed(of, d["cache"])}
    if way == 4:
        at = of.randrange(x.numel())
        x.view(-1)[at] = x.view(-1)[at] ^ 1 << of.randrange(8)
    elif way == 5:
        x = of.choice([x.to("meta"), x.half(), x[:1], x[..., :-1], x.to_sparse(), x.int()])
    elif way == 6:
        x = torch.randint(0, 256, x.shape, dtype=torch.uint8)
    elif way == 7:
        x = of.choice([None, "../x", 0, [x]])
    else:
        tensors[of.choice(["", "../x", "9.page"])] = tensors.pop(name)
        return {**d, "tensors": tensors}
    return {**d, "tensors": {**tensors, name: x}}


@pytest.mark.parametrize("dtype", [torch.float16, "k4v4"], ids=str)
def test_a_damaged_snapshot_is_refused_and_changes_nothing(
    dtype: torch.dtype | str, record_property: Callable[[str, object], None]
) -> None:
    def build() -> LessKVCache:
        hot = {"sinks": 1, "hot": 3} if isinstance(dtype, str) else {}
        return LessKVCache(2, 4, 2, 16, 2, H2O(6, 6), dtype=dtype, backend="reference", **hot)

    cache, of = build(), random.Random(str(dtype))
    for i in range(2):
        cache.attend(i, *random_qkv(2, 4, 2, 20, 16, seed=i))
    d = cache.state_dict()
    refused = 0
    for _ in range(COUNT):
        damaged = wrong(of, d)
        try:
            said = None
            cache.load_state_dict(damaged)
        except (ValueError, TypeError) as error:
            said = str(error)
        if said is not None:
            refused += 1
            assert said.startswith("load_state_dict: ")
            assert cache.session.columns == d["columns"]
            assert all(torch.equal(x, d["tensors"][f"{i}.page"]) for i, x in cache.pools.items())
        else:
            for i in range(2):  # numbers of keys and values may be other ones
                positions = cache.positions(i)
                assert bool((positions < cache.seen[:, None, None]).all())
                cache.attend(i, *random_qkv(2, 4, 2, 1, 16))
            cache.load_state_dict(d)
    assert refused > COUNT // 3
    record_property("damaged files and snapshots", COUNT)
