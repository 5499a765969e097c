"""``Calibration``: what was measured of a model's heads, for rows of few bits and for budgets.

One folder, a sidekick's or one of its own, holds it in ``rows.safetensors`` and ``rows.json``:
means and scales of every channel, per layer and kv head; and, where they were measured, curves of
the error that each head causes at several capacities.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from less._check import require_int, require_shape
from less.files import (
    CALIBRATION_FILE,
    SHIPPED,
    parse_json,
    read_json,
    shipped_calibrations,
    write_whole,
)
from less.layer import Space
from less.layer.space import SPACE
from less.sidekick.identity import model_identity
from less.sidekick.parts import check_part, part_slice

FORMAT = "less-rows"
VERSION = 2  # version 1 had no curves
TENSORS_FILE = "rows.safetensors"
CONFIG_FILE = CALIBRATION_FILE
#: Of each layer, float32 [K, D]: what its space is made of.
NAMES = SPACE
#: In the metadata of ``rows.safetensors``, under its digest: capacities and length once more.
GRID = "grid"
#: Of each layer, float32 [K, n], where curves were measured: the error that a head causes in the
#: output of attention at each of n capacities, times what the layer's error costs the model.
CURVE = "curve"


class Calibration:
    """Means and scales of the channels of keys and values, and what each head's slots are worth.

    Args:
        layers: One dict per layer with ``key_mean``, ``key_scale``, ``value_mean`` and
            ``value_scale``, float32 [K, D] each, and with curves ``curve``, float32 [K, n]; None
            for a layer that slides.
        config: What is known beside them: ``model`` (``less.sidekick.identity``), ``text``,
            ``tokens``. Anything JSON can hold.
        capacities: The n numbers of slots at which curves were measured, ascending, two or more;
            empty: there are no curves.
        length: Tokens of the texts that curves were measured on; 0: there are no curves.

    Raises:
        ValueError: A tensor is missing, has another shape, or is not finite; or all slide.
    """

    def __init__(
        self,
        layers: Sequence[Mapping[str, Tensor] | None],
        config: Mapping[str, Any] | None = None,
        capacities: Sequence[int] = (),
        length: int = 0,
    ) -> None:
        op = "Calibration"
        self.capacities, self.length = _checked_grid(op, capacities, length)
        names = (*NAMES, CURVE) if self.capacities else NAMES
        held = [layer for layer in layers if layer is not None]
        if not held:
            raise ValueError(f"{op}: layers must hold one or more that do not slide")
        first = held[0].get("key_mean")
        if first is None or first.dim() != 2:
            raise ValueError(f"{op}: layers must have key_mean [K, D]")
        self.kv_heads, self.head_dim = first.shape
        self._layers: list[dict[str, Tensor] | None] = []
        for i, layer in enumerate(layers):
            if layer is None:
                self._layers.append(None)
                continue
            if set(layer) != set(names):
                raise ValueError(
                    f"{op}: layer {i} must have {', '.join(names)}, got {', '.join(sorted(layer))}"
                )
            for name, x in layer.items():
                width = len(self.capacities) if name == CURVE else self.head_dim
                require_shape(op, f"layer {i}'s {name}", x, [self.kv_heads, width])
            # Copies: a caller's tensors may change, or be those of another layer too.
            mine = {n: layer[n].detach().to("cpu", torch.float32, copy=True) for n in names}
            mine = {n: x.contiguous() for n, x in mine.items()}
            self._space(mine)  # refuses what is no space
            if CURVE in mine and not bool((mine[CURVE].isfinite() & (mine[CURVE] >= 0)).all()):
                raise ValueError(f"{op}: layer {i}'s {CURVE} must be finite and 0 or more")
            self._layers.append(mine)
        self.config: dict[str, Any] = dict(config or {})

    def __len__(self) -> int:
        """Number of layers, those that slide included."""
        return len(self._layers)

    def __getitem__(self, layer: int) -> dict[str, Tensor] | None:
        """The tensors of a layer by name; None where it slides."""
        mine = self._layers[layer]
        return None if mine is None else dict(mine)

    def __repr__(self) -> str:
        """Sizes on one line."""
        curves = f", curves at {len(self.capacities)} capacities" if self.capacities else ""
        return (
            f"Calibration(layers={len(self)}, kv_heads={self.kv_heads}, "
            f"head_dim={self.head_dim}{curves})"
        )

    def space(self, layer: int) -> Space | None:
        """The space of a layer's rows; None where the layer slides."""
        mine = self._layers[layer]
        return None if mine is None else self._space(mine)

    def _space(self, layer: Mapping[str, Tensor]) -> Space:
        return Space.of(self.kv_heads, self.head_dim, **{n: layer[n] for n in NAMES})

    def curve(self, layer: int) -> Tensor | None:
        """The curves of a layer's heads, float32 [K, n]; None where there are none."""
        mine = self._layers[layer]
        return None if mine is None else mine.get(CURVE)

    @property
    def digest(self) -> str:
        """A sha256 of means and scales: what snapshots are compared by.

        Curves say how many slots heads have, which a snapshot notes by itself.
        """
        digest = hashlib.sha256()
        for layer in self._layers:
            for name in NAMES if layer is not None else ():
                assert layer is not None
                digest.update(layer[name].numpy().tobytes())
        return digest.hexdigest()

    def check(self, op: str, layers: int, kv_heads: int, head_dim: int) -> None:
        """Refuse the shape of another model.

        Raises:
            ValueError: The message names what differs.
        """
        for name, wanted, got in (
            ("layers", layers, len(self)),
            ("kv_heads", kv_heads, self.kv_heads),
            ("head_dim", head_dim, self.head_dim),
        ):
            if wanted != got:
                raise ValueError(f"{op}: calibration must have {name}={wanted}, got {name}={got}")

    def check_model(self, config: Any) -> None:
        """Refuse another model's config.

        Args:
            config: A transformers model or its config.

        Raises:
            ValueError: The calibration notes another model; the message names both.
        """
        mine, theirs = self.config.get("model"), model_identity(config)
        if isinstance(mine, dict) and mine.get("fingerprint") != theirs["fingerprint"]:
            raise ValueError(
                f"calibration: it was measured on {mine.get('name') or 'another model'}, not on "
                f"{theirs['name'] or 'this model'}; run less-kv calibrate for it"
            )

    def shard(self, rank: int, world: int) -> Calibration:
        """That of one process's kv heads."""
        check_part("Calibration.shard", rank, world, self.kv_heads, self.kv_heads)
        part = part_slice(self.kv_heads, rank, world)
        return Calibration(
            [
                None if layer is None else {n: x[part] for n, x in layer.items()}
                for layer in self._layers
            ],
            self.config,
            self.capacities,
            self.length,
        )

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write both files into a folder, each whole or not at all; made if missing."""
        from safetensors.torch import save

        root = Path(folder)
        root.mkdir(parents=True, exist_ok=True)
        tensors = {
            f"layers.{i}.{name}": x if name == CURVE or not _is_half(x) else x.half()
            for i, layer in enumerate(self._layers)
            if layer is not None
            for name, x in layer.items()
        }
        metadata = {"format": FORMAT, "version": str(VERSION)}
        if self.capacities:
            metadata[GRID] = json.dumps([self.capacities, self.length])
        content = save(tensors, metadata)
        header = {
            "format": FORMAT,
            "version": VERSION,
            "layers": len(self),
            "kv_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "sha256": hashlib.sha256(content).hexdigest(),
            "config": self.config,
        }
        if self.capacities:
            header |= {"capacities": list(self.capacities), "length": self.length}
        text = json.dumps(header, indent=2, allow_nan=False) + "\n"
        write_whole(root / TENSORS_FILE, content)
        write_whole(root / CONFIG_FILE, text)

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str]) -> Calibration:
        """Read a folder that ``less-kv calibrate`` wrote.

        Args:
            folder: The folder, or one of ``shipped_calibrations``.

        Raises:
            FileNotFoundError: The folder has no calibration.
            ValueError: A file is damaged, or of another format or version; the message names it.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load

        root = Path(folder).expanduser()
        if os.fspath(folder) in shipped_calibrations():
            root = SHIPPED / folder
        at = f"Calibration.from_pretrained: {root / CONFIG_FILE}"
        for name in (CONFIG_FILE, TENSORS_FILE):
            if not (root / name).is_file():
                raise FileNotFoundError(
                    f"Calibration.from_pretrained: {root / name}: no such file; less-kv calibrate "
                    "writes it"
                )
        header = read_json(at, root / CONFIG_FILE)
        if not isinstance(header, dict) or header.get("format") != FORMAT:
            raise ValueError(f'{at}: not a calibration: wanted "format": "{FORMAT}"')
        if header.get("version") not in range(1, VERSION + 1):
            raise ValueError(
                f"{at}: version {header.get('version')!r}; this library reads versions 1 to "
                f"{VERSION}"
            )
        layers = header.get("layers")
        if not isinstance(layers, int) or isinstance(layers, bool) or not 0 < layers < 1 << 16:
            raise ValueError(f"{at}: layers must be a number of layers, got {layers!r}")
        content = (root / TENSORS_FILE).read_bytes()
        digest = hashlib.sha256(content).hexdigest()
        if digest != header.get("sha256"):
            raise ValueError(
                f"Calibration.from_pretrained: {root / TENSORS_FILE}: damaged, or of another "
                f"{CONFIG_FILE}: its sha256 must be {header.get('sha256')}, got {digest}"
            )
        try:
            tensors = load(content)
        except SafetensorError as error:
            raise ValueError(f"{at}: {TENSORS_FILE} is no safetensors file ({error})") from None
        found: list[dict[str, Tensor] | None] = [None] * layers
        for key, x in tensors.items():
            match = re.fullmatch(r"layers\.(0|[1-9][0-9]{0,5})\.(\w+)", key)
            name = match[2] if match else ""
            if match is None or int(match[1]) >= layers or name not in (*NAMES, CURVE):
                raise ValueError(f"{at}: unknown tensor {key!r} in {TENSORS_FILE}")
            i = int(match[1])
            found[i] = {**(found[i] or {}), name: x}
        config = header.get("config")
        try:
            read = cls(
                found,
                config if isinstance(config, dict) else {},
                header.get("capacities", ()),
                header.get("length", 0),
            )
        except ValueError as error:
            raise ValueError(f"{at}: {error}") from None
        _check_grid(at, content, header)
        return read


def _is_half(x: Tensor) -> bool:
    """Whether float16 holds every number exactly."""
    return torch.equal(x.half().float(), x)


def _check_grid(at: str, content: bytes, header: Mapping[str, Any]) -> None:
    """Raise where capacities and length are others than the file of tensors says, if it does."""
    end = 8 + int.from_bytes(content[:8], "little")
    metadata = parse_json(f"{at}: {TENSORS_FILE}", content[8:end]).get("__metadata__", {})
    if GRID not in metadata:  # written before it was
        return
    wanted = parse_json(f"{at}: {TENSORS_FILE}", metadata[GRID])
    got = [header.get("capacities"), header.get("length")]
    if got != wanted:
        raise ValueError(
            f"{at}: capacities and length must be {wanted}, as {TENSORS_FILE} says, got {got}"
        )


def _checked_grid(op: str, capacities: object, length: object) -> tuple[tuple[int, ...], int]:
    """The capacities of curves and the length of their text; () and 0 where there are none."""
    if capacities == () and length == 0:
        return (), 0
    if not isinstance(capacities, Sequence) or isinstance(capacities, str) or len(capacities) < 2:
        raise ValueError(f"{op}: capacities must list two or more, got {capacities!r}")
    listed = tuple(require_int(op, f"capacities[{i}]", s, 1) for i, s in enumerate(capacities))
    if any(a >= b for a, b in itertools.pairwise(listed)):
        raise ValueError(f"{op}: capacities must ascend, got {list(listed)}")
    return listed, require_int(op, "length", length, listed[-1])
