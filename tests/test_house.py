"""The house's rules: what mirrors what, what is documented, what must not be committed."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import pkgutil
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

import less

ROOT = Path(__file__).resolve().parent.parent
# Ops that compute nothing, and tell where something lies.
FACTS = {"page_offsets"}
OPS = sorted({path.stem for path in (ROOT / "csrc" / "ops").glob("*.cpp")} - FACTS)

# Ops that have no CUDA kernel yet.
WITHOUT_CUDA: set[str] = set()


@pytest.mark.parametrize("op", OPS)
def test_every_op_has_its_mirrors(op: str) -> None:
    reference = importlib.import_module("less.reference")
    missing = [
        name
        for name in (f"csrc/cpu/{op}.cpp", f"tests/ops/test_{op}.py")
        if not (ROOT / name).exists()
    ]
    if op not in WITHOUT_CUDA and not (ROOT / f"csrc/cuda/{op}.cu").exists():
        missing.append(f"csrc/cuda/{op}.cu")
    if not callable(getattr(reference, op, None)):
        missing.append(f"less.reference.{op}")
    if op not in bench_cases():
        missing.append(f"a case named {op} in bench/")
    assert not missing, f"the op {op} lacks {', '.join(missing)}"


def bench_cases() -> set[str]:
    """Names of the functions in bench/cases.py: read, not imported, for want of native code."""
    tree = ast.parse(read(ROOT / "bench" / "cases.py"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_no_op_claims_to_lack_a_cuda_kernel_that_it_has() -> None:
    have = {path.stem for path in (ROOT / "csrc" / "cuda").glob("*.cu")}
    assert not WITHOUT_CUDA & have
    assert set(OPS) >= WITHOUT_CUDA


def test_kernels_include_no_torch_header() -> None:
    kernels = [*(ROOT / "csrc" / "cpu").glob("*")]
    kernels += [path for end in ("cu", "h") for path in (ROOT / "csrc" / "cuda").rglob(f"*.{end}")]
    kernels += [ROOT / "csrc" / "params.h", *(ROOT / "csrc" / "common").glob("*")]
    guilty = [
        path.name for path in kernels if re.search(r"#include\s*[<\"](torch|ATen|c10)/", read(path))
    ]
    assert not guilty


# Modules that import vLLM, which is not installed where these tests run.
OF_VLLM = {"less.integrations.vllm.backend", "less.integrations.vllm.scheduler"}


def modules() -> Iterator[ModuleType]:
    yield less
    for info in pkgutil.walk_packages(less.__path__, "less."):
        if info.name in OF_VLLM and importlib.util.find_spec("vllm") is None:
            continue
        if info.name.rpartition(".")[2] not in ("_C", "_cuda", "__main__"):
            yield importlib.import_module(info.name)


def test_every_public_name_is_documented() -> None:
    bare = []
    for module in modules():
        if not module.__doc__:
            bare.append(module.__name__)
        for name, thing in vars(module).items():
            if name.startswith("_") or getattr(thing, "__module__", None) != module.__name__:
                continue
            if not (inspect.isclass(thing) or inspect.isfunction(thing)):
                continue
            where = f"{module.__name__}.{name}"
            if not inspect.getdoc(thing):
                bare.append(where)
            if inspect.isclass(thing):
                bare += [f"{where}.{method}" for method in undocumented_methods(thing)]
    assert not bare


def undocumented_methods(cls: type) -> Iterator[str]:
    for name, thing in vars(cls).items():
        plain = inspect.isfunction(thing) or isinstance(thing, (property, classmethod))
        # getdoc() finds the docstring of the method that is overridden.
        if plain and not name.startswith("_") and not inspect.getdoc(getattr(cls, name)):
            yield name


def test_all_names_in_all_exist() -> None:
    for module in modules():
        for name in getattr(module, "__all__", []):
            assert hasattr(module, name), f"{module.__name__}.__all__ names {name}"


def tracked() -> list[Path]:
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in done.stdout.splitlines() if (ROOT / name).is_file()]


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="ignore") if path.is_file() else ""


def test_nothing_names_a_folder_of_one_machine() -> None:
    pattern = re.compile(r"(?<![\w.$}~])/(?:home|root|Users|work|mnt|scratch)/\w+")
    suffixes = {".py", ".md", ".cpp", ".h", ".cu", ".toml", ".txt", ".json", ".cmake", ""}
    guilty = [
        f"{path.relative_to(ROOT)}: {found[0]}"
        for path in tracked()
        if path.suffix in suffixes and path != Path(__file__)
        for found in pattern.finditer(read(path))
    ]
    assert not guilty


def test_what_is_generated_is_not_tracked() -> None:
    guilty = [path.name for path in tracked() if path.suffix in (".so", ".o", ".pyc", ".whl")]
    assert not guilty
