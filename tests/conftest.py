"""What every test shares: SIMD levels, devices, thread counts, loud skips where CUDA is missing."""

from __future__ import annotations

import os
import sys
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch

from less.backend import ops as less_ops
from less.policies import registry
from tests import emulated

BUILT_IN = ("Full", "H2O", "SinkRecent")
#: Of each test's cases on the emulator, as many run beside all other tests; with --emulated all do.
EMULATED_CASES = 8


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--emulator-tier",
        choices=emulated.TIERS,
        default=os.environ.get("LESS_EMULATOR_TIER", "fast"),
        help="where tests of CUDA kernels run without a GPU (LESS_EMULATOR_TIER; default fast)",
    )
    parser.addoption("--emulated", action="store_true", help="run what the emulator runs alone")
    parser.addoption(
        "--sample",
        type=int,
        metavar="N",
        help="of each test's cases at most N, drawn alike in every run",
    )
    parser.addoption("--proof", action="store_true", help="run the tests marked proof too")


def pytest_configure(config: pytest.Config) -> None:
    # Processes side by side share the cores; two that each take all of them wait for each other.
    workers = getattr(config, "workerinput", {}).get("workercount", 1)
    torch.set_num_threads(max(1, torch.get_num_threads() // workers))


@pytest.fixture
def fresh_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only built-in policies have names, and no later test knows those that this one adds."""
    known = {name: cls for name, cls in registry._classes.items() if name in BUILT_IN}
    monkeypatch.setattr(registry, "_classes", known)


def params_of(item: pytest.Item) -> dict[str, object]:
    call = getattr(item, "callspec", None)
    return dict(call.params) if call is not None else {}


def on_emulator(item: pytest.Item) -> bool:
    """Whether a test runs on the emulated GPU."""
    if "emulator" in getattr(item, "fixturenames", ()):
        return True
    params = params_of(item)
    return "emulated" in (params.get("launched"), params.get("device"), params.get("backend"))


def built(item: pytest.Item) -> bool:
    """Whether the emulator, or a GPU, has the kernels that a test asks of it.

    Those are of the head dims D of LESS_CUDA_HEAD_DIMS, and of every kind of maps but centroids.
    """
    dims = os.environ.get("LESS_CUDA_HEAD_DIMS", "").replace(",", " ").split()
    params = params_of(item)
    where = (params.get("launched"), params.get("device"), params.get("backend"))
    launched = on_emulator(item) or "cuda" in where
    if launched and params.get("kind") == "centroid":  # refused: no CUDA kernel has such maps yet
        return False
    return not dims or not launched or str(params.get("D", dims[0])) in dims


def sample(items: list[pytest.Item], n: int) -> list[pytest.Item]:
    """At most n cases of each test: the same in every run, and in step with no parameter."""
    cases: dict[str, list[pytest.Item]] = {}
    for item in items:
        cases.setdefault(item.nodeid.partition("[")[0], []).append(item)
    kept = {
        item
        for of_one in cases.values()
        for item in sorted(of_one, key=lambda item: zlib.crc32(item.nodeid.encode()))[:n]
    }
    return [item for item in items if item in kept]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Says how much of what is counted there was: steps, damaged files, wrong calls."""
    counts: Counter[str] = Counter()
    for report in terminalreporter.getreports("passed"):
        counts.update({n: x for n, x in report.user_properties if isinstance(x, int)})
    for name, count in counts.items():
        terminalreporter.write_line(f"{count:,} {name}")


@pytest.hookimpl(trylast=True)  # of what -k and -m leave
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    def wanted(item: pytest.Item) -> bool:
        if item.get_closest_marker("proof") and not config.getoption("--proof"):
            return False
        return built(item) and (on_emulator(item) or not config.getoption("--emulated"))

    kept = [item for item in items if wanted(item)]
    if config.getoption("--sample"):
        kept = sample(kept, config.getoption("--sample"))
    elif not config.getoption("--emulated"):
        emulated_items = [item for item in kept if on_emulator(item)]
        left_out = set(emulated_items) - set(sample(emulated_items, EMULATED_CASES))
        kept = [item for item in kept if item not in left_out]
    staying = set(kept)
    config.hook.pytest_deselected(items=[item for item in items if item not in staying])
    items[:] = kept


def simd_levels() -> list[str]:
    """The SIMD levels that this build has and this machine can run; none without native code."""
    try:
        from less import _C
    except ImportError:
        return []
    return list(_C.build_facts()["simd_supported"])


@pytest.fixture(params=simd_levels())
def simd(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test once in each SIMD level."""
    from less import _C

    before = _C.build_facts()["simd"]
    _C._test.set_simd(request.param)
    yield request.param
    _C._test.set_simd(before)


@pytest.fixture
def with_threads() -> Iterator[object]:
    """A function that sets torch's thread count; it is put back afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def end_if_lost(test: str) -> None:
    """Ends the process if its GPU answers no more, as after an illegal address.

    All that came after would fail too. Of pytest-xdist's processes another takes its place.
    """
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        message = f"{test} left a GPU that answers no more: {error}"
        if "PYTEST_XDIST_WORKER" not in os.environ:
            pytest.exit(message, returncode=1)
        print(message, file=sys.__stderr__, flush=True)
        os._exit(1)


@pytest.fixture
def cuda(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """A CUDA device. Skips where there is none, fails where LESS_REQUIRE_CUDA=1 promised one."""
    if torch.cuda.is_available():
        yield torch.device("cuda")
        end_if_lost(request.node.nodeid)
        return
    if os.environ.get("LESS_REQUIRE_CUDA") == "1":
        pytest.fail("LESS_REQUIRE_CUDA=1, but torch.cuda.is_available() is false")
    pytest.skip("NO GPU: this test of CUDA kernels did not run")


@pytest.fixture
def emulator(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> emulated.Emulator:
    """CUDA kernels on the CPU: within the test, the ops of less are those of the emulator."""
    if not emulated.supported():
        pytest.skip("NO EMULATOR: it wants Linux on x86-64")
    tier = request.config.getoption("--emulator-tier")
    if any(
        library not in os.environ.get("LD_PRELOAD", "")
        for library in emulated.preload(tier).split()
    ):
        pytest.fail(f"--emulator-tier={tier} wants LD_PRELOAD={emulated.preload(tier)!r}")
    if tier == "ptx_80":
        monkeypatch.setenv("LESS_EMULATOR_ARCHITECTURE", "80")
    loaded = emulated.load(tier)
    monkeypatch.setattr(torch.ops, "less", torch.ops.less_emulated)
    gpu = less_ops.slot_dtypes(torch.device("cuda"))
    monkeypatch.setattr(less_ops, "slot_dtypes", lambda device: gpu)
    return loaded


@pytest.fixture
def counting(emulator: emulated.Emulator) -> Iterator[emulated.Emulator]:
    """An emulator that counts; its profile is that of the last launch."""
    if emulator.tier != "track":
        pytest.skip(f"NOT COUNTED: --emulator-tier={emulator.tier}, wants track")
    emulator.set(profile=1)
    yield emulator
    emulator.set(profile=0)


def launched_on(where: str, request: pytest.FixtureRequest) -> torch.device:
    if where == "cuda":
        device: torch.device = request.getfixturevalue("cuda")
        return device
    request.getfixturevalue("emulator")
    return torch.device("cpu")


@pytest.fixture(params=["emulated", "cuda"])
def launched(request: pytest.FixtureRequest) -> torch.device:
    """Runs the test on the emulated GPU, and on a GPU if there is one: where kernels are launched.

    A kernel's parity test takes this or ``device``, puts its tensors on it and calls ``less.ops``.
    The emulated GPU's tensors lie on the CPU.
    """
    return launched_on(request.param, request)


@dataclass(frozen=True)
class Computing:
    """Who computes a test's layers, and where: a backend's name, a device."""

    backend: str
    device: torch.device


@pytest.fixture(params=["reference", "native", "emulated", "cuda"])
def backend(request: pytest.FixtureRequest) -> Computing:
    """Runs the test once per backend: plain torch, CPU kernels, emulated and real GPU kernels."""
    if request.param in ("reference", "native"):
        if request.param == "native":
            pytest.importorskip("less._C")
        return Computing(request.param, torch.device("cpu"))
    return Computing("native", launched_on(request.param, request))


@pytest.fixture(params=[*(f"cpu-{level}" for level in simd_levels()), "emulated", "cuda"])
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """Runs the test once per device: in each SIMD level, and where ``launched`` runs it."""
    if request.param in ("emulated", "cuda"):
        yield launched_on(request.param, request)
        return
    from less import _C

    before = _C.build_facts()["simd"]
    _C._test.set_simd(request.param.removeprefix("cpu-"))
    yield torch.device("cpu")
    _C._test.set_simd(before)
