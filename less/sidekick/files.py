"""A sidekick's folder: reading, writing, checksums; and the folders that come with the package."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from less.files import SHIPPED, read_json, write_whole
from less.sidekick.kinds import kind_of
from less.sidekick.parts import part_slice

FORMAT = "less-sidekick"
FORMAT_VERSION = 1  # int8 files are of version 2, which a library that knows 1 alone refuses
INT8_VERSION = 2
TENSORS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"
DIGEST = "tensors_sha256"  # field of config.json; files without it are older, and not compared
#: What config.json says of the tensors, and Sidekick's attribute of the same name must confirm.
SHAPE_FIELDS = ("kind", "layers", "q_heads", "kv_heads", "head_dim", "rank", "hidden")
ABSENT = "layers_without_maps"  # field of config.json, where there are such


def read_config(path: Path) -> dict[str, Any]:
    """Read a sidekick's config.json.

    Raises:
        FileNotFoundError: There is none.
        ValueError: It is truncated, or of another format, version or kind.
    """
    at = f"Sidekick.from_pretrained: {path}"
    if not path.is_file():
        raise FileNotFoundError(f"{at}: no such file; a sidekick's folder has one")
    header = read_json(at, path)
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise ValueError(f'{at}: not a sidekick\'s config: wanted "format": "{FORMAT}"')
    if header.get("format_version") not in (FORMAT_VERSION, INT8_VERSION):
        raise ValueError(
            f"{at}: format version {header.get('format_version')!r}; this library reads "
            f"versions {FORMAT_VERSION} and {INT8_VERSION}"
        )
    kind_of(at, header.get("kind"))
    return header


def extra(header: Mapping[str, Any]) -> dict[str, Any]:
    """The part of config.json that the tensors do not say themselves."""
    derived = ("format", "format_version", "dtype", DIGEST, ABSENT, *SHAPE_FIELDS)
    return {k: v for k, v in header.items() if k not in derived}


def check_digest(path: Path, wanted: object) -> None:
    """Refuse tensors of other bytes than config.json was written for.

    Raises:
        ValueError: Their sha256 is not the wanted one.
    """
    if wanted is None:
        return
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    if digest.hexdigest() != wanted:
        raise ValueError(
            f"Sidekick.from_pretrained: {path}: damaged, or of another {CONFIG_FILE}: its sha256 "
            f"must be {wanted}, got {digest.hexdigest()}"
        )


def read_tensors(
    path: Path, rank: int = 0, world: int = 1, absent: object = ()
) -> list[dict[str, Tensor]]:
    """Read the layers of a sidekick's tensors, of one part of the heads alone.

    Args:
        path: The file.
        rank: Which part.
        world: Of how many.
        absent: The layers without maps, as config.json lists them.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is truncated or foreign, or a layer is missing.
    """
    from safetensors import SafetensorError, safe_open

    at = f"Sidekick.from_pretrained: {path}"
    if not path.is_file():
        raise FileNotFoundError(f"{at}: no such file; a sidekick's folder has one")
    layers: dict[int, dict[str, Tensor]] = {}
    try:
        with safe_open(path, framework="pt") as file:
            if (file.metadata() or {}).get("format") != FORMAT:
                raise ValueError(f"{at}: a safetensors file, but not a sidekick's")
            for key in file.keys():  # noqa: SIM118 - safe_open is no mapping
                match = re.fullmatch(r"layers\.(0|[1-9][0-9]{0,5})\.(\w+)", key)
                if match is None:
                    raise ValueError(f"{at}: unknown tensor {key!r}, wanted layers.<i>.<name>")
                held = file.get_slice(key)  # reads no more of the file than the part
                shape = held.get_shape()
                part = part_slice(shape[0], rank, world) if shape else slice(None)
                tensor = held[part] if world > 1 else file.get_tensor(key)
                layers.setdefault(int(match[1]), {})[match[2]] = tensor
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{at}: truncated or not a safetensors file ({error})") from None
    if not isinstance(absent, (list, tuple)) or not all(type(i) is int for i in absent):
        raise ValueError(f"{at}: {ABSENT} must be a list of layers, got {absent!r}")
    for i in absent:
        if i in layers:
            raise ValueError(f"{at}: layer {i} must have no tensors, {CONFIG_FILE} says")
        layers[i] = {}
    if sorted(layers) != list(range(len(layers))):
        raise ValueError(f"{at}: layers must be numbered 0.. without a gap, got {sorted(layers)}")
    return [layers[i] for i in range(len(layers))]


def write(
    root: Path,
    shape: Mapping[str, Any],
    dtype: torch.dtype,
    tensors: dict[str, Tensor],
    config: Mapping[str, Any],
) -> None:
    """Write both files of a sidekick's folder, each one atomically.

    Args:
        root: The folder; made if missing.
        shape: Values of ``SHAPE_FIELDS``.
        dtype: Of the matrices.
        tensors: On the CPU, named ``layers.<i>.<name>``.
        config: What is known beside the tensors.
    """
    from safetensors.torch import save

    version = INT8_VERSION if dtype == torch.int8 else FORMAT_VERSION
    root.mkdir(parents=True, exist_ok=True)
    # Not save_file: it makes files that only their owner may read, whatever the umask.
    content = save(tensors, {"format": FORMAT, "version": str(version)})
    header = {"format": FORMAT, "format_version": version, **shape}
    header |= {"dtype": str(dtype).removeprefix("torch.")}
    header |= {DIGEST: hashlib.sha256(content).hexdigest(), **config}
    text = json.dumps(header, indent=2, allow_nan=False) + "\n"
    write_whole(root / TENSORS_FILE, content)
    write_whole(root / CONFIG_FILE, text)


def shipped_names() -> list[str]:
    """Names of the sidekicks that come with the package."""
    if not SHIPPED.is_dir():
        return []
    return sorted(p.name for p in SHIPPED.iterdir() if (p / CONFIG_FILE).is_file())


def shipped(name: str) -> Path:
    """Folder of a sidekick that comes with the package, for `Sidekick.from_pretrained`.

    Raises:
        ValueError: there is none of that name.
    """
    if name not in shipped_names():
        raise ValueError(
            f"shipped: no sidekick named {name!r}; there are: "
            + (", ".join(shipped_names()) or "none")
        )
    return SHIPPED / name
