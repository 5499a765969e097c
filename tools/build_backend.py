"""setuptools' build backend, plus the build requirements that depend on the surroundings.

torch is a build requirement only where the target environment has none: a second copy in the
isolated build environment would cost minutes and, worse, other headers than the torch the
extension will be loaded into. CMake and Ninja are asked for only where the system has none.
"""

from __future__ import annotations

import importlib.util

import setuptools
from setuptools import build_meta
from setuptools.build_meta import *

import native


def get_requires_for_build_wheel(config_settings: dict | None = None) -> list[str]:
    """What an isolated build of a wheel needs beside setuptools."""
    requires = list(build_meta.get_requires_for_build_wheel(config_settings))
    if not native.native_wanted():
        return requires
    if native.find_torch() is None:
        requires.append("torch>={}.{}".format(*native.MINIMUM_TORCH))
    if native.find_cmake() is None:
        requires.append("cmake>={}.{}".format(*native.MINIMUM_CMAKE))
    if native.find_ninja() is None:
        requires.append("ninja")
    return requires


def get_requires_for_build_editable(config_settings: dict | None = None) -> list[str]:
    """What an isolated editable install needs: the same as a wheel."""
    return get_requires_for_build_wheel(config_settings)


def prepare_metadata_for_build_wheel(
    metadata_directory: str, config_settings: dict | None = None
) -> str:
    """As setuptools', once it is sure that this setuptools can build a wheel."""
    _require_wheel()
    return build_meta.prepare_metadata_for_build_wheel(metadata_directory, config_settings)


def prepare_metadata_for_build_editable(
    metadata_directory: str, config_settings: dict | None = None
) -> str:
    """As setuptools', once it is sure that this setuptools can build a wheel."""
    _require_wheel()
    return build_meta.prepare_metadata_for_build_editable(metadata_directory, config_settings)


def _require_wheel() -> None:
    """Stop with a clear message where an old setuptools lacks the package `wheel`."""
    version = tuple(int(part) for part in setuptools.__version__.split(".")[:2])
    if version < (70, 1) and importlib.util.find_spec("wheel") is None:
        raise SystemExit(
            f"less: setuptools {setuptools.__version__} of this environment builds wheels only "
            "with the package `wheel`: `pip install --upgrade setuptools wheel`, or leave out "
            "--no-build-isolation."
        )
