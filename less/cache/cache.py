"""``LessKVCache``: bounded slots, a low-rank state for what leaves them, and the step between."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from less import backend as backends
from less._check import require_int, require_shape, require_tensor
from less.backend import Backend
from less.cache import snapshot
from less.cache.checks import (
    check_calibration,
    check_call,
    check_dtype,
    check_sidekick,
    check_weighing,
    checked_victim,
    layer_capacities,
    layer_policies,
    named_device,
    positive,
    real_device,
    sliding_layers,
    warn_of_weighing,
)
from less.cache.contents import Contents
from less.cache.described import Described
from less.cache.holdings import Holdings
from less.cache.limits import BiasedKeys, TrainingLimits
from less.cache.paged import PagedLayer
from less.cache.protocol import CacheProtocol
from less.cache.session import Session
from less.calibration import Calibration
from less.layer import Call, PageLayout
from less.layer.spec import VICTIMS
from less.policies import Policy
from less.sidekick import Sidekick


class LessKVCache(Contents, Described, CacheProtocol):
    """A KV cache of fixed size: S slots per kv head, and a low-rank state of what was evicted.

    Memory is allocated here, once; no call ever grows it. Use ``attend`` in place of writing to the
    cache and calling attention, with any number of tokens per call::

        cache = LessKVCache(layers=32, q_heads=32, kv_heads=8, head_dim=128, batch=4,
                            policy=H2O(heavy=128, recent=128), sidekick=sidekick)
        out = cache.attend(layer, q, k, v)

    Args:
        layers: Number of layers.
        q_heads: Query heads Q.
        kv_heads: Key-value heads K; Q must be a multiple.
        head_dim: Head dim D.
        batch: Batch rows B. Rows are independent and may hold different numbers of tokens.
        policy: Who stays: ``H2O``, ``SinkRecent`` or a ``Policy`` of your own; or a list of one
            per layer, which may keep more tokens in one layer than in another (``Full`` keeps all;
            what is listed for layers that slide is not used).
        sidekick: Feature maps of the low-rank state; None is eviction alone. A capacity outside
            of those that it was trained for, and a text that grows beyond the length that it was
            trained at, warn once by name, where its config says what they were.
        dtype: Of the slots: float32, bfloat16 or float16; or 8 bits whose rows have a float32
            scale each, int8 or, on a GPU and with the reference backend, float8_e4m3fn (float64
            with the reference backend); or a packed format by name, such as ``"k4v4"``: bits of
            keys and of values (``less.dtypes.FORMATS``). k and v are rounded to it on entry; those
            of a packed format to ``hot_dtype`` first. State is float32.
        device: Where the cache lives.
        scale: Factor of q.k; 1/sqrt(D) by default.
        backend: ``"native"`` (the compiled kernels), ``"reference"`` (plain torch, slow, any
            device) or None: native where it was built for the device, else the reference with a
            warning.
        native: Indices of layers that slide, which bound themselves: a cache layer of
            transformers serves them, inside this cache, and nothing here applies to them.
            ``less.hf`` finds and makes them.
        softcap: What scale q.k is held within, before the log-weights: softcap * tanh(scale q.k /
            softcap), as in Gemma 2. None: nothing.
        victim: What becomes of a token that leaves: ``"fold"``, into the low-rank state, which
            needs a sidekick; ``"merge"``, into the nearest token that stays (docs/merging.md),
            which needs a policy with scores that decay and no sidekick; or ``"forget"``. None:
            folded where there is a sidekick.
        calibration: Means and scales of the channels, which few bits fit better then; of the space
            in which rows of any dtype are stored. None: packed formats are rotated alone, and keys
            are centred on the sidekick's ``key_mean``, where it has one.
        sinks: First tokens that stay for good, in rows of ``hot_dtype``, of packed formats; 4 by
            default.
        hot: Last tokens in rows of ``hot_dtype``, of packed formats; 16 by default. Who leaves
            these is encoded, and only then competes for a slot.
        hot_dtype: int8, float16 or float32.
        capacities: Slots of each kv head where they differ: for each layer a list of K numbers, or
            None for as many as its policy keeps. The policy's recent tokens are in proportion.

    Raises:
        ValueError: An argument is wrong; the message names it.

    Source: arXiv:2402.09398.
    """

    def __init__(
        self,
        layers: int,
        q_heads: int,
        kv_heads: int,
        head_dim: int,
        batch: int,
        policy: Policy | Sequence[Policy | None],
        sidekick: Sidekick | None = None,
        dtype: torch.dtype | str = torch.float32,
        device: torch.device | str = "cpu",
        scale: float | None = None,
        backend: str | None = None,
        native: Sequence[int] = (),
        softcap: float | None = None,
        victim: str | None = None,
        calibration: Calibration | None = None,
        sinks: int | None = None,
        hot: int | None = None,
        hot_dtype: torch.dtype = torch.int8,
        capacities: Sequence[int | Sequence[int] | None] | None = None,
    ) -> None:
        """See the class."""
        op = "LessKVCache"
        self.layers = require_int(op, "layers", layers, 1)
        self.q_heads = require_int(op, "q_heads", q_heads, 1)
        self.kv_heads = require_int(op, "kv_heads", kv_heads, 1)
        self.head_dim = require_int(op, "head_dim", head_dim, 1)
        self.batch = require_int(op, "batch", batch, 1)
        if q_heads % kv_heads:
            raise ValueError(
                f"{op}: q_heads must be a multiple of kv_heads, got {q_heads} and {kv_heads}"
            )
        self.native = sliding_layers(op, native, self.layers)
        self.policies = layer_policies(op, policy, self.layers, self.native)
        #: Tokens per row that can be passed in: None but for ``Full`` layers.
        self.max_columns: int | None = min(
            (p.capacity for p in self.policies if p is not None and not p.evicts), default=None
        )
        self.device = named_device(op, device)
        chosen = backends.choose(backend, self.device)
        self.backend = chosen.name
        check_dtype(op, "dtype", dtype, chosen, self.device)
        self.scale = positive(op, "scale", 1.0 / math.sqrt(head_dim) if scale is None else scale)
        self.softcap = None if softcap is None else positive(op, "softcap", softcap)
        self.dtype, self.sidekick, self.calibration = dtype, sidekick, calibration
        self.victim = checked_victim(op, victim, sidekick)
        if sidekick is not None:
            check_sidekick(op, sidekick, layers, q_heads, kv_heads, head_dim)
        check_weighing(op, self.victim, *self.policies)
        warn_of_weighing(op, self.victim, self.policies)
        self._capacities = layer_capacities(op, capacities, self.policies, kv_heads)
        if calibration is not None:
            check_calibration(op, calibration, (layers, kv_heads, head_dim), sidekick, softcap)
        self._hot = (sinks, hot, hot_dtype)
        self.biased = BiasedKeys(calibration, dtype)
        self.session = Session(self.layers, self.batch, self.device, self.native)
        self._holdings = self._built(chosen, self.device)
        self.limits = TrainingLimits(sidekick, self._holdings.bounded)
        self._holdings.reserve()

    def _built(self, backend: Backend, device: torch.device) -> Holdings:
        """The layers of this cache on a device, with empty pages."""
        layers: list[PagedLayer | None] = []
        for i, (policy, capacity) in enumerate(zip(self.policies, self._capacities, strict=True)):
            if policy is None or capacity is None:
                layers.append(None)
                continue
            # A full layer keeps every token, hence no state.
            maps = self.sidekick[i] if self.sidekick is not None and policy.evicts else {}
            action = VICTIMS[self.victim]
            layout = PageLayout(
                self.kv_heads,
                self.head_dim,
                capacity,
                self.dtype,
                0 if self.sidekick is None or not maps else self.sidekick.rank,
                *self._hot,
                weights=(policy.evicts and action.weighs) or None,
            )
            layers.append(
                PagedLayer(
                    policy,
                    layout,
                    self.q_heads,
                    maps=maps or None,
                    kind=self.kind or "exp",
                    space=None if self.calibration is None else self.calibration.space(i),
                    scale=self.scale,
                    softcap=self.softcap,
                    victim=None if action.maps or not policy.evicts else self.victim,
                    device=device,
                    backend=backend,
                )
            )
        return Holdings(layers, self.batch, device, self.session)

    def attend(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        valid: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """Attend with T new tokens, which then join the cache; evict and fold down to capacity.

        The queries attend to the kept slots, to the low-rank state and, causally, to the call's
        own tokens. A first call is a prompt (exact causal attention), T = 1 a decode step,
        anything else a chunk. Keys and queries come after the rotary embedding. Nothing looks for
        NaN: it spoils its own row, as in full attention, and no other.

        Args:
            layer: Index of the layer.
            q: [B, Q, T, D], float32, bfloat16 or float16.
            k: [B, K, T, D], rounded to the cache's dtype.
            v: [B, K, T, D], rounded to the cache's dtype.
            valid: bool [B, T], False for padding, which never enters the cache and whose output
                is zero. None: all valid.
            out: Contiguous, like q: where to write the result. With it a decode step under a
                policy that has a rule allocates nothing.

        Returns:
            [B, Q, T, D] in q's dtype; ``out`` where it is given.

        Raises:
            ValueError: An argument is wrong; the cache is as it was.
            RuntimeError: Another thread is in a call of this cache; or memory ran out while pages
                were written, now or in an earlier call: the message says to reset the cache. Where
                it does not, the cache is as it was.
        """
        op = "attend"
        self._check_layer(op, layer)
        paged, at = self._holdings.at(layer)
        call = Call(q, k, v, valid, out)
        check_call(op, call, paged.plan, self.batch, at.pool.device)
        self._check_room(op, layer, q.shape[2])
        self.biased.heed(k, self.session.columns[layer])
        # What a CUDA graph captures runs, and is counted, when it is replayed: see advance.
        captured = self.device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        tokens = 0 if captured else q.shape[2]
        result = self.session.counted(layer, tokens, lambda: paged.run(call, at))
        self.limits.heed(self.session.columns[layer])
        return result

    def advance(self, steps: int) -> None:
        """Count decode steps of all layers that ran without Python, as replays of CUDA graphs do.

        What a layer holds, and how many tokens it saw, lies in its pages and is right whoever
        launched the step; transformers counts columns by this.

        Args:
            steps: Replays, of one token per row each.

        Raises:
            ValueError: It is no whole number >= 0, or more than a ``Full`` layer has room for.
        """
        require_int("advance", "steps", steps, 0)
        for layer in range(self.layers):
            self._check_room("advance", layer, steps)
        with self.session.turn.taken("advance"):
            self.session.columns = [columns + steps for columns in self.session.columns]
        self.limits.heed(self.columns)

    def _check_room(self, op: str, layer: int, tokens: int) -> None:
        policy = self.policies[layer]
        if policy is None or policy.evicts:
            return
        columns = self.session.columns[layer] + tokens
        if columns > policy.capacity:
            raise ValueError(
                f"{op}: layer {layer} is full attention with room for {policy.capacity} tokens, "
                f"padding included, got {columns}; build the cache with a larger max_tokens"
            )

    @property
    def policy(self) -> Policy:
        """Who stays, where that is the same in every layer.

        Raises:
            ValueError: Layers differ; ``policies`` has one for each.
        """
        first, *others = (p for p in self.policies if p is not None)
        if any(p != first for p in others):
            raise ValueError("policy: the layers of this cache have several; see cache.policies")
        return first

    def reset(self) -> None:
        """Forget everything; keep the memory."""
        with self.session.turn.taken("reset", mends=True):
            self._holdings.clear()
            self.session.reset()

    def to(self, device: torch.device | str) -> LessKVCache:
        """Move everything held to another device, in place; decoding goes on there.

        Nothing is rounded on the way, so there and back changes no bit. The sidekick that the
        cache was built from stays where it is; the cache moves its own copy.

        Args:
            device: Where to; the backend must serve it.

        Returns:
            The cache itself.

        Raises:
            ValueError: The device is none that holds values here, or the cache's backend does not
                serve it; the cache is as it was.
            RuntimeError: The cache is attached to a model, which would not move with it.
        """
        target = real_device("to", device)
        if target == self.seen.device:
            return self
        if self.session.bound is not None:
            raise RuntimeError(
                f"to: the cache is attached to a model on {self.device}; leave that block first"
            )
        self._move(target)
        return self

    def _move(self, target: torch.device) -> None:
        with self.session.turn.taken("to", reads=True):
            moved = self._built(backends.choose(self.backend, target), target)
            moved.copy(self._holdings)
            moved.reserve()
            put = self.session.moved(target)
        with self.session.turn.taken("to"):
            put()
            self.device, self._holdings = target, moved

    def reorder(self, rows: Tensor) -> None:
        """Make row i what row ``rows[i]`` was, as beam search does.

        Args:
            rows: int64 [B], each in 0 .. B - 1.

        Raises:
            ValueError: ``rows`` is wrong; the cache is as it was.
        """
        rows = require_tensor("reorder", "rows", rows)
        require_shape("reorder", "rows", rows, [self.batch])
        if rows.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"reorder: rows must be integers, got {rows.dtype}")
        if bool(((rows < 0) | (rows >= self.batch)).any()):
            raise ValueError(f"reorder: rows must be in 0 .. {self.batch - 1}, got {rows.tolist()}")
        rows = rows.to(self.device, torch.int64)
        scratch, put = self._holdings.scratch(self.device), self.session.reordered(rows)
        with self.session.turn.taken("reorder"):
            self._holdings.reorder(rows, scratch)
            put()

    def state_dict(self) -> dict[str, Any]:
        """A snapshot, of plain values and copies of the tensors; the sidekick is not in it.

        Returns:
            ``tensors`` (``"<layer>.page"``: uint8 [B, page]; and the keys and values of layers that
            slide), ``columns``, ``fed`` (which text a model was fed, as counts and digests) and
            ``cache``, the settings that a cache must share to load it.
        """
        with self.session.turn.taken("state_dict", reads=True):
            return snapshot.save(self._settings(), self.pools, self.session)

    def load_state_dict(self, d: dict[str, Any]) -> None:
        """Continue from a snapshot; decoding goes on bit for bit.

        Raises:
            ValueError: The snapshot is of another kind of cache, incomplete or damaged; the
                message names what differs and the cache is as it was.
        """
        put = snapshot.loaded(d, self._settings(), self.pools, self.layouts, self.session)
        with self.session.turn.taken("load_state_dict", mends=True):
            put()
        self.limits.heed(self.columns)
