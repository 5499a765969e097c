"""Compiles kernels to machine code, and disassembles them; what did not change is kept."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from bench.native import ROOT

from . import ptxas, sass
from .gates import Excuse, excuses, short_name

sys.path.insert(0, str(ROOT / "tools"))

import cuda_toolkit

CUDA = ROOT / "csrc" / "cuda"
BUILD = ROOT / "build" / "proof"
NO_KERNELS = ("build_facts.cu",)
# Launchers and what declares them: no machine code depends on these.
HOST_ONLY = (CUDA / "kernels.h", CUDA / "decode_step.cu")


class ProofError(SystemExit):
    """Something could not be compiled or read; the message says what."""


@dataclass
class Unit:
    """A .cu file for an architecture: its kernels, and what they take."""

    source: Path
    arch: str
    kernels: list[sass.Kernel]
    resources: dict[str, ptxas.Resources]


def jobs() -> int:
    """Compilers that run at once: MAX_JOBS, or all cores."""
    return int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)


def sources() -> list[Path]:
    """The files that hold kernels."""
    return [path for path in sorted(CUDA.glob("*.cu")) if path.name not in NO_KERNELS]


def head_dims() -> list[int]:
    """The head dims in LESS_CUDA_HEAD_DIMS, as CMake reads it; none: all that kernels have."""
    return [
        int(dim) for dim in re.split("[ ,;]+", os.environ.get("LESS_CUDA_HEAD_DIMS", "")) if dim
    ]


def all_head_dims() -> list[int]:
    """Those that kernels can be compiled for: the list in head_dims.h."""
    text = (CUDA / "head_dims.h").read_text()
    listed = re.search(r"^#define LESS_HEAD_DIMS (.+)$", text, flags=re.M)
    assert listed is not None
    return [int(dim) for dim in listed[1].split(",")]


def work(files: Sequence[Path], archs: Sequence[str]) -> list[tuple[Path, str, int | None]]:
    """What `compile_unit` is to be called with, the slow ones first.

    A file whose kernels are templates over D is compiled once for each, so that what is kept is
    kept for any choice of head dims.
    """
    dims = sorted(head_dims() or all_head_dims(), reverse=True)
    slow = [file for file in files if _includes(file, "cuda/head_dims.h")]
    quick = [file for file in files if file not in slow]
    slow = [file for file in slow if file not in HOST_ONLY]
    wanted: list[tuple[Path, int | None]] = [
        (file, dim)
        for dim in dims
        for file in slow
        # row_tiles.h makes rows of 80 rows of 96.
        if not (dim == 80 and 96 in dims and _includes(file, "cuda/row_tiles.h"))
    ]
    wanted += [(file, None) for file in quick]
    return [(file, arch, dim) for file, dim in wanted for arch in archs]


@cache
def _includes(file: Path, wanted: str) -> bool:
    """Whether a header is among a file's, or theirs."""
    names = re.findall(r'^#include "(.+)"', file.read_text(), flags=re.M)
    headers = [ROOT / "csrc" / name for name in names]
    return wanted in names or any(
        _includes(header, wanted) for header in headers if header.is_file()
    )


def compile_unit(source: Path, arch: str, head_dim: int | None) -> Unit:
    """Compile a file for one architecture, as the product is compiled.

    Args:
        source: The .cu file.
        arch: "80", "90a".
        head_dim: The one that its kernels are compiled for; None: it asks for none.

    Raises:
        ProofError: nvcc refuses it, or the disassembly lacks a kernel that ptxas compiled.
    """
    cubin, resources = compile_cubin(source, arch, head_dim)
    disassembly = run([cuda_toolkit.require_tool("nvdisasm"), "-c", "-gi", cubin]).stdout
    unit = Unit(source, arch, sass.parse(disassembly), resources)
    missing = set(unit.resources) - {kernel.name for kernel in unit.kernels}
    if missing:
        raise ProofError(f"proof: {source.name} for sm_{arch}: no machine code of {missing}")
    return unit


def compile_cubin(
    source: Path, arch: str, head_dim: int | None
) -> tuple[Path, dict[str, ptxas.Resources]]:
    """Machine code of a file for one architecture, and what its kernels take.

    Args:
        source: The .cu file.
        arch: "80", "90a".
        head_dim: The one that its kernels are compiled for; None: it asks for none.

    Raises:
        ProofError: nvcc refuses it.
    """
    folder = BUILD / arch
    folder.mkdir(parents=True, exist_ok=True)
    name = source.stem if head_dim is None else f"{source.stem}_{head_dim}"
    cubin, log = folder / f"{name}.cubin", folder / f"{name}.log"
    flags = ["-std=c++17", "-O3", "--expt-relaxed-constexpr", f"-arch=sm_{arch}", "-lineinfo"]
    if head_dim is not None:
        flags.append(f"-DLESS_HEAD_DIM_MASK={1 << head_dim // 16}")
    flags += ["-Xptxas", "-v,--warn-on-spills,--warn-on-local-memory-usage", "-cubin"]
    compile_to(cubin, [cuda_toolkit.require().nvcc, *flags, source], log)
    return cubin, ptxas.parse(log.read_text())


def compile_to(target: Path, command: Sequence[str | Path], log: Path | None = None) -> None:
    """Run a compiler, unless the target is of the same command and the same files.

    Args:
        target: What it writes.
        command: Without the options for that, and for csrc's headers.
        log: Gets what the compiler says.

    Raises:
        ProofError: It failed.
    """
    needs, stamp = target.with_suffix(".d"), target.with_suffix(".stamp")
    words = [*command, f"-I{ROOT / 'csrc'}", "-o", target, "-MD", "-MF", needs]
    if target.exists() and stamp.exists() and stamp.read_text() == _state(words, needs):
        return
    begun = time.time()
    done = run(words)
    if log is not None:
        log.write_text(done.stderr)
    if max(file.stat().st_mtime for file in _needed(needs) if file.is_file()) < begun:
        stamp.write_text(_state(words, needs))
    else:  # which version was compiled nobody knows
        stamp.unlink(missing_ok=True)


def _needed(needs: Path) -> list[Path]:
    """The files that a compiler has read."""
    return [Path(file) for file in
            needs.read_text().split(":", 1)[-1].replace("\\\n", " ").split()]  # fmt: skip


def _state(words: Sequence[str | Path], needs: Path) -> str:
    """Changes with the command, and with every file that it read."""
    digest = hashlib.sha256(" ".join(map(str, words)).encode())
    for file in _needed(needs):
        if file not in HOST_ONLY or file in words:
            digest.update(file.read_bytes() if file.is_file() else b"gone")
    return digest.hexdigest()


def run(command: Sequence[str | Path], given: str = "") -> subprocess.CompletedProcess[str]:
    """Run a tool.

    Args:
        command: Its words.
        given: Its standard input.

    Raises:
        ProofError: It failed.
    """
    words = [str(word) for word in command]
    done = subprocess.run(words, input=given, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ProofError(f"proof: {' '.join(words)} failed:\n{done.stderr[-3000:]}")
    return done


@cache
def demangle(name: str) -> str:
    """The C++ name without namespaces and parameters: ``fold_kernel<float, 128>``."""
    full = run(["c++filt", name]).stdout.strip()
    full = re.sub(r"\b(less|cuda|std)::", "", full)
    depth, out = 0, []
    for char in full.removeprefix("void "):
        if char == "(" and depth == 0 and out and not "".join(out).endswith("operator"):
            break
        depth += {"<": 1, ">": -1}.get(char, 0)
        out.append(char)
    return re.sub(r"\((?:int|bool|long|unsigned int)\)", "", "".join(out))


def excuse_of(line: sass.Line) -> Excuse | None:
    """The excuse of a line of source; None where it has none, or the file is not there."""
    return _excuses(line[0]).get(line[1])


def all_excuses() -> set[Excuse]:
    """Those of all files of csrc/cuda."""
    files = [path for path in CUDA.rglob("*") if path.suffix in (".cu", ".h")]
    return {excuse for path in files for excuse in _excuses(str(path)).values()}


@cache
def _excuses(file: str) -> dict[int, Excuse]:
    path = Path(file)
    return excuses(short_name(file), path.read_text()) if path.is_file() else {}
