"""The compiled simulator: built with the system's compiler when it is first wanted."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

SOURCE = Path(__file__).with_name("simulate.cpp")
# Products are fused with sums where the source says so, and nowhere else: codes are to be those of
# the format's definition, which rounds every operation.
FLAGS = ("-O3", "-march=native", "-std=c++17", "-ffp-contract=off", "-fno-math-errno",
         "-fno-trapping-math", "-shared", "-fPIC")  # fmt: skip

KINDS = ("exact", "half", "brain", "int8", "table")
FITS = ("none", "square", "product")
VICTIMS = ("forget", "merge")


@dataclass(frozen=True)
class Quantizer:
    """How the numbers of a row are rounded.

    Attributes:
        kind: One of ``KINDS``; what follows is of ``"table"`` alone.
        levels: What a code stands for, in units of the scale, ascending.
        by_max: A group is cut by its largest number, else by its rms.
        unit: The part of that which a level of 1 stands for.
        fit: The stored scale: the unit itself (``"none"``), the one of least squared error
            (``"square"``), or the one that keeps the row's product with itself (``"product"``),
            so that a row is not shortened.
        group: Numbers per scale; 0: the whole row.
    """

    kind: str
    levels: tuple[float, ...] = ()
    by_max: bool = False
    unit: float = 1.0
    fit: str = "square"
    group: int = 0


@dataclass(frozen=True)
class Cache:
    """A cache to simulate: what is held of a kv head, and in which rows.

    Attributes:
        cold_k: Rows of the keys of cold tokens.
        cold_v: Rows of their values.
        cold: Cold slots; a number for each kv head, or one for all.
        hot_rows: Rows of the sinks and of the last tokens.
        sinks: First tokens that stay hot for good.
        hot: Last tokens that are hot; 0: a token turns cold as it comes.
        recent: Last tokens that do not leave (the policy's); likewise.
        protect: First tokens that do not leave (the policy's).
        decay: What a score keeps per token.
        half_scores: Scores are held in fp16.
        int8_queries: Queries are rounded to int8, as they are where they meet packed rows.
        victim: ``"forget"``, or ``"merge"``: who leaves joins another cold row.
    """

    cold_k: Quantizer
    cold_v: Quantizer
    cold: int | Sequence[int]
    hot_rows: Quantizer = Quantizer("int8")
    sinks: int = 4
    hot: int = 16
    recent: int | Sequence[int] = 0
    protect: int = 0
    decay: float = 0.98
    half_scores: bool = False
    int8_queries: bool = False
    victim: str = "forget"


class _Quantizer(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int32) for name in ("kind", "levels", "group", "by_max", "fit")] + [
        ("unit", ctypes.c_float),
        ("level", ctypes.c_void_p),
    ]


class _Simulation(ctypes.Structure):
    _fields_ = (
        [(name, ctypes.c_int32) for name in ("Q", "K", "T", "D", "sinks", "hot", "protect")]
        + [(name, ctypes.c_int32) for name in ("half_score", "merge", "R")]
        + [(name, ctypes.c_float) for name in ("decay", "scale")]
        + [(name, _Quantizer) for name in ("hot_rows", "cold_k", "cold_v")]
        + [(name, ctypes.c_void_p) for name in ("cold", "recent", "q", "k", "v", "phi", "psi")]
        + [(name, ctypes.c_void_p) for name in ("out", "error", "power")]
    )


@functools.cache
def library() -> ctypes.CDLL:
    """The simulator, compiled once for this source and machine into a folder for scratch.

    Raises:
        RuntimeError: There is no C++ compiler, or it fails.
    """
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        raise RuntimeError("bench.simulate needs a C++ compiler: set CXX, or install g++")
    folder = Path(tempfile.gettempdir()) / f"less-simulate-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise RuntimeError(f"bench.simulate: {folder} belongs to somebody else")
    key = hashlib.sha256(SOURCE.read_bytes() + repr((compiler, FLAGS)).encode()).hexdigest()[:16]
    built = folder / f"{key}.so"
    if not built.exists():
        scratch = folder / f"{key}.{os.getpid()}"
        command = [*compiler.split(), *FLAGS, str(SOURCE), "-o", str(scratch)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"bench.simulate: {' '.join(command)} failed:\n{done.stderr}")
        scratch.rename(built)  # of two that build at once, the second replaces the same file
    loaded = ctypes.CDLL(str(built))
    loaded.simulate.argtypes, loaded.simulate.restype = [ctypes.c_void_p], None
    loaded.round_rows.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32,
                                  ctypes.c_void_p]  # fmt: skip
    loaded.round_rows.restype = None
    return loaded


def _filled(rows: Quantizer, D: int, alive: list[Tensor]) -> _Quantizer:
    """The struct, whose levels live in a tensor that is put into `alive`."""
    group = rows.group or D
    if D % group:
        raise ValueError(f"simulate: groups must divide a row of {D} numbers, got {group}")
    if rows.kind == "table" and not 2 <= len(rows.levels) <= 256:
        raise ValueError(f"simulate: levels must be 2 to 256 numbers, got {len(rows.levels)}")
    table = torch.tensor(rows.levels, dtype=torch.float32)
    alive.append(table)
    return _Quantizer(
        KINDS.index(rows.kind),
        len(rows.levels),
        group,
        rows.by_max,
        FITS.index(rows.fit),
        rows.unit,
        table.data_ptr(),
    )


@dataclass
class Noise:
    """Squared error that encoding cold rows left, and their squares: of keys, and of values."""

    error: Tensor
    power: Tensor


@dataclass(frozen=True)
class Features:
    """What the low-rank state is made of.

    Attributes:
        phi: Of the queries, float32 [Q, T, R].
        psi: Of the keys, float32 [K, T, R].
    """

    phi: Tensor
    psi: Tensor


def simulate(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cache: Cache,
    scale: float,
    noise: Noise | None = None,
    features: Features | None = None,
) -> Tensor:
    """Replay a text through one layer of a cache, token by token.

    Args:
        q: float32 [Q, T, D], after the rotary embedding.
        k: float32 [K, T, D].
        v: float32 [K, T, D].
        cache: What is held.
        scale: Factor of q.k.
        noise: float64 [2] each: what is added to.
        features: Of a low-rank state that tokens join as they leave; None: there is none. phi.psi
            stands beside e^(scale q.k) of these very q and k.

    Returns:
        float32 [Q, T, D].
    """
    (Q, T, D), K = q.shape, k.shape[0]
    if k.shape != (K, T, D) or v.shape != k.shape or Q % K:
        raise ValueError(
            f"simulate: k and v must be [K, {T}, {D}] with K a divisor of {Q}, "
            f"got {list(k.shape)} and {list(v.shape)}"
        )
    if cache.victim not in VICTIMS:
        raise ValueError(f"simulate: victim must be of {VICTIMS}, got {cache.victim!r}")
    merge = cache.victim == "merge"
    cold, recent = (_per_head(n, getattr(cache, n), K) for n in ("cold", "recent"))
    if cold.min() < 1:
        raise ValueError(f"simulate: cold must be 1 or more, got {cold.min()}")
    if features is None:
        features = Features(q.new_zeros(Q, T, 0), q.new_zeros(K, T, 0))
    R = features.phi.shape[-1]
    if features.phi.shape != (Q, T, R) or features.psi.shape != (K, T, R):
        raise ValueError(
            f"simulate: features must be [{Q}, {T}, R] and [{K}, {T}, R], "
            f"got {list(features.phi.shape)} and {list(features.psi.shape)}"
        )
    if R and merge:
        raise ValueError("simulate: victim 'merge' and a low-rank state exclude each other")
    q, k, v, phi, psi = (
        x.to(torch.float32).contiguous() for x in (q, k, v, features.phi, features.psi)
    )
    if cache.int8_queries:
        q = round_rows(q, Quantizer("int8"))
    out = torch.empty_like(q)
    noise = noise or Noise(*torch.zeros(2, 2, dtype=torch.float64))
    alive: list[Tensor] = []
    rows = [_filled(x, D, alive) for x in (cache.hot_rows, cache.cold_k, cache.cold_v)]
    tensors: Sequence[Tensor] = (
        cold, recent, q, k, v, phi, psi, out, noise.error, noise.power
    )  # fmt: skip
    params = _Simulation(
        Q, K, T, D, cache.sinks, cache.hot, cache.protect, cache.half_scores, merge, R,
        cache.decay, scale, *rows, *(x.data_ptr() for x in tensors),
    )  # fmt: skip
    library().simulate(ctypes.byref(params))
    return out


def cold_keys(k: Tensor, cache: Cache) -> Tensor:
    """What keys [K, T, D] are once their tokens are cold."""
    was_hot = cache.sinks + cache.hot > 0
    return round_rows(round_rows(k, cache.hot_rows) if was_hot else k, cache.cold_k)


def _per_head(name: str, value: int | Sequence[int], K: int) -> Tensor:
    """A setting of the cache as int32 [K]."""
    found = torch.tensor([value] * K if isinstance(value, int) else list(value), dtype=torch.int32)
    if found.shape != (K,):
        raise ValueError(f"simulate: {name} must be one number or {K}, got {value}")
    return found


def round_rows(x: Tensor, rows: Quantizer) -> Tensor:
    """What rows [..., D] are once they were encoded and decoded."""
    x = x.to(torch.float32).contiguous()
    y, alive = torch.empty_like(x), list[Tensor]()
    D = x.shape[-1]
    quantizer = _filled(rows, D, alive)
    library().round_rows(ctypes.byref(quantizer), x.data_ptr(), x.numel() // D, D, y.data_ptr())
    return y
