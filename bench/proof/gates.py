"""What every kernel must show in its machine code, and the exceptions, each with its reason."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from .ptxas import Resources
from .sass import Instruction, Kernel, Line, global_bytes, is_generic, is_local


@dataclass(frozen=True)
class Narrow:
    """An access of less than 16 bytes that may stand in a loop.

    Args:
        kernel: Pattern of the kernel's demangled name.
        source: Pattern of a line of source that the access comes from.
        reason: Why it is as it is.
    """

    kernel: str
    source: str
    reason: str


_FEATURE = "compact_|feature_|decode_"  # what evaluates feature maps
EXCEPTIONS: tuple[Narrow, ...] = (
    Narrow(
        r"^(fold|quantize)_kernel<.*, 1>$",
        r"",
        "the instance for rows that are no whole number of 16 bytes: element by element",
    ),
    Narrow(
        r"^fold_kernel",
        r"keep\[n\]|psi\[n \* p\.R \+ r\]|z\[r\]|store\(z \+ r",
        "one number of a token or a feature, the same for all lanes",
    ),
    Narrow(
        r"^quantize_kernel",
        r"store8\(out|store\(reinterpret_cast<uint32_t\*>\(out\)",
        "16 bytes that were read become 4 or 8",
    ),
    Narrow(
        r"^compact_(select|insert)_kernel",
        r"valid\[t\]|position\[|rank\[|score\[|key\[|store\((c\.key|list|free|take|position) \+"
        r"|= free\[place\]",
        "one number of a token; a lane has a token, lanes lie side by side",
    ),
    Narrow(
        r"^compact_(fold|add)_kernel",
        r"list\[first|\*scale : 0|psi\[token \* R \+ r\]|part\[strip",
        "one number of a token, or R of its features, R any number; lanes lie side by side",
    ),
    Narrow(
        _FEATURE,
        r"from\[row \* from_row \+ c\]|\[i\] = from\[i\]",
        "weights whose rows are no whole number of 16 bytes: element by element",
    ),
    Narrow(
        _FEATURE,
        r"w[12]_scale\[|m\.(bias|scale|mix_scale)\[|A\[q \* m\.R\]",
        "one number of a hidden column or a feature; lanes lie side by side",
    ),
    Narrow(
        _FEATURE,
        r"store\(out \+ output\[row\] \* R \+ r",
        "the features: R of a token, R any number; lanes lie side by side",
    ),
    Narrow(
        r"^decode_step_kernel",
        r"load8\(static_cast<const uint16_t\*>\(x\)|store8\(static_cast<uint16_t\*>\(x\)",
        "q, k, v and out of the one token: four 16-bit elements a lane, once a step",
    ),
    Narrow(
        r"^decode_step_kernel",
        r"of(_head)?\.(position|score|weight|k_scale|v_scale)\[|masses\[|z\[r\]|plan\.parts\[",
        "one number of a slot, a part or a feature; lanes lie side by side",
    ),
    Narrow(
        r"^decode_step_kernel",
        r"widened\((keys|values)\[",
        "the one row that leaves, a lane an element, once a step",
    ),
    Narrow(
        r"^decode_step_kernel",
        r"global\[i\]",
        "weights whose rows are no whole number of 16 bytes: byte by byte",
    ),
    Narrow(
        r"^(attend|column|list_keys)_kernel",
        r"position\[s\]|valid\[t\]|store\(list \+|index\[n\]|token\[b|weight\[at\]"
        r"|_scale\[at\]|lse\[|z\[first \+ r\]|phi_q\[|store\(to \+ head_\.query_at"
        r"|load8\(part_rest\(split\)",
        "one number of a token, a row or a feature, or two; lanes lie side by side",
    ),
    Narrow(
        r"^(attend|column)_kernel",
        r"static_cast<const uint32_t\*>\(x\)\[\(from \+ d\) / 4\]|load_four\(x, dtype, from",
        "float32 queries over narrower keys and values, which become sums of parts on the way to "
        "shared memory: four elements a lane, 16 bytes where they are float32",
    ),
)


def judge(
    kernel: Kernel,
    resources: Resources,
    demangled: str,
    source_of: Callable[[Line], str],
    exceptions: tuple[Narrow, ...] = EXCEPTIONS,
    used: set[Narrow] | None = None,
) -> list[str]:
    """What is wrong with a kernel; nothing where it passes.

    Args:
        kernel: Its code.
        resources: What ptxas says it takes.
        demangled: Its name.
        source_of: The text of a line of source.
        exceptions: Accesses that are excused.
        used: Gets the exceptions that excused something.
    """
    wrong = []
    if resources.spilled:
        wrong.append(f"spills {resources.spilled} bytes")
    if resources.stack:
        wrong.append(f"has a stack of {resources.stack} bytes")
    for what, test in (("local memory", is_local), ("generic addresses", is_generic)):
        found = [one for one in kernel.code if test(one)]
        if found:
            wrong.append(f"{len(found)} accesses by {what}, first {where(found[0])}")
    narrow: Counter[str] = Counter()
    for one in kernel.code:
        width = global_bytes(one)
        if width is None or width >= 16 or kernel.main_loop(one) is None:
            continue
        excuse = excused(one, demangled, source_of, exceptions)
        if excuse is None:
            narrow[f"{width}-byte {one.opcode} in a loop, {where(one)}"] += 1
        elif used is not None:
            used.add(excuse)
    return wrong + [f"{times} x {what}" for what, times in sorted(narrow.items())]


def excused(
    instruction: Instruction,
    demangled: str,
    source_of: Callable[[Line], str],
    exceptions: tuple[Narrow, ...],
) -> Narrow | None:
    """The exception that allows an access, by the lines of source that it comes from."""
    for exception in exceptions:
        if re.search(exception.kernel, demangled) and any(
            re.search(exception.source, source_of(line)) for line in instruction.lines
        ):
            return exception
    return None


def where(instruction: Instruction) -> str:
    """The lines of the project that an instruction comes from: innermost first."""
    own = [line for line in instruction.lines if "/csrc/" in line[0]]
    shown = [
        f"{file.partition('/csrc/cuda/')[2] or Path(file).name}:{number}"
        for file, number in own or instruction.lines
    ]
    return " < ".join(shown[:4]) or f"at {instruction.address:#x}"
