"""Builds the programs of bench/cpp, which need a C++ compiler and CMake but no torch."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


class BuildError(SystemExit):
    """A program could not be built; the message says why."""


class MissingError(BuildError):
    """What a program is built with is not installed; the message names Debian's package."""


def build(
    target: str, folder: Path = ROOT / "build" / "bench", options: Sequence[str] = ()
) -> Path:
    """Compile one target of bench/cpp.

    Args:
        target: ``less_kernels``, ``less_instructions`` or ``less_bench_read``.
        folder: Where to build; kept, so that the next time compiles what changed.
        options: Of CMake's configuration, besides.

    Returns:
        The program, or the shared library.

    Raises:
        MissingError: A library that the target needs is missing.
        BuildError: A tool is missing, or it does not compile.
    """
    sys.path.insert(0, str(ROOT / "tools"))
    import native

    native.require_compiler()
    cmake, ninja = native.require_cmake(), native.find_ninja()
    configure = [cmake, "-S", str(ROOT), "-B", str(folder), "-Wno-dev"]
    configure += [f"-DLESS_WERROR={os.environ.get('LESS_WERROR', '0')}", "-DLESS_PYTHON=OFF"]
    configure += ["-DLESS_BENCH=ON", "-DCMAKE_BUILD_TYPE=Release", *options]
    if ninja and not (folder / "CMakeCache.txt").exists():
        configure += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
    jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
    compile_ = [cmake, "--build", str(folder), "--parallel", jobs, "--target", target]
    configured = _run(configure)
    # As bench/cpp/CMakeLists.txt says it.
    lacks = re.search(rf"less: no (.+), hence no {target}$", configured, flags=re.M)
    if lacks:
        raise MissingError(f"bench: {target} needs {lacks[1]}")
    _run(compile_)
    made = folder / "bench" / "cpp"
    library = made / f"lib{target}.so"
    return library if library.exists() else made / target


def _run(command: Sequence[str]) -> str:
    """Standard output of a command.

    Raises:
        BuildError: It fails; the message has its last lines.
    """
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = (done.stdout + done.stderr).splitlines()[-30:]
        text = "\n".join(line[:300] for line in lines)
        raise BuildError(f"bench: {' '.join(command)} failed:\n{text}")
    return done.stdout


def require(program: str, package: str) -> None:
    """Stop where a program is not installed.

    Raises:
        BuildError: It is not; the message names Debian's package.
    """
    if shutil.which(program) is None:
        raise BuildError(f"bench: no {program} was found (Debian: apt-get install {package})")


if __name__ == "__main__":
    print(build(sys.argv[1]))
