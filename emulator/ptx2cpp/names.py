"""PTX names as C++ ones."""

from __future__ import annotations

import re

_RESERVED = frozenset({"and", "or", "not", "xor", "int", "float", "double", "bool", "this", "P"})


def c_name(name: str) -> str:
    """The name without the characters that C++ does not have."""
    plain = re.sub(r"\W", "_", name.replace("%", ""))
    return f"{plain}_" if plain in _RESERVED else plain
