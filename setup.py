"""Finds torch and CMake, then hands over: all native build logic is in CMakeLists.txt.

Environment:
    LESS_NATIVE      on (default) | off: off installs the pure-torch reference alone
    LESS_CUDA        auto (default) | on | off: auto builds CUDA kernels where a GPU is seen or
                     LESS_CUDA_ARCHS is set, and an nvcc is installed; on builds them anywhere, with
                     the nvcc of PyPI's wheels too
    LESS_CUDA_ARCHS  e.g. "80 90a", or "all": "80 90a 100 120+PTX"; default: where GPUs are seen,
                     theirs alone, else all
    LESS_CUDA_HEAD_DIMS  e.g. "64 128": what CUDA kernels are compiled for; fewer build faster and
                     load smaller; default: all of csrc/cuda/head_dims.h
    LESS_WERROR      1: compiler warnings are errors
    LESS_TORCH_ROOT  the torch package folder to build against
    MAX_JOBS         parallel compile jobs, default all cores

`python setup.py build_ext --inplace` builds into less/ incrementally; it is what `make dev` runs.
With `--kernels` it compiles the CPU kernels alone, which need no torch: `make` does so while pip
installs torch.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import ClassVar

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE / "tools"))

import cuda_toolkit  # noqa: E402
import native  # noqa: E402

#: Whether the modules use Python's limited API, which a Python without a global lock has not.
LIMITED_API = not sysconfig.get_config_var("Py_GIL_DISABLED")
MODULES = ("_C", "_cuda")
OLDEST_PYTHON = "cp310"  # whose limited API that is: csrc/python.h


class CMakeBuild(build_ext):
    """Builds less/_C.*so, and less/_cuda.*so where CUDA is on, through CMake."""

    user_options: ClassVar = [
        *build_ext.user_options,
        ("kernels", None, "compile the CPU kernels alone, which need no torch, into build/"),
    ]
    boolean_options: ClassVar = [*build_ext.boolean_options, "kernels"]

    def initialize_options(self) -> None:
        """Set the defaults."""
        super().initialize_options()
        self.kernels = False

    def run(self) -> None:
        """Configure, build, install into the package folder."""
        if not native.native_wanted():
            return
        native.require_compiler()
        torch_root = "" if self.kernels else native.require_torch()
        cmake = native.require_cmake()
        # An editable build keeps its folder, so that the next one compiles only what changed; a
        # wheel's starts afresh, because isolation gives every build other tools.
        kept = self.inplace or self.editable_mode
        tree = HERE / "build" / ("native" if kept else "wheel")
        if not kept or self._tools_are_gone(tree):
            shutil.rmtree(tree, ignore_errors=True)
        options = {
            "CMAKE_BUILD_TYPE": "Release",
            "Python_EXECUTABLE": sys.executable,
            "LESS_PYTHON": "OFF" if self.kernels else "ON",
            "LESS_LIMITED_API": "ON" if LIMITED_API else "OFF",
            "LESS_TORCH_ROOT": torch_root,
            "LESS_VERSION": self.distribution.get_version(),
            "LESS_WERROR": os.environ.get("LESS_WERROR", "0"),
            **self._cuda_options(),
        }
        configure = [cmake, "-S", HERE, "-B", tree, "-Wno-dev"]
        # A compiler other than the cached one makes CMake forget all other options.
        fresh = "CMAKE_CUDA_COMPILER" in options or not (tree / "CMakeCache.txt").exists()
        if fresh:
            configure.append("--fresh")
        ninja = native.find_ninja()
        if ninja and fresh:
            configure += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
        configure += [f"-D{key}={value}" for key, value in options.items()]
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
        self._call(configure)
        self._call([cmake, "--build", tree, "--parallel", jobs])
        if self.kernels:
            return
        package = self._package_folder()
        self._call([cmake, "--install", tree, "--prefix", package])
        # An earlier build into the same folder may have left a library that this one has not, or
        # one of another Python's, which this Python may prefer.
        installed = {Path(line.strip()).name for line in (tree / "install_manifest.txt").open()}
        for name in MODULES:
            for library in package.glob(f"{name}.*"):
                if library.suffix != ".pyi" and library.name not in installed:
                    library.unlink()

    @staticmethod
    def _cuda_options() -> dict[str, str]:
        """Whether to build CUDA kernels, with what, and for which GPUs."""
        mode = os.environ.get("LESS_CUDA", "auto")
        named = os.environ.get("LESS_CUDA_ARCHS", "")
        own = cuda_toolkit.gpu_archs() if not named and mode.lower() != "off" else []
        options = {
            "LESS_CUDA": mode,
            "LESS_CUDA_ARCHS": named or " ".join(own),
            "LESS_CUDA_ARCHS_WHY": "; this machine's GPUs alone, LESS_CUDA_ARCHS=all for all"
            if own
            else "",
            "LESS_CUDA_HEAD_DIMS": os.environ.get("LESS_CUDA_HEAD_DIMS", ""),
        }
        # CMake finds an installed toolkit by itself.
        toolkit = cuda_toolkit.find() if mode.lower() == "on" else None
        if toolkit is not None and toolkit.source == "wheels":
            options |= toolkit.cmake_options
        return options

    def _package_folder(self) -> Path:
        kept = self.inplace or self.editable_mode
        return HERE / "less" if kept else Path(self.build_lib).resolve() / "less"

    @staticmethod
    def _tools_are_gone(tree: Path) -> bool:
        """Whether the folder was configured by a CMake or Ninja of a finished isolated build."""
        cache = tree / "CMakeCache.txt"
        if not cache.exists():
            return True
        tools = re.findall(
            r"^CMAKE_(?:COMMAND|MAKE_PROGRAM):\w+=(.*)$", cache.read_text(), flags=re.M
        )
        return not all(Path(tool).exists() for tool in tools)

    @staticmethod
    def _call(command: list[object]) -> None:
        words = [str(word) for word in command]
        if subprocess.run(words, check=False).returncode:
            raise native.BuildError(
                f"less: the native build failed in `{words[0]} {words[1]}` (its messages are "
                "above). LESS_NATIVE=off installs the slower pure-torch reference alone."
            )

    def get_outputs(self) -> list[str]:
        """The libraries that were built."""
        suffix = ".abi3.so" if LIMITED_API else sysconfig.get_config_var("EXT_SUFFIX")
        folder = self._package_folder()
        return [
            str(folder / name)
            for name in (module + suffix for module in MODULES)
            if (folder / name).exists()
        ]

    def get_output_mapping(self) -> dict[str, str]:
        """For editable installs: where a built file would lie, and where it does lie."""
        if not (self.inplace or self.editable_mode):
            return {}
        outputs = map(Path, self.get_outputs())
        return {str(Path(self.build_lib) / "less" / path.name): str(path) for path in outputs}


# The name alone matters: it makes the wheel a platform wheel. CMake knows the sources.
native_wanted = native.native_wanted()
setup(
    license="Apache-2.0",
    ext_modules=[Extension("less._C", sources=[], py_limited_api=LIMITED_API)] * native_wanted,
    cmdclass={"build_ext": CMakeBuild},
    options={"bdist_wheel": {"py_limited_api": OLDEST_PYTHON}}
    if native_wanted and LIMITED_API
    else {},
)
