"""Bugs that are planted in a cache: the state machine finds each."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from less import LessKVCache, files
from less.cache.holdings import Holdings
from less.cache.session import Session
from tests import test_files, test_reference
from tests.fuzz.machine import CacheMachine


def counted_first(attend: Callable[..., Any]) -> Callable[..., Any]:
    """Counts a call's columns before it is checked."""

    def wrong(self: LessKVCache, layer: int, q: Any, *args: Any, **kwargs: Any) -> Any:
        self.session.columns[0] += q.shape[2]
        out = attend(self, layer, q, *args, **kwargs)
        self.session.columns[0] -= q.shape[2]
        return out

    return wrong


def all_but_the_last(clear: Callable[..., Any]) -> Callable[..., Any]:
    """Resets every row but the last."""

    def wrong(self: Holdings) -> None:
        kept = [pool[-1].clone() for pool in self.pools if pool is not None]
        clear(self)
        for pool, row in zip((p for p in self.pools if p is not None), kept, strict=True):
            pool[-1] = row

    return wrong


def never(check: Callable[..., Any]) -> Callable[..., None]:
    """Checks nothing."""
    return lambda *args: None


def rows_as_they_were(reorder: Callable[..., Any]) -> Callable[..., Any]:
    """Reorders into the order that was."""
    return lambda self, rows, *scratch: reorder(self, torch.arange(len(rows)), *scratch)


PLANTED = {
    "refusal order": (LessKVCache, "attend", counted_first),
    "row reset": (Holdings, "clear", all_but_the_last),
    "bounds check": (LessKVCache, "_check_layer", never),
    "reorder": (Holdings, "reorder", rows_as_they_were),
    "columns of a reset": (Session, "reset", never),
}


@pytest.mark.parametrize("name", PLANTED)
def test_the_machine_finds_a_planted_bug(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    where, attribute, change = PLANTED[name]
    monkeypatch.setattr(where, attribute, change(getattr(where, attribute)))
    machine = type("Machine", (CacheMachine,), {"BACKEND": "reference"})
    with pytest.raises((AssertionError, IndexError, ValueError, pytest.fail.Exception)):
        run_state_machine_as_test(
            machine,
            settings=settings(
                max_examples=30,
                stateful_step_count=25,
                derandomize=True,
                database=None,
                deadline=None,
                phases=[Phase.generate],
                suppress_health_check=list(HealthCheck),
            ),
        )


def newer_first(survivors: Callable[..., Any]) -> Callable[..., Any]:
    """Of equal ranks the newer leaves."""

    def wrong(position: torch.Tensor, *args: Any) -> torch.Tensor:
        return survivors(torch.where(position >= 0, (1 << 30) - position, -1), *args)

    return wrong


def test_a_tie_that_goes_to_the_newer_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    where = test_reference.reference
    monkeypatch.setattr(where, "survivors", newer_first(where.survivors))
    with pytest.raises(AssertionError):
        test_reference.test_survivors_break_ties_by_age_and_put_nan_last()


def in_place(path: Path, content: Any) -> None:
    """Writes without a file beside it."""
    if callable(content):
        content(path)
    else:
        path.write_bytes(content.encode() if isinstance(content, str) else content)


def test_a_write_in_place_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "write_whole", in_place)
    with pytest.raises(AssertionError):
        test_files.test_a_write_that_fails_leaves_the_old_file_alone(tmp_path)
