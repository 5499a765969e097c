"""Where a figure was measured: machine, versions, commit, memory of the process."""

from __future__ import annotations

import contextlib
import os
import platform
import subprocess
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import less


def machine() -> dict[str, str | int | None]:
    """Facts that a measured figure must carry, JSON-ready."""
    return {
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": version_of("transformers"),
        "less": less.__version__,
        "commit": _commit(),
    }


def in_words(facts: Mapping[str, Any]) -> str:
    """CPU, threads, torch, version and commit of ``machine``'s facts, as a caption has them."""
    threads = f"{facts['threads']} thread{'' if facts['threads'] == 1 else 's'}"
    return (
        f"{facts['cpu']}, {threads}, torch {facts['torch']}, less {facts['less']} "
        f"({facts['commit'] or 'installed'})"
    )


def resident_bytes() -> int | None:
    """Bytes of this process in memory now (RSS), None where the system does not say."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, ValueError, IndexError):
        return None
    return pages * os.sysconf("SC_PAGE_SIZE")


def available_bytes() -> int | None:
    """Bytes that this machine can still give, None where the system does not say."""
    return said_bytes("/proc/meminfo", "MemAvailable")


def said_bytes(file: str, name: str) -> int | None:
    """Bytes that a file of /proc says in kB under a name; None where the system does not say."""
    try:
        lines = Path(file).read_text().splitlines()
        return next((int(x.split()[1]) * 1024 for x in lines if x.startswith(f"{name}:")), None)
    except (OSError, ValueError):
        return None


class Peak:
    """The most memory that a device, or this process on a CPU, takes beyond what it has now.

    Args:
        device: Where tensors live.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._before = device, 0
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self._before = torch.cuda.memory_allocated(device)
            return
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # from now on the peak counts anew
        self._before = resident_bytes() or 0

    def bytes(self) -> int | None:
        """So far, at least 0; None where the system does not say."""
        if self._device.type == "cuda":
            return int(torch.cuda.max_memory_allocated(self._device)) - self._before
        highest = said_bytes("/proc/self/status", "VmHWM")
        return None if highest is None else max(0, highest - self._before)


def version_of(package: str) -> str | None:
    """Of an installed package; None where it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _commit() -> str | None:
    """Commit of the checkout that `less` runs from, "+" for changes; None for an installed copy."""
    root = Path(less.__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    try:
        answer = subprocess.run(
            ["git", "describe", "--always", "--dirty=+", "--abbrev=9", "--exclude=*"],
            cwd=root, capture_output=True, text=True, timeout=10, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip() or None
