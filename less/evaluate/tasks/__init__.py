"""What ``less-kv report`` measures: one module per kind of task, found by being in this folder.

A module lists its tasks in ``TASKS``; or, where they follow from what a user names, has a function
``tasks(given)``. Adding a task touches one file. ``base`` says what a task is.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Sequence

from less.evaluate.tasks.base import Given, Task


def all_tasks(given: Given) -> list[Task]:
    """Every task, in order of worth.

    Args:
        given: What the user named.
    """
    found: list[Task] = []
    for info in pkgutil.iter_modules(__path__):
        module = importlib.import_module(f"{__name__}.{info.name}")
        found += getattr(module, "TASKS", ())
        if hasattr(module, "tasks"):
            found += module.tasks(given)
    return sorted(found, key=lambda task: task.worth)


def chosen(tasks: Sequence[Task], names: Sequence[str]) -> list[Task]:
    """The tasks of these names; ``perplexity`` names all of ``perplexity:...``.

    Raises:
        ValueError: There is none of a name.
    """
    out: list[Task] = []
    for name in names:
        mine = [t for t in tasks if name in (t.name, t.name.partition(":")[0])]
        if not mine:
            known = ", ".join(task.name for task in tasks)
            raise ValueError(f"--tasks must be among {known}, got {name!r}")
        out += [task for task in mine if task not in out]
    return out
