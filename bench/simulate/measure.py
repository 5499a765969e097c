"""What a simulated cache costs a model on a text, beside full attention and plain H2O."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from bench.simulate import quantizers
from bench.simulate.budgets import Curves, curves
from bench.simulate.model import SidekickFeatures, bounded, calibrate, nats
from bench.simulate.native import Cache, Noise
from bench.simulate.space import Moments, space_by_name
from less.budget import deal_curves, most_within
from less.evaluate.perplexity import Nats, recovered
from less.fit.calibrate import REPEATED
from less.layer.layout import PageLayout, placed

LEAST_COLD = 12  # cold slots that every head is dealt
METADATA = {"forget": 6, "merge": 8, "fold": 6}  # bytes of a packed slot: position, score, count


@dataclass(frozen=True)
class Setting:
    """A row of the table.

    Attributes:
        rows: Bits of keys and values, as in ``k4v3``; 16 is fp16, 8 is int8.
        bytes_of: 16-bit tokens whose bytes are spent, those of a page; 0: nothing is evicted.
        quantizer: A name that ``quantizers.named`` knows.
        space: One of ``SPACES``.
        victim: One of ``VICTIMS``, or ``"fold"``: into a state.
        budgets: Slots are dealt to the heads by the curves of the training text.
        repeated: The part that chunks which repeat a passage have in these curves.
        hot: Last tokens in int8.
        sinks: First tokens in int8.
        decay: What a score keeps per token.
        recent: Part of the slots that hold the last tokens.
        metadata: Bytes of a slot beside its rows and their scales; None: as the cache has them.
        state: Bytes of a head beside its slots.
    """

    rows: str
    bytes_of: int
    quantizer: str = "max"
    space: str = "calibrated"
    victim: str = "forget"
    budgets: bool = False
    repeated: float = REPEATED
    hot: int = 16
    sinks: int = 4
    decay: float = 0.98
    recent: float = 0.25
    metadata: int | None = None
    state: int = 0

    def cache(self, D: int, slots: Sequence[int]) -> Cache:
        """The cache to simulate of rows of D numbers, given the slots of each head.

        The part that is recent is counted of the mean over `slots`, then scaled head by head, as
        a policy's rule is.
        """
        hot = self.sinks + self.hot
        if min(slots) <= hot:
            raise ValueError(
                f"--bytes-of must leave cold slots beside {hot} hot ones, "
                f"got {self.bytes_of}: {min(slots)} slots"
            )
        k, v = (quantizers.named(self.quantizer, bits, D) for bits in bits_of(self.rows))
        return Cache(
            k, v, [S - hot for S in slots], sinks=self.sinks, hot=self.hot,
            recent=[int(self.recent * S) for S in slots], decay=self.decay,
            half_scores=any(bits < 8 for bits in bits_of(self.rows)),
            int8_queries=k.kind == "table",
            victim="forget" if self.victim == "fold" else self.victim,
        )  # fmt: skip

    def slots(self, D: int, length: int) -> int:
        """Slots of a kv head, hot ones included, where all have equally many."""
        if not self.bytes_of:
            return length
        return most_within(self.room(D), lambda slots: self.head_bytes(D, slots))

    def room(self, D: int) -> int:
        """Bytes of a kv head."""
        layout = PageLayout(1, D, self.bytes_of, torch.float16)
        return layout.nbytes - layout.header_bytes

    def head_bytes(self, D: int, slots: int) -> int:
        """Bytes of a kv head of so many slots, its fields placed as those of a page."""
        group = quantizers.named(self.quantizer, 4, D).group
        hot = min(self.sinks + self.hot, slots)
        metadata = METADATA[self.victim] if self.metadata is None else self.metadata
        fields = {"position": (slots, min(metadata, 4))}
        for label, bits in zip("kv", bits_of(self.rows), strict=True):
            scales = 0 if bits == 16 else 4 if bits == 8 else 2 * (D // (group or D))
            cold = slots - hot
            fields |= {
                f"hot_{label}": (hot, D),
                f"hot_{label}_scale": (hot, 4),
                label: (cold, D * bits // 8),
                f"{label}_scale": (cold, scales),
            }
        fields["others"] = (slots, max(metadata - 4, 0))
        return placed(fields)[1] + self.state

    def __str__(self) -> str:
        words = [f"{self.rows} {self.quantizer}", self.space, self.victim]
        words += [f"budgets {self.repeated} repeated"] if self.budgets else []
        words += [f"hot {self.hot}", f"decay {self.decay}", f"recent {self.recent}"]
        words += [] if self.metadata is None else [f"metadata {self.metadata}"]
        words += [f"bytes of {self.bytes_of}" if self.bytes_of else "nothing evicted"]
        return ", ".join(words)


def bits_of(rows: str) -> list[int]:
    """Bits of keys and of values."""
    return [int(bits) for bits in rows[1:].split("v")]


@dataclass
class Measurement:
    """A model and its text.

    Attributes:
        model: A causal language model of transformers.
        chunks: Token ids, int64 [chunks, length].
        start: Position that scoring starts from.
        training: Token ids that calibration sees, int64 [chunks, length].
        repeats: Those of chunks that repeat a passage, for curves, int64 [chunks, length].
    """

    model: Any
    chunks: Tensor
    start: int
    training: Tensor
    repeats: Tensor
    _known: dict[int, Moments] = field(default_factory=dict)
    _measured: dict[int, Nats] = field(default_factory=dict)
    _curves: list[Curves] = field(default_factory=list)

    @property
    def head_dim(self) -> int:
        """Head dim."""
        config = self.model.config.get_text_config()
        return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads

    @property
    def kv_heads(self) -> int:
        """Kv heads of a layer."""
        config = self.model.config.get_text_config()
        return int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)

    @property
    def full(self) -> Nats:
        """Full attention."""
        if 0 not in self._measured:
            self._measured[0] = nats(self.model, self.chunks, None, self.start)
        return self._measured[0]

    def h2o(self, tokens: int) -> Nats:
        """Plain H2O of fp16 rows, half of them recent."""
        if tokens not in self._measured:
            half = quantizers.HALF
            plain = Cache(half, half, tokens, half, sinks=0, hot=0, recent=tokens // 2, decay=1.0)
            self._measured[tokens] = nats(
                self.model, self.chunks, bounded(lambda layer: plain, None), self.start
            )
        return self._measured[tokens]

    def calibrated(self) -> dict[int, Moments]:
        """Moments of the training text."""
        if not self._known:
            self._known = calibrate(self.model, self.training)
        return self._known

    def curves(self, repeated: float) -> Curves:
        """Error curves of the training text, and of repeated passages in part."""
        if not self._curves:
            self._curves = [curves(self.model, ids) for ids in (self.training, self.repeats)]
        text, repeats = self._curves
        return Curves(
            text.capacities,
            {i: error.lerp(repeats.error[i], repeated) for i, error in text.error.items()},
        )

    def capacities(self, setting: Setting, measured: Curves | None = None) -> dict[int, list[int]]:
        """Slots of each head, by layer; of the curves of the training text, or of others."""
        measured = measured or self.curves(setting.repeated)
        D, K = self.head_dim, self.kv_heads
        dealt = deal_curves(
            list(measured.error.values()),
            measured.capacities,
            len(measured.error) * K * setting.room(D),
            lambda slots: setting.head_bytes(D, slots),
            setting.sinks + setting.hot + LEAST_COLD,
        )
        return {layer: list(heads) for layer, heads in zip(measured.error, dealt, strict=True)}

    def measure(
        self,
        setting: Setting,
        capacities: dict[int, list[int]] | None = None,
        sidekick: SidekickFeatures | None = None,
    ) -> tuple[str, dict[str, Any]]:
        """A row of the table, and all of it unrounded.

        Args:
            setting: The row.
            capacities: Slots of each head, by layer; None: as the setting has them.
            sidekick: What makes the low-rank state, of victim ``"fold"``; None: there is none.
        """
        began = time.perf_counter()
        noise = Noise(*torch.zeros(2, 2, dtype=torch.float64))
        known = self.calibrated() if setting.space in ("calibrated", "means") else {}
        slots = setting.slots(self.head_dim, self.chunks.shape[1])
        if capacities is None and setting.budgets:
            capacities = self.capacities(setting)
        K = self.kv_heads
        caches = defaultdict(lambda: setting.cache(self.head_dim, [slots] * K))
        for layer, heads in (capacities or {}).items():
            caches[layer] = setting.cache(self.head_dim, heads)
        features = sidekick if setting.victim == "fold" else None
        attend = bounded(caches.__getitem__, space_by_name(setting.space, known), noise, features)
        measured = nats(self.model, self.chunks, attend, self.start)
        h2o = self.h2o(setting.bytes_of) if setting.bytes_of else None
        record = {
            **asdict(setting),
            "slots": slots,
            "capacities": capacities,
            "perplexity": measured.perplexity(self.start),
            "loss": self._loss(measured).tolist(),
            "h2o": self._loss(h2o).tolist() if h2o else None,
            "noise": (noise.error / noise.power).tolist(),
            "seconds": time.perf_counter() - began,
        }
        return self.row(str(setting), slots, measured, h2o), record

    def row(self, name: str, slots: int, measured: Nats, h2o: Nats | None = None) -> str:
        """A row of the table; standard errors are paired over chunks."""
        loss, share = self._loss(measured), ""
        error = float(loss.std()) / math.sqrt(len(loss)) if len(loss) > 1 else math.nan
        if h2o is not None:
            won = recovered(self.full, h2o, measured, self.start)
            share = f"{100 * won.share:.1f} ± {100 * won.error:.1f}"
        perplexity = measured.perplexity(self.start)
        return (
            f"| {name} | {slots} | {perplexity:.3f} | {float(loss.mean()):.4f} ± {error:.4f} "
            f"| {share} |"
        )

    def _loss(self, measured: Nats) -> Tensor:
        return measured.per_chunk(self.start) - self.full.per_chunk(self.start)
