"""``less-kv doctor``: what this installation can do on this machine, and what to change."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import shutil
import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

Facts = dict[str, Any]

#: What a package is for, and the extra of this one that installs it.
_OPTIONAL = {
    "transformers": ("models", "hf"),
    "accelerate": ("models", "hf"),
    "gguf": ("the demo's model", "demo"),
    "matplotlib": ("plots of the demo", "demo"),
    "rich": ("chat and progress", "demo"),
    "plotly": ("pages of reports", "report"),
    "rouge-score": ("summaries in reports", "report"),
    "datasets": ("texts of the hub", "report"),
    "lm_eval": ("less-kv lm-eval", "eval"),
    "vllm": ("serving", "vllm"),
}
_THP = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_QUOTA = (Path("/sys/fs/cgroup/cpu.max"), Path("/sys/fs/cgroup/cpu/cpu.cfs_quota_us"))
# The step that is timed: a layer of a model of 8 B parameters, more of them than caches hold.
_LAYERS, _BATCH, _K, _Q, _D, _TOKENS = 4, 16, 8, 32, 128, 256
_READ_BYTES, _TURNS = 256 << 20, 5


@dataclass(frozen=True)
class Finding:
    """Something to change.

    Attributes:
        wrong: True: results or commands suffer; False: only speed or memory does.
        what: What was found.
        change: What to do about it.
    """

    wrong: bool
    what: str
    change: str


def add_parser(subparsers: Any) -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser(
        "doctor",
        help="what this installation can do here, and what to change",
        description="Versions, SIMD level, CUDA, packages; a self-test of every native kernel "
        "against the reference; threads, huge pages, read rate and a decode step, measured; and "
        "what to change. Seconds. Exit status 1 where something is wrong.",
    )
    parser.add_argument("--json", action="store_true", help="as one JSON object")
    parser.add_argument(
        "--quick", action="store_true", help="facts alone: no self-test, no measurement"
    )


def run(args: argparse.Namespace) -> int:
    """Examine and print; 1 where something is wrong."""
    import json

    groups, findings = examine(measure=not args.quick)
    if args.json:
        print(json.dumps({**groups, "findings": [asdict(f) for f in findings]}, indent=2))
    else:
        show(groups)
        print("\nwhat to change" if findings else "\nnothing to change")
        for f in findings:
            print(f"  {'wrong' if f.wrong else 'could be better'}: {f.what}\n    {f.change}")
    return int(any(f.wrong for f in findings))


def show(groups: dict[str, Facts]) -> None:
    """Print facts, by group."""
    for group, facts in groups.items():
        print(group)
        for name, value in facts.items():
            text = ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else value
            print(f"  {name:<16} {'none' if text in (None, '') else text}")


def examine(measure: bool = True) -> tuple[dict[str, Facts], list[Finding]]:
    """All facts by group, and what to change.

    Args:
        measure: Run the self-test and measure too.
    """
    from less.evaluate.machine import version_of

    groups, findings = gather(), [*_of_native(), *_of_cuda(), *_of_packages()]
    groups["packages"] = {
        name: version_of(name) or f"none ({purpose}: pip install 'less-kv[{extra}]')"
        for name, (purpose, extra) in _OPTIONAL.items()
    }
    if measure:
        for name, part in (("self-test", _self_test), ("speed", _speed)):
            groups[name], found = part()
            findings += found
    return groups, findings


def gather() -> dict[str, Facts]:
    """What was built, what it runs on, and what is shipped; nothing is measured."""
    import torch

    from less.backend import ops
    from less.calibration import Calibration
    from less.evaluate.machine import machine
    from less.files import shipped_calibrations
    from less.sidekick import Sidekick, shipped, shipped_names

    missing = ops.missing(torch.device("cpu"))
    native: Facts = {"backend": "native" if missing is None else f"reference: {missing}"}
    try:
        native |= importlib.import_module("less._C").build_facts()
    except ImportError as error:
        native["less._C"] = f"not built ({error})"
    sidekicks = {}
    for name in shipped_names():
        sidekick = Sidekick.from_pretrained(shipped(name))
        sidekicks[name] = (
            f"{sidekick.kind} maps, rank {sidekick.rank}, hidden {sidekick.hidden}, "
            f"{sidekick.layers} layers, {str(sidekick.dtype).removeprefix('torch.')}, "
            f"{sidekick.nbytes / 2**20:.1f} MiB"
        )
    calibrations = {}
    for name in shipped_calibrations():
        calibration = Calibration.from_pretrained(name)
        curves = f", curves at {len(calibration.capacities)} capacities" * bool(calibration.length)
        calibrations[name] = (
            f"{len(calibration)} layers, {calibration.config['tokens']:,} tokens{curves}"
        )
    return {
        "machine": machine(),
        "native code": native,
        "sidekicks": sidekicks or {"shipped": ""},
        "calibrations": calibrations or {"shipped": ""},
    }


# -- what to change --------------------------------------------------------------------------------


def _of_native() -> Iterator[Finding]:
    import torch

    from less.backend import ops

    missing = ops.missing(torch.device("cpu"))
    if missing is not None:
        yield Finding(
            True,
            f"{missing}: every step runs in plain torch, many times slower",
            "install a C++ compiler and install less-kv again without LESS_NATIVE=off",
        )
        return
    facts = importlib.import_module("less._C").build_facts()
    best = facts["simd_supported"][-1]
    if facts["simd"] != best:
        yield Finding(
            False,
            f"LESS_SIMD={facts['simd']} is set, and this machine has {best}",
            "unset LESS_SIMD",
        )
    if best == "portable":
        yield Finding(
            False,
            f"the kernels run without SIMD instructions ({best})",
            "this processor has none that less has kernels for: AVX2, AVX-512 or NEON",
        )


def _of_cuda() -> Iterator[Finding]:
    import torch

    from less.backend import ops

    if torch.cuda.is_available():
        missing = ops.missing(torch.device("cuda"))
        if missing is not None:
            yield Finding(True, missing, "until then CUDA tensors run on the slow reference")
    elif shutil.which("nvidia-smi") or Path("/dev/nvidia0").exists():
        yield Finding(
            True,
            f"there is a GPU, and torch {torch.__version__} finds none",
            "install a torch that was built for CUDA and a driver that it supports",
        )


def _of_packages() -> Iterator[Finding]:
    try:
        from packaging.requirements import Requirement
    except ImportError:
        yield Finding(False, "versions of packages were not compared", "pip install packaging")
        return
    from less.evaluate.machine import version_of

    try:
        wanted = metadata.requires("less-kv") or []
    except metadata.PackageNotFoundError:
        return  # a source tree that is on the path
    for line in wanted:
        requirement = Requirement(line)
        have = version_of(requirement.name)
        if have is not None and not requirement.specifier.contains(have, prereleases=True):
            yield Finding(
                requirement.marker is None,
                f"{requirement.name} {have} is installed, and less wants {requirement.specifier}",
                f"pip install '{requirement.name}{requirement.specifier}'",
            )


def _self_test() -> tuple[Facts, list[Finding]]:
    """The native kernels of each device against the reference."""
    import torch

    from less.backend import ops
    from less.evaluate import selftest

    facts: Facts = {}
    findings: list[Finding] = []
    for name in ("cpu", *(["cuda"] if torch.cuda.is_available() else [])):
        device = torch.device(name)
        missing = ops.missing(device)
        if missing is not None:
            facts[name] = f"none: {missing}"
            continue
        with _one_thread():
            start, cases = time.perf_counter(), list(selftest.run(device))
        failed = [(case, wrong) for case, wrong in cases if wrong is not None]
        facts[name] = (
            f"{len(cases) - len(failed)} of {len(cases)} cases agree with the reference, "
            f"{time.perf_counter() - start:.1f} s"
        )
        findings += [
            Finding(
                True,
                f"a kernel of {name} is wrong here: {case}: {wrong}",
                "use backend='reference', and report this line with `less-kv doctor --json`",
            )
            for case, wrong in failed
        ]
    return facts, findings


def _speed() -> tuple[Facts, list[Finding]]:
    """Threads, huge pages, read rate and a decode step, on the CPU."""
    import torch

    from less.cli.threads import choose

    before = torch.get_num_threads()
    with _one_thread():
        rate = _read_rate()
        step, moved, huge = _decode_step()
        chosen = choose(before)
    facts: Facts = {
        "threads": f"{chosen.threads}: {chosen.why}",
        "read rate": f"{rate / 1e9:.1f} GB/s, one thread",
        "decode step": (
            f"{step * 1e3:.2f} ms a layer of {_BATCH} sequences, {_K} kv heads, D = {_D}, "
            f"{_TOKENS} tokens of k4v4: {moved / step / 1e9:.1f} GB/s, one thread"
        ),
        "huge pages": "not said by this system" if huge is None else f"{huge:.0%} of a pool",
    }
    findings = []
    if chosen.threads < before:
        findings.append(
            Finding(
                False,
                f"torch computes with {before} threads, and {chosen.threads} are as fast",
                f"set OMP_NUM_THREADS={chosen.threads} (commands of less-kv measure this "
                "themselves)",
            )
        )
    if huge == 0:
        setting = _THP.read_text().strip() if _THP.exists() else "unknown"
        findings.append(
            Finding(
                False,
                f"pools get no huge pages (transparent_hugepage: {setting})",
                f"as root: echo madvise > {_THP}",
            )
        )
    quota = _quota()
    if quota is not None and quota < before:
        findings.append(
            Finding(
                False,
                f"this container may use {quota:.1f} cores, and torch computes with {before} "
                "threads",
                f"set OMP_NUM_THREADS={max(1, int(quota))}",
            )
        )
    return facts, findings


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Small work in several threads waits for cores that other programs have."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _quota() -> float | None:
    """Cores that the control group gives this process; None: no limit, or none that is known."""
    try:
        if _QUOTA[0].exists():
            most, period = _QUOTA[0].read_text().split()
        else:
            most = _QUOTA[1].read_text().strip()
            period = (_QUOTA[1].parent / "cpu.cfs_period_us").read_text().strip()
        return float(most) / float(period) if float(most) > 0 else None
    except (OSError, ValueError):  # "max" is no number
        return None


def _read_rate() -> float:
    """Bytes a second that one thread reads from memory, at best."""
    import torch

    memory = torch.ones(_READ_BYTES // 4)
    turns = []
    for _ in range(_TURNS):
        start = time.perf_counter()
        memory.sum()
        turns.append(time.perf_counter() - start)
    return memory.nbytes / min(turns)


def _decode_step() -> tuple[float, int, float | None]:
    """Median seconds of a layer's step, its pages' bytes, and their share in huge pages."""
    import torch

    from less.cache import PagedLayer
    from less.evaluate.machine import said_bytes
    from less.layer import PageLayout, allocate
    from less.policies import H2O

    layout = PageLayout(_K, _D, _TOKENS, "k4v4", sinks=4, hot=16)
    policy = H2O(heavy=_TOKENS * 3 // 4, recent=_TOKENS // 4, decay=0.98)
    layer = PagedLayer(policy, layout, _Q)
    where = "/proc/self/smaps_rollup", "AnonHugePages"
    before = said_bytes(*where)
    pools = allocate([layout] * _LAYERS, _BATCH)
    after = said_bytes(*where)
    g = torch.Generator().manual_seed(0)

    def call(tokens: int) -> float:
        q, k, v = (torch.randn(_BATCH, h, tokens, _D, generator=g) for h in (_Q, _K, _K))
        start = time.perf_counter()
        for pool in pools:
            layer.attend(pool, q, k, v)
        return (time.perf_counter() - start) / len(pools)

    call(_TOKENS)
    seconds = statistics.median(call(1) for _ in range(4 * _TURNS))
    total = layout.nbytes * _BATCH * _LAYERS
    huge = None if before is None or after is None else min(1.0, max(0, after - before) / total)
    return seconds, layout.nbytes * _BATCH, huge
