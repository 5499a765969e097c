"""A few of a model's weights, by which a sidekick knows the model that it was trained on.

Models of one shape differ in their weights alone: a base model and its chat version, say. Training
notes a few numbers of each attention matrix of the first, middle and last layer in the sidekick's
config ("model_weights"), and a cache compares them with those of the model that it serves::

    distance = |got - noted| / |noted|        per matrix, over its noted numbers

Rounding float32 to bfloat16 moves a number by 2^-9 of its size at most, to float16 by 2^-11, and
both sides may be rounded: the same weights are within 2^-8 of each other however they are loaded.

Not compared: what has another name or shape (adapters, fused weights), what is no plain tensor of
floats (quantised weights, parts of sharded ones) or holds no values here (offloaded ones), and
models whose heads are dealt out to several processes.
"""

from __future__ import annotations

import math
import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from less.cache import LessKVCache
    from less.hf.models import ModelFacts

FIELD = "model_weights"  # of a sidekick's config
_NUMBERS = 8  # per matrix
_TOLERANCE = 2.0**-8
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def note_weights(facts: ModelFacts) -> dict[str, dict[str, list[Any]]]:
    """What a sidekick's config notes of its model.

    Returns:
        ``"<layer>.<name within the attention module>"`` -> ``shape`` and ``values``, a few of the
        matrix's numbers.
    """
    return {
        name: {"shape": list(matrix.shape), "values": [float(f"{x:.6g}") for x in _some(matrix)]}
        for name, matrix in _matrices(facts).items()
    }


def warn_of_other_weights(cache: LessKVCache, facts: ModelFacts) -> None:
    """Warn of a model whose weights differ from those that the cache's sidekick was trained on.

    A cache says the same once: ``cache_for`` compares, and ``attach`` does again.

    Raises:
        ValueError: The sidekick's config does not hold what ``note_weights`` wrote.
    """
    if cache.sidekick is None or facts.part != (0, 1):
        return
    noted = cache.sidekick.config.get(FIELD)
    if not noted:  # of an older file, or not made by training
        return
    matrices = _matrices(facts)
    far = {}
    for name in noted:
        shape, values = _noted(cache.sidekick.name, noted, name)
        if name in matrices and list(matrices[name].shape) == shape:
            distance = _distance(_some(matrices[name]), values)
            if distance > _TOLERANCE:
                far[name] = distance
    if not far:
        return
    name = max(far, key=lambda name: far[name])
    trained = (cache.sidekick.config.get("model") or {}).get("name") or "unknown"
    got = str(getattr(facts.config, "_name_or_path", "") or facts.name)
    text = (
        f"less.hf: the sidekick {cache.sidekick.name!r} was trained on {trained!r}, and the "
        f"weights of {got!r} are others: of {len(noted)} matrices {len(far)} differ, {name} by "
        f"{100 * far[name]:.2g} % of its size. Its memory may do harm; train one for this model"
    )
    if text != cache.session.other_weights:
        cache.session.other_weights = text
        warnings.warn(text, stacklevel=3)


def _matrices(facts: ModelFacts) -> dict[str, Tensor]:
    """The matrices that are noted and compared, as far as they can be read here."""
    layers = sorted({0, facts.layers // 2, facts.layers - 1})
    return {
        f"{layer}.{name}": parameter
        for layer in layers
        for name, parameter in facts.modules[layer].named_parameters()
        if parameter.dim() == 2
        and parameter.dtype in _DTYPES
        and parameter.device.type != "meta"
        and type(parameter.data) is Tensor
    }


def _some(matrix: Tensor) -> list[float]:
    """Numbers from all over a matrix: at multiples of the golden ratio, mod 1, of its length."""
    at = [int(matrix.numel() * ((i + 1) * 0.6180339887498949 % 1.0)) for i in range(_NUMBERS)]
    flat = matrix.detach().flatten()
    values: list[float] = flat[torch.tensor(at, device=flat.device)].double().cpu().tolist()
    return values


def _noted(sidekick: str, noted: Any, name: str) -> tuple[list[int], list[float]]:
    try:
        shape, values = noted[name]["shape"], [float(x) for x in noted[name]["values"]]
    except (KeyError, TypeError, ValueError):
        raise ValueError(
            f"less.hf: the config of the sidekick {sidekick!r} must hold a shape and numbers in "
            f"{FIELD}[{name!r}]"
        ) from None
    return shape, values


def _distance(got: list[float], noted: list[float]) -> float:
    if len(got) != len(noted):
        return math.inf
    size = math.dist(noted, [0.0] * len(noted))
    apart = math.dist(got, noted)
    return apart / size if size else (math.inf if apart else 0.0)
