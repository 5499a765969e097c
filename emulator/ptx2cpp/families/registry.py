"""Where the families enter their instructions."""

from __future__ import annotations

from collections.abc import Callable

from ..operation import Operation

Family = Callable[[Operation], str]
FAMILIES: dict[str, Family] = {}


def family(*names: str) -> Callable[[Family], Family]:
    """Enter a function as the translation of these instructions."""

    def enter(function: Family) -> Family:
        for name in names:
            FAMILIES[name] = function
        return function

    return enter
