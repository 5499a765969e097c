"""The maps under training, and the point that training starts from.

The start matters. With zero biases the features' mass phi.psi is unrelated to what it has to be,
and too much of it, which drowns the kept tokens, takes longest to unlearn. Here biases ("exp",
"centroid") or the scale s1 ("paper") are set from data: before the first step the mass, summed over
what was evicted, is e^START of what the evicted tokens weigh in full attention, in geometric mean
over queries, per query head ("exp", "centroid") or kv head ("paper"). A little below the full mass
(START = -2) is the better start: the geometric mean is exact for no query, and where it is too much
it costs more than where it is too little. docs/training.md has the measurements.

The inputs are divided by their root mean square, one number per head, which makes one learning rate
fit every layer and model; the divisors are folded into W1 and V1, or into the factors of centroids,
of the maps that leave. (One number per dimension, which flattens the directions that carry the
attention, trained worse.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from less.fit.objective import Rows, low_rank
from less.sidekick import TENSORS

START = -2.0  # nats between the evicted tokens' mass and the low-rank part's at the start


class Trainable:
    """A layer's maps as leaf tensors in normalised inputs.

    Args:
        kind: A name in ``less.layer.kinds.KINDS``.
        q: Queries to take the root mean square of, [N, Q, T, D].
        k: Keys likewise, [N, K, T, D]; of a centred kind without their mean.
        rank: R.
        hidden: E.
        generator: Draws the weights; on the CPU whatever the device, so that devices agree.
    """

    def __init__(
        self, kind: str, q: Tensor, k: Tensor, rank: int, hidden: int, generator: torch.Generator
    ) -> None:
        self.kind = kind
        sizes = {"Q": q.shape[1], "K": k.shape[1], "D": q.shape[3], "E": hidden, "R": rank}
        shapes = TENSORS[kind]
        rms = {"q": _rms(q), "k": _rms(k)}
        divided = [n for n, letters in shapes.items() if n[:2] in ("q_", "k_") and "D" in letters]
        divided += [n for n in shapes if n.endswith("_factor")]
        self._divisor = {n: rms[n[0]].view(-1, *[1] * (len(shapes[n]) - 1)) for n in divided}
        self.leaves: dict[str, Tensor] = {}
        for name, letters in shapes.items():
            shape = [sizes[c] for c in letters]
            x = torch.zeros(shape)
            if len(letters) == 3:  # [heads, in, out]
                x = torch.randn(shape, generator=generator) * sizes[letters[1]] ** -0.5
            elif name in ("k_scale", "q_factor", "k_factor"):
                x = torch.ones(shape)
            elif name == "k_mix_scale":
                x = torch.full(shape, 1e-4)  # as published; 0.1 and 1 trained worse
            self.leaves[name] = x.to(q.device).requires_grad_()

    @torch.no_grad()
    def begin_at(self, maps: Mapping[str, Tensor]) -> None:
        """Begin at a layer's maps, of these shapes."""
        for name, leaf in self.leaves.items():
            leaf.copy_(maps[name].to(leaf) * self._divisor.get(name, 1.0))

    def maps(self) -> dict[str, Tensor]:
        """The maps on inputs as they are: what the cache evaluates."""
        return {
            name: x / self._divisor[name] if name in self._divisor else x
            for name, x in self.leaves.items()
        }

    @torch.no_grad()
    def match_mass(self, batches: Sequence[Rows]) -> None:
        """Set biases or scales so that phi z is e^START of the mass of what was evicted."""
        total, count = torch.zeros(1), torch.zeros(1)
        for rows in batches:
            if rows.gone_log_mass is None:
                raise ValueError("match_mass: the batches must be prepared with gone_mass=True")
            mass, _ = low_rank(rows, self.maps(), self.kind)
            B, K = mass.shape[:2]
            gap = rows.gone_log_mass - mass[..., 0].clamp(min=1e-30).log()
            gap = gap.view(B, K, -1, rows.q.shape[2])  # [B, K, G, n]
            counted = gap.isfinite()  # rows that have lost something
            total = total.to(gap) + gap.where(counted, 0.0).sum((0, 3))
            count = count.to(gap) + counted.sum((0, 3))
        gap = total / count.clamp(min=1) + START  # [K, G], in nats
        shared = gap.mean(1, keepdim=True)  # [K, 1]
        if self.kind == "paper":
            self.leaves["k_scale"] *= shared.exp()
            return
        if self.kind == "centroid":
            self.leaves["k_offset"] += shared[:, 0] / 2
        else:
            self.leaves["k_bias"] += shared / 2
        self.leaves["q_bias"] += (gap - shared / 2).reshape(-1, 1)


def _rms(x: Tensor) -> Tensor:
    """Root mean square per head [H], never 0."""
    # Chunk by chunk: x is the largest tensor there is, and squaring it whole would double it.
    mean = torch.stack([c.float().square().mean((1, 2)) for c in x]).mean(0)
    return mean.sqrt().clamp(min=1e-6)
