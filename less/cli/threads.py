"""How many threads a command computes with, and how they wait for each other.

The threads of an OpenMP team meet after every small piece of work, hundreds of times a token. Where
another program has one of their cores, each meeting may last until the scheduler's next turn, and
threads that spin while they wait keep the scheduler from helping. So a command lets its threads
sleep while they wait, which the OpenMP library must be told before torch loads it, and it measures
which number of threads is the fastest on the machine as it is now.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import argparse

    from rich.console import Console

# What tells an OpenMP library how to wait: the standard's, GNU's and LLVM's.
WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
DEFAULT = "default: the fastest, in a short measurement"  # help of --threads
GAIN = 0.9  # more threads must take at most this part of the time that fewer take
ROUNDS = 7


@dataclass(frozen=True)
class Choice:
    """A number of threads, and why.

    Attributes:
        threads: To compute with.
        why: In words, for one line.
    """

    threads: int
    why: str


def wait_passively(environ: MutableMapping[str, str] = os.environ) -> None:
    """Let OpenMP's threads sleep while they wait; starts this program anew if torch is loaded.

    Does nothing where one of ``WAITING`` is set, or where a program cannot be started in place.
    """
    if any(name in environ for name in WAITING) or os.name != "posix":
        return
    environ["OMP_WAIT_POLICY"] = "passive"
    if "torch" in sys.modules:
        sys.stdout.flush()
        sys.stderr.flush()
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], dict(environ))


def counts(most: int) -> list[int]:
    """The numbers of threads that are tried: powers of two, and the most itself."""
    tried = [1]
    while tried[-1] * 2 < most:
        tried.append(tried[-1] * 2)
    return [*tried, most] if most > 1 else tried


def choose(
    most: int, seconds_with: Callable[[int], float] | None = None, rounds: int = ROUNDS
) -> Choice:
    """The fastest number of threads for small steps of a model, by measuring.

    The numbers take turns, so that a busy moment hits all alike, and the median turn of each
    counts. Of two numbers that are as fast, within ``GAIN``, the smaller is taken.

    Args:
        most: Threads at most.
        seconds_with: Times a step with a number of threads; default: ``Probe``.
        rounds: Turns of each number.
    """
    tried = counts(most)
    if tried == [1]:
        return Choice(1, "torch may use no more here")
    if seconds_with is None:
        seconds_with = Probe()
    turns: dict[int, list[float]] = {threads: [] for threads in tried}
    for _ in range(rounds):
        for threads in tried:
            turns[threads].append(seconds_with(threads))
    medians = {threads: statistics.median(turns[threads]) for threads in tried}
    best = 1
    for threads in tried:
        if medians[threads] < GAIN * medians[best]:
            best = threads
    measured = ", ".join(f"{seconds * 1e3:.1f} ms with {n}" for n, seconds in medians.items())
    return Choice(best, f"a small decode step takes {measured}")


class Probe:
    """A decode step of a small model, in shapes and number of parallel pieces of work."""

    _HIDDEN, _INNER, _LAYERS, _STEPS = 576, 1536, 6, 3  # SmolLM2-135M's, and a fifth of its layers

    def __init__(self) -> None:
        """Make the weights, 4 bytes each: more together than a core's caches hold."""
        import torch

        self._up, self._down = (
            [torch.full(shape, 1e-3) for _ in range(self._LAYERS)]
            for shape in ((self._INNER, self._HIDDEN), (self._HIDDEN, self._INNER))
        )
        self._rows = [torch.ones(rows, self._HIDDEN) for rows in (1, 32)]

    def __call__(self, threads: int) -> float:
        """Mean seconds of a step with this number of threads."""
        import torch

        torch.set_num_threads(threads)
        with torch.inference_mode():
            self._step()  # starts the threads
            start = time.perf_counter()
            for _ in range(self._STEPS):
                self._step()
            return (time.perf_counter() - start) / self._STEPS

    def _step(self) -> None:
        from torch.nn.functional import linear

        for x in self._rows:
            for up, down in zip(self._up, self._down, strict=True):
                x = linear(linear(x, up), down)


def set_threads(args: argparse.Namespace, console: Console) -> None:
    """Follow ``--threads``; without it measure, choose, and say so in one line."""
    import torch

    if args.threads:
        torch.set_num_threads(args.threads)
        return
    chosen = choose(torch.get_num_threads())
    torch.set_num_threads(chosen.threads)
    console.print(
        f"  threads   {chosen.threads}: {chosen.why} (--threads N for another number)",
        markup=False,
    )
