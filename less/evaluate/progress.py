"""Progress with the time left: a bar on a terminal, a line now and then in a log."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

_LINE_EVERY = 15.0  # seconds, in a log
_FIRST_LINE = 5.0  # seconds from the start


@contextlib.contextmanager
def progress(console: Console, label: str) -> Iterator[Callable[[float, float], None]]:
    """Show the progress of one task; yields ``update(done, total)``."""
    start = time.monotonic()
    if console.is_terminal:
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed:g}/{task.total:g}"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=console, transient=True) as bar:
            task = bar.add_task(label, total=None)
            yield lambda done, total: bar.update(task, completed=done, total=total)
    else:
        last = start + _FIRST_LINE - _LINE_EVERY

        def line(done: float, total: float) -> None:
            nonlocal last
            now = time.monotonic()
            if now - last >= _LINE_EVERY and 0 < done < total:
                last = now
                left = (now - start) * (total - done) / done
                console.print(f"  {label}: {done}/{total}, about {left:.0f} s left")

        yield line
    console.print(f"  {label}: done in {time.monotonic() - start:.0f} s")
