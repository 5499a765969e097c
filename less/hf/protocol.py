"""What transformers asks of a cache, as a mixin; imports nothing of transformers.

transformers (5.23) treats a cache by its methods, so ``LessKVCache`` need not inherit from
``transformers.Cache``: it inherits ``CacheProtocol``. Two rules make the method fit the protocol:

- Lengths are counted in columns seen (padding included), never in slots held: rotary positions and
  masks follow from them.
- ``update`` stores nothing. Keys and values enter the cache in the attention function, together
  with the queries that they compete for; ``update`` hands them through to it. Without ``attach``
  nobody would take them, so an unbound ``update`` raises.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NoReturn, Protocol

import torch
from torch import Tensor

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


class NativeLayer(Protocol):
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

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Make row i what row ``beam_idx[i]`` was."""


def native_tensors(layer: NativeLayer) -> dict[str, Tensor]:
    """What a native layer holds; nothing before its first token."""
    if layer.keys is None or layer.values is None:
        return {}
    return {"keys": layer.keys, "values": layer.values}


def load_native(
    layer: NativeLayer,
    tensors: Mapping[str, Tensor],
    index: int,
    columns: int,
    device: torch.device,
) -> None:
    """Put a snapshot's ``<index>.keys`` and ``<index>.values`` into a native layer."""
    layer.reset()
    if columns:
        keys, values = (tensors[f"{index}.{n}"].to(device, copy=True) for n in ("keys", "values"))
        layer.lazy_initialization(keys, values)
        layer.keys, layer.values, layer.cumulative_length = keys, values, columns


class Bound(Protocol):
    """The side of ``attach`` that a cache knows."""

    def hand(self, layer_idx: int, key: Tensor) -> None:
        """Take note of keys on their way to the attention function."""

    def update_native(self, layer_idx: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store keys and values in a native layer; returns those to attend to."""


class CacheProtocol:
    """Mixin: the methods by which transformers' models and ``generate`` use a cache.

    The cache itself brings ``layers``, ``batch``, ``device``, ``seen``, ``columns``, ``reorder``
    and ``reset``.
    """

    # transformers sets this on caches that the user passed to generate.
    _is_user_defined = False
    #: Rank and world: which part of a sharded model's heads these are; ``cache_for`` knows.
    part: tuple[int, int] = (0, 1)
    _bound: Bound | None = None
    # What was last said of a model whose weights are not the sidekick's: see less.hf.weights.
    _other_weights: str = ""
    # What was fed through a model, per row: tokens and their digest, int64 [B, 2]. Unlike the ids
    # it does not grow; it is what tells a continuation from a second prompt.
    _fed: Tensor | None = None

    # -- what the cache brings ---------------------------------------------------------------

    layers: int
    batch: int
    device: torch.device
    native: tuple[int, ...]
    _native: dict[int, NativeLayer | None]

    @property
    def seen(self) -> Tensor:
        """Tokens seen, int64 [B]."""
        raise NotImplementedError

    @property
    def columns(self) -> int:
        """Tokens per row passed in, padding included."""
        raise NotImplementedError

    def reorder(self, rows: Tensor) -> None:
        """Make row i what row ``rows[i]`` was."""
        raise NotImplementedError

    # -- lengths -----------------------------------------------------------------------------

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns seen, as transformers counts them: padding included, evicted tokens too."""
        return self.columns

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """Column of the next query."""
        return self.columns

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """Length and offset of the columns that an attention mask must cover.

        A native layer's are its window's. The model asks with the index of a layer that slides for
        the mask of those, and with 0, whatever that is, for the others': ``less.hf.interface``
        takes their columns from ``get_query_offset``.
        """
        native = self._native.get(layer_idx)
        if native is not None:
            return native.get_mask_sizes(int(query_length))
        return self.columns + int(query_length), 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """No maximum: -1."""
        return -1

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        """No maximum: -1; transformers' older name."""
        return -1

    # -- kind --------------------------------------------------------------------------------

    @property
    def batch_size(self) -> int:
        """Batch rows."""
        return self.batch

    @property
    def is_initialized(self) -> bool:
        """True: memory is allocated when the cache is built."""
        return True

    @property
    def is_compileable(self) -> bool:
        """False: ``generate`` shall not compile the model on its own."""
        return False

    @property
    def is_croppable(self) -> bool:
        """False: what was evicted cannot come back."""
        return False

    @property
    def is_sliding(self) -> list[bool]:
        """Per layer: whether it is native; native layers slide."""
        return [i in self.native for i in range(self.layers)]

    @property
    def is_linear(self) -> list[bool]:
        """Per layer: False."""
        return [False] * self.layers

    @property
    def is_dummy(self) -> list[bool]:
        """Per layer: False."""
        return [False] * self.layers

    def is_recording_past(self, layer_idx: int = 0) -> bool:
        """False: see ``activate_past_recording``."""
        return False

    # -- tokens ------------------------------------------------------------------------------

    def update(
        self,
        key_states: Tensor,
        value_states: Tensor,
        layer_idx: int,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        """Hand keys and values through to the attention function, which stores them.

        Those of a native layer are stored here, and what its queries may see is returned.

        Raises:
            RuntimeError: The cache is not attached to a model, so nothing would store them.
        """
        if self._bound is None:
            raise RuntimeError(
                "update: this LessKVCache is not attached to the model, so its attention would "
                "ignore it: use `with less.hf.attach(model, cache):` around the call"
            )
        if layer_idx in self.native:
            return self._bound.update_native(layer_idx, key_states, value_states)
        self._bound.hand(layer_idx, key_states)
        return key_states, value_states

    # -- rows --------------------------------------------------------------------------------

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Beam search: make row i what row ``beam_idx[i]`` was."""
        self.reorder(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Rows cannot be dropped, only reordered.

        Raises:
            ValueError: The number of rows would change.
        """
        if indices.dtype == torch.bool:
            indices = indices.nonzero()[:, 0]
        if indices.shape != (self.batch,):
            raise ValueError(
                f"batch_select_indices: the cache was allocated for {self.batch} rows and keeps "
                f"them, got {list(indices.shape)} indices; build a cache of the other batch size"
            )
        self.reorder(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Rows cannot be added.

        Raises:
            ValueError: ``repeats`` is not 1.
        """
        if repeats != 1:
            raise ValueError(
                f"batch_repeat_interleave: the cache was allocated for {self.batch} rows; build it "
                f"with batch={self.batch * repeats} instead of repeating it {repeats} times"
            )

    # -- what cannot work ----------------------------------------------------------------------

    def crop(self, tokens_to_remove: int) -> NoReturn:
        """Refuse: evicted tokens and the state cannot be rolled back.

        Raises:
            NotImplementedError: Always.
        """
        raise NotImplementedError(
            f"crop({tokens_to_remove}): a bounded cache cannot be rolled back: what was evicted is "
            "gone, and the low-rank state has no inverse. Take cache.state_dict() before, and "
            "load_state_dict it instead"
        )

    def activate_past_recording(self) -> NoReturn:
        """Refuse: assisted decoding asks for it, to take back rejected tokens.

        Raises:
            NotImplementedError: Always.
        """
        raise NotImplementedError(
            "assisted decoding (assistant_model, prompt_lookup_num_tokens, ...) takes rejected "
            "tokens back out of the cache; a bounded cache cannot roll back (see crop). Use greedy "
            "decoding, sampling or beam search"
        )

    def early_initialization(self, *args: Any, **kwargs: Any) -> None:
        """Nothing to do: memory is allocated when the cache is built."""

    # -- which text is in the cache --------------------------------------------------------------

    def _fed_tokens(self) -> Tensor:
        if self._fed is None:
            with torch.inference_mode(False):  # whatever mode later calls run in
                self._fed = torch.zeros(self.batch, 2, dtype=torch.int64, device=self.device)
        elif self.columns == 0:  # reset
            self._fed.zero_()
        return self._fed

    def _feed(self, ids: Tensor, valid: Tensor | None) -> None:
        """Note tokens that a model has just passed through every layer."""
        fed = self._fed_tokens()
        ids = ids.to(fed.device)
        if valid is None:
            fed[:, 0] += ids.shape[1]
        else:
            valid = valid.to(fed.device)
            fed[:, 0] += valid.sum(1)
        fed[:, 1] = extend_digest(fed[:, 1], ids, valid)

    def _is_prefix(self, ids: Tensor, valid: Tensor | None) -> bool | None:
        """Whether these are the tokens seen; None where some of them came another way."""
        fed = self._fed_tokens()
        if not torch.equal(fed[:, 0], self.seen.to(fed.device)):
            return None
        ids = ids.to(fed.device)
        valid = valid.to(fed.device) if valid is not None else None
        count = ids.new_full((self.batch,), ids.shape[1]) if valid is None else valid.sum(1)
        digest = extend_digest(torch.zeros_like(fed[:, 1]), ids, valid)
        return torch.equal(fed[:, 0], count) and torch.equal(fed[:, 1], digest)

    def _reorder_fed(self, rows: Tensor) -> None:
        """For ``reorder``: the record follows its rows."""
        if self._fed is not None:
            self._fed.copy_(self._fed.index_select(0, rows.to(self._fed.device)))

    def _fed_state(self) -> Tensor:
        """For ``state_dict``: a copy of the record, int64 [B, 2]."""
        return self._fed_tokens().clone()

    def _load_fed(self, fed: Tensor | Sequence[Sequence[int]] | None) -> None:
        """For ``load_state_dict``, after the rest is loaded; None where the snapshot has none."""
        self._fed = None
        mine = self._fed_tokens()
        if fed is not None:
            mine.copy_(torch.as_tensor(fed))
