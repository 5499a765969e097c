"""A plug-in for pytest: ``LESS_SANITIZED=library python -m pytest -p tests.sanitized``.

The kernels that are tested are then those of another build, with checks at every access (``make
sanitize``), and not those of the package. The sanitizers must come before everything else in the
process: ``python -m tests.sanitized`` prints what LD_PRELOAD must hold.
"""

from __future__ import annotations

import importlib.util
import os
import sys

from tests import emulated


def use(library: str) -> None:
    """Make a library ``less._C``."""
    import torch  # noqa: F401 - its libraries come first

    spec = importlib.util.spec_from_file_location("less._C", os.path.abspath(library))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["less._C"] = module
    spec.loader.exec_module(module)
    import less

    less._C = module


if __name__ == "__main__":
    print(emulated.preload("asan"))
else:
    use(os.environ["LESS_SANITIZED"])
