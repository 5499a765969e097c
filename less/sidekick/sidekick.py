"""The sidekick: the feature maps' weights of every layer, built, checked, loaded and saved.

A sidekick holds, per layer, the tensors of phi (per query head) and psi (per kv head). What they
compute is in ``less.reference.phi`` and ``less.reference.psi``; this file knows their names, shapes
and files only.

    kind "paper"   q_w1 [Q,D,E]  q_w2 [Q,E,R]  k_w1 [K,D,E]  k_w2 [K,E,R]
                   k_mix [K,R,R]  k_scale [K,R]  k_mix_scale [K,R]
    kind "exp"     q_w1 [Q,D,E]  q_w2 [Q,E,R]  q_bias [Q,R]
                   k_w1 [K,D,E]  k_w2 [K,E,R]  k_bias [K,R]

The matrices (w1, w2) are all but all of the bytes, and may be float32, bfloat16, float16 or int8;
the rest, a few numbers per head whose size runs from 1e-8 up, is float32 always. Of int8 matrices
each output column has a scale, matrix = scale * int8 (``less.reference.quantize``):

    int8           q_w1_scale [Q,E]  q_w2_scale [Q,R]  k_w1_scale [K,E]  k_w2_scale [K,R]

A saved sidekick is a folder: ``model.safetensors`` (tensors named ``layers.<i>.<name>``) and
``config.json`` (shapes, the model it belongs to, a few of that model's weights, the policies and
the text it was trained with, and the other file's sha256, which loading compares).

Source: arXiv:2402.09398, section 3.2 (the paper's maps); docs/training.md (the exp maps).
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from less.dtypes import MAP_DTYPES
from less.identity import model_identity
from less.reference import dequantize, quantize

FORMAT = "less-sidekick"
FORMAT_VERSION = 1  # int8 files are of version 2, which a library that knows 1 alone refuses
_INT8_VERSION = 2
TENSORS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"
_DIGEST = "tensors_sha256"  # field of config.json; files without it are older, and not compared

#: Tensor name -> shape in letters, per kind. The order is the order of the files.
TENSORS: dict[str, dict[str, str]] = {
    "paper": {
        "q_w1": "QDE",
        "q_w2": "QER",
        "k_w1": "KDE",
        "k_w2": "KER",
        "k_mix": "KRR",
        "k_scale": "KR",
        "k_mix_scale": "KR",
    },
    "exp": {
        "q_w1": "QDE",
        "q_w2": "QER",
        "q_bias": "QR",
        "k_w1": "KDE",
        "k_w2": "KER",
        "k_bias": "KR",
    },
}
#: Of int8 matrices: their scales' shapes, one scale per output column.
SCALES = {"q_w1_scale": "QE", "q_w2_scale": "QR", "k_w1_scale": "KE", "k_w2_scale": "KR"}
MATRICES = ("q_w1", "q_w2", "k_w1", "k_w2")
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
#: What config.json says of the tensors, and Sidekick's attribute of the same name must confirm.
_SHAPE_FIELDS = ("kind", "layers", "q_heads", "kv_heads", "head_dim", "rank", "hidden")
_HEADS = ("q_heads", "kv_heads")
#: The authors' names -> ours, and whether a plain tensor or an nn.Linear's (transposed) weight.
_REFERENCE_NAMES = {
    "kernel_q_mat1": "q_w1",
    "kernel_q_mat2": "q_w2",
    "kernel_k_mat1": "k_w1",
    "kernel_k_mat2": "k_w2",
    "interaction_k": "k_mix",
    "scalingD": "k_scale",
    "scalingD2": "k_mix_scale",
}


class Sidekick:
    """Feature maps of every layer: what turns an eviction policy into LESS.

    Args:
        layers: One dict of tensors per layer, names and shapes as in this module's docstring. Any
            floating dtype, or int8 matrices with their scales; held as contiguous copies on the
            device they came on.
        kind: "paper" or "exp".
        config: What is known beside the tensors, saved with them: "model" (identity of the model,
            see ``less.identity``), "model_weights" (a few of its weights, see
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
        if kind not in TENSORS:
            raise ValueError(f"Sidekick: kind must be one of {sorted(TENSORS)}, got {kind!r}")
        _check_dtype("Sidekick", dtype)
        if isinstance(layers, Mapping) or not isinstance(layers, Sequence):
            raise TypeError(
                f"Sidekick: layers must be a sequence of dicts of tensors, got {_type(layers)}"
            )
        if len(layers) == 0:
            raise ValueError("Sidekick: layers must hold at least one layer, got none")
        self.kind = kind
        self.config: dict[str, Any] = dict(config or {})
        sizes: dict[str, int] = {}
        where: dict[str, str] = {}
        self._layers = [
            _as_dtype(i, _checked_layer(i, layer, kind, sizes, where), dtype)
            for i, layer in enumerate(layers)
        ]
        self.dtype = dtype
        self.q_heads, self.kv_heads = sizes["Q"], sizes["K"]
        self.head_dim, self.hidden, self.rank = sizes["D"], sizes["E"], sizes["R"]
        if self.q_heads % self.kv_heads:
            raise ValueError(
                f"Sidekick: query heads must be a multiple of kv heads, got {self.q_heads} (q_w1) "
                f"and {self.kv_heads} (k_w1)"
            )
        self.device = self._layers[0]["q_w1"].device
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
        return length if isinstance(length, int) else None

    @property
    def trained_capacities(self) -> tuple[int, ...]:
        """Tokens kept per head in training, ascending; empty where the config does not say."""
        budgets = self.config.get("budgets")
        return tuple(sorted(budgets)) if isinstance(budgets, list) else ()

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
        _check_dtype("Sidekick.to", dtype)
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
            kind: "paper" or "exp".
            generator: A torch generator, a seed, or None for torch's own state.
        """
        if kind not in TENSORS:
            raise ValueError(
                f"Sidekick.random: kind must be one of {sorted(TENSORS)}, got {kind!r}"
            )
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
            if name.endswith(("w1", "w2", "mix")):
                return x * math.sqrt(3 / sizes[letters[1]]) * (2 if name.endswith("w2") else 1)
            return 1 + x / 2 if name == "k_scale" else x / 2

        names = TENSORS[kind]
        return cls([{n: draw(n, s) for n, s in names.items()} for _ in range(layers)], kind=kind)

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
        layers = [_reference_layer(path, kv_heads) for path in _reference_files(root)]
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
            _check_dtype("Sidekick.from_pretrained", dtype)
        root = Path(path)
        if not root.is_dir() and str(path) in shipped_names():
            root = shipped(str(path))
        if not root.is_dir():
            raise FileNotFoundError(
                f"Sidekick.from_pretrained: no folder {str(path)!r}, nor a shipped sidekick of "
                f"that name (shipped: {', '.join(shipped_names()) or 'none'})"
            )
        header = _read_config(root / CONFIG_FILE)
        rank, world = shard
        check_part(
            "Sidekick.from_pretrained", rank, world, header.get("q_heads"), header.get("kv_heads")
        )
        layers = _read_tensors(root / TENSORS_FILE, rank, world)
        try:
            held = _dtype_of(layers)
            sidekick = cls(layers, kind=header["kind"], config=_extra(header), dtype=held)
            sidekick._part, sidekick._name = (rank, world), root.resolve().name
        except ValueError as error:
            raise ValueError(f"Sidekick.from_pretrained: {root / TENSORS_FILE}: {error}") from None
        for field in _SHAPE_FIELDS:
            held_field = getattr(sidekick, field) * (world if field in _HEADS else 1)
            if header.get(field) != held_field:
                raise ValueError(
                    f"Sidekick.from_pretrained: {root}: the files do not belong together: "
                    f"{CONFIG_FILE} says {field} = {header.get(field)!r}, {TENSORS_FILE} holds "
                    f"{held_field!r}"
                )
        _check_digest(root / TENSORS_FILE, header.get(_DIGEST))
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
        from safetensors.torch import save

        if self._part != (0, 1):
            raise ValueError(
                f"Sidekick.save_pretrained: this is part {self._part} (rank, world) of a sidekick; "
                "save the whole one, and load parts of it with from_pretrained(path, shard=...)"
            )
        dtype = self.dtype if dtype is None else dtype
        _check_dtype("Sidekick.save_pretrained", dtype)
        stored = self if dtype == self.dtype else self.to(dtype)
        tensors = {
            f"layers.{i}.{name}": tensor.detach().cpu()
            for i, layer in enumerate(stored)
            for name, tensor in layer.items()
        }
        version = _INT8_VERSION if dtype == torch.int8 else FORMAT_VERSION
        root = Path(path)
        root.mkdir(parents=True, exist_ok=True)
        header = {"format": FORMAT, "format_version": version}
        header |= {field: getattr(self, field) for field in _SHAPE_FIELDS}
        # Not save_file: it makes files that only their owner may read, whatever the umask.
        content = save(tensors, {"format": FORMAT, "version": str(version)})
        header |= {"dtype": str(dtype).removeprefix("torch.")}
        header |= {_DIGEST: hashlib.sha256(content).hexdigest(), **self.config}
        text = json.dumps(header, indent=2, allow_nan=False) + "\n"
        part = root / f".{TENSORS_FILE}.{os.getpid()}"
        part.write_bytes(content)
        os.replace(part, root / TENSORS_FILE)
        part = root / f".{CONFIG_FILE}.{os.getpid()}"
        part.write_text(text, encoding="utf-8")
        os.replace(part, root / CONFIG_FILE)
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


def shipped_names() -> list[str]:
    """Names of the sidekicks that come with the package."""
    root = Path(__file__).parent / "sidekicks"
    if not root.is_dir():
        return []
    return sorted(p.name for p in root.iterdir() if (p / CONFIG_FILE).is_file())


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
    return Path(__file__).parent / "sidekicks" / name


# -- parts of the heads ------------------------------------------------------------------------


def check_part(op: str, rank: int, world: int, q_heads: Any, kv_heads: Any) -> None:
    """Refuse a part that does not exist, or heads that cannot be dealt out evenly.

    Raises:
        ValueError: the message says which.
    """
    for name, x in (("rank", rank), ("world", world)):
        if isinstance(x, bool) or not isinstance(x, int):
            raise ValueError(f"{op}: {name} must be a whole number, got {x!r}")
    if not 0 <= rank < world:
        raise ValueError(f"{op}: rank must be in 0 .. world - 1, got rank {rank} of world {world}")
    for name, heads in (("q_heads", q_heads), ("kv_heads", kv_heads)):
        if world > 1 and (not isinstance(heads, int) or heads % world):
            raise ValueError(f"{op}: {name} must be a multiple of world = {world}, got {heads!r}")


def part_slice(heads: int, rank: int, world: int) -> slice:
    """Which of a tensor's first dim, the heads, are of a part."""
    return slice(rank * heads // world, (rank + 1) * heads // world)


# -- checks ------------------------------------------------------------------------------------


def _type(x: object) -> str:
    return type(x).__name__


def _checked_layer(
    index: int,
    layer: Mapping[str, Tensor],
    kind: str,
    sizes: dict[str, int],
    where: dict[str, str],
) -> dict[str, Tensor]:
    """One layer as contiguous copies, int8 matrices with their scales and the rest in float32.

    `sizes` (letter -> size) grows with the first layer's shapes.
    """
    at = f"Sidekick: layers[{index}]"
    if not isinstance(layer, Mapping):
        raise TypeError(f"{at} must be a dict of tensors, got {_type(layer)}")
    names = dict(TENSORS[kind])
    eights = [n for n in MATRICES if getattr(layer.get(n), "dtype", None) == torch.int8]
    names |= {f"{n}_scale": SCALES[f"{n}_scale"] for n in eights}
    missing = [n for n in names if n not in layer]
    unknown = [n for n in layer if n not in names]
    if missing or unknown:
        others = [k for k in TENSORS if k != kind and set(layer) == set(TENSORS[k])]
        hint = f"; these are the tensors of kind {others[0]!r}" if others else ""
        raise ValueError(
            f"{at}: kind {kind!r} has tensors {', '.join(names)}; missing: "
            f"{', '.join(missing) or 'none'}, unknown: "
            f"{', '.join(map(str, unknown)) or 'none'}{hint}"
        )
    held: dict[str, Tensor] = {}
    for name, letters in names.items():
        tensor = layer[name]
        here = f"{at}['{name}']"
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{here} must be a tensor, got {_type(tensor)}")
        if tensor.dtype not in _FLOATS and name not in eights:
            more = ", or int8 with a scale" if name in MATRICES else ""
            raise ValueError(
                f"{here} must be float16/bfloat16/float32/float64{more}, got {tensor.dtype}"
            )
        device = str(tensor.device)
        if device == "meta" or where.setdefault("device", device) != device:
            wanted = where.get("device", "a device with values")
            raise ValueError(f"{here} must be on {wanted} as the others are, got {device}")
        shape = list(tensor.shape)
        wanted = "[" + ", ".join(letters) + "]"
        if len(shape) != len(letters) or 0 in shape:
            raise ValueError(f"{here} must have shape {wanted}, none of them 0, got {shape}")
        for letter, size in zip(letters, shape, strict=True):
            if sizes.setdefault(letter, size) != size:
                raise ValueError(
                    f"{here} must have shape {wanted} with {letter} = {sizes[letter]} as in "
                    f"{where[letter]}, got {shape}"
                )
            where.setdefault(letter, f"layers[{index}]['{name}']")
        kept = torch.int8 if name in eights else torch.float32
        copy = tensor.detach().to(kept, copy=True).contiguous()
        if not bool(torch.isfinite(copy).all()):
            bad = int((~torch.isfinite(copy)).sum())
            raise ValueError(f"{here} must be finite, got {bad} NaN or infinite values")
        held[name] = copy
    return held


def _check_dtype(op: str, dtype: torch.dtype) -> None:
    if dtype not in MAP_DTYPES:
        names = ", ".join(str(d).removeprefix("torch.") for d in MAP_DTYPES)
        raise ValueError(f"{op}: dtype must be one of {names}, got {dtype}")


def _dtype_of(layers: Sequence[Mapping[str, Tensor]]) -> torch.dtype:
    """What the first matrix of a file is stored in; another than ours is refused by its layer."""
    dtype = getattr(layers[0].get("q_w1"), "dtype", None) if layers else None
    return dtype if dtype in MAP_DTYPES else torch.float32


def _as_dtype(index: int, layer: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """A checked layer with its matrices in another dtype; int8 to int8 keeps every bit."""
    held: dict[str, Tensor] = {}
    scales: dict[str, Tensor] = {}
    for name, tensor in layer.items():
        if name in SCALES:
            continue
        if name not in MATRICES:
            held[name] = tensor
            continue
        scale = layer.get(f"{name}_scale")
        if dtype == torch.int8:
            if scale is None:
                tensor, scale = quantize(tensor, -2)
            held[name], scales[f"{name}_scale"] = tensor, scale
            continue
        wide = tensor if scale is None else dequantize(tensor, scale, -2)
        narrow = wide.to(dtype)
        if not bool(torch.isfinite(narrow).all()):
            raise ValueError(
                f"Sidekick: layers[{index}]['{name}'] has a value of {float(wide.abs().max()):.4g},"
                f" beyond {str(dtype).removeprefix('torch.')}; keep it in float32"
            )
        held[name] = narrow.contiguous()
    return held | scales


# -- files -------------------------------------------------------------------------------------


def _read_config(path: Path) -> dict[str, Any]:
    at = f"Sidekick.from_pretrained: {path}"
    if not path.is_file():
        raise FileNotFoundError(f"{at}: no such file; a sidekick's folder has one")
    try:
        header = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, UnicodeDecodeError) as error:
        raise ValueError(f"{at}: truncated or not JSON ({error})") from None
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise ValueError(f'{at}: not a sidekick\'s config: wanted "format": "{FORMAT}"')
    if header.get("format_version") not in (FORMAT_VERSION, _INT8_VERSION):
        raise ValueError(
            f"{at}: format version {header.get('format_version')!r}; this library reads "
            f"versions {FORMAT_VERSION} and {_INT8_VERSION}"
        )
    if header.get("kind") not in TENSORS:
        raise ValueError(f"{at}: kind must be one of {sorted(TENSORS)}, got {header.get('kind')!r}")
    return header


def _extra(header: Mapping[str, Any]) -> dict[str, Any]:
    """The part of config.json that the tensors do not say themselves."""
    derived = ("format", "format_version", "dtype", _DIGEST, *_SHAPE_FIELDS)
    return {k: v for k, v in header.items() if k not in derived}


def _check_digest(path: Path, wanted: object) -> None:
    """Refuse tensors of other bytes than config.json was written for."""
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


def _read_tensors(path: Path, rank: int = 0, world: int = 1) -> list[dict[str, Tensor]]:
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
                match = re.fullmatch(r"layers\.(\d+)\.(\w+)", key)
                if match is None:
                    raise ValueError(f"{at}: unknown tensor {key!r}, wanted layers.<i>.<name>")
                held = file.get_slice(key)  # reads no more of the file than the part
                shape = held.get_shape()
                part = part_slice(shape[0], rank, world) if shape else slice(None)
                tensor = held[part] if world > 1 else file.get_tensor(key)
                layers.setdefault(int(match[1]), {})[match[2]] = tensor
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{at}: truncated or not a safetensors file ({error})") from None
    if sorted(layers) != list(range(len(layers))):
        raise ValueError(f"{at}: layers must be numbered 0.. without a gap, got {sorted(layers)}")
    return [layers[i] for i in range(len(layers))]


def _reference_files(root: Path) -> list[Path]:
    """layer_0.pth, layer_1.pth, ... in the order of their numbers, none missing."""
    if not root.is_dir():
        raise FileNotFoundError(f"from_reference_checkpoints: no folder {str(root)!r}")
    numbered: dict[int, Path] = {}
    for path in root.iterdir():
        match = re.fullmatch(r"layer_(\d+)\.pth", path.name)
        if match:
            numbered[int(match[1])] = path
    if not numbered:
        raise FileNotFoundError(
            f"from_reference_checkpoints: {root}: no files named layer_<i>.pth in it"
        )
    gaps = [i for i in range(max(numbered) + 1) if i not in numbered]
    if gaps:
        raise FileNotFoundError(
            f"from_reference_checkpoints: {root}: layer files missing: "
            + ", ".join(f"layer_{i}.pth" for i in gaps)
        )
    return [numbered[i] for i in sorted(numbered)]


def _reference_layer(path: Path, kv_heads: int | None) -> dict[str, Tensor]:
    """One of the authors' files as this library's tensors."""
    at = f"from_reference_checkpoints: {path}"
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a broken or a foreign pickle
        reason = str(error).splitlines()[0] if str(error) else _type(error)
        raise ValueError(f"{at}: truncated, or not a file of tensors alone ({reason})") from None
    # Their trainer wraps the weights beside its own progress; a bare state dict is as good.
    state = content.get("model_state_dict", content) if isinstance(content, dict) else None
    if not isinstance(state, dict):
        raise ValueError(f"{at}: wanted a dict of tensors, got {_type(content)}")
    layer: dict[str, Tensor] = {}
    for theirs, ours in _REFERENCE_NAMES.items():
        tensor, linear = state.get(theirs), state.get(f"{theirs}.weight")
        if isinstance(linear, Tensor) and linear.dim() == 2:
            tensor = linear.t()[None]  # y = x Wt: one kv head, [out, in] -> [1, in, out]
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{at}: must hold a tensor {theirs!r}")
        if ours in ("k_scale", "k_mix_scale"):
            if tensor.dim() == 4 and tensor.shape[0] == tensor.shape[2] == 1:
                tensor = tensor[0, :, 0]
            elif tensor.dim() != 2:
                raise ValueError(
                    f"{at}: {theirs} must have shape [1, K, 1, R] or [K, R], "
                    f"got {list(tensor.shape)}"
                )
        layer[ours] = tensor
    held = layer["k_w1"].shape[0]
    if kv_heads is None or kv_heads == held:
        return layer
    if held % kv_heads:
        raise ValueError(f"{at}: {held} psi maps cannot be shared among {kv_heads} kv heads")
    for name in [n for n in layer if n.startswith("k_")]:
        groups = layer[name].unflatten(0, (kv_heads, held // kv_heads))
        if not torch.equal(groups, groups[:, :1].expand_as(groups)):
            raise ValueError(
                f"{at}: holds psi per query head ({held}), and the maps of a group differ in "
                f"{name}: they cannot become one map for each of {kv_heads} kv heads. Use them "
                f"with a cache of kv_heads={held} (keys repeated), or train anew (less-kv train)"
            )
        layer[name] = groups[:, 0]
    return layer
