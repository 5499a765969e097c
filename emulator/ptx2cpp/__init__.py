"""PTX to C++: what nvcc really emitted, run by the emulator.

``PYTHONPATH=emulator python -m ptx2cpp kernel.ptx -o kernel.cpp`` turns each kernel into a C++
function on emulator/ptx.h, and registers it under its mangled name. Widths of accesses,
inline assembly, and what the optimiser made of the source are then under the emulator's checks.
An instruction or a modifier that is not known is an error here, with its line; never a guess.
"""

from __future__ import annotations

from .emit import emit
from .parse import PtxError, parse

# Wrappers whose lines say nothing: the line that called them is reported.
HELPERS = frozenset({
    "device.h", "convert.h", "cuda_fp16.hpp", "cuda_bf16.hpp", "cuda_fp8.hpp",
    "sm_20_intrinsics.hpp", "sm_30_intrinsics.hpp", "sm_32_intrinsics.hpp",
    "sm_80_rt.hpp", "sm_90_rt.hpp", "device_functions.hpp", "math_functions.hpp",
})  # fmt: skip


def translate(ptx: str, source: str = "PTX", timed: bool = False) -> str:
    """C++ of a PTX module.

    Args:
        ptx: Its text.
        source: Its name, for messages.
        timed: Whether its threads keep clocks (emulator/timeline.h).

    Raises:
        PtxError: Something is not translated.
    """
    return emit(parse(ptx, HELPERS), source, timed)


__all__ = ["HELPERS", "PtxError", "translate"]
