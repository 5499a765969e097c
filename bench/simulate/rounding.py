"""Squared error of a model's rows under each quantiser: ``python -m bench.simulate.rounding``.

In parts per thousand of their squares, keys and values in a calibrated space and in Hadamard alone:
what a quantiser does, without the noise that a text's nats have.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn

from bench.simulate import quantizers
from bench.simulate.model import calibrate, full, narrow, nats
from bench.simulate.native import Quantizer, round_rows
from bench.simulate.space import FIRST, space_by_name
from less.evaluate import assets

NAMES = [
    *("lloyd", "lloyd:none", "lloyd:product", "max", "max:product", "rms", "fullmax", "absmax"),
    *("lloyd/32", "max/32", "rms/32", "absmax/32"),
]
EVERY = 4  # of a text's rows one in so many


def rows_of(
    model: nn.Module, chunks: Tensor, calibration: Tensor
) -> tuple[list[Tensor], list[Tensor]]:
    """Rows [N, D] of each layer in the calibrated space and in Hadamard alone: (keys, values)."""
    known = calibrate(model, calibration)
    keys: list[list[Tensor]] = [[], []]
    values: list[list[Tensor]] = [[], []]

    def attend(
        module: nn.Module, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float
    ) -> Tensor:
        for i, name in enumerate(("calibrated", "hadamard")):
            space = space_by_name(name, known)
            assert space is not None
            _, *rows = space(layer, q, k, v, module.o_proj.weight).enter(q, k, v)
            for into, x in zip((keys, values), rows, strict=True):
                into[i].append(x[:, FIRST::EVERY].reshape(-1, x.shape[-1]))
        return full(module, layer, q, k, v, scale)

    nats(model, chunks, attend, chunks.shape[1] - 1)
    return [torch.cat(x) for x in keys], [torch.cat(x) for x in values]


def error(x: Tensor, rows: Quantizer) -> float:
    """Mean over rows of the part of a row's square that rounding takes, in parts per thousand."""
    lost = (round_rows(x, rows) - x).square().sum(1)
    return 1000 * float((lost / x.square().sum(1).clamp(min=1e-30)).mean())


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(prog="python -m bench.simulate.rounding", description=__doc__)
    parser.add_argument("--model", default="smollm2", help="smollm2, a folder, or a hub name")
    parser.add_argument("--chunks", type=int, default=2)
    args = parser.parse_args()
    model, tokenizer = assets.load_model(args.model)
    narrow(model)
    chunks, calibration = (
        assets.chunks(tokenizer, assets.wikipedia_articles(split), 1024, args.chunks)
        for split in ("eval", "train")
    )
    keys, values = rows_of(model, chunks, calibration)
    D = keys[0].shape[-1]
    gaussian = torch.randn(20000, D, generator=torch.Generator().manual_seed(0))
    sets = [gaussian, keys[0], values[0], keys[1], values[1]]
    print("| bits | quantiser | Gaussian | keys | values | keys, Hadamard | values, Hadamard |")
    print("|---:|---|---:|---:|---:|---:|---:|")
    for bits in (4, 3, 2):
        for name in NAMES:
            rows = quantizers.named(name, bits, D)
            cells = " | ".join(f"{error(x, rows):.2f}" for x in sets)
            print(f"| {bits} | {name} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
