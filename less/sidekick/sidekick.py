"""``Sidekick``: the maps of every layer, and what is known of their training."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from less.sidekick import authors, files
from less.sidekick.identity import model_identity
from less.sidekick.kinds import KEY_MEAN, kind_of
from less.sidekick.parts import check_part, part_slice
from less.sidekick.tensors import (
    as_dtype,
    check_dtype,
    checked_layer,
    digest,
    dtype_of,
    type_name,
)

_HEADS = ("q_heads", "kv_heads")


class Sidekick:
    """Feature maps of every layer: what turns an eviction policy into LESS.

    Args:
        layers: One dict of tensors per layer, names and shapes as in ``less.layer.kinds``. Any
            floating dtype, or int8 matrices with their scales; held as contiguous copies on the
            device they came on. An empty dict: the layer has no maps, and evicts alone. Of kind
            "centroid" a layer may have ``key_mean`` [K, D]: the mean of keys that it was trained
            with, to which a cache's rows must be centred.
        kind: A name in ``less.layer.kinds.KINDS``: "paper", "exp" or "centroid".
        config: What is known beside the tensors, saved with them: "model" (identity of the model,
            see ``less.sidekick.identity``), "model_weights" (a few of its weights, see
            ``less.hf.weights``), "policies", "budgets", "training". Anything JSON can hold.
        dtype: What the matrices are held in: float32, bfloat16, float16 or int8.

    Raises:
        ValueError: a kind, name, shape, dtype or value is wrong; the message says which and where.
        TypeError: `layers` is no sequence of dicts of tensors.
    """

    def __init__(
        self,
        layers: Sequence[Mapping[str, Tensor]],
        kind: str = "paper",
        config: Mapping[str, Any] | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        kind_of("Sidekick", kind)
        check_dtype("Sidekick", dtype)
        if isinstance(layers, Mapping) or not isinstance(layers, Sequence):
            raise TypeError(
                f"Sidekick: layers must be a sequence of dicts of tensors, got {type_name(layers)}"
            )
        if len(layers) == 0:
            raise ValueError("Sidekick: layers must hold at least one layer, got none")
        self.kind = kind
        self.config: dict[str, Any] = dict(config or {})
        sizes: dict[str, int] = {}
        where: dict[str, str] = {}
        self._layers = [
            as_dtype(i, checked_layer(i, layer, kind, sizes, where), dtype)
            for i, layer in enumerate(layers)
        ]
        if not any(self._layers):
            raise ValueError("Sidekick: layers must hold at least one layer with maps, got none")
        self.dtype = dtype
        self.q_heads, self.kv_heads = sizes["Q"], sizes["K"]
        self.head_dim, self.rank = sizes["D"], sizes["R"]
        #: Hidden width E; 0 where the kind has no hidden layer.
        self.hidden = sizes.get("E", 0)
        if self.q_heads % self.kv_heads:
            raise ValueError(
                f"Sidekick: query heads must be a multiple of kv heads, got {self.q_heads} "
                f"({where['Q']}) and {self.kv_heads} ({where['K']})"
            )
        self.device = next(t for layer in self._layers for t in layer.values()).device
        self._part = (0, 1)
        self._name = ""

    # -- reading -----------------------------------------------------------------------------

    @property
    def layers(self) -> int:
        """Number of layers."""
        return len(self._layers)

    def __len__(self) -> int:
        """Number of layers."""
        return len(self._layers)

    def __getitem__(self, layer: int) -> dict[str, Tensor]:
        """The tensors of one layer, by name (a fresh dict of the held tensors).

        Empty where the layer has no maps.

        Raises:
            IndexError: there is no such layer (negative indices do not count from the end).
        """
        if not 0 <= layer < len(self._layers):
            raise IndexError(f"Sidekick: layer must be in 0..{len(self._layers) - 1}, got {layer}")
        return dict(self._layers[layer])

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        """The layers' dicts in order."""
        return (dict(layer) for layer in self._layers)

    def __repr__(self) -> str:
        """Kind, sizes and bytes on one line."""
        return (
            f"Sidekick(kind={self.kind!r}, layers={self.layers}, q_heads={self.q_heads}, "
            f"kv_heads={self.kv_heads}, head_dim={self.head_dim}, rank={self.rank}, "
            f"hidden={self.hidden}, dtype={self.dtype}, {self.nbytes / 2**20:.1f} MiB)"
        )

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors as held."""
        return sum(t.numel() * t.element_size() for layer in self._layers for t in layer.values())

    @property
    def absent(self) -> tuple[int, ...]:
        """The layers without maps, ascending: they evict alone."""
        return tuple(i for i, layer in enumerate(self._layers) if not layer)

    def key_mean(self, layer: int) -> Tensor | None:
        """The mean of keys that a layer's maps were trained with [K, D]; None: none."""
        return self._layers[layer].get(KEY_MEAN)

    @property
    def digest(self) -> str:
        """A sha256 of all tensors, by layer and name."""
        return digest(self._layers)

    @property
    def key_mean_digest(self) -> str | None:
        """A sha256 of the means of keys: what snapshots are compared by; None: there are none."""
        means = [{n: t for n, t in layer.items() if n == KEY_MEAN} for layer in self._layers]
        return digest(means) if any(means) else None

    @property
    def name(self) -> str:
        """What messages call it: its folder's name, else that of the model it was trained for."""
        model = self.config.get("model")
        return self._name or str(model.get("name") if isinstance(model, dict) else "") or "unnamed"

    @property
    def trained_length(self) -> int | None:
        """Tokens of the chunks that the maps were trained on; None where the config does not say.

        How the state does on longer texts was not seen in training.
        """
        training = self.config.get("training")
        text = training.get("text") if isinstance(training, dict) else None
        length = text.get("chunk_tokens") if isinstance(text, dict) else None
        return length if type(length) is int else None

    @property
    def trained_capacities(self) -> tuple[int, ...]:
        """Tokens kept per head in training, ascending; empty where the config does not say."""
        budgets = self.config.get("budgets")
        listed = budgets if isinstance(budgets, list) else []
        return tuple(sorted(n for n in listed if type(n) is int))

    def _like(
        self, layers: Sequence[Mapping[str, Tensor]], dtype: torch.dtype, part: tuple[int, int]
    ) -> Sidekick:
        """Other tensors of the same origin."""
        other = Sidekick(layers, kind=self.kind, config=self.config, dtype=dtype)
        other._part, other._name = part, self._name
        return other

    def to(
        self,
        target: torch.device | str | torch.dtype | None = None,
        dtype: torch.dtype | None = None,
    ) -> Sidekick:
        """The same sidekick on another device, with its matrices in another dtype, or both.

        Args:
            target: A device, or a dtype; None stays where it is.
            dtype: float32, bfloat16, float16 or int8; None keeps the present one. From int8 it
                is the rounded values that are widened.

        Raises:
            ValueError: another dtype, or a weight beyond float16.
        """
        if isinstance(target, torch.dtype):
            if dtype is not None:
                raise ValueError(f"Sidekick.to: one dtype must be given, got {target} and {dtype}")
            target, dtype = None, target
        dtype = self.dtype if dtype is None else dtype
        check_dtype("Sidekick.to", dtype)
        device = self.device if target is None else target
        moved = [{n: t.to(device) for n, t in layer.items()} for layer in self._layers]
        return self._like(moved, dtype, self._part)

    @property
    def part(self) -> tuple[int, int]:
        """Rank and world: which part of the model's heads these are; (0, 1) for all of them."""
        return self._part

    def shard(self, rank: int, world: int) -> Sidekick:
        """The maps of one process's heads, where a model's heads are dealt out to several.

        Args:
            rank: Which part: heads rank * Q / world on, and kv heads rank * K / world on.
            world: Number of parts.

        Returns:
            A sidekick of Q / world query heads and K / world kv heads, in copies.

        Raises:
            ValueError: the heads cannot be dealt out evenly, there is no such part, or this is a
                part already.
        """
        op = "Sidekick.shard"
        if self._part != (0, 1):
            raise ValueError(f"{op}: this is part {self._part} already; shard the whole sidekick")
        check_part(op, rank, world, self.q_heads, self.kv_heads)
        cut = [{n: t[part_slice(t.shape[0], rank, world)] for n, t in m.items()} for m in self]
        return self._like(cut, self.dtype, (rank, world))

    # -- building ----------------------------------------------------------------------------

    @classmethod
    def random(
        cls,
        layers: int,
        q_heads: int,
        kv_heads: int,
        head_dim: int,
        rank: int = 8,
        hidden: int = 64,
        kind: str = "paper",
        generator: torch.Generator | int | None = None,
    ) -> Sidekick:
        """Random maps whose every term matters on inputs of unit variance; for tests and examples.

        Not a start for training (see ``less.fit.start``): scales and biases are drawn of order one.

        Args:
            layers: Number of layers.
            q_heads: Query heads Q.
            kv_heads: Kv heads K, a divisor of Q.
            head_dim: Head dim D.
            rank: Features R.
            hidden: Hidden width E.
            kind: A name in ``less.layer.kinds.KINDS``.
            generator: A torch generator, a seed, or None for torch's own state.
        """
        tensors = kind_of("Sidekick.random", kind).tensors
        if isinstance(generator, int):
            generator = torch.Generator().manual_seed(generator)
        sizes = {"Q": q_heads, "K": kv_heads, "D": head_dim, "E": hidden, "R": rank}
        words = {"Q": "q_heads", "K": "kv_heads", "D": "head_dim", "E": "hidden", "R": "rank"}
        for letter, size in {**sizes, "L": layers}.items():
            if size < 1:
                name = words.get(letter, "layers")
                raise ValueError(f"Sidekick.random: {name} must be at least 1, got {size}")

        def draw(name: str, letters: str) -> Tensor:
            x = torch.rand([sizes[c] for c in letters], generator=generator) * 2 - 1
            if len(letters) == 3:  # [heads, in, out]
                return x * math.sqrt(3 / sizes[letters[1]]) * (2 if name.endswith("w2") else 1)
            return 1 + x / 2 if name in ("k_scale", "q_factor", "k_factor") else x / 2

        return cls([{n: draw(n, s) for n, s in tensors.items()} for _ in range(layers)], kind=kind)

    @classmethod
    def from_reference_checkpoints(
        cls, folder: str | os.PathLike[str], kv_heads: int | None = None
    ) -> Sidekick:
        """Read the per-layer files that the paper's released code trains (hdong920/LESS).

        The folder holds ``layer_0.pth``, ``layer_1.pth``, ...: each a dict which has, under
        "model_state_dict" or itself, kernel_q_mat1 [Q,D,E], kernel_q_mat2 [Q,E,R], kernel_k_mat1,
        kernel_k_mat2, interaction_k and scalingD, scalingD2 [1,K,1,R]. For multi-query models
        the key side is three linear layers (``kernel_k_mat1.weight`` [E,D], ...): they become kv
        head 0, transposed. The maps are the paper's, on keys after the rotary embedding, as here.

        Their code keeps keys per query head, so for a model with fewer kv heads than query heads
        such files hold Q psi maps where this library has K. Give `kv_heads` to say so: if the maps
        within each group are equal they are one map and load exactly; if they differ they are
        refused, since no single psi computes what several did.

        Files are read with ``weights_only=True``: no code of theirs can run.

        Args:
            folder: Where the files lie.
            kv_heads: The model's kv heads; None takes the number that the files hold.

        Raises:
            FileNotFoundError: no such folder, no layer files, or a layer missing between others.
            ValueError: a file is truncated, foreign or of other shapes.
        """
        root = Path(folder)
        layers = [authors.read_layer(path, kv_heads) for path in authors.layer_files(root)]
        try:
            return cls(layers, kind="paper", config={"training": {"source": "hdong920/LESS files"}})
        except ValueError as error:
            raise ValueError(f"from_reference_checkpoints: {root}: {error}") from None

    # -- files -------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike[str],
        dtype: torch.dtype | None = None,
        shard: tuple[int, int] = (0, 1),
    ) -> Sidekick:
        """Load a folder written by `save_pretrained`, or a shipped sidekick by its name.

        Args:
            path: The folder; or a name in `shipped_names()`, such as "smollm2-135m-instruct".
            dtype: Of the matrices, see `to`; the file's own by default.
            shard: Rank and world: load one part of the heads alone, as `shard` would cut it.

        Raises:
            FileNotFoundError: neither a folder nor a shipped name, or a file is missing in it.
            ValueError: a file is truncated, damaged, foreign, of another format version, the two
                files do not belong together (the message names the file), or there is no such part.
        """
        if dtype is not None:
            check_dtype("Sidekick.from_pretrained", dtype)
        root = Path(path)
        if not root.is_dir() and str(path) in files.shipped_names():
            root = files.shipped(str(path))
        if not root.is_dir():
            raise FileNotFoundError(
                f"Sidekick.from_pretrained: no folder {str(path)!r}, nor a shipped sidekick of "
                f"that name (shipped: {', '.join(files.shipped_names()) or 'none'})"
            )
        header = files.read_config(root / files.CONFIG_FILE)
        rank, world = shard
        check_part(
            "Sidekick.from_pretrained", rank, world, header.get("q_heads"), header.get("kv_heads")
        )
        tensors = root / files.TENSORS_FILE
        layers = files.read_tensors(tensors, rank, world, header.get(files.ABSENT, ()))
        try:
            held = dtype_of(layers, header["kind"])
            sidekick = cls(layers, kind=header["kind"], config=files.extra(header), dtype=held)
            sidekick._part, sidekick._name = (rank, world), root.resolve().name
        except ValueError as error:
            raise ValueError(f"Sidekick.from_pretrained: {tensors}: {error}") from None
        for field in files.SHAPE_FIELDS:
            held_field = getattr(sidekick, field) * (world if field in _HEADS else 1)
            if header.get(field) != held_field:
                raise ValueError(
                    f"Sidekick.from_pretrained: {root}: the files do not belong together: "
                    f"{files.CONFIG_FILE} says {field} = {header.get(field)!r}, {tensors.name} "
                    f"holds {held_field!r}"
                )
        files.check_digest(tensors, header.get(files.DIGEST))
        return sidekick if dtype in (None, held) else sidekick.to(dtype)

    def save_pretrained(
        self, path: str | os.PathLike[str], dtype: torch.dtype | None = None
    ) -> Path:
        """Write ``config.json`` and ``model.safetensors`` into a folder, each one atomically.

        Args:
            path: The folder; made if missing.
            dtype: Of the matrices, see `to`; as they are held by default. Loading gives them back
                in it, bit for bit.

        Returns:
            The folder.

        Raises:
            ValueError: another dtype, a weight beyond float16, or a part of a sidekick (`shard`);
                nothing is written.
        """
        if self._part != (0, 1):
            raise ValueError(
                f"Sidekick.save_pretrained: this is part {self._part} (rank, world) of a sidekick; "
                "save the whole one, and load parts of it with from_pretrained(path, shard=...)"
            )
        dtype = self.dtype if dtype is None else dtype
        check_dtype("Sidekick.save_pretrained", dtype)
        stored = self if dtype == self.dtype else self.to(dtype)
        tensors = {
            f"layers.{i}.{name}": tensor.detach().cpu()
            for i, layer in enumerate(stored)
            for name, tensor in layer.items()
        }
        root = Path(path)
        shape = {field: getattr(self, field) for field in files.SHAPE_FIELDS}
        if self.absent:
            shape[files.ABSENT] = list(self.absent)
        files.write(root, shape, dtype, tensors, self.config)
        return root

    # -- belonging ---------------------------------------------------------------------------

    def check_model(self, model: Any, part: tuple[int, int] = (0, 1)) -> None:
        """Refuse a model that these maps were not trained for.

        The head shapes are always compared; where the sidekick records its model ("model" in
        `config`), so is every field of `model_identity` but the name (a copy in another folder is
        the same model).

        Args:
            model: A transformers model or its config.
            part: Rank and world of the heads that this process computes, where the model's heads
                are dealt out to several.

        Raises:
            ValueError: something differs; the message lists each field with both values.
        """
        if self._part != tuple(part):
            raise ValueError(
                f"Sidekick.check_model: the model computes part {tuple(part)} (rank, world) of its "
                f"heads here, the sidekick is of part {self._part}; Sidekick.from_pretrained(path, "
                f"shard={tuple(part)}) reads the part that fits"
            )
        got = model_identity(model)
        wanted: dict[str, Any] = dict(self.config.get("model") or {})
        wanted |= {"layers": self.layers, "head_dim": self.head_dim}
        wanted |= {f: getattr(self, f) * self._part[1] for f in _HEADS}
        differing = [
            f"{field}: sidekick {wanted[field]!r}, model {got.get(field)!r}"
            for field in wanted
            if field not in ("name", "fingerprint") and wanted[field] != got.get(field)
        ]
        if not differing:
            return
        hint = ""
        if self.kv_heads == self.q_heads != got["kv_heads"]:
            hint = (
                " (this sidekick keeps psi per query head; the model shares keys among a group: "
                "from_reference_checkpoints(folder, kv_heads=...) says whether it can be reduced)"
            )
        name = wanted.get("name") or "unknown"
        raise ValueError(
            f"Sidekick.check_model: trained for {name!r}, does not fit {got['name']!r}: "
            + "; ".join(differing)
            + hint
        )
