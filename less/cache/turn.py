"""Whose turn it is: one call of a cache at a time, and none after one that stopped half way."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Turn:
    """Refuses a call while another is under way, and after one that left a cache half changed.

    A call takes the turn before it changes anything and gives it back at its end. It counts as
    stopped half way until it says that it did not: so whatever ends it, an exception in C++ or
    an interrupt between two lines, is found by the next call.
    """

    def __init__(self) -> None:
        # One object to take: ``pop`` and ``append`` of a list are atomic in every Python.
        self._free = [True]
        self._stopped = ""

    def __deepcopy__(self, memo: dict[int, Any]) -> Turn:
        """Of a copy nothing is under way; half a cache stays one."""
        other = Turn()
        other._stopped = self._stopped
        return other

    def take(self, op: str, mends: bool = False) -> None:
        """Begin a call.

        Args:
            op: Its name.
            mends: Whether the cache is whole after it, whatever it was before.

        Raises:
            RuntimeError: Another call is under way, or an earlier one stopped half way.
        """
        try:
            self._free.pop()
        except IndexError:
            raise RuntimeError(
                f"{op}: another thread is in a call of this cache; its calls must come one after "
                "the other. Give each thread a cache of its own, or share a lock"
            ) from None
        if self._stopped and not mends:
            self._free.append(True)
            raise RuntimeError(
                f"{op}: an earlier call, {self._stopped}, stopped half way, and the cache is no "
                "longer whole. Call cache.reset(), or load_state_dict a snapshot"
            )
        self._stopped = op

    def give(self, whole: bool) -> None:
        """End a call.

        Args:
            whole: Whether it did all or nothing.
        """
        if whole:
            self._stopped = ""
        self._free.append(True)

    @contextmanager
    def taken(self, op: str, mends: bool = False, reads: bool = False) -> Iterator[None]:
        """A call, whole at its end or, where it only ``reads``, always; the rest as in ``take``."""
        self.take(op, mends)
        whole = reads
        try:
            yield
            whole = True
        finally:
            self.give(whole)
