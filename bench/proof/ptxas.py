"""Reads what ``ptxas -v`` says of each kernel."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass
class Resources:
    """What a kernel takes.

    Args:
        registers: Of a thread.
        shared: Bytes of static shared memory.
        stack: Bytes of a thread's stack, which is local memory.
        spilled: Bytes of registers stored to it, or loaded from it.
    """

    registers: int = 0
    shared: int = 0
    stack: int = 0
    spilled: int = 0


def parse(text: str) -> dict[str, Resources]:
    """Resources by the kernel's mangled name.

    Args:
        text: Standard error of nvcc with -Xptxas -v.
    """
    kernels: dict[str, Resources] = {}
    current = Resources()
    for line in text.split("\n"):
        entry = re.search(r"Compiling entry function '(\S+)'", line)
        if entry:
            current = kernels.setdefault(entry[1], Resources())
        stack = re.search(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line
        )
        if stack:
            current.stack += int(stack[1])
            current.spilled += int(stack[2]) + int(stack[3])
        used = re.search(r"Used (\d+) registers", line)
        if used:
            current.registers = int(used[1])
            shared = re.search(r"(\d+)(?:\+\d+)? bytes smem", line)
            current.shared = int(shared[1]) if shared else 0
    return kernels
