"""What the native build needs from its surroundings: torch's headers, CMake, a compiler.

Nothing here imports torch: under build isolation the torch of the environment that is installed
into is not importable, but its headers and libraries are still at their place.
"""

from __future__ import annotations

import os
import re
import shutil
import site
import subprocess
import sys
import sysconfig
from pathlib import Path

MINIMUM_TORCH = (2, 10)
MINIMUM_CMAKE = (3, 24)


class BuildError(SystemExit):
    """The native build cannot go on; the message says why and what to do."""


def native_wanted() -> bool:
    """Whether to build native code: LESS_NATIVE, `on` (the default) or `off`."""
    value = os.environ.get("LESS_NATIVE", "on").lower()
    if value not in ("on", "off"):
        raise BuildError(f"LESS_NATIVE must be on or off, got {value!r}")
    return value == "on"


def find_torch() -> Path | None:
    """Folder of the newest-enough torch whose headers can be seen, or None.

    LESS_TORCH_ROOT names one outright. Then the places a package may lie in are tried, the
    running interpreter's own first: under build isolation that is the target environment.
    """
    named = os.environ.get("LESS_TORCH_ROOT")
    if named:
        root = Path(named)
        if _torch_version(root) is None:
            raise BuildError(f"LESS_TORCH_ROOT must name a torch package folder, got {named!r}")
        return root
    places = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *sys.path]
    places += [*site.getsitepackages(), site.getusersitepackages()]
    for place in places:
        root = Path(place or ".") / "torch"
        version = _torch_version(root)
        if version is not None and version >= MINIMUM_TORCH:
            return root.resolve()
    return None


def _torch_version(root: Path) -> tuple[int, int] | None:
    header = root / "include" / "torch" / "headeronly" / "version.h"
    if not header.is_file():
        return None
    text = header.read_text()
    parts = [re.search(rf"define TORCH_VERSION_{part} (\d+)", text) for part in ("MAJOR", "MINOR")]
    major, minor = (int(part[1]) if part else 0 for part in parts)
    return major, minor


def find_cmake() -> str | None:
    """The first CMake on PATH or beside this Python that is new enough, or None."""
    folders = [os.environ.get("PATH", ""), str(Path(sys.executable).parent)]
    for folder in os.pathsep.join(folders).split(os.pathsep):
        cmake = shutil.which("cmake", path=folder) if folder else None
        if cmake is None:
            continue
        answer = subprocess.run([cmake, "--version"], capture_output=True, text=True, check=False)
        version = re.search(r"version (\d+)\.(\d+)", answer.stdout)
        if version and (int(version[1]), int(version[2])) >= MINIMUM_CMAKE:
            return cmake
    return None


def find_ninja() -> str | None:
    """Ninja on PATH or beside this Python, or None."""
    return shutil.which("ninja") or shutil.which("ninja", path=str(Path(sys.executable).parent))


def require_compiler() -> None:
    """Stop with a clear message where no C++ compiler can be seen."""
    named = os.environ.get("CXX", "").split()
    if any(shutil.which(name) for name in (*named[:1], "c++", "g++", "clang++")):
        return
    raise BuildError(
        "less: no C++ compiler was found (tried $CXX, c++, g++, clang++), so its native kernels "
        "cannot be built.\nInstall one (Debian and Ubuntu: apt-get install g++) and try again, "
        "or set LESS_NATIVE=off to install the slower pure-torch reference alone."
    )


def require_torch() -> Path:
    """Folder of torch, or stop with a clear message."""
    root = find_torch()
    if root is None:
        raise BuildError(
            "less: no torch >= {}.{} was found by its headers; install torch first, name its "
            "folder in LESS_TORCH_ROOT, or build with isolation, which fetches one.".format(
                *MINIMUM_TORCH
            )
        )
    return root


def require_cmake() -> str:
    """CMake's path, or stop with a clear message."""
    cmake = find_cmake()
    if cmake is None:
        raise BuildError(
            "less: no CMake >= {}.{} was found; `pip install cmake`, or build with isolation, "
            "which fetches one.".format(*MINIMUM_CMAKE)
        )
    return cmake
