"""Contenders timed in turns within one process, so that a busy moment hits all alike."""

from __future__ import annotations

import ctypes
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

CACHE_BYTES = 128 << 20  # what all layers of a contender must exceed together
LEAST_LAYERS = 24
READ_BYTES = 512 << 20


def layers_for(bytes_each: int, most: int = 1 << 30) -> int:
    """How many layers to rotate over, so that each comes from memory and not from a cache.

    At least 24 and 128 MiB together, but no more than `most` bytes: a layer that is larger than
    every cache needs no others to displace it.
    """
    wanted = max(LEAST_LAYERS, math.ceil(CACHE_BYTES / bytes_each))
    return max(1, min(wanted, max(most // bytes_each, math.ceil(CACHE_BYTES / bytes_each))))


@dataclass
class Contender:
    """One way to do a layer's step.

    Attributes:
        run: Does it for layer i.
        layers: How many there are; one turn goes once through all.
        bytes: Of k and v that a step must read.
        seconds: Per layer, a value for each turn. Written by ``interleave``.
    """

    name: str
    run: Callable[[int], object]
    layers: int
    bytes: int = 0
    seconds: list[float] = field(default_factory=list)

    @property
    def best(self) -> float:
        """The fastest turn."""
        return min(self.seconds)

    @property
    def median(self) -> float:
        """The middle turn."""
        return statistics.median(self.seconds)

    def turn(self) -> float:
        """Seconds a layer of one turn through all layers."""
        start = time.perf_counter()
        for i in range(self.layers):
            self.run(i)
        return (time.perf_counter() - start) / self.layers


def interleave(
    contenders: Sequence[Contender], budget: float, least: int = 5, most_seconds: float = 60.0
) -> None:
    """Let all take turns, A B C A B C, for `budget` seconds and at least `least` turns each.

    The first turn warms up and does not count. A contender whose turn takes long shortens the
    rest: after `most_seconds` two counted turns are enough.
    """
    for each in contenders:
        each.turn()
    start = time.perf_counter()
    turns = 0
    while True:
        for each in contenders:
            each.seconds.append(each.turn())
        turns += 1
        passed = time.perf_counter() - start
        if (turns >= least and passed > budget) or (turns >= 2 and passed > most_seconds):
            return


class ReadRate:
    """What the cores read from memory: bench/cpp/read.cpp, the roof of every figure.

    Args:
        library: ``libless_bench_read.so``; ``bench.native.build`` makes it.
        threads: Cores that read at once, each its own part.
    """

    def __init__(self, library: Path, threads: int = 1) -> None:
        """Fill the buffer."""
        self._call = ctypes.CDLL(str(library)).less_bench_read_rate
        self._call.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
        self._call.restype = None
        self._parts = [torch.ones(READ_BYTES // 8, dtype=torch.int64) for _ in range(threads)]
        self.best = 0.0

    def run(self, _: int = 0) -> None:
        """One measurement; ``best`` keeps the highest, in bytes a second of all cores."""
        from concurrent.futures import ThreadPoolExecutor

        results = [(ctypes.c_double * 2)() for _ in self._parts]

        def read(part: torch.Tensor, result: ctypes.Array[ctypes.c_double]) -> None:
            self._call(part.data_ptr(), part.nbytes, ctypes.addressof(result))

        with ThreadPoolExecutor(len(self._parts)) as pool:
            list(pool.map(read, self._parts, results))
        self.best = max(self.best, sum(result[0] for result in results))
