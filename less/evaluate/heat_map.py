"""Which heads get a budget that curves deal out: a map of layers by kv heads."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

from less.calibration import Calibration
from less.config import LessConfig
from less.files import write_whole

_SHADES = " ░▒▓█"
_NUMBERS = 16  # kv heads of a layer whose slots are written out; of more there are shades alone

Slots = Sequence["tuple[int, ...] | None"]  # of each layer's heads; None where it slides


def dealt_slots(calibration: Calibration, tokens: int) -> Slots:
    """The slots of each layer's heads, None where it slides, at a mean of so many.

    Args:
        calibration: With curves.
        tokens: The mean over heads.
    """
    layers = range(len(calibration))
    slides = [i for i in layers if calibration.curve(i) is None]
    config = LessConfig(tokens=tokens, shape="calibrated")
    dealt = config.capacities(len(layers), native=slides, calibration=calibration)
    return [kept if isinstance(kept, tuple) else None for kept in dealt]


def text(slots: Slots) -> str:
    """A line for each layer, and one for the 10th, 50th and 90th percentile of all heads.

    A head's shade grows by an octave of slots, from half the median on.
    """
    every = [n for layer in slots for n in layer or ()]
    tenths = statistics.quantiles(every, n=10, method="inclusive") if len(every) > 1 else every * 9
    middle = tenths[4]

    def shade(n: int) -> str:
        return _SHADES[min((2 * n / middle).__trunc__().bit_length(), len(_SHADES) - 1)]

    lines = []
    for i, layer in enumerate(slots):
        if layer is None:
            row = "  slides"
        elif len(layer) > _NUMBERS:
            row = " " + "".join(map(shade, layer))
        else:
            row = "".join(f"{n:>7,}{shade(n)}" for n in layer)
        lines.append(f"{i:>4}{row}".rstrip())
    percentiles = ", ".join(f"{round(tenths[i]):,}" for i in (0, 4, 8))
    lines.append(f"10th, 50th and 90th percentile: {percentiles}; most {max(every):,}")
    return "\n".join(lines)


def plot(slots: Slots, path: Path, title: str) -> None:
    """Draw the map into a file, of a format by its name's ending."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.colors import LogNorm

    heads = max(len(layer) for layer in slots if layer is not None)
    grid = [[float("nan")] * heads if layer is None else list(layer) for layer in slots]
    size = (3.5 + 0.25 * heads, 1.5 + 0.2 * len(slots))
    figure, axes = plt.subplots(figsize=size, layout="constrained")
    image = axes.imshow(grid, norm=LogNorm(), aspect="auto", cmap="viridis")
    axes.set_xlabel("kv head")
    axes.set_ylabel("layer")
    axes.set_title(title, fontsize=10)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.yaxis.get_major_locator().set_params(integer=True)
    figure.colorbar(image, label="slots")
    write_whole(path, lambda part: figure.savefig(part, dpi=150))
    plt.close(figure)
