"""The tensors of one layer: checked, copied and brought to a dtype."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from less.dtypes import FLOATS, MAP_DTYPES
from less.reference import dequantize, quantize
from less.sidekick.kinds import KEY_MEAN, KINDS, MATRICES, SCALES

_STORED = (*FLOATS, torch.float64)


def type_name(x: object) -> str:
    """What messages call a value of the wrong type."""
    return type(x).__name__


def checked_layer(
    index: int,
    layer: Mapping[str, Tensor],
    kind: str,
    sizes: dict[str, int],
    where: dict[str, str],
) -> dict[str, Tensor]:
    """One layer as contiguous copies, int8 matrices with their scales and the rest in float32.

    A layer without tensors has no maps; one of a centred kind may have a ``key_mean``.

    Args:
        index: The layer's, for messages.
        layer: Its tensors by name.
        kind: Its kind.
        sizes: Letter -> size; grows with the first layer's shapes.
        where: Letter -> the tensor that gave the size; and "device".

    Raises:
        TypeError: Something is no dict or no tensor.
        ValueError: A name, dtype, device, shape or value is wrong.
    """
    at = f"Sidekick: layers[{index}]"
    if not isinstance(layer, Mapping):
        raise TypeError(f"{at} must be a dict of tensors, got {type_name(layer)}")
    row = KINDS[kind]
    if not layer:
        return {}
    names = dict(row.tensors)
    if row.centred and KEY_MEAN in layer:
        names[KEY_MEAN] = "KD"
    eights = [n for n in row.matrices if getattr(layer.get(n), "dtype", None) == torch.int8]
    names |= {f"{n}_scale": row.scales[f"{n}_scale"] for n in eights}
    missing = [n for n in names if n not in layer]
    unknown = [n for n in layer if n not in names]
    if missing or unknown:
        others = [k for k in KINDS if k != kind and set(layer) == set(KINDS[k].tensors)]
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
            raise TypeError(f"{here} must be a tensor, got {type_name(tensor)}")
        if tensor.dtype not in _STORED and name not in eights:
            more = ", or int8 with a scale" if name in row.matrices else ""
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


def digest(layers: Sequence[Mapping[str, Tensor]]) -> str:
    """A sha256 of layers' tensors, by layer and name."""
    found = hashlib.sha256()
    for i, layer in enumerate(layers):
        for name, tensor in layer.items():
            found.update(f"{i}.{name}".encode())
            found.update(tensor.cpu().float().numpy().tobytes())
    return found.hexdigest()


def check_dtype(op: str, dtype: torch.dtype) -> None:
    """Refuse a dtype that matrices cannot be held in.

    Raises:
        ValueError: It is one.
    """
    if dtype not in MAP_DTYPES:
        names = ", ".join(str(d).removeprefix("torch.") for d in MAP_DTYPES)
        raise ValueError(f"{op}: dtype must be one of {names}, got {dtype}")


def dtype_of(layers: Sequence[Mapping[str, Tensor]], kind: str) -> torch.dtype:
    """What the first matrix of a file is stored in; another than ours is refused by its layer."""
    first = next((layer for layer in layers if layer), {})
    dtype = getattr(first.get(KINDS[kind].matrices[0]), "dtype", None)
    return dtype if dtype in MAP_DTYPES else torch.float32


def as_dtype(index: int, layer: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """A checked layer with its matrices in another dtype; int8 to int8 keeps every bit.

    Raises:
        ValueError: A value is beyond float16.
    """
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
