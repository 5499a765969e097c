"""Where nvcc, its headers and the SASS tools are, and which GPUs to compile for.

Tried in this order: the folder that ``CUDACXX`` or ``CUDA_HOME`` names, nvcc on ``PATH``,
``/usr/local/cuda``, and the wheels of ``requirements-cuda.txt``, so that kernels can be compiled
and inspected where no toolkit is installed. Found here, used by setup.py, the Makefile (as a
command: ``python tools/cuda_toolkit.py nvcc``) and the tests.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import re
import shutil
import site
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

MINIMUM_NVCC = (13, 0)
USUAL = Path("/usr/local/cuda")
ARCHS = ("80", "90a", "100", "120")  # what kernels are written and proved for
WHEELS = "requirements-cuda.txt"
DRIVER = "libcuda.so.1"
CAPABILITY_ATTRIBUTES = (75, 76)  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR


class ToolkitError(SystemExit):
    """No toolkit that would do; the message says where it was looked for and what to do."""


@dataclass(frozen=True)
class Toolkit:
    """One CUDA toolkit.

    Args:
        root: Its folder, with bin/ and include/.
        source: Where it was found, in words.
    """

    root: Path
    source: str

    @property
    def nvcc(self) -> Path:
        """The compiler."""
        return self.root / "bin" / "nvcc"

    @property
    def include(self) -> list[Path]:
        """Folders for a C++ compiler that wants CUDA's headers."""
        folders = [self.root / "include", self.root / "include" / "cccl"]
        return [folder for folder in folders if folder.is_dir()]

    @property
    def library(self) -> Path:
        """Folder of the CUDA runtime. The wheels' nvcc does not know theirs: link with -L of it."""
        lib64 = self.root / "lib64"
        return lib64 if lib64.is_dir() else self.root / "lib"

    @property
    def cmake_options(self) -> dict[str, str]:
        """What CMake is to be told to compile with it."""
        options = {"CMAKE_CUDA_COMPILER": str(self.nvcc)}
        if self.source == "wheels":
            options["CMAKE_CUDA_FLAGS"] = f"-L{self.library}"
        return options

    @cached_property
    def version(self) -> tuple[int, int]:
        """What nvcc says: (13, 0)."""
        done = subprocess.run([self.nvcc, "--version"], capture_output=True, text=True, check=True)
        found = re.search(r"release (\d+)\.(\d+)", done.stdout)
        return (int(found[1]), int(found[2])) if found else (0, 0)


def find() -> Toolkit | None:
    """The first toolkit whose nvcc is new enough, or None.

    Raises:
        ToolkitError: CUDACXX or CUDA_HOME names what is none.
    """
    return next((kit for kit in _candidates() if kit.version >= MINIMUM_NVCC), None)


def require() -> Toolkit:
    """The toolkit, or stop with a clear message."""
    toolkit = find()
    if toolkit is None:
        old = [f"{kit.nvcc} is {'.'.join(map(str, kit.version))}" for kit in _candidates()]
        raise ToolkitError(
            "no nvcc >= {}.{} was found: tried CUDACXX, CUDA_HOME, PATH, /usr/local/cuda and "
            "the wheels{}.\nInstall a CUDA toolkit, or: pip install --no-deps -r {}".format(
                *MINIMUM_NVCC, f" ({'; '.join(old)})" if old else "", WHEELS
            )
        )
    return toolkit


def gpu_archs() -> list[str]:
    """The architectures to build for the GPUs that this machine shows; none: no GPU to build for.

    Code for a capability runs on later ones of the same major version: an 8.6 takes that of 8.0.
    A GPU that is newer than all of ours takes the newest one's PTX; one that is older, or of a
    major version between ours, takes nothing.
    """
    of_major = {int(arch.rstrip("a")[:-1]): arch for arch in ARCHS}
    newest = max(of_major)
    majors = {major for major, _ in gpu_capabilities()}
    archs = [arch for major, arch in of_major.items() if major in majors]
    if any(major > newest for major in majors):
        archs = [arch for arch in archs if arch != of_major[newest]] + [f"{of_major[newest]}+PTX"]
    return archs


def gpu_capabilities() -> list[tuple[int, int]]:
    """Compute capabilities of the GPUs, (9, 0) for 9.0: nvidia-smi's, else the driver's own."""
    program = shutil.which("nvidia-smi")
    if program is not None:
        command = [program, "--query-gpu=compute_cap", "--format=csv,noheader"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        found = re.findall(r"^\s*(\d+)\.(\d+)\s*$", done.stdout, flags=re.M)
        if done.returncode == 0 and found:
            return [(int(major), int(minor)) for major, minor in found]
    return _driver_capabilities()


def _driver_capabilities() -> list[tuple[int, int]]:
    """What the driver's library says; a container often has it without nvidia-smi."""
    try:
        driver = ctypes.CDLL(DRIVER)
    except OSError:
        return []
    count = ctypes.c_int()
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)):
        return []
    capabilities = []
    for device in range(count.value):
        numbers = []
        for attribute in CAPABILITY_ATTRIBUTES:
            number = ctypes.c_int()
            if driver.cuDeviceGetAttribute(ctypes.byref(number), attribute, device):
                return []
            numbers.append(number.value)
        capabilities.append((numbers[0], numbers[1]))
    return capabilities


def require_tool(name: str) -> Path:
    """Path of a program of the toolkit that may be apart from nvcc, such as nvdisasm.

    The wheels' one is preferred: a toolkit's reads nothing newer than itself.
    """
    folders = [root / "bin" for root in _wheel_roots()]
    toolkit = find()
    if toolkit is not None:
        folders.append(toolkit.root / "bin")
    for path in [*map(str, folders), os.environ.get("PATH", "")]:
        found = shutil.which(name, path=path)
        if found:
            return Path(found)
    raise ToolkitError(f"{name} was not found: pip install --no-deps -r {WHEELS}")


def _candidates() -> Iterator[Toolkit]:
    for variable in ("CUDACXX", "CUDA_HOME", "CUDA_PATH"):
        value = os.environ.get(variable)
        if not value:
            continue
        root = _root_of(value) if variable == "CUDACXX" else Path(value)
        if root is None or not _has_nvcc(root):
            raise ToolkitError(f"{variable}={value}: there is no working nvcc")
        yield Toolkit(root, variable)
    on_path = shutil.which("nvcc")
    root = _root_of(on_path) if on_path else None
    if root is not None:
        yield Toolkit(root, "PATH")
    places = [(USUAL, str(USUAL)), *((root, "wheels") for root in _wheel_roots())]
    for root, source in places:
        if _has_nvcc(root):
            yield Toolkit(root, source)


def _root_of(nvcc: str) -> Path | None:
    """The toolkit that this nvcc belongs to; it may be a script that calls the real one."""
    command = [nvcc, "-dryrun", "nothing.cu"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return None
    top = re.search(r"^#\$ TOP=(.+)$", done.stderr, flags=re.M)
    return Path(top[1]).resolve() if top else None


def _has_nvcc(root: Path) -> bool:
    return os.access(root / "bin" / "nvcc", os.X_OK)


def _wheel_roots() -> list[Path]:
    places = [sysconfig.get_path("purelib"), *site.getsitepackages(), *sys.path]
    roots = (Path(place or ".") / "nvidia" / "cu13" for place in dict.fromkeys(places))
    return [root for root in roots if root.is_dir()]


def main() -> int:
    """Print what is asked for, for a Makefile or a script."""
    parser = argparse.ArgumentParser(prog="cuda_toolkit", description=__doc__.splitlines()[0])
    what = ("nvcc", "root", "include", "library", "nvdisasm", "archs", "cmake", "facts")
    parser.add_argument("what", choices=what)
    what = parser.parse_args().what
    if what == "nvdisasm":
        print(require_tool(what))
        return 0
    if what == "archs":
        print(*gpu_archs())
        return 0
    toolkit = require()
    if what == "cmake":
        print(*(f"-D{key}={value}" for key, value in toolkit.cmake_options.items()), sep="\n")
    elif what == "facts":
        print("nvcc {}.{} at {} ({})".format(*toolkit.version, toolkit.nvcc, toolkit.source))
    elif what == "include":
        print(*toolkit.include, sep=os.pathsep)
    else:
        print(getattr(toolkit, what))
    return 0


if __name__ == "__main__":
    sys.exit(main())
