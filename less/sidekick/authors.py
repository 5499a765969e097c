"""Checkpoints that the paper's released code trains (hdong920/LESS), as this library's tensors."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import Tensor

from less.sidekick.tensors import type_name

#: The authors' names -> ours, and whether a plain tensor or an nn.Linear's (transposed) weight.
_NAMES = {
    "kernel_q_mat1": "q_w1",
    "kernel_q_mat2": "q_w2",
    "kernel_k_mat1": "k_w1",
    "kernel_k_mat2": "k_w2",
    "interaction_k": "k_mix",
    "scalingD": "k_scale",
    "scalingD2": "k_mix_scale",
}


def layer_files(root: Path) -> list[Path]:
    """layer_0.pth, layer_1.pth, ... in the order of their numbers, none missing.

    Raises:
        FileNotFoundError: No such folder, no layer files, or a layer missing between others.
    """
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


def read_layer(path: Path, kv_heads: int | None) -> dict[str, Tensor]:
    """One of the authors' files as this library's tensors, of kind "paper".

    Args:
        path: The file.
        kv_heads: The model's kv heads; None takes the number that the file holds.

    Raises:
        ValueError: The file is truncated or foreign, or its maps cannot be those of so many heads.
    """
    at = f"from_reference_checkpoints: {path}"
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a broken or a foreign pickle
        reason = str(error).splitlines()[0] if str(error) else type_name(error)
        raise ValueError(f"{at}: truncated, or not a file of tensors alone ({reason})") from None
    # Their trainer wraps the weights beside its own progress; a bare state dict is as good.
    state = content.get("model_state_dict", content) if isinstance(content, dict) else None
    if not isinstance(state, dict):
        raise ValueError(f"{at}: wanted a dict of tensors, got {type_name(content)}")
    layer: dict[str, Tensor] = {}
    for theirs, ours in _NAMES.items():
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
