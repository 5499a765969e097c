"""Translates PTX, builds it with the emulator, and runs its kernels on numpy arrays."""

from __future__ import annotations

import ctypes
import json
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT / "tools"), str(ROOT / "emulator")]

import cuda_toolkit  # noqa: E402
import ptx2cpp  # noqa: E402

FLAGS = ["-std=c++17", "-O1", "-g0", "-w", "-fPIC", "-ffp-contract=off", "-mavx2", "-mfma"]
FLAGS += ["-mf16c", "-fno-strict-aliasing", "-DLESS_EMULATOR=1", "-DLESS_EMULATOR_SHARED_GUARD=0"]


class Program:
    """Kernels of one PTX module, and the emulator they run in.

    Args:
        folder: Where to build.
        ptx: The module.
        more: Further C++ files.
        timed: Whether threads keep clocks.
    """

    def __init__(
        self, folder: Path, ptx: str, more: Sequence[Path] = (), timed: bool = False
    ) -> None:
        translated = folder / "kernels.cpp"
        translated.write_text(ptx2cpp.translate(ptx, timed=timed))
        names = folder / "names.cpp"
        kernels = re.findall(r"\.entry\s+(\w+)", ptx)
        names.write_text("".join(f'extern "C" void {kernel}() {{}}\n' for kernel in kernels))
        runtime = sorted((ROOT / "emulator").glob("*.cpp"))
        sources = [path for path in runtime if path.name != "hooks.cpp"]
        sources += [HERE / "ptx_driver.cpp", translated, names, *more]
        library = folder / "program.so"
        with ThreadPoolExecutor(2) as pool:
            objects = list(pool.map(lambda source: _compile(source, folder), sources))
        _call(["g++", "-shared", "-o", library, *objects, "-ldl", "-lpthread"])
        self.library = ctypes.CDLL(str(library))
        self.library.less_emulator_errors_json.restype = ctypes.c_char_p
        self.library.less_emulator_profile_json.restype = ctypes.c_char_p
        self.library.less_emulator_alloc.restype = ctypes.c_void_p
        self.library.less_emulator_alloc.argtypes = [
            ctypes.c_size_t, ctypes.c_char_p, ctypes.c_int,
        ]  # fmt: skip
        self.library.less_emulator_free.argtypes = [ctypes.c_void_p]

    def set(self, option: str, value: str) -> None:
        """Set an option of the emulator."""
        assert self.library.less_emulator_set(option.encode(), value.encode()) == 0, option

    def profile(self) -> dict[str, Any]:
        """What the last launch cost."""
        profile: dict[str, Any] = json.loads(self.library.less_emulator_profile_json())
        return profile

    def run(
        self,
        kernel: str,
        *params: np.ndarray | np.generic | bytes,
        blocks: int = 1,
        threads: int = 32,
        cluster: int = 1,
        shared: int = 0,
        unwritten: Sequence[int] = (),
    ) -> list[dict[str, str]]:
        """Run a kernel; returns the errors that were found.

        Args:
            kernel: Its name.
            params: Arrays, passed by address and written back; numbers and bytes, by value.
            blocks: Of the grid.
            threads: Of a block.
            cluster: Blocks of a cluster.
            shared: Bytes of dynamic shared memory.
            unwritten: Which arrays count as uninitialised.
        """
        self.library.less_emulator_reset()
        held, arrays = [], []
        for i, value in enumerate(params):
            if isinstance(value, np.ndarray):
                initialised = 0 if i in unwritten else 1
                at = self.library.less_emulator_alloc(value.nbytes, f"p{i}".encode(), initialised)
                ctypes.memmove(at, value.ctypes.data, value.nbytes)
                arrays.append((value, at))
                held.append(ctypes.c_uint64(at))
            else:
                data = value if isinstance(value, bytes) else value.tobytes()
                held.append(ctypes.create_string_buffer(data, len(data)))
        pointers = (ctypes.c_void_p * max(len(held), 1))(*(ctypes.addressof(h) for h in held))
        name = ctypes.cast(getattr(self.library, kernel), ctypes.c_void_p)
        done = self.library.ptx_launch(
            name, blocks, threads, cluster, ctypes.c_size_t(shared), pointers
        )
        assert done == 0, kernel
        for array, at in arrays:
            ctypes.memmove(array.ctypes.data, at, array.nbytes)
            self.library.less_emulator_free(at)
        errors: list[dict[str, str]] = json.loads(self.library.less_emulator_errors_json())
        return errors


def entry(name: str, params: Mapping[str, str], body: str) -> str:
    """PTX of a kernel whose parameters are already in registers %name, and %tid in one.

    Args:
        name: Of the kernel.
        params: Name and type of each; arrays are u64.
        body: Instructions. %a<9> are b32, %h<9> b16, %w<9> b64, %p<9> predicates.
    """
    declared = ", ".join(f".param .{kind} {name}_{one}" for one, kind in params.items())
    registers = "".join(f".reg .{kind} %{one};\n" for one, kind in params.items())
    loads = "".join(f"ld.param.{k} %{one}, [{name}_{one}];\n" for one, k in params.items())
    return (
        f".visible .entry {name}({declared})\n{{\n{registers}"
        ".reg .b32 %a<9>, %tid;\n.reg .b16 %h<9>;\n.reg .b64 %w<9>;\n.reg .pred %p<9>;\n"
        f"{loads}mov.u32 %tid, %tid.x;\n{body}\nret;\n}}\n"
    )


def module(*kernels: str) -> str:
    """A PTX module of these kernels."""
    return ".version 9.0\n.target sm_90a\n.address_size 64\n" + "".join(kernels)


def _compile(source: Path, folder: Path) -> Path:
    target = folder / f"{source.stem}.o"
    include = [flag for path in cuda_toolkit.require().include for flag in ("-isystem", str(path))]
    own = [f"-I{ROOT / 'csrc'}", f"-I{ROOT}"]
    _call(["g++", *FLAGS, *own, *include, "-c", source, "-o", target])
    return target


def _call(command: Sequence[str | Path]) -> None:
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
