"""What the budget of a ``LessConfig`` comes to: in tokens of its layers, and in slots of heads."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Union

from less.budget import deal, deal_curves, most_within, pyramid
from less.calibration import Calibration

#: What a layer keeps: tokens per kv head, or one number for each head; None where it slides.
Kept = Union[int, "tuple[int, ...]", None]
_MORE = 12  # slots that every head gets beyond the fewest, where curves deal the budget out


@dataclass(frozen=True)
class TokenBudget:
    """A budget in tokens per head, the mean over bounded layers."""

    mean: int

    @classmethod
    def of(cls, tokens: int | None, share: float | None, prompt_tokens: int | None) -> TokenBudget:
        """From a number of tokens, or a share of the prompt.

        Raises:
            ValueError: The prompt's length is not given, or the share of it is less than a token.
        """
        if share is None:
            assert tokens is not None
            return cls(tokens)
        if prompt_tokens is None:
            raise ValueError("LessConfig: share needs prompt_tokens, the prompt's length")
        mean = round(share * prompt_tokens)
        if mean < 1:
            raise ValueError(
                f"LessConfig: share={share} of {prompt_tokens} tokens is less than one"
            )
        return cls(mean)

    def tokens(self, weights: Sequence[float], fewest: int) -> int:
        """Tokens of all bounded layers together."""
        return self.mean * len(weights)

    def left(self, layers: int, fewest: int) -> int:
        """Tokens per head of all bounded layers beyond the fewest of each.

        Raises:
            ValueError: There are less than those.
        """
        if self.mean < fewest:
            raise ValueError(
                f"LessConfig: every head must keep {fewest} tokens or more, got a mean of "
                f"{self.mean}; raise the budget"
            )
        return (self.mean - fewest) * layers

    def cost(self, tokens: int) -> int:
        """What a layer takes of the budget that keeps so many tokens per head."""
        return tokens


@dataclass(frozen=True)
class ByteBudget:
    """A budget in bytes, and what it pays for.

    Attributes:
        nbytes: The budget.
        layer_bytes: From the tokens per head that a layer keeps, and whether it evicts and so may
            have a state, to the layer's bytes over all rows.
        held: Bytes that it pays for beside the bounded layers, by what they are.
    """

    nbytes: int
    layer_bytes: Callable[[int, bool], int]
    held: Mapping[str, int]

    def tokens(self, weights: Sequence[float], fewest: int) -> int:
        """Tokens of all bounded layers together, of which each can have ``fewest``."""
        spare = self.left(len(weights), fewest)

        def cost(total: int) -> int:
            return sum(self.cost(max(tokens, fewest)) for tokens in deal(total, weights))

        return most_within(spare + cost(0), cost)

    def left(self, layers: int, fewest: int) -> int:
        """Bytes that are left once each bounded layer keeps ``fewest`` tokens per head.

        Raises:
            ValueError: Less than none are.
        """
        least = sum(self.held.values()) + layers * self.cost(fewest)
        if self.nbytes < least:
            beside = " and ".join(f"{n:,} bytes of {what}" for what, n in self.held.items() if n)
            count = "one token" if fewest == 1 else f"{fewest} tokens"
            raise ValueError(
                f"LessConfig: bytes={self.nbytes:,} cannot hold {count} per head in each of "
                f"{layers} layers{' beside ' if beside else ''}{beside}: that takes {least:,}"
            )
        return self.nbytes - least

    def cost(self, tokens: int) -> int:
        """What a layer takes of the budget that keeps so many tokens per head."""
        return self.layer_bytes(tokens, True)


def layer_weights(shape: str | Sequence[float], beta: float, layers: int) -> list[float]:
    """What each layer gets in proportion, by a shape that is not calibrated."""
    if shape == "uniform":
        return [1.0] * layers
    if shape == "pyramid":
        return pyramid(layers, beta)
    assert not isinstance(shape, str)
    check_length("shape", shape, layers)
    return [float(weight) for weight in shape]


def check_length(name: str, values: Sequence[object], layers: int) -> None:
    """Refuse a list that has not one number per layer."""
    if len(values) != layers:
        raise ValueError(
            f"LessConfig: {name} must list {layers} numbers, one per layer, got {len(values)}"
        )


def by_curves(
    calibration: Calibration | None,
    layers: int,
    bounded: Sequence[int],
    budget: ByteBudget | TokenBudget,
    fewest: int,
) -> list[tuple[int, ...]]:
    """Slots of the heads of each bounded layer, by the curves of a calibration.

    Args:
        calibration: Of these heads.
        layers: Number of layers.
        bounded: Indices of those that are bounded.
        budget: What is dealt out.
        fewest: Slots that a head must have. Each gets a dozen more, where the budget pays for that.

    Raises:
        ValueError: There are no curves, they are another model's, or the budget is too small.
    """
    if calibration is None or not calibration.capacities:
        got = "none" if calibration is None else "one without curves"
        raise ValueError(
            "LessConfig: shape='calibrated' needs a calibration with curves, as less-kv calibrate "
            f"writes it, got {got}"
        )
    calibration.check("LessConfig", layers, calibration.kv_heads, calibration.head_dim)
    curves = []
    for i in bounded:
        curve = calibration.curve(i)
        if curve is None:
            raise ValueError(f"LessConfig: calibration must have a curve of layer {i}, got none")
        curves.append(curve)
    # Costs are those of a layer whose heads all have so many slots: K times a head's.
    base, spare = budget.cost(fewest), budget.left(len(bounded), fewest)

    def cost(slots: int) -> int:
        return budget.cost(slots) - base

    more = most_within(spare, lambda more: len(bounded) * cost(fewest + more))
    least = fewest + min(more, _MORE)
    return deal_curves(curves, calibration.capacities, calibration.kv_heads * spare, cost, least)


def most(kept: int | tuple[int, ...]) -> int:
    """Slots of a layer's head with the most."""
    return kept if isinstance(kept, int) else max(kept)


def joined(parts: Sequence[Kept]) -> list[int] | None:
    """The slots of a layer's heads, over all processes; None where all have those of the policy."""
    lists = [part for part in parts if isinstance(part, tuple)]
    return [slots for part in lists for slots in part] if lists else None
