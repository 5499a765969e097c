"""Every change of a folder is the last one once: run by test_kills.py.

A child does the work, and at the n-th file that it opens for writing, renames, makes or removes in
the folder it is killed, or its disk is full. Prints a line of JSON: for each work and fault, how
many points there were and how the folder was found afterwards. An argument N: of a
training one point in N, of a report two.
"""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import signal
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from less import Calibration, LessConfig, Sidekick
from less.cli import main as cli
from less.evaluate.cells import Cells
from less.fit.recipe import Recipe
from less.fit.train import train
from less.policies import H2O
from tests.tiny_model import TEXT, save_tiny, tiny_model

EVENTS = ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir")
FULL = 28  # exit status of a child whose error was that the disk is full


def arm(folder: Path, n: int, fault: str) -> None:
    """Let this process's n-th change of a folder fail."""
    left = n

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal left
        if event not in EVENTS or not str(arguments[0]).startswith(str(folder)):
            return
        if event == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            return
        left -= 1
        if left == 0 and fault == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if left <= 0 and fault == "full" and event in ("open", "os.mkdir"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(arguments[0]))

    sys.addaudithook(hook)


def child(work: Callable[[], object], folder: Path, n: int, fault: str) -> int:
    """Do the work in a child; the signal that ended it, negative, or its exit status."""
    pid = os.fork()
    if pid == 0:
        arm(folder, n, fault)
        status = 0
        try:
            work()
        except OSError as error:
            status = FULL if error.errno == errno.ENOSPC else 1
        except BaseException:
            status = 1
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def sidekick(seed: int) -> Sidekick:
    return Sidekick.random(2, 4, 2, 16, rank=4, hidden=8, generator=seed)


def calibration(seed: int) -> Calibration:
    g = torch.Generator().manual_seed(seed)
    names = ("key_mean", "key_scale", "value_mean", "value_scale")
    return Calibration([{n: torch.rand(2, 16, generator=g) + 0.5 for n in names}])


def equal(a: Sidekick, b: Sidekick) -> bool:
    return all(torch.equal(x[n], y[n]) for x, y in zip(a, b, strict=True) for n in x)


def saves(folder: Path) -> dict[str, tuple[Callable[[int], object], Callable[[], int]]]:
    """By name: what saves a first or second content, and what tells which of them is there."""
    contents = [sidekick(0), sidekick(1)]
    digests = [calibration(i).digest for i in range(2)]
    configs = [LessConfig(tokens=64), LessConfig(tokens=32)]

    def which_sidekick() -> int:
        got = Sidekick.from_pretrained(folder)
        return [equal(got, x) for x in contents].index(True)

    return {
        "sidekick": (lambda i: contents[i].save_pretrained(folder), which_sidekick),
        "calibration": (
            lambda i: calibration(i).save_pretrained(folder),
            lambda: digests.index(Calibration.from_pretrained(folder).digest),
        ),
        "config": (
            lambda i: configs[i].save_pretrained(folder),
            lambda: configs.index(LessConfig.from_pretrained(folder)),
        ),
        # A report's results, which a second run goes on with.
        "cells": (
            lambda i: Cells(folder / "cells.jsonl").add([{"kind": "cell", "key": str(i)}]),
            lambda: len(Cells(folder / "cells.jsonl").known) - 1,
        ),
    }


def attack_save(name: str, fault: str, over: bool) -> dict[str, int]:
    """End a save at every point, over an old one or where none was."""
    found = {"points": 0, "old": 0, "new": 0, "refused": 0}
    while True:
        with tempfile.TemporaryDirectory() as root:
            folder = Path(root) / "folder"
            save, which = saves(folder)[name]
            if name == "cells":
                folder.mkdir()
            if over:
                save(0)
            status = child(lambda save=save: save(1), folder, found["points"] + 1, fault)
            if status == 0:
                assert which() == (1 if over or name != "cells" else 0)
                return found
            assert status == (-signal.SIGKILL if fault == "kill" else FULL), status
            found["points"] += 1
            refusal = ""
            try:
                found["new" if which() == 1 else "old"] += 1
            except (ValueError, OSError) as error:
                found["refused"] += 1
                refusal = str(error)
            assert not refusal or str(folder) in refusal, refusal
            save(1)
            assert which() == (1 if over or name != "cells" else 0)


def attack_run(
    fault: str, every: int, run: Callable[[Path], object], resumes: Callable[[Path], None]
) -> dict[str, int]:
    """End what works in a folder at every point, or one of ``every``; then look at a second run."""
    points, n = 0, 1
    while True:
        with tempfile.TemporaryDirectory() as root:
            work = Path(root) / "work"
            status = child(lambda work=work: run(work), work, n, fault)
            if status == 0:
                return {"points": points, "resumed": points}
            assert status == (-signal.SIGKILL if fault == "kill" else FULL), status
            points += 1
            n += every
            resumes(work)


def attack_training(fault: str, every: int) -> dict[str, int]:
    """End a training at every point, or one of ``every``; a second run makes the same sidekick."""
    model = tiny_model()
    ids = torch.randint(0, 256, (6, 48), generator=torch.Generator().manual_seed(0))
    recipe = Recipe(steps=4, rows=8, held_rows=16, rank=4, hidden=8)

    def run(work: Path | None) -> Sidekick:
        return train(model, ids, H2O(heavy=4, recent=4, decay=0.98), recipe=recipe, work=work)

    want = run(None)

    def resumes(work: Path) -> None:
        assert equal(run(work), want)
        assert not work.exists()

    return attack_run(fault, every, run, resumes)


def attack_report(fault: str, every: int) -> dict[str, int]:
    """End ``less-kv report`` at every point, or one of ``every``; a second run makes the same."""
    with tempfile.TemporaryDirectory() as root, contextlib.redirect_stdout(io.StringIO()):
        at = Path(root)
        save_tiny(at / "model")
        (at / "text.txt").write_text(TEXT * 20)

        def run(folder: Path) -> None:
            words = f"report --model {at / 'model'} --data mine={at / 'text.txt'} --lengths 256"
            words += " --examples 1 --steps 2 --batches 1 --together 1 --methods full,h2o"
            words += f" --budgets 64 --threads 1 --tasks perplexity:mine --out {folder}"
            if cli(words.split()):
                raise OSError(errno.ENOSPC, "said")  # the one fault that it returns from

        def results(folder: Path) -> list[object]:
            lines = (folder / "results.jsonl").read_text().splitlines()
            cells = [x for x in map(json.loads, lines) if x["kind"] == "cell"]
            return sorted((x["key"], x["scores"]) for x in cells)

        run(at / "whole")
        want = results(at / "whole")

        def resumes(out: Path) -> None:
            run(out)
            assert results(out) == want
            assert {x.name for x in out.iterdir()} >= {x.name for x in (at / "whole").iterdir()}

        return attack_run(fault, every, run, resumes)


def main() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    every = int(sys.argv[1]) if len(sys.argv) > 1 else 1
    found = {}
    for fault in ("kill", "full"):
        for name in saves(Path()):
            for over in (True, False):
                at = f"{name}, {'over an old one' if over else 'new'}: {fault}"
                found[at] = attack_save(name, fault, over)
        found[f"training: {fault}"] = attack_training(fault, every)
        found[f"report: {fault}"] = attack_report(fault, -(-every // 2))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
