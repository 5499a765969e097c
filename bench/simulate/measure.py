"""What a simulated cache costs a model on a text, beside full attention and plain H2O."""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from bench.simulate import quantizers
from bench.simulate.model import bounded, calibrate, nats
from bench.simulate.native import Cache, Noise
from bench.simulate.space import Moments, space_by_name
from less.evaluate.perplexity import Nats, recovered

METADATA = 6  # bytes of a slot beside its rows and their scales


@dataclass(frozen=True)
class Setting:
    """A row of the table.

    Attributes:
        rows: Bits of keys and values, as in ``k4v3``; 16 is fp16, 8 is int8.
        quantizer: A name that ``quantizers.named`` knows.
        bytes_of: 16-bit tokens of today's pages whose bytes are spent; 0: nothing is evicted.
        space: One of ``SPACES``.
        hot: Last tokens in int8.
        sinks: First tokens in int8.
        decay: What a score keeps per token.
        recent: Part of the slots that hold the last tokens.
        half_scores: Scores are held in fp16.
    """

    rows: str
    quantizer: str
    bytes_of: int
    space: str
    hot: int
    sinks: int
    decay: float
    recent: float
    half_scores: bool

    def cache(self, D: int, length: int) -> Cache:
        """The cache to simulate, of rows of D numbers and texts of `length` tokens."""
        k, v = (quantizers.named(self.quantizer, bits, D) for bits in bits_of(self.rows))
        slots = self.slots(D, length)
        if slots <= self.sinks + self.hot:
            raise ValueError(
                f"--bytes-of must leave cold slots beside {self.sinks + self.hot} hot ones, "
                f"got {self.bytes_of}: {slots} slots"
            )
        return Cache(
            k, v, slots - self.sinks - self.hot, sinks=self.sinks, hot=self.hot,
            recent=round(self.recent * slots), decay=self.decay, half_scores=self.half_scores,
        )  # fmt: skip

    def slots(self, D: int, length: int) -> int:
        """Slots of a kv head, hot ones included."""
        if not self.bytes_of:
            return length
        group = quantizers.named(self.quantizer, 4, D).group
        hot = self.sinks + self.hot
        room = self.bytes_of * (4 * D + 12) - hot * slot_bytes("k8v8", D, 0)
        return hot + room // slot_bytes(self.rows, D, group)

    def __str__(self) -> str:
        scores = ", fp16 scores" if self.half_scores else ""
        spent = f"bytes of {self.bytes_of}" if self.bytes_of else "nothing evicted"
        return (
            f"{self.rows} {self.quantizer}, {self.space}, hot {self.hot}, "
            f"decay {self.decay}{scores}, {spent}"
        )


def bits_of(rows: str) -> list[int]:
    """Bits of keys and of values."""
    return [int(bits) for bits in rows[1:].split("v")]


def slot_bytes(rows: str, D: int, group: int) -> int:
    """Bytes of a slot: codes, scales of two bytes, metadata."""
    scales = 2 * (D // group if group else 1)
    return METADATA + sum(D * b // 8 + (scales if b < 16 else 0) for b in bits_of(rows))


@dataclass
class Measurement:
    """A model and its text.

    Attributes:
        model: A causal language model of transformers.
        chunks: Token ids, int64 [chunks, length].
        start: Position that scoring starts from.
        training: Token ids that calibration sees, int64 [chunks, length].
    """

    model: Any
    chunks: Tensor
    start: int
    training: Tensor
    _known: dict[int, Moments] = field(default_factory=dict)
    _measured: dict[int, Nats] = field(default_factory=dict)

    @property
    def head_dim(self) -> int:
        """Head dim."""
        config = self.model.config.get_text_config()
        return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads

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
            self._measured[tokens] = nats(self.model, self.chunks, bounded(plain, None), self.start)
        return self._measured[tokens]

    def calibrated(self) -> dict[int, Moments]:
        """Moments of the training text."""
        if not self._known:
            self._known = calibrate(self.model, self.training)
        return self._known

    def measure(self, setting: Setting) -> tuple[str, dict[str, Any]]:
        """A row of the table, and all of it unrounded."""
        began = time.perf_counter()
        noise = Noise(*torch.zeros(2, 2, dtype=torch.float64))
        known = self.calibrated() if setting.space in ("calibrated", "means") else {}
        length = self.chunks.shape[1]
        attend = bounded(
            setting.cache(self.head_dim, length), space_by_name(setting.space, known), noise
        )
        measured = nats(self.model, self.chunks, attend, self.start)
        h2o = self.h2o(setting.bytes_of) if setting.bytes_of else None
        record = {
            **asdict(setting),
            "slots": setting.slots(self.head_dim, length),
            "perplexity": measured.perplexity(self.start),
            "loss": self._loss(measured).tolist(),
            "h2o": self._loss(h2o).tolist() if h2o else None,
            "noise": (noise.error / noise.power).tolist(),
            "seconds": time.perf_counter() - began,
        }
        return self.row(str(setting), record["slots"], measured, h2o), record

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
