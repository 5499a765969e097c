"""Policies by name: where a name in a file or a command finds its class.

``Policy.__init_subclass__`` enters every concrete class. A name that is not here is sought among
the entry points of installed packages, in the group ``less.policies``; each is named as its class.
They are read only then: importing ``less`` imports no other package.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import importlib.util
import inspect
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

GROUP = "less.policies"
_BUILT_IN = "less.policies."  # modules of the classes whose names nobody else may take

_classes: dict[str, type[Any]] = {}


def register(cls: type[Any]) -> None:
    """Enter a policy class by its name, unless it is abstract; of equal names the latest counts.

    Raises:
        ValueError: The name is a built-in policy's.
    """
    if any(
        getattr(inspect.getattr_static(cls, name), "__isabstractmethod__", False)
        for name in dir(cls)
    ):
        return
    held = _classes.get(cls.__name__)
    if held is not None and _is_built_in(held) and not _is_built_in(cls):
        raise ValueError(
            f"Policy: {cls.__name__} is the name of a built-in policy; {cls.__module__}."
            f"{cls.__qualname__} needs another name"
        )
    _classes[cls.__name__] = cls


def find(argument: str, name: object) -> type[Any]:
    """The policy class of a name.

    Args:
        argument: What gave the name, for the message.
        name: As ``Policy.to_dict`` writes it.

    Raises:
        ValueError: No imported module and no entry point has it; or the entry point fails.
    """
    if isinstance(name, str):
        if name not in _classes:
            _load_entry_point(argument, name)
        if name in _classes:
            return _classes[name]
    raise ValueError(
        f"{argument}: name must be one of {sorted(_classes)}, got {name!r}. Import the module that "
        "defines another policy first: in Python, with less-kv --import MODULE_OR_FILE.py, with "
        "imports=MODULE_OR_FILE.py among lm-eval's model arguments, or by a package's entry point "
        f"of that name in the group {GROUP!r}"
    )


def import_policies(argument: str, what: str) -> ModuleType:
    """Import a module or a file that defines policies; a file is run once per process.

    Args:
        argument: What names it, for the message.
        what: A module's dotted name, or the path of a file that ends in ``.py``.

    Raises:
        ValueError: There is none, importing it fails, or it defines no policy.
    """
    before = set(_classes.values())
    is_file = what.endswith(".py") or "/" in what or os.sep in what
    if is_file and not Path(what).is_file():
        raise ValueError(f"{argument} {what}: there is no such file")
    if is_file and not what.endswith(".py"):
        raise ValueError(f"{argument} {what}: a file of policies must end in .py")
    try:
        module = _import_file(Path(what)) if is_file else importlib.import_module(what)
    except (Exception, SystemExit) as error:
        if isinstance(error, ModuleNotFoundError) and not is_file and _is_part(error.name, what):
            raise ValueError(
                f"{argument} {what}: Python's path has no such module; a file is named with its "
                "path and its .py"
            ) from error
        raise ValueError(
            f"{argument} {what}: importing it failed: {type(error).__name__}: {error}"
        ) from error
    if not any(
        cls not in before or cls in _classes_of(module)
        for cls in _classes.values()
        if not _is_built_in(cls)
    ):
        raise ValueError(
            f"{argument} {what}: it defines no policy, which is a subclass of less.Policy with a "
            "capacity and a rank"
        )
    return module


def _is_built_in(cls: type[Any]) -> bool:
    return cls.__module__.startswith(_BUILT_IN)


def _is_part(missing: str | None, what: str) -> bool:
    """Whether the missing module is the wanted one or a package of it, not one that it imports."""
    return missing is not None and f"{what}.".startswith(f"{missing}.")


def _classes_of(module: ModuleType) -> set[type[Any]]:
    """The policy classes that a module or a module below it defines, or that it names."""
    inside = f"{module.__name__}."
    classes = {cls for cls in _classes.values() if f"{cls.__module__}.".startswith(inside)}
    return classes | {thing for thing in vars(module).values() if isinstance(thing, type)}


def _import_file(path: Path) -> ModuleType:
    """Run a file as a module of its own name, which two files of one stem do not share."""
    path = path.resolve()
    digest = hashlib.sha256(os.fsencode(path)).hexdigest()[:8]
    name = f"less_import_{digest}_{path.stem}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _load_entry_point(argument: str, name: str) -> None:
    """Load the entry point that is named as the policy, where there is one.

    Raises:
        ValueError: It fails, it does not define the policy, or several packages have one.
    """
    points = {
        point.value: point for point in importlib.metadata.entry_points(group=GROUP, name=name)
    }
    if len(points) > 1:
        raise ValueError(
            f"{argument}: several entry points of the group {GROUP!r} are named {name!r}: "
            f"{sorted(points)}; import the module of the one that is meant"
        )
    for value, point in points.items():
        where = f"{argument}: the entry point {name} = {value} of the group {GROUP!r}"
        try:
            point.load()
        except Exception as error:
            raise ValueError(f"{where} fails: {type(error).__name__}: {error}") from error
        if name not in _classes:
            raise ValueError(f"{where} defines no policy of this name")
