"""The CUDA kernels on the CPU: builds the emulator's library of a tier and loads its ops.

They are ``torch.ops.less_emulated``, the ops of ``torch.ops.less`` for CPU tensors, run as a GPU
would. One process loads one tier.
"""

from __future__ import annotations

import ctypes
import functools
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
TREE = ROOT / "build" / "emulator"
TIERS = ("fast", "asan", "track", "ptx_80", "ptx_90a")
SANITIZERS = ("libasan.so", "libubsan.so")


class BuildError(RuntimeError):
    """The library could not be built; the message is the compiler's."""


def supported() -> bool:
    """Whether the emulator runs on this machine at all."""
    return sys.platform == "linux" and platform.machine() in ("x86_64", "AMD64")


def preload(tier: str) -> str:
    """What LD_PRELOAD must hold for a tier: the sanitizers come before everything else."""
    if tier != "asan":
        return ""
    compiler = os.environ.get("CXX", "g++")
    paths = [
        subprocess.run(
            [compiler, f"-print-file-name={name}"], check=True, capture_output=True, text=True
        ).stdout.strip()
        for name in SANITIZERS
    ]
    return " ".join(paths)


def _call(*command: object) -> None:
    # The compiler is not to run under the sanitizers that the tests may run under.
    env = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    done = subprocess.run(
        [str(word) for word in command], env=env, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise BuildError(
            f"{' '.join(map(str, command))}\n{done.stdout[-8000:]}{done.stderr[-4000:]}"
        )


def make(tier: str, target: str) -> Path:
    """Compile what changed of a target of CMake's that a tier needs; returns the build's folder."""
    import fcntl  # not on every system that this module is imported on

    sys.path.insert(0, str(ROOT / "tools"))
    try:
        import native
    finally:
        sys.path.pop(0)
    cmake, ninja = native.require_cmake(), native.find_ninja()
    options = {
        "LESS_EMULATOR": "ON",
        "LESS_EMULATOR_SELFTEST": "ON",
        "LESS_CUDA": "off",
        "LESS_CUDA_HEAD_DIMS": os.environ.get("LESS_CUDA_HEAD_DIMS", ""),
        "LESS_WERROR": os.environ.get("LESS_WERROR", "0"),
        "Python_EXECUTABLE": sys.executable,
        "LESS_TORCH_ROOT": native.require_torch(),
    }
    if tier.startswith("ptx_"):
        options["LESS_EMULATOR_PTX"] = "80;90a"
    configure = [cmake, "-S", ROOT, "-B", TREE, "-Wno-dev"]
    if ninja and not (TREE / "CMakeCache.txt").exists():
        configure += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
    jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
    TREE.mkdir(parents=True, exist_ok=True)
    with (TREE / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the tests of another tier may build here too
        _call(*configure, *(f"-D{key}={value}" for key, value in options.items()))
        _call(cmake, "--build", TREE, "--parallel", jobs, "--target", target)
    return TREE


def build(tier: str) -> Path:
    """Compile what changed of a tier's library of ops; returns it."""
    target = f"less_emulated_ops_{tier}"
    return make(tier, target) / f"lib{target}.so"


class Emulator:
    """A loaded tier, and its controls (emulator/control.h).

    Args:
        library: The tier's library of ops.
    """

    def __init__(self, library: Path) -> None:
        """See the class."""
        torch.ops.load_library(library)
        self._control = ctypes.CDLL(str(library))
        self._control.less_emulator_tier.restype = ctypes.c_char_p
        self._control.less_emulator_profile_json.restype = ctypes.c_char_p
        self.tier = self._control.less_emulator_tier().decode()

    def set(self, **options: object) -> None:
        """Set options by name."""
        for name, value in options.items():
            if self._control.less_emulator_set(name.encode(), str(value).encode()):
                raise ValueError(f"the emulator has no option {name}={value}")

    def profile(self) -> dict[str, Any]:
        """What the last launch did to memory; with the option ``profile`` in the tier track."""
        answer: dict[str, Any] = json.loads(self._control.less_emulator_profile_json())
        return answer


@functools.lru_cache(maxsize=1)
def load(tier: str) -> Emulator:
    """Build and load a tier, once."""
    return Emulator(build(tier))
