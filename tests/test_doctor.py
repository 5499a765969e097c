"""``less-kv doctor`` and the self-test of native kernels."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

from less.backend import ops
from less.backend.native import NativeBackend
from less.cli import doctor, main
from less.evaluate import selftest

pytest.importorskip("less._C")

CPU = torch.device("cpu")


def test_self_test_runs_every_op(monkeypatch):
    called = set()
    registered = [
        name.removeprefix("less::")
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("less::")
    ]
    for name in registered:
        op = getattr(torch.ops.less, name)
        monkeypatch.setattr(
            torch.ops.less, name, lambda *a, name=name, op=op: called.add(name) or op(*a)
        )
    some = [
        selftest.Case("k4v4", "merge"),
        selftest.Case(torch.int8, "forget"),
        selftest.Case(torch.float16, "fold", "exp"),
    ]
    assert set(some) < set(selftest.cases(CPU))
    monkeypatch.setattr(selftest, "cases", lambda device: some)
    assert set(dict(selftest.run(CPU)).values()) == {None}
    # Those that compute have a Python name here; the rest answers questions about layouts.
    assert called >= {name for name in registered if hasattr(ops, name)} - {"decode_step_workspace"}


@pytest.mark.parametrize("victim", ["forget", "merge", "fold"])
def test_self_test_finds_a_kernel_that_is_wrong(monkeypatch, victim):
    right = NativeBackend.decode_step
    monkeypatch.setattr(NativeBackend, "decode_step", lambda *args: right(*args).mul_(1.01))
    case = selftest.Case(torch.float16, victim, "exp" if victim == "fold" else None)
    assert "call 2, of 1 tokens, is" in selftest.failure(case, CPU)


def test_self_test_finds_other_tokens_kept(monkeypatch):
    right = NativeBackend.compact

    def other(self, new, valid, step, at, plan, rank):
        step.score.neg_()
        right(self, new, valid, step, at, plan, rank)

    monkeypatch.setattr(NativeBackend, "compact", other)
    monkeypatch.setattr(selftest, "CALLS", (40,))
    case = selftest.Case(torch.float16, "forget")
    assert selftest.failure(case, CPU) == "other tokens were kept than by the reference"


def test_doctor_tells_facts_self_test_and_speed(capsys):
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["native code"]["simd"] in found["native code"]["simd_supported"]
    number = len(list(selftest.cases(CPU))) + 2
    assert found["self-test"]["cpu"].startswith(f"{number} of {number} cases agree")
    assert {"threads", "read rate", "decode step", "huge pages"} == set(found["speed"])
    assert not any(finding["wrong"] for finding in found["findings"])


def test_doctor_quick_measures_nothing(capsys, monkeypatch):
    for name in ("_self_test", "_speed"):
        monkeypatch.setattr(doctor, name, lambda: pytest.fail("measured"))
    assert main(["doctor", "--quick"]) == 0
    out = capsys.readouterr().out
    assert "packages" in out
    assert "self-test" not in out


def test_doctor_fails_where_a_kernel_is_wrong(capsys, monkeypatch):
    monkeypatch.setattr(selftest, "run", lambda device: [("k4v4 merge", "call 2 is far")])
    monkeypatch.setattr(doctor, "_speed", lambda: ({}, []))
    assert main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "0 of 1 cases agree" in out
    assert "wrong: a kernel of cpu is wrong here: k4v4 merge: call 2 is far" in out


def test_doctor_names_missing_kernels_a_gpu_that_torch_cannot_use_and_simd_that_is_off(monkeypatch):
    monkeypatch.setattr(ops, "missing", lambda device: "the native kernels were not built")
    (native,) = doctor._of_native()
    assert native.wrong
    assert "install a C++ compiler" in native.change
    monkeypatch.undo()

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: f"/usr/bin/{name}")
    (gpu,) = doctor._of_cuda()
    assert gpu.wrong
    assert "finds none" in gpu.what

    facts = {"simd": "avx2", "simd_supported": ["portable", "avx2", "avx512"]}
    library = SimpleNamespace(build_facts=lambda: facts)
    monkeypatch.setattr(doctor.importlib, "import_module", lambda name: library)
    (simd,) = doctor._of_native()
    assert (simd.wrong, simd.change) == (False, "unset LESS_SIMD")


def test_doctor_compares_versions_with_what_the_package_wants(monkeypatch):
    wanted = ["torch>=99", "transformers>=99; extra == 'hf'", "numpy", "nowhere-package>=2"]
    monkeypatch.setattr(doctor.metadata, "requires", lambda name: wanted)
    torch_found, transformers_found = doctor._of_packages()
    assert torch_found.wrong
    assert torch_found.change == "pip install 'torch>=99'"
    assert not transformers_found.wrong


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({"cpu.max": "150000 100000\n"}, 1.5),
        ({"cpu.max": "max 100000\n"}, None),
        ({"cpu.cfs_quota_us": "400000\n", "cpu.cfs_period_us": "100000\n"}, 4.0),
        ({"cpu.cfs_quota_us": "-1\n", "cpu.cfs_period_us": "100000\n"}, None),
        ({}, None),
    ],
)
def test_doctor_reads_the_quota_of_both_versions_of_control_groups(
    tmp_path, monkeypatch, files, cores
):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    places = tmp_path / "cpu.max", tmp_path / "cpu.cfs_quota_us"
    monkeypatch.setattr(doctor, "_QUOTA", places)
    assert doctor._quota() == cores
