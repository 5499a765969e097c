"""Measure a model's channels, for rows of few bits, and what its heads' slots are worth.

Per kv head and channel d, over the text's tokens, the first few of a chunk left out (they stay in
finer rows, and are unlike the rest):

    m_k = mean k, m_v = mean v
    c_k = (mean q^2 / var k)^(1/4)     c_v = (|W_o|^2 / var v)^(1/4)

so that an error of a channel counts, where rows are rounded, as it counts in logits and outputs;
q^2 and |W_o|^2 are summed over the query heads of the group. Scales are those of a head up to a
common factor, which a row's own scale makes up for. Both are rounded to float16, in which caches
hold them.

The curves of ``less.fit.curves`` are divided by the mean squared norm of the residual stream that
enters their layer, over the tokens that curves count: an error matters as it changes the stream.
Where chunks that repeat a passage are given too, a curve is three parts of the text's and one of
theirs: in a text that says little twice, heads that find what was said before seem to need nothing.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from less.calibration import CURVE, Calibration
from less.fit.capture import Captured, LayerWalk
from less.fit.curves import first_counted, grid, measure_curves
from less.hf.models import describe
from less.sidekick.identity import model_identity

#: The part that chunks which repeat a passage have in a curve: docs/budgets.md.
REPEATED = 0.25
_FIRST = 4  # tokens of a chunk that are left out
_SHORTEST = 32  # tokens of a chunk, for curves
_MOST = 32.0  # what a scale may differ from a head's typical one by


def calibrate(
    model: Any,
    ids: Tensor,
    *,
    repeats: Tensor | None = None,
    budgets: bool = True,
    source: str = "",
    name: str | None = None,
    show: Callable[[float, float], None] = lambda done, total: None,
) -> Calibration:
    """Measure a model's channels over a text, and the curves of its heads.

    Args:
        model: A transformers causal language model that a bounded cache can serve, on any device.
        ids: Token ids, int64 [chunks, tokens].
        repeats: Token ids of chunks that repeat a passage (``less.fit.text.repeat_passage``), int64
            [chunks, tokens]; None: curves are those of the text alone.
        budgets: Whether to measure curves, for budgets per head: most of the time.
        source: Where the text comes from, for the record.
        name: The model's name, for the record; the last part of its path by default.
        show: Called with the layers that are done, in parts, and how many there are.

    Returns:
        Means, scales and curves of every layer that does not slide.

    Raises:
        ValueError: No bounded cache can serve the model, or there are too few tokens.
    """
    N, T = ids.shape
    if budgets and T < _SHORTEST:
        raise ValueError(
            f"calibrate: ids must have chunks of {_SHORTEST} tokens or more for budgets, got {T}"
        )
    if repeats is not None and (not budgets or repeats.shape[1:] != ids.shape[1:]):
        raise ValueError(
            f"calibrate: repeats must be chunks of {T} tokens like ids, of which curves are "
            f"measured, got {list(repeats.shape)} and budgets={budgets}"
        )
    capacities = grid(T) if budgets else ()
    if N * (T - _FIRST) < 256:
        raise ValueError(f"calibrate: ids must have 256 tokens or more, got {N} chunks of {T}")
    begun = time.perf_counter()
    facts = describe(model, "calibrate")
    record = model_identity(model)
    if name is not None:
        record["name"] = name
    layers: list[dict[str, Tensor] | None] = []

    def show_from(layer: int) -> Callable[[float], None]:
        return lambda part: show(round(layer + part, 1), facts.layers)

    with tempfile.TemporaryDirectory(prefix="less-calibrate-") as folder:
        walk = LayerWalk(model, ids if repeats is None else torch.cat([ids, repeats]), folder)
        walk.start()
        last = max(i for i in range(facts.layers) if i not in facts.windows)
        for layer in range(last + 1):
            walk.seek(layer)
            if layer in facts.windows:
                layers.append(None)
            else:
                captured = walk.capture(layer)
                measured = {n: x.half().float() for n, x in measure(captured, N).items()}
                if capacities:
                    curves = measure_curves(captured, capacities, show_from(layer))
                    power = walk.mean_square(layer, first_counted(T))
                    measured[CURVE] = _mean_curve(curves, N) / power
                layers.append(measured)
                walk.release(layer)
            show(layer + 1, facts.layers)
        show(facts.layers, facts.layers)
    layers += [None] * (facts.layers - len(layers))
    config = {
        "model": record,
        "text": source,
        "tokens": ids.numel(),
        "chunks": N,
        "repeats": 0 if repeats is None else len(repeats),
        "seconds": round(time.perf_counter() - begun, 1),
    }
    return Calibration(layers, config, capacities, T if capacities else 0)


def _mean_curve(curves: Tensor, texts: int) -> Tensor:
    """The curve of each head, float32 [K, n], of chunks' [N, K, n], the first of which are text."""
    mean = curves[:texts].mean(0)
    return mean.lerp(curves[texts:].mean(0), REPEATED) if len(curves) > texts else mean


def measure(captured: Captured, chunks: int | None = None) -> dict[str, Tensor]:
    """Means and scales of one layer's channels, float32 [K, D] each, by the names of a calibration.

    Args:
        captured: What its attention saw.
        chunks: The first ones count; None: all.
    """
    k, v, q = (x[:chunks, :, _FIRST:] for x in (captured.k, captured.v, captured.q))
    K, D = k.shape[1], k.shape[3]
    key_mean, key_var = _moments(k)
    value_mean, value_var = _moments(v)
    queries = torch.zeros(K, D, dtype=torch.float64)
    for chunk in q:
        queries += chunk.double().square().sum(1).view(K, -1, D).sum(1).cpu()
    weight = captured.o_weight.double().square().sum(0).view(K, -1, D).sum(1).cpu()
    return {
        "key_mean": key_mean.float(),
        "key_scale": _scale(queries, key_var),
        "value_mean": value_mean.float(),
        "value_scale": _scale(weight, value_var),
    }


def key_mean(k: Tensor) -> Tensor:
    """The mean of keys [N, K, T, D], as ``measure`` has it: float32 [K, D], on the CPU."""
    return _moments(k[:, :, _FIRST:])[0].float()


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of [N, K, T, D] over N and T, float64 [K, D], a chunk at a time."""
    count = x.shape[0] * x.shape[2]
    mean = sum((chunk.double().sum(1).cpu() for chunk in x), torch.zeros(())) / count
    square = torch.zeros_like(mean)
    for chunk in x:
        square += (chunk.double().cpu() - mean[:, None]).square().sum(1)
    return mean, square / count


def _scale(weight: Tensor, variance: Tensor) -> Tensor:
    """(weight / variance)^(1/4) of each channel, about 1 in every head: float32 [K, D]."""
    least = 1e-12
    log = ((weight + least).log() - (variance + least).log()) / 4
    log = log - log.mean(1, keepdim=True)
    most = float(torch.tensor(_MOST).log())
    return log.clamp(-most, most).exp().float()
