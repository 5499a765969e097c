"""The rooms of ``less``: what imports what, whose private names are whose, how long a file is."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LONGEST = 450  # lines

Trees = Mapping[str, ast.Module]  # by path, as less/hf/models.py


def trees() -> Trees:
    paths = [*(ROOT / "less").rglob("*.py"), *(ROOT / "bench").rglob("*.py")]
    return {
        path.relative_to(ROOT).as_posix(): ast.parse(path.read_text(encoding="utf-8"))
        for path in paths
    }


def test_a_room_imports_only_what_stands_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from importlinter.cli import EXIT_STATUS_SUCCESS, lint_imports

    monkeypatch.chdir(ROOT)  # it reads pyproject.toml, and prints what is wrong
    assert lint_imports(no_cache=True) == EXIT_STATUS_SUCCESS


def test_no_file_is_too_long() -> None:
    lengths = {
        path.relative_to(ROOT).as_posix(): len(path.read_text(encoding="utf-8").splitlines())
        for path in (ROOT / "less").rglob("*.py")
    }
    assert {path: n for path, n in lengths.items() if n > LONGEST} == {}


# -- private names -----------------------------------------------------------------------------


def private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def room(path: str) -> str:
    """less/hf/models.py -> hf, less/config.py -> config, bench/run.py -> bench."""
    parts = Path(path).with_suffix("").parts
    return parts[1] if parts[0] == "less" else parts[0]


def on_self(node: ast.Attribute) -> bool:
    return isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")


def privates(tree: ast.AST) -> set[str]:
    """Private names that code defines: functions, variables, attributes of ``self``."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and on_self(node):
            names.add(node.attr)
    return {name for name in names if private(name)}


def trespasses(code: Trees) -> Iterator[str]:
    """Uses of a private name that another room defines."""
    rooms: dict[str, set[str]] = {}
    classes: dict[str, tuple[str, ast.ClassDef]] = {}
    for path, tree in code.items():
        rooms.setdefault(room(path), set()).update(privates(tree))
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                classes[node.name] = room(path), node
    for path, tree in code.items():
        here = room(path)
        others = {n for at, names in rooms.items() if at != here for n in names} - rooms[here]
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and not on_self(node) and node.attr in others:
                yield f"{path}:{node.lineno}: {ast.unparse(node)}"
            elif isinstance(node, ast.ImportFrom) and str(node.module).startswith("less."):
                yield from (
                    f"{path}:{node.lineno}: {node.module}.{name.name}"
                    for name in node.names
                    if private(name.name) and room(str(node.module).replace(".", "/")) != here
                )
            elif isinstance(node, ast.ClassDef):
                theirs = inherited(node, here, classes)
                yield from (
                    f"{path}:{node.lineno}: {node.name} uses {name} of its base"
                    for name in sorted(theirs & (privates(node) | used(node)))
                )


def inherited(
    node: ast.ClassDef, here: str, classes: dict[str, tuple[str, ast.ClassDef]]
) -> set[str]:
    """Private names of a class's bases in other rooms."""
    names: set[str] = set()
    for base in node.bases:
        where, found = classes.get(ast.unparse(base).rpartition(".")[2], (here, None))
        if found is not None and found is not node:
            names |= inherited(found, here, classes) | (privates(found) if where != here else set())
    return names


def used(node: ast.ClassDef) -> set[str]:
    return {n.attr for n in ast.walk(node) if isinstance(n, ast.Attribute) and on_self(n)}


def test_no_room_uses_the_private_names_of_another() -> None:
    assert list(trespasses(trees())) == []


CACHE = "class Cache:\n    def __init__(self): self._pools = []\n    def _move(self): pass\n"


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("cache._move()", "cache._move"),
        ("cache._pools = []", "cache._pools"),
        ("from less.cache.cache import _move", "less.cache.cache._move"),
        ("class Other(Cache):\n    def _move(self): pass", "Other uses _move"),
        ("class Other(less.Cache):\n    def go(self): return self._pools", "Other uses _pools"),
        ("class Own:\n    def _move(self): pass\nOwn()._move()", None),
        ("config._attn_implementation", None),
    ],
)
def test_private_names_of_another_room_are_found(code: str, found: str | None) -> None:
    sources = {"less/cache/cache.py": CACHE, "less/hf/some.py": code}
    guilty = list(trespasses({path: ast.parse(text) for path, text in sources.items()}))
    if found is None:
        assert guilty == []
    else:
        assert len(guilty) == 1
        assert guilty[0].startswith("less/hf/some.py:")
        assert found in guilty[0]
