"""What each quantiser does to a model's rows: ``python -m bench.simulate.rounding``.

Two errors, in parts per thousand: of the rows themselves, and of what attention makes of them, a
layer at a time on exact inputs. Neither has the noise that a text's nats have.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from bench.simulate import quantizers
from bench.simulate.__main__ import texts_of
from bench.simulate.model import calibrate, full, narrow, nats
from bench.simulate.native import Cache, Quantizer, round_rows, simulate
from bench.simulate.space import FIRST, Space
from less.evaluate import assets

NAMES = [
    "lloyd", "lloyd:none", "lloyd:product", "max", "max:product", "rms", "fullmax:square", "absmax",
    "lloyd/32", "max/32", "rms/32", "absmax/32",
]  # fmt: skip
CALIBRATION = 4  # chunks
EVERY = 4  # of a text's rows one in so many


def row_error(x: Tensor, rows: Quantizer) -> float:
    """Mean over rows of the part of a row's square that rounding takes."""
    lost = (round_rows(x, rows) - x).square().sum(-1)
    return float((lost / x.square().sum(-1).clamp(min=1e-30)).mean())


def main(words: Sequence[str] | None = None) -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(prog="python -m bench.simulate.rounding", description=__doc__)
    parser.add_argument("--model", default="smollm2", help="smollm2, a folder, or a hub name")
    parser.add_argument("--text", type=Path, help="a file or folder; default: Wikipedia")
    parser.add_argument("--training", type=Path, help="the text of calibration, likewise")
    parser.add_argument("--chunks", type=int, default=1)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--quantizer", nargs="+", default=NAMES)
    args = parser.parse_args(words)
    model, tokenizer = assets.load_model(args.model)
    narrow(model)
    chunks, calibration = (
        assets.chunks(tokenizer, texts, args.length, count)
        for texts, count in zip(texts_of(args), (args.chunks, CALIBRATION), strict=True)
    )
    known = calibrate(model, calibration)
    table = [(bits, name) for bits in (4, 3, 2) for name in args.quantizer]
    errors = torch.zeros(len(table), 5)  # keys, values, output by keys, by values, by both
    layers = 0

    def attend(
        module: nn.Module, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float
    ) -> Tensor:
        nonlocal layers
        layers += 1
        T, D = k.shape[1:]
        weight = module.o_proj.weight.float()
        space = Space(k.shape[0], D, known[layer])
        q_in, k_in, v_in = space.enter(q, k, v)

        def projected(out: Tensor) -> Tensor:
            return out.transpose(0, 1).reshape(T, -1) @ weight.T

        exact = full(module, layer, q, k, v, scale)
        wanted = projected(exact)
        for i, (bits, name) in enumerate(table):
            rows = quantizers.named(name, bits, D)
            errors[i, 0] += row_error(k_in[:, FIRST::EVERY], rows)
            errors[i, 1] += row_error(v_in[:, FIRST::EVERY], rows)
            kinds = [(rows, quantizers.EXACT), (quantizers.EXACT, rows), (rows, rows)]
            for j, (cold_k, cold_v) in enumerate(kinds):
                cache = Cache(cold_k, cold_v, T, quantizers.EXACT)
                out = space.leave(simulate(q_in, k_in, v_in, cache, scale))
                lost = (projected(out) - wanted).square().sum()
                errors[i, 2 + j] += float(lost / wanted.square().sum())
        return exact

    nats(model, chunks, attend, chunks.shape[1] - 1)
    print("| bits | quantiser | keys | values | output, by keys | by values | by both |")
    print("|---:|---|---:|---:|---:|---:|---:|")
    for (bits, name), row in zip(table, (1000 * errors / layers).tolist(), strict=True):
        print(f"| {bits} | {name} | {' | '.join(f'{x:.2f}' for x in row)} |")


if __name__ == "__main__":
    main()
