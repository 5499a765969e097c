"""Where a toolkit is looked for, in which order, and which GPUs a build is for."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))
try:
    import cuda_toolkit
finally:
    sys.path.pop(0)


def script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def toolkit(root: Path, version: str = "13.0", library: str = "lib64") -> Path:
    """A folder that looks like a toolkit; its nvcc answers what is asked of it."""
    (root / "include" / "cccl").mkdir(parents=True)
    (root / library).mkdir()
    says = f"echo 'Cuda compilation tools, release {version}, V{version}.1'"
    script(root / "bin" / "nvcc",
           f'case $1 in -dryrun) echo "#\\$ TOP={root}" >&2 ;; *) {says} ;; esac')  # fmt: skip
    return root


class Machine:
    """A machine whose toolkits are where a test puts them."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.set = folder, monkeypatch
        for name in ("CUDACXX", "CUDA_HOME", "CUDA_PATH"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # of the driver, if there is one
        self.path = folder / "path"
        self.path.mkdir()
        monkeypatch.setenv("PATH", f"{self.path}:/usr/bin:/bin")
        monkeypatch.setattr(cuda_toolkit, "USUAL", folder / "usual")
        monkeypatch.setattr(cuda_toolkit, "_wheel_roots", lambda: [folder / "site" / "cu13"])

    def on_path(self, version: str = "13.0") -> Path:
        """Under a name of its own, as a distribution's wrapper is."""
        root = toolkit(self.folder / "linked", version)
        script(self.path / "nvcc", f'exec {root}/bin/nvcc "$@"')
        return root

    def usual(self, version: str = "13.0") -> Path:
        return toolkit(self.folder / "usual", version)

    def wheels(self, version: str = "13.0") -> Path:
        return toolkit(self.folder / "site" / "cu13", version, library="lib")


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(tmp_path, monkeypatch)


def found() -> tuple[Path, str]:
    kit = cuda_toolkit.find()
    assert kit is not None
    return kit.root, kit.source


def test_without_a_toolkit_there_is_none_and_the_message_says_what_to_do(machine: Machine) -> None:
    assert cuda_toolkit.find() is None
    with pytest.raises(cuda_toolkit.ToolkitError, match="pip install --no-deps -r") as error:
        cuda_toolkit.require()
    assert "tried CUDACXX, CUDA_HOME, PATH, /usr/local/cuda and the wheels." in str(error.value)


def test_the_order_is_environment_path_usual_folder_wheels(machine: Machine) -> None:
    wheels = machine.wheels()
    assert found() == (wheels, "wheels")
    usual = machine.usual()
    assert found() == (usual, str(usual))
    linked = machine.on_path()
    assert found() == (linked, "PATH")
    home = toolkit(machine.folder / "home")
    machine.set.setenv("CUDA_HOME", str(home))
    assert found() == (home, "CUDA_HOME")
    named = toolkit(machine.folder / "named")
    machine.set.setenv("CUDACXX", str(named / "bin" / "nvcc"))
    assert found() == (named, "CUDACXX")


def test_one_that_is_too_old_is_passed_over(machine: Machine) -> None:
    machine.on_path("12.4")
    wheels = machine.wheels()
    assert found() == (wheels, "wheels")


def test_one_that_is_too_old_is_named_where_there_is_no_other(machine: Machine) -> None:
    machine.on_path("12.4")
    with pytest.raises(cuda_toolkit.ToolkitError, match="linked/bin/nvcc is 12.4"):
        cuda_toolkit.require()


@pytest.mark.parametrize("variable", ["CUDACXX", "CUDA_HOME"])
def test_a_variable_that_names_none_is_refused_though_others_are_there(
    machine: Machine, variable: str
) -> None:
    machine.usual()
    machine.set.setenv(variable, "/nonexistent")
    with pytest.raises(cuda_toolkit.ToolkitError, match=f"{variable}=/nonexistent"):
        cuda_toolkit.find()


def test_headers_and_libraries_are_where_each_kind_of_toolkit_has_them(machine: Machine) -> None:
    wheels, usual = machine.wheels(), machine.usual()
    for root, source, library in ((wheels, "wheels", "lib"), (usual, str(usual), "lib64")):
        kit = cuda_toolkit.Toolkit(root, source)
        assert kit.include == [root / "include", root / "include" / "cccl"]
        assert kit.library == root / library
        assert kit.version == (13, 0)


def test_cmake_is_told_where_the_wheels_have_their_libraries(machine: Machine) -> None:
    wheels = machine.wheels()
    kit = cuda_toolkit.require()
    assert kit.cmake_options == {
        "CMAKE_CUDA_COMPILER": f"{wheels}/bin/nvcc",
        "CMAKE_CUDA_FLAGS": f"-L{wheels}/lib",
    }
    usual = machine.usual()
    assert cuda_toolkit.require().cmake_options == {"CMAKE_CUDA_COMPILER": f"{usual}/bin/nvcc"}


def test_a_tool_of_the_wheels_is_preferred_to_an_installed_one(machine: Machine) -> None:
    usual = machine.usual()
    old = script(usual / "bin" / "nvdisasm", "")
    assert cuda_toolkit.require_tool("nvdisasm") == old
    new = script(machine.wheels() / "bin" / "nvdisasm", "")
    assert cuda_toolkit.require_tool("nvdisasm") == new
    with pytest.raises(cuda_toolkit.ToolkitError, match="nvprune was not found"):
        cuda_toolkit.require_tool("nvprune")


# -- which GPUs ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("capabilities", "archs"),
    [
        ("9.0", ["90a"]),
        ("8.0", ["80"]),
        ("8.6", ["80"]),  # code of 8.0 runs there
        ("10.3", ["100"]),
        ("12.0", ["120"]),
        ("12.1", ["120"]),
        ("11.0", []),
        (r"9.0\n9.0", ["90a"]),
        (r"12.0\n8.9", ["80", "120"]),
        ("7.5", []),
        (r"9.0\n11.0", ["90a"]),  # nothing of ours runs on an 11.0
        ("13.1", ["120+PTX"]),
        (r"8.0\n12.0\n13.0", ["80", "120+PTX"]),
        ("", []),
    ],
)
def test_a_build_is_for_the_gpus_that_are_there(
    machine: Machine, capabilities: str, archs: list[str]
) -> None:
    script(machine.path / "nvidia-smi", f"printf '{capabilities}\\n'")
    assert cuda_toolkit.gpu_archs() == archs


def test_without_a_driver_a_build_is_for_no_gpu(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_toolkit, "DRIVER", "libnothing.so.1")
    assert cuda_toolkit.gpu_archs() == []
    script(machine.path / "nvidia-smi", "echo 'NVIDIA-SMI has failed'; exit 9")
    assert cuda_toolkit.gpu_archs() == []


class Driver:
    """A driver's library that shows these GPUs."""

    def __init__(self, *capabilities: tuple[int, int], status: int = 0) -> None:
        self.capabilities, self.status = capabilities, status

    def cuInit(self, flags: int) -> int:  # noqa: N802
        return self.status

    def cuDeviceGetCount(self, count: Any) -> int:  # noqa: N802
        count._obj.value = len(self.capabilities)
        return 0

    def cuDeviceGetAttribute(self, number: Any, attribute: int, device: int) -> int:  # noqa: N802
        number._obj.value = self.capabilities[device][{75: 0, 76: 1}[attribute]]
        return 0


def test_without_nvidia_smi_the_driver_is_asked(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: Driver((9, 0), (8, 6)))
    assert cuda_toolkit.gpu_capabilities() == [(9, 0), (8, 6)]
    assert cuda_toolkit.gpu_archs() == ["80", "90a"]
    monkeypatch.setattr(ctypes, "CDLL", lambda name: Driver((9, 0), status=100))
    assert cuda_toolkit.gpu_archs() == []


def configured(machine: Machine, **env: str) -> str:
    """What setup.py tells CMake, one option a line; the build itself is cut short."""
    log = machine.folder / "cmake.log"
    script(machine.path / "cmake",
           f'[ "$1" = --version ] && echo "cmake version 4.0" && exit\n'
           f"printf '%s\\n' \"$@\" > {log}; exit 1")  # fmt: skip
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", str(machine.folder)]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **env}, capture_output=True,
                          text=True, check=False)  # fmt: skip
    assert "the native build failed" in done.stderr, done.stderr
    return log.read_text()


def test_setup_builds_for_this_machines_gpu_alone_unless_told_otherwise(machine: Machine) -> None:
    unset = {"LESS_CUDA": "auto", "LESS_CUDA_ARCHS": ""}
    assert "-DLESS_CUDA_ARCHS=\n" in configured(machine, **unset)  # CMake leaves CUDA out
    script(machine.path / "nvidia-smi", "echo 9.0")
    told = configured(machine, **unset)
    assert "-DLESS_CUDA_ARCHS=90a\n" in told
    assert "this machine's GPUs alone, LESS_CUDA_ARCHS=all for all" in told
    for named in ("all", "80 100"):
        told = configured(machine, **unset | {"LESS_CUDA_ARCHS": named})
        assert f"-DLESS_CUDA_ARCHS={named}\n" in told
        assert "this machine's GPUs" not in told
