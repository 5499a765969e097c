"""The model's side of a cache: columns passed in, which text they are, sliding layers.

Nothing here changes a layer's tokens; those lie in its pages. Here is what a transformers model
asks of its cache, and the digest that distinguishes one text from another.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from less.backend import HalfWrittenError
from less.cache.turn import Turn

_PRIME = 2**31 - 1  # products of two residues fit in int64
_BASE = 1_103_515_245


def extend_digest(digest: Tensor, ids: Tensor, valid: Tensor | None) -> Tensor:
    """Append tokens to the hash of a text, row by row: h <- h * base + (id + 1), modulo a prime.

    Appending is associative, so the tokens are combined in pairs: log2(T) steps, no loop over T.

    Args:
        digest: int64 [B], 0 for an empty text.
        ids: Token ids, integers [B, T].
        valid: bool [B, T], False for padding, which does not count. None: all valid.

    Returns:
        int64 [B].
    """
    add = (ids.to(torch.int64) + 1) % _PRIME
    mul = torch.full_like(add, _BASE)
    if valid is not None:
        add = add.masked_fill(~valid, 0)
        mul = mul.masked_fill(~valid, 1)
    while add.shape[1] > 1:
        if add.shape[1] % 2:
            add = torch.nn.functional.pad(add, (0, 1), value=0)
            mul = torch.nn.functional.pad(mul, (0, 1), value=1)
        add = (add[:, ::2] * mul[:, 1::2] + add[:, 1::2]) % _PRIME
        mul = mul[:, ::2] * mul[:, 1::2] % _PRIME
    if add.shape[1] == 0:
        return digest.clone()
    return (digest * mul[:, 0] + add[:, 0]) % _PRIME


class SlidingLayer(Protocol):
    """What is used of a sliding cache layer of transformers, ``DynamicSlidingWindowLayer``."""

    keys: Tensor | None  # [B, K, min(columns, window - 1), D]
    values: Tensor | None
    sliding_window: int
    cumulative_length: int  # columns seen
    device: torch.device  # once there are keys

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Note dtype and device."""

    def update(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        """Add tokens; returns those that the call's queries may see, and the call's own."""

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of what ``update`` will return."""

    def reset(self) -> None:
        """Forget everything."""


def sliding_tensors(layer: SlidingLayer) -> dict[str, Tensor]:
    """What a sliding layer holds; nothing before its first token."""
    if layer.keys is None or layer.values is None:
        return {}
    return {"keys": layer.keys, "values": layer.values}


def loaded_sliding(
    layer: SlidingLayer,
    tensors: Mapping[str, Tensor],
    index: int,
    columns: int,
    device: torch.device,
) -> Callable[[], None]:
    """Copy a snapshot's ``<index>.keys`` and ``<index>.values``; what is returned puts them in."""
    copies = [tensors[f"{index}.{n}"].to(device, copy=True) for n in ("keys", "values") if columns]

    def put() -> None:
        layer.reset()
        if copies:
            layer.lazy_initialization(*copies)
            layer.keys, layer.values = copies
            layer.cumulative_length = columns

    return put


class Bound(Protocol):
    """The side of ``attach`` that a cache knows."""

    def hand(self, layer_idx: int, key: Tensor) -> None:
        """Take note of keys on their way to the attention function."""

    def update_sliding(self, layer_idx: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store keys and values in a sliding layer; returns those to attend to."""


class Session:
    """The side of a cache that its model knows.

    Args:
        layers: Number of layers.
        batch: Batch rows B.
        device: Where the cache lives.
        sliding: Indices of layers that slide.

    Attributes:
        columns: Columns passed to each layer, padding included.
        bound: The model that the cache is attached to, or None.
        sliding: The cache layers of transformers that serve the layers that slide; None until
            ``less.hf``, which knows the windows, makes them.
        sliding_seen: Tokens that each of those has seen, int64 [B].
        passing: Columns before a model's forward pass that has not ended; None: there is none.
        turn: Whose calls change the cache.
        other_weights: What was last said of a model whose weights are not the sidekick's; see
            ``less.hf.weights``.
    """

    def __init__(
        self, layers: int, batch: int, device: torch.device, sliding: Sequence[int]
    ) -> None:
        self.columns = [0] * layers
        self.bound: Bound | None = None
        self.passing: int | None = None
        self.turn = Turn()
        self.other_weights = ""
        self.sliding: dict[int, SlidingLayer | None] = dict.fromkeys(sliding)
        self.sliding_seen = {
            i: torch.zeros(batch, dtype=torch.int64, device=device) for i in sliding
        }
        self._batch, self._device = batch, device
        # What was fed through a model, per row: tokens and their digest, int64 [B, 2]. Unlike the
        # ids it does not grow; it is what tells a continuation from a second prompt.
        self._fed: Tensor | None = None

    def made(self) -> list[tuple[int, SlidingLayer]]:
        """The sliding layers that there are, with their indices."""
        return [(i, at) for i, at in self.sliding.items() if at is not None]

    def counted(self, layer: int, tokens: int, run: Callable[[], Tensor]) -> Tensor:
        """Run a layer's call, and count its columns: unless it fails, which changes nothing.

        They are counted first. A call that is interrupted, at whatever point, is then ahead of the
        other layers' and found unfinished.

        Raises:
            RuntimeError: Another call is under way, or one stopped half way; or this one did.
        """
        if torch.compiler.is_compiling():  # a graph changes what is not a tensor at its end alone
            self.columns[layer] += tokens
            return run()
        self.turn.take("attend")
        whole = False
        try:
            self.columns[layer] += tokens
            out = run()
            whole = True
        except HalfWrittenError:
            raise
        except Exception:
            self.columns[layer] -= tokens
            whole = True
            raise
        finally:
            self.turn.give(whole)
        return out

    def reset(self) -> None:
        """Forget every text."""
        self.passing = None
        self.columns = [0] * len(self.columns)
        for _, at in self.made():
            at.reset()
        for seen in self.sliding_seen.values():
            seen.zero_()

    def reordered(self, rows: Tensor) -> Callable[[], None]:
        """Copy rows, row i from row ``rows[i]``: int64 [B]; what is returned puts them in place."""
        held = list(self.sliding_seen.values())
        held += [self._fed] if self._fed is not None else []
        copies = [x.index_select(0, rows.to(x.device)) for x in held]
        layers = [
            (at, {n: x.index_select(0, rows.to(x.device)) for n, x in sliding_tensors(at).items()})
            for _, at in self.made()
        ]

        def put() -> None:
            for x, copy in zip(held, copies, strict=True):
                x.copy_(copy)
            for at, tensors in layers:
                vars(at).update(tensors)

        return put

    def moved(self, device: torch.device) -> Callable[[], None]:
        """Copy all tensors to a device; what is returned puts the copies in place."""
        fed = self.fed_tokens().to(device)
        seen = {i: x.to(device) for i, x in self.sliding_seen.items()}
        layers = [
            (at, {n: x.to(device) for n, x in sliding_tensors(at).items()}) for _, at in self.made()
        ]

        def put() -> None:
            self._fed, self.sliding_seen, self._device = fed, seen, device
            for at, tensors in layers:
                vars(at).update(tensors)
                if tensors:
                    at.device = device

        return put

    # -- which text is in the cache --------------------------------------------------------------

    def fed_tokens(self) -> Tensor:
        """Tokens fed through a model and their digest, int64 [B, 2]; anew after a reset."""
        if self._fed is None:
            with torch.inference_mode(False):  # whatever mode later calls run in
                self._fed = torch.zeros(self._batch, 2, dtype=torch.int64, device=self._device)
        elif max(self.columns) == 0:  # reset
            self._fed.zero_()
        return self._fed

    def feed(self, ids: Tensor, valid: Tensor | None) -> None:
        """Note tokens that a model has just passed through every layer."""
        fed = self.fed_tokens()
        ids = ids.to(fed.device)
        if valid is None:
            fed[:, 0] += ids.shape[1]
        else:
            valid = valid.to(fed.device)
            fed[:, 0] += valid.sum(1)
        fed[:, 1] = extend_digest(fed[:, 1], ids, valid)

    def is_prefix(self, ids: Tensor, valid: Tensor | None, seen: Tensor) -> bool | None:
        """Whether these are the tokens seen; None where some of them came another way.

        Args:
            ids: Token ids, integers [B, T].
            valid: bool [B, T], False for padding. None: all valid.
            seen: Tokens that the cache has seen, int64 [B].
        """
        fed = self.fed_tokens()
        if not torch.equal(fed[:, 0], seen.to(fed.device)):
            return None
        ids = ids.to(fed.device)
        valid = valid.to(fed.device) if valid is not None else None
        count = ids.new_full((self._batch,), ids.shape[1]) if valid is None else valid.sum(1)
        digest = extend_digest(torch.zeros_like(fed[:, 1]), ids, valid)
        return torch.equal(fed[:, 0], count) and torch.equal(fed[:, 1], digest)

    def load_fed(self, fed: Tensor) -> None:
        """Put a snapshot's record in place, int64 [B, 2], after the rest is loaded."""
        self.passing = None
        self.fed_tokens().copy_(fed)
