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

from typing import Any, NoReturn

import torch
from torch import Tensor

from less.cache.session import Session


class CacheProtocol:
    """Mixin: the methods by which transformers' models and ``generate`` use a cache.

    The cache itself brings ``layers``, ``batch``, ``device``, ``session``, ``seen``, ``reorder``
    and ``reset``.
    """

    # transformers sets this on caches that the user passed to generate.
    _is_user_defined = False
    #: Rank and world: which part of a sharded model's heads these are; ``cache_for`` knows.
    part: tuple[int, int] = (0, 1)

    # -- what the cache brings ---------------------------------------------------------------

    layers: int
    batch: int
    device: torch.device
    native: tuple[int, ...]
    session: Session

    @property
    def seen(self) -> Tensor:
        """Tokens seen, int64 [B]."""
        raise NotImplementedError

    @property
    def columns(self) -> int:
        """Tokens per row that were passed in, padding included; of the layer that is furthest."""
        return max(self.session.columns)

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

        A sliding layer's are its window's. The model asks with the index of a layer that slides for
        the mask of those, and with 0, whatever that is, for the others': ``less.hf.interface``
        takes their columns from ``get_query_offset``.
        """
        sliding = self.session.sliding.get(layer_idx)
        if sliding is not None:
            return sliding.get_mask_sizes(int(query_length))
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
        """Per layer: whether it slides."""
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

        Those of a sliding layer are stored here, and what its queries may see is returned.

        Raises:
            RuntimeError: The cache is not attached to a model, so nothing would store them.
        """
        bound = self.session.bound
        if bound is None:
            raise RuntimeError(
                "update: this LessKVCache is not attached to the model, so its attention would "
                "ignore it: use `with less.hf.attach(model, cache):` around the call"
            )
        if layer_idx in self.native:
            return bound.update_sliding(layer_idx, key_states, value_states)
        bound.hand(layer_idx, key_states)
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
