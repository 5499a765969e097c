"""The native build: its facts, its switches, its loud failures, and what a user installs."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
from pathlib import Path

import pytest
import torch

import less

_C = pytest.importorskip("less._C")

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))
try:
    import cuda_toolkit
finally:
    sys.path.pop(0)
SITE = Path(sysconfig.get_path("purelib"))


def call(*command: object, cwd: Path = ROOT, **env: str) -> subprocess.CompletedProcess[str]:
    """Run a command with these variables added; stdout and stderr come back as one text."""
    return subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env={**os.environ, **env},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
    )


# -- facts -----------------------------------------------------------------------------------------


def test_build_facts_are_those_of_this_build() -> None:
    facts = _C.build_facts()
    assert facts["version"] == less.__version__
    assert facts["torch"].split(".")[:2] == torch.__version__.split(".")[:2]
    assert facts["compiler"].split()[0] in ("gcc", "clang")
    assert facts["simd_levels"][0] == "portable"
    assert facts["simd"] in facts["simd_supported"]
    assert set(facts["simd_supported"]) <= set(facts["simd_levels"])
    assert facts["cuda"] == bool(facts["cuda_archs"])


def test_cuda_library_is_there_exactly_where_the_facts_say_so() -> None:
    built = any(Path(_C.__file__).parent.glob("_cuda.*.so"))
    assert built == _C.build_facts()["cuda"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="it is loaded here, rightly")
def test_cuda_library_is_not_loaded_without_a_gpu() -> None:
    assert "less._cuda" not in sys.modules


def test_cuda_library_loads_where_it_is_asked_to() -> None:
    if not _C.build_facts()["cuda"]:
        assert os.environ.get("LESS_CUDA", "auto").lower() != "on", (
            "LESS_CUDA=on built no less._cuda"
        )
        pytest.skip("NOT BUILT: less._cuda, which LESS_CUDA=on builds and this test loads")
    code = "import torch; from less import _cuda; print(_cuda.build_facts()['cuda_archs'])"
    done = call(sys.executable, "-c", code)
    assert done.returncode == 0, done.stdout
    assert done.stdout.split()[-1] == ",".join(_C.build_facts()["cuda_archs"])


def test_libraries_name_no_folder_of_the_building_machine() -> None:
    for library in Path(_C.__file__).parent.glob("*.so"):
        data = library.read_bytes()
        for path in (ROOT, SITE, Path.home()):
            assert str(path).encode() + b"/" not in data, f"{library.name} holds {path}"


# -- the choice of the SIMD level ------------------------------------------------------------------

IMPORT = "import torch; from less import _C; print(_C.build_facts()['simd'])"


@pytest.mark.parametrize("level", _C.build_facts()["simd_supported"])
def test_less_simd_chooses_the_level(level: str) -> None:
    done = call(sys.executable, "-c", IMPORT, LESS_SIMD=level)
    assert done.stdout.split() == [level]


def test_unset_less_simd_takes_the_best_level() -> None:
    assert call(sys.executable, "-c", IMPORT, LESS_SIMD="").stdout.split() == [
        _C.build_facts()["simd_supported"][-1]
    ]


def test_unknown_less_simd_is_refused_by_name_and_never_swallowed() -> None:
    for code in (IMPORT, "import less.backend.ops"):
        done = call(sys.executable, "-c", code, LESS_SIMD="sse9")
        assert done.returncode != 0
        wanted = "ImportError: LESS_SIMD must be one of portable, avx2, avx512, neon, got 'sse9'"
        assert wanted in done.stdout


def test_each_level_uses_its_own_registers_and_no_wider_ones() -> None:
    if "avx2" not in _C.build_facts()["simd_levels"]:
        pytest.skip("other registers than x86-64's")
    if not shutil.which("objdump"):
        pytest.skip("no objdump")
    listing = call("objdump", "-d", "--no-show-raw-insn", _C.__file__).stdout
    used: dict[str, set[str]] = {"portable": set(), "avx2": set(), "avx512": set()}
    registers: set[str] = set()
    for line in listing.splitlines():
        if line.endswith(">:"):
            # Mangled as length and name; of no level are the ops, and the C++ library's templates.
            level = re.search(r"4less3cpu(?:8(portable)|4(avx2)|6(avx512))", line)
            registers = used[next(filter(None, level.groups()))] if level else set()
        else:
            registers.update(re.findall(r"%([xyz]mm)", line))
    if not any(used.values()):
        pytest.skip("the library was stripped of its symbols")
    assert used["portable"] == {"xmm"}
    assert "ymm" in used["avx2"]
    assert "zmm" not in used["avx2"]
    assert "zmm" in used["avx512"]


# -- settings and loud failures --------------------------------------------------------------------


def configure(folder: Path, *more: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Run CMake's configuration alone."""
    cmake = shutil.which("cmake") or str(Path(sys.executable).parent / "cmake")
    options = {
        "Python_EXECUTABLE": sys.executable,
        "LESS_TORCH_ROOT": Path(torch.__file__).parent,
        "LESS_CUDA": env.pop("LESS_CUDA", "off"),
        "LESS_CUDA_ARCHS": env.pop("LESS_CUDA_ARCHS", ""),
        "LESS_CUDA_HEAD_DIMS": env.pop("LESS_CUDA_HEAD_DIMS", ""),
    }
    settings = [f"-D{key}={value}" for key, value in options.items()]
    return call(cmake, "-S", ROOT, "-B", folder, *settings, *more, **env)


def test_cuda_on_without_nvcc_fails_loudly(tmp_path: Path) -> None:
    done = configure(tmp_path, LESS_CUDA="on", CUDACXX="/nonexistent/nvcc")
    assert done.returncode != 0
    assert "LESS_CUDA=on, but no working nvcc was found" in done.stdout


@pytest.mark.parametrize(
    ("archs", "why"),
    [
        ("", "no GPU was seen that its kernels run on; LESS_CUDA=on builds them for all"),
        ("90a", "no nvcc was found; LESS_CUDA=on says where it was looked for"),
    ],
)
def test_cuda_auto_says_in_one_line_why_it_is_left_out(
    tmp_path: Path, archs: str, why: str
) -> None:
    env = {"CUDACXX": "/nonexistent/nvcc"} if archs else {}
    done = configure(tmp_path, LESS_CUDA="auto", LESS_CUDA_ARCHS=archs, **env)
    assert done.returncode == 0, done.stdout
    assert f"-- less: CUDA off ({why})\n" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode", "archs", "built"),
    [("auto", "90a", "90a"), ("on", "90a", "90a"), ("on", "", "80,90a,100,120+PTX")],
)
def test_cuda_is_built_for_the_architectures_that_are_named(
    tmp_path: Path, mode: str, archs: str, built: str
) -> None:
    kit = cuda_toolkit.find()
    if kit is None:
        pytest.skip("NO NVCC: CMake cannot be asked what it would compile")
    options = [f"-D{key}={value}" for key, value in kit.cmake_options.items()]
    done = configure(tmp_path, *options, LESS_CUDA=mode, LESS_CUDA_ARCHS=archs)
    assert done.returncode == 0, done.stdout
    assert f"; architectures {built})\n" in done.stdout


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("LESS_CUDA", "maybe", "LESS_CUDA must be auto, on or off, got 'maybe'"),
        ("LESS_CUDA_ARCHS", "80 ampere", "got 'ampere'"),
        ("LESS_CUDA_HEAD_DIMS", "64 100", "wanted some of 64 80 96 128 256, got '100'"),
    ],
)
def test_unknown_settings_are_refused_by_name(
    tmp_path: Path, setting: str, value: str, message: str
) -> None:
    done = configure(tmp_path, **{"LESS_CUDA": "auto", setting: value})
    assert done.returncode != 0
    assert message in done.stdout


@pytest.mark.slow
def test_kernels_compile_without_torch_and_the_package_takes_them(tmp_path: Path) -> None:
    for name in ("csrc", "tools"):
        shutil.copytree(ROOT / name, tmp_path / name)
    for name in ("setup.py", "CMakeLists.txt", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "less").mkdir()
    shutil.copy(ROOT / "less" / "_version.py", tmp_path / "less")
    for kept in (tmp_path / "csrc" / "cpu").glob("*.cpp"):  # small ones stand for all
        if kept.stem not in ("dispatch", "quantize"):
            kept.write_text("")
    build = (sys.executable, "setup.py", "-q", "build_ext", "--inplace")
    env = {"LESS_CUDA": "off"}
    done = call(*build, "--kernels", cwd=tmp_path, LESS_TORCH_ROOT="/nonexistent", **env)
    assert done.returncode == 0, done.stdout
    compiled = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("quantize.cpp.o")}
    assert len(compiled) == len(_C.build_facts()["simd_levels"])
    done = call(*build, cwd=tmp_path, **env)
    assert done.returncode == 0, done.stdout
    assert {p: p.stat().st_mtime_ns for p in compiled} == compiled
    assert list((tmp_path / "less").glob("_C.*.so"))


def test_without_a_compiler_the_message_names_the_way_out(tmp_path: Path) -> None:
    env = {"PATH": str(tmp_path), "CXX": ""}
    done = call(sys.executable, "setup.py", "-q", "build_ext", "--build-lib", tmp_path, **env)
    assert done.returncode != 0
    assert "no C++ compiler was found" in done.stdout
    assert "LESS_NATIVE=off" in done.stdout


def test_build_requirements_ask_for_torch_only_where_there_is_none(tmp_path: Path) -> None:
    code = (
        "import sys; sys.path.insert(0, 'tools')\n"
        "import native, build_backend\n"
        "if sys.argv[1] == 'none': native.find_torch = lambda: None\n"
        "print(build_backend.get_requires_for_build_wheel())"
    )
    shutil.copytree(ROOT / "tools", tmp_path / "tools")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "less").mkdir()
    shutil.copy(ROOT / "less" / "_version.py", tmp_path / "less")
    found = call(sys.executable, "-c", code, "found", cwd=tmp_path)
    none = call(sys.executable, "-c", code, "none", cwd=tmp_path)
    off = call(sys.executable, "-c", code, "none", cwd=tmp_path, LESS_NATIVE="off")
    assert "torch" not in found.stdout.splitlines()[-1], found.stdout
    assert "'torch>=2.10'" in none.stdout.splitlines()[-1], none.stdout
    assert "torch" not in off.stdout.splitlines()[-1], off.stdout


# -- what a user installs --------------------------------------------------------------------------


def environment(folder: Path) -> Path:
    """A new virtual environment that borrows this one's run-time packages; returns its Python.

    Neither less nor anything that builds is borrowed: an isolated build must bring its own.
    """
    venv.create(folder, with_pip=True)
    site = next(folder.glob("lib/python*/site-packages"))
    kept_away = ("less", "_less", "__editable__", "pip", "setuptools", "wheel", "cmake", "ninja")
    for entry in SITE.iterdir():
        name = entry.name.lower()
        borrowed = not name.startswith(kept_away) and entry.suffix != ".pth"
        if borrowed and not (site / entry.name).exists():
            (site / entry.name).symlink_to(entry)
    return folder / "bin" / "python"


SMOKE = """
import sys, torch, less
from less import _C
from less.backend import ops
H, z = torch.zeros(1, 1, 2, 8), torch.zeros(1, 1, 2)
ops.fold(H, z, torch.ones(1, 1, 3, 2), torch.ones(1, 1, 3, 8))
assert H.eq(3).all() and z.eq(3).all()
assert "transformers" not in sys.modules and "matplotlib" not in sys.modules
print(_C.__file__, less.__version__)
"""


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sdist")
    done = call(sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", folder)
    assert done.returncode == 0, done.stdout
    return next(folder.glob("*.tar.gz"))


@pytest.mark.slow
def test_sdist_holds_the_sources_and_nothing_built(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    folders = ("csrc", "emulator", "examples", "less", "tests", "tools")
    tracked = call("git", "ls-files", *folders).stdout.split("\n")
    present = {name for name in tracked if name and (ROOT / name).exists()}
    assert not present - names
    assert {"CMakeLists.txt", "setup.py", "pyproject.toml", "LICENSE"} <= names
    assert {"README.md", "CONTRIBUTING.md", "CHANGELOG.md"} <= names
    assert not [name for name in names if name.endswith((".so", ".o", ".pyc")) or "build/" in name]


@pytest.mark.slow
def test_an_isolated_install_of_the_sdist_works(sdist: Path, tmp_path: Path) -> None:
    python = environment(tmp_path / "venv")
    # It is built beside the other builds, where a compiler cache finds what they have compiled.
    beside = ROOT / "build" / "isolated"
    beside.mkdir(parents=True, exist_ok=True)
    settings = {"LESS_CUDA": "off", "LESS_WERROR": "1", "TMPDIR": str(beside)}
    done = call(python, "-m", "pip", "install", sdist, cwd=tmp_path, **settings)
    assert done.returncode == 0, done.stdout
    done = call(python, "-c", SMOKE, cwd=tmp_path)
    assert done.returncode == 0, done.stdout
    assert str(tmp_path / "venv") in done.stdout
    done = call(tmp_path / "venv" / "bin" / "less-kv", "--version", cwd=tmp_path)
    assert less.__version__ in done.stdout


@pytest.mark.slow
def test_an_install_without_native_code_falls_back_loudly(sdist: Path, tmp_path: Path) -> None:
    python = environment(tmp_path / "venv")
    install = (python, "-m", "pip", "install", "--no-deps", sdist)
    done = call(*install, cwd=tmp_path, LESS_NATIVE="off")
    assert done.returncode == 0, done.stdout
    code = (
        "import less\n"
        "less.LessKVCache(layers=1, q_heads=2, kv_heads=1, head_dim=8, batch=1,\n"
        "                 policy=less.H2O(4, 4))"
    )
    done = call(python, "-c", code, cwd=tmp_path)
    assert done.returncode == 0, done.stdout
    assert "RuntimeWarning: less: the native kernels were not built" in done.stdout


# -- wheels ----------------------------------------------------------------------------------------


def test_modules_use_the_limited_api_of_the_oldest_python() -> None:
    assert _C.__file__.endswith(".abi3.so" if not sysconfig.get_config_var("Py_GIL_DISABLED")
                                else sysconfig.get_config_var("EXT_SUFFIX"))  # fmt: skip
    oldest = re.search(r'requires-python = ">=3\.(\d+)"', (ROOT / "pyproject.toml").read_text())
    assert oldest is not None
    assert f"0x03{int(oldest[1]):02X}0000" in (ROOT / "csrc" / "python.h").read_text()
    assert f'"cp3{oldest[1]}"' in (ROOT / "setup.py").read_text()


def _other_pythons() -> list[str]:
    names = (f"python3.{minor}" for minor in range(10, 20) if minor != sys.version_info[1])
    return [name for name in names if shutil.which(name)]


FACTS = """
import ctypes, importlib.util, sys
for library in ("libc10.so", "libtorch_cpu.so", "libtorch.so"):
    ctypes.CDLL(f"{sys.argv[1]}/{library}", ctypes.RTLD_GLOBAL)
spec = importlib.util.spec_from_file_location("less._C", sys.argv[2])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
print(module.build_facts()["version"], module._test.set_simd("portable"))
"""


@pytest.mark.parametrize("python", _other_pythons() or [None])
def test_one_module_serves_other_pythons(python: str | None) -> None:
    if python is None or not _C.__file__.endswith(".abi3.so"):
        pytest.skip("NO OTHER PYTHON, or no limited API")
    done = call(python, "-c", FACTS, Path(torch.__file__).parent / "lib", _C.__file__)
    if (
        "not found" in done.stdout and done.returncode == 127
    ):  # a shim of a Python that is not there
        pytest.skip(f"NOT INSTALLED: {python}")
    assert done.returncode == 0, done.stdout
    assert done.stdout.split() == [less.__version__, "None"]
