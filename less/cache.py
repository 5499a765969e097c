"""``LessKVCache``: bounded slots, a low-rank state for what leaves them, and the step between."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from less import _backend
from less._backend import FLOATS, Layer, Rows, Step
from less._check import require_int, require_shape, require_tensor
from less.hf.protocol import CacheProtocol, NativeLayer, load_native, native_tensors
from less.policies import Policy
from less.policies.base import checked_rank
from less.reference import EIGHT_BITS, candidates
from less.sidekick import Sidekick

_STATE_FORMAT = 2


def _layer_policies(
    op: str, policy: Policy | Sequence[Policy | None], layers: int, native: Sequence[int]
) -> tuple[Policy | None, ...]:
    """``policy`` as one per layer, checked; None for native layers."""
    if isinstance(policy, Policy):
        listed, name = [policy] * layers, "policy"
    elif isinstance(policy, (list, tuple)):
        listed, name = list(policy), "policy[{}]"
    else:
        raise ValueError(
            f"{op}: policy must be a Policy or a list of them, got {type(policy).__name__}"
        )
    if len(listed) != layers:
        raise ValueError(
            f"{op}: policy must list {layers} policies, one per layer, got {len(listed)}"
        )
    for i, one in enumerate(listed):
        if i not in native:
            if not isinstance(one, Policy):
                raise ValueError(
                    f"{op}: {name.format(i)} must be a Policy, got {type(one).__name__}"
                )
            require_int(op, f"{name.format(i)}.capacity", one.capacity, 1)
    return tuple(None if i in native else one for i, one in enumerate(listed))


def _positive(op: str, name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{op}: {name} must be a number, got {value!r}")
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{op}: {name} must be finite and positive, got {value}")
    return float(value)


def _native_layers(op: str, native: Sequence[int], layers: int) -> tuple[int, ...]:
    """``native``, checked and sorted."""
    indices = sorted({require_int(op, "native", i, 0) for i in native})
    if indices and indices[-1] >= layers:
        raise ValueError(f"{op}: native must be in 0 .. {layers - 1}, got {indices[-1]}")
    if len(indices) == layers:
        raise ValueError(
            f"{op}: native names every one of the {layers} layers, so there is nothing to bound"
        )
    return tuple(indices)


class LessKVCache(CacheProtocol):
    """A KV cache of fixed size: S slots per kv head, and a low-rank state of what was evicted.

    Memory is allocated here, once; no call ever grows it, but for a GPU's scratch, which is as
    large as the longest chunk wanted. Use ``attend`` in place of writing to the cache and calling
    attention, with any number of tokens per call::

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
            what is listed for native layers is not used).
        sidekick: Feature maps of the low-rank state; None is eviction alone.
        dtype: Of the slots: float32, bfloat16 or float16; or 8 bits whose rows have a float32
            scale each, int8 or, on a GPU and with the reference backend, float8_e4m3fn (float64
            with the reference backend). k and v are rounded to it on entry. State, scores and
            log-weights are float32.
        device: Where the cache lives.
        scale: Factor of q.k; 1/sqrt(D) by default.
        backend: ``"native"`` (the compiled kernels), ``"reference"`` (plain torch, slow, any
            device) or None: native where it was built for the device, else the reference with a
            warning.
        native: Indices of layers that bound themselves (a sliding window): a cache layer of
            transformers serves them, inside this cache, and nothing here applies to them.
            ``less.hf`` finds and makes them.
        softcap: What scale q.k is held within, before the log-weights: softcap * tanh(scale q.k /
            softcap), as in Gemma 2. None: nothing.

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
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        scale: float | None = None,
        backend: str | None = None,
        native: Sequence[int] = (),
        softcap: float | None = None,
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
        self.native = _native_layers(op, native, self.layers)
        self.policies = _layer_policies(op, policy, self.layers, self.native)
        #: Tokens per row, padding included, that can be passed in: None but for ``Full`` layers.
        self.max_columns: int | None = min(
            (p.capacity for p in self.policies if p is not None and not p.evicts), default=None
        )
        try:
            self.device = torch.device(device)
        except (RuntimeError, TypeError) as e:
            raise ValueError(f"{op}: device must name a torch device, got {device!r}") from e
        self._backend = _backend.choose(backend, self.device)
        self.backend = self._backend.name
        wanted = self._backend.dtypes(self.device)
        if dtype not in wanted:
            names = ", ".join(str(d) for d in wanted)
            raise ValueError(
                f"{op}: dtype must be one of {names} with the {self.backend} backend on "
                f"{self.device.type}, got {dtype}"
            )
        if scale is None:
            scale = 1.0 / math.sqrt(head_dim)
        self.scale = _positive(op, "scale", scale)
        self.softcap = None if softcap is None else _positive(op, "softcap", softcap)
        self.dtype = dtype
        self.sidekick = sidekick
        # Made by less.hf, which knows the windows.
        self._native: dict[int, NativeLayer | None] = dict.fromkeys(self.native)
        self._kind = ""
        self._maps: list[dict[str, Tensor]] | None = None
        if sidekick is not None:
            self._take_sidekick(sidekick)
        self._layers = [self._new_layer(i) for i in range(layers)]
        self._columns = [0] * layers
        self._reserve()

    def _reserve(self) -> None:
        """Scratch for the steps, where the backend wants any."""
        self._backend.reserve(
            [at for i, at in enumerate(self._layers) if i not in self.native],
            self.q_heads,
            [self._maps_of(i) for i in range(self.layers) if i not in self.native],
        )

    def _maps_of(self, layer: int) -> dict[str, Tensor] | None:
        return (self._maps[layer] or None) if self._maps is not None else None

    def _take_sidekick(self, sidekick: Sidekick) -> None:
        if not isinstance(sidekick, Sidekick):
            raise ValueError(
                f"LessKVCache: sidekick must be a Sidekick, got {type(sidekick).__name__}"
            )
        for name, wanted, got in (
            ("layers", self.layers, len(sidekick)),
            ("q_heads", self.q_heads, sidekick.q_heads),
            ("kv_heads", self.kv_heads, sidekick.kv_heads),
            ("head_dim", self.head_dim, sidekick.head_dim),
        ):
            if wanted != got:
                raise ValueError(
                    f"LessKVCache: sidekick must have {name}={wanted}, got {name}={got}"
                )
        self._kind = sidekick.kind
        self._maps = [
            {n: t.to(self.device) for n, t in sidekick[i].items()} if self._evicts(i) else {}
            for i in range(self.layers)
        ]

    def _evicts(self, layer: int) -> bool:
        """Whether tokens can leave the layer's slots: not where it is native or full."""
        policy = self.policies[layer]
        return policy is not None and policy.evicts

    def _new_layer(self, layer: int) -> Layer:
        policy = self.policies[layer]
        B, K, D = self.batch, self.kv_heads, self.head_dim
        S = 0 if policy is None else policy.capacity  # of a native layer, tokens are only counted
        state = torch.float64 if self.dtype == torch.float64 else torch.float32
        at = self.device
        H = z = None
        if self._maps is not None and self._maps[layer]:
            R = self._maps[layer]["q_w2"].shape[-1]
            H = torch.zeros(B, K, R, D, dtype=state, device=at)
            z = torch.zeros(B, K, R, dtype=state, device=at)
        return Layer(
            slot_k=torch.zeros(B, K, S, D, dtype=self.dtype, device=at),
            slot_v=torch.zeros(B, K, S, D, dtype=self.dtype, device=at),
            position=torch.full((B, K, S), -1, dtype=torch.int32, device=at),
            score=torch.zeros(B, K, S, dtype=state, device=at),
            weight=torch.zeros(B, K, S, dtype=state, device=at),
            seen=torch.zeros(B, dtype=torch.int64, device=at),
            H=H,
            z=z,
            share=torch.zeros(B, K, dtype=torch.float64, device=at),
            k_scale=torch.zeros(B, K, S, device=at) if self.dtype in EIGHT_BITS else None,
            v_scale=torch.zeros(B, K, S, device=at) if self.dtype in EIGHT_BITS else None,
        )

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
        anything else a chunk. Keys and queries come after the rotary embedding.

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
        """
        self._check_attend(layer, q, k, v, valid, out)
        at, policy = self._layers[layer], self.policies[layer]
        assert policy is not None  # the check has refused native layers
        maps = self._maps_of(layer)
        rule = policy.rule
        if rule is not None and q.shape[2] == 1:
            out = self._backend.decode_step(
                at,
                q,
                k,
                v,
                valid,
                maps=maps,
                kind=self._kind,
                scale=self.scale,
                softcap=self.softcap or 0.0,
                decay=policy.decay,
                scores=policy.needs_scores,
                rule=rule,
                out=out,
            )
            self._count(layer, 1)
            return out
        new = self._backend.rounded(k, v, self.dtype)
        # Until more tokens came than fit, nothing can have left: no use to look at an empty state.
        something_left = self._columns[layer] > policy.capacity
        step = self._backend.attend(
            at,
            q,
            new,
            valid,
            maps=maps if something_left else None,
            kind=self._kind,
            scale=self.scale,
            softcap=self.softcap or 0.0,
            decay=policy.decay,
            scores=policy.needs_scores,
        )
        rank = None if rule is not None else self._rank(policy, at, step, new, valid)
        self._backend.compact(
            at, step, new, valid, maps=maps, kind=self._kind, rule=rule, rank=rank
        )
        at.add_share(step)
        self._count(layer, q.shape[2])
        return step.out if out is None else out.copy_(step.out)

    def _count(self, layer: int, tokens: int) -> None:
        # What a CUDA graph captures runs when it is replayed, and is counted then: see advance.
        if self.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return
        self._columns[layer] += tokens

    def advance(self, steps: int) -> None:
        """Count decode steps of all layers that ran without Python, as replays of CUDA graphs do.

        What changes in a step lives on the device and is right whoever launched it; how many
        columns were passed in is known here, and what comes after the replays relies on it.

        Args:
            steps: Replays, of one token per row each.

        Raises:
            ValueError: It is no whole number >= 0, or more than a ``Full`` layer has room for.
        """
        require_int("advance", "steps", steps, 0)
        for layer, columns in enumerate(self._columns):
            self._check_room("advance", layer, columns + steps)
        self._columns = [columns + steps for columns in self._columns]

    def _check_attend(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        valid: Tensor | None,
        out: Tensor | None,
    ) -> None:
        op = "attend"
        self._check_layer(op, layer)
        B, Q, K, D = self.batch, self.q_heads, self.kv_heads, self.head_dim
        q = require_tensor(op, "q", q)
        require_shape(op, "q", q, [B, Q, "T", D])
        T = q.shape[2]
        self._check_room(op, layer, self._columns[layer] + T)
        for name, x in (("k", k), ("v", v)):
            x = require_tensor(op, name, x)
            if x.shape != (B, K, T, D):
                # k's T is the caller's to choose, so a message about heads says T, not a number.
                require_shape(op, name, x, [B, K, "T", D])
                require_shape(op, name, x, [B, K, T, D])
        wanted = FLOATS + ((torch.float64,) if self.dtype == torch.float64 else ())
        for name, x in (("q", q), ("k", k), ("v", v)):
            if x.dtype not in wanted:
                raise ValueError(
                    f"{op}: {name} must have dtype {', '.join(map(str, wanted))}, got {x.dtype}"
                )
            self._check_device(op, name, x)
            if x.requires_grad and torch.is_grad_enabled():
                raise ValueError(
                    f"{op}: {name} requires grad, but the cache has no backward; "
                    "call it under torch.no_grad()"
                )
        if k.dtype != v.dtype:
            raise ValueError(f"{op}: v must have k's dtype {k.dtype}, got {v.dtype}")
        if valid is not None:
            valid = require_tensor(op, "valid", valid)
            require_shape(op, "valid", valid, [B, T])
            if valid.dtype != torch.bool:
                raise ValueError(f"{op}: valid must have dtype torch.bool, got {valid.dtype}")
            self._check_device(op, "valid", valid)
        if out is not None:
            out = require_tensor(op, "out", out)
            require_shape(op, "out", out, list(q.shape))
            if out.dtype != q.dtype or not out.is_contiguous():
                raise ValueError(f"{op}: out must be contiguous, of q's dtype {q.dtype}")
            self._check_device(op, "out", out)

    def _check_room(self, op: str, layer: int, columns: int) -> None:
        policy = self.policies[layer]
        if policy is not None and not policy.evicts and columns > policy.capacity:
            raise ValueError(
                f"{op}: layer {layer} is full attention with room for {policy.capacity} tokens, "
                f"padding included, got {columns}; build the cache with a larger max_tokens"
            )

    def _check_device(self, op: str, name: str, x: Tensor) -> None:
        want = self._layers[0].seen.device
        if x.device != want:
            raise ValueError(f"{op}: {name} must be on {want}, got {x.device}")

    def _check_layer(self, op: str, layer: object) -> None:
        if isinstance(layer, bool) or not isinstance(layer, int):
            raise ValueError(f"{op}: layer must be a whole number, got {layer!r}")
        if not 0 <= layer < self.layers:
            raise ValueError(f"{op}: layer must be in 0 .. {self.layers - 1}, got {layer}")
        if layer in self.native:
            held = [i for i in range(self.layers) if i not in self.native]
            raise ValueError(
                f"{op}: layer {layer} is native: it bounds itself, and this cache holds none of "
                f"its tokens; the layers that it holds are {held}"
            )

    def _rank(
        self, policy: Policy, at: Layer, step: Step, new: Rows, valid: Tensor | None
    ) -> Tensor:
        tokens = candidates(
            at.position,
            step.slot_score,
            at.weight,
            at.seen,
            at.rows.floats(),
            new.floats(),
            step.chunk_score,
            valid,
        )
        return checked_rank(policy, tokens)

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

    def positions(self, layer: int) -> Tensor:
        """Row-local positions of the kept tokens, int32 [B, K, S], -1 where a slot is empty."""
        self._check_layer("positions", layer)
        return self._layers[layer].position.clone()

    def scores(self, layer: int) -> Tensor:
        """Scores of the kept tokens, float32 [B, K, S]; 0 where the policy uses none."""
        self._check_layer("scores", layer)
        return self._layers[layer].score.clone()

    def weights(self, layer: int) -> Tensor:
        """Log-weights, float32 [B, K, S]: 0 unless a slot stands for several tokens."""
        self._check_layer("weights", layer)
        return self._layers[layer].weight.clone()

    def state(self, layer: int) -> tuple[Tensor, Tensor]:
        """The low-rank state: H [B, K, R, D] and z [B, K, R], float32.

        Raises:
            ValueError: The cache has no sidekick, or the layer is full, hence no state.
        """
        self._check_layer("state", layer)
        at = self._layers[layer]
        if at.H is None or at.z is None:
            if self.sidekick is not None:
                raise ValueError(f"state: layer {layer} keeps every token, hence no low-rank state")
            raise ValueError("state: this cache has no sidekick, hence no low-rank state")
        return at.H.clone(), at.z.clone()

    @property
    def seen(self) -> Tensor:
        """Tokens seen by each row, padding left out, int64 [B]; of the layer that is furthest."""
        return self._layers[self._columns.index(max(self._columns))].seen.clone()

    @property
    def columns(self) -> int:
        """Tokens per row that were passed in, padding included; of the layer that is furthest."""
        return max(self._columns)

    def memory(self) -> dict[str, int]:
        """Bytes held, by purpose.

        Returns:
            ``slots`` (k, v, their scales, positions, scores, log-weights), ``state`` (H, z),
            ``maps`` (the sidekick's weights), ``workspace`` (counters, and the scratch of a GPU's
            kernels), ``native`` (k and v of
            native layers), ``total`` of these, and ``full``: the k and v that a full cache would
            hold of the same tokens now, in this cache's dtype, or in 16 bits where that has 8,
            which full caches are not held in; for native layers, what they hold.
        """
        slots = state = 0
        workspace = self._backend.workspace
        for at in self._layers:
            for name, x in at.tensors().items():
                if name in ("H", "z"):
                    state += x.nbytes
                elif name in ("seen", "share"):
                    workspace += x.nbytes
                else:
                    slots += x.nbytes
        maps = sum(x.nbytes for m in self._maps or [] for x in m.values())
        per_token = 2 * self.kv_heads * self.head_dim * max(2, self.dtype.itemsize)
        tokens = sum(
            int(at.seen.sum()) for i, at in enumerate(self._layers) if i not in self.native
        )
        native = sum(
            x.untyped_storage().nbytes()
            for _, at in self._made_native()
            for x in native_tensors(at).values()
        )
        return {
            "slots": slots,
            "state": state,
            "maps": maps,
            "workspace": workspace,
            "native": native,
            "total": slots + state + maps + workspace + native,
            "full": tokens * per_token + native,
        }

    def stats(self) -> dict[str, list[int] | list[float]]:
        """What happened so far, a list over layers each.

        Returns:
            ``seen``: tokens, summed over rows; ``kept``: tokens in slots, summed over rows, mean
            over kv heads; ``evictions``: their difference; ``memory_share``: mean part of a
            query's attention mass that the low-rank state took. A native layer keeps what its
            own window needs and evicts nothing here: its ``kept`` is its ``seen``.
        """
        seen = [int(at.seen.sum()) for at in self._layers]
        held = [int((at.position >= 0).sum()) for at in self._layers]
        kept = [
            n if i in self.native else h // self.kv_heads
            for i, (n, h) in enumerate(zip(seen, held, strict=True))
        ]
        share = [
            float(at.share.sum()) / (n * self.q_heads) if n else 0.0
            for at, n in zip(self._layers, seen, strict=True)
        ]
        return {
            "seen": seen,
            "kept": kept,
            "evictions": [n - h for n, h in zip(seen, kept, strict=True)],
            "memory_share": share,
        }

    def reset(self) -> None:
        """Forget everything; keep the memory."""
        for at in self._layers:
            for name, x in at.tensors().items():
                x.fill_(-1 if name == "position" else 0)
        for _, layer in self._made_native():
            layer.reset()
        self._columns = [0] * self.layers

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
        try:
            target = torch.empty(0, device=device).device  # "cuda" becomes "cuda:<current>"
        except (AssertionError, RuntimeError, TypeError) as e:
            reason = str(e).splitlines()[0]
            raise ValueError(
                f"to: device must be one that is here, got {device!r}: {reason}"
            ) from e
        if target.type == "meta":
            raise ValueError("to: device must hold values, got 'meta'")
        if target == self._layers[0].seen.device:
            return self
        if self._bound is not None:
            raise RuntimeError(
                f"to: the cache is attached to a model on {self.device}; leave that block first"
            )
        self._move(target)
        return self

    def _move(self, target: torch.device) -> None:
        backend = _backend.choose(self.backend, target)
        moved = [{n: x.to(target) for n, x in at.tensors().items()} for at in self._layers]
        maps = self._maps and [{n: x.to(target) for n, x in m.items()} for m in self._maps]
        native = [
            (at, {n: x.to(target) for n, x in native_tensors(at).items()})
            for _, at in self._made_native()
        ]
        # All of it is there; now nothing can fail on its way.
        self._fed = self._fed_tokens().to(target)
        for at, tensors in zip(self._layers, moved, strict=True):
            vars(at).update(tensors)
        for layer, tensors in native:
            vars(layer).update(tensors)
            if tensors:
                layer.device = target
        self._maps, self._backend, self.device = maps, backend, target
        self._reserve()

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
        for at in self._layers:
            for x in at.tensors().values():
                x.copy_(x.index_select(0, rows))
        for _, layer in self._made_native():
            layer.reorder_cache(rows)
        self._reorder_fed(rows)

    def _made_native(self) -> list[tuple[int, NativeLayer]]:
        return [(i, at) for i, at in self._native.items() if at is not None]

    def _identity(self) -> dict[str, Any]:
        return {
            "format": _STATE_FORMAT,
            "layers": self.layers,
            "q_heads": self.q_heads,
            "kv_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "part": list(self.part),  # a list, as JSON gives it back
            "batch": self.batch,
            "dtype": str(self.dtype),
            "scale": self.scale,
            "softcap": self.softcap,
            "policy": self._policy_text(),
            "native": {
                # Names, not numbers: a snapshot may pass through JSON.
                str(i): None if at is None else at.sliding_window
                for i, at in self._native.items()
            },
            "kind": self._kind,
            "rank": self.sidekick.rank if self.sidekick is not None else 0,
        }

    def state_dict(self) -> dict[str, Any]:
        """A snapshot, of plain values and copies of the tensors; the sidekick is not in it.

        Returns:
            ``tensors`` (``"<layer>.<name>"`` -> copy), ``columns``, ``fed`` (which text a model was
            fed, as counts and digests) and ``cache``, the settings that a cache must share to load
            it.
        """
        return {
            "cache": self._identity(),
            "columns": list(self._columns),
            "fed": self._fed_state(),
            "tensors": {
                f"{i}.{name}": x.detach().clone()
                for i, tensors in [
                    *((i, at.tensors()) for i, at in enumerate(self._layers)),
                    *((i, native_tensors(at)) for i, at in self._made_native()),
                ]
                for name, x in tensors.items()
            },
        }

    def load_state_dict(self, d: dict[str, Any]) -> None:
        """Continue from a snapshot; decoding goes on bit for bit.

        Raises:
            ValueError: The snapshot is of another kind of cache, incomplete or damaged; the
                message names what differs and the cache is as it was.
        """
        op = "load_state_dict"
        if not isinstance(d, dict) or not {"cache", "columns", "fed", "tensors"} <= d.keys():
            raise ValueError(f"{op}: d must be a result of LessKVCache.state_dict")
        if None in self._native.values():
            raise ValueError(
                f"{op}: the native layers {list(self.native)} are made by less.hf.cache_for, or "
                "when the cache is attached; load the snapshot after that"
            )
        for name, want in self._identity().items():
            got = d["cache"].get(name)
            if got != want:
                raise ValueError(f"{op}: {name} must be {want!r}, got {got!r}")
        mine = {
            f"{i}.{name}": x
            for i, at in enumerate(self._layers)
            for name, x in at.tensors().items()
        }
        columns = d["columns"]
        if not isinstance(columns, list) or len(columns) != self.layers:
            raise ValueError(f"{op}: columns must list {self.layers} numbers, got {columns!r}")
        columns = [int(c) for c in columns]
        native = {
            f"{i}.{name}": min(columns[i], at.sliding_window - 1)
            for i, at in self._made_native()
            for name in (("keys", "values") if columns[i] else ())
        }
        wanted = mine.keys() | native.keys()
        missing, unknown = wanted - d["tensors"].keys(), d["tensors"].keys() - wanted
        if missing or unknown:
            raise ValueError(
                f"{op}: tensors missing: {sorted(missing)}, unknown: {sorted(unknown)}"
            )
        for name, x in mine.items():
            got = require_tensor(op, name, d["tensors"][name])
            require_shape(op, name, got, list(x.shape))
            if got.dtype != x.dtype:
                raise ValueError(f"{op}: {name} must have dtype {x.dtype}, got {got.dtype}")
        for name, length in native.items():
            got = require_tensor(op, name, d["tensors"][name])
            require_shape(op, name, got, [self.batch, self.kv_heads, length, self.head_dim])
        fed = require_tensor(op, "fed", d["fed"])
        require_shape(op, "fed", fed, [self.batch, 2])
        if fed.dtype != torch.int64:
            raise ValueError(f"{op}: fed must have dtype torch.int64, got {fed.dtype}")
        for name, x in mine.items():
            x.copy_(d["tensors"][name])
        for i, at in self._made_native():
            load_native(at, d["tensors"], i, columns[i], self.device)
        self._columns = columns
        self._load_fed(fed)

    def _policy_text(self) -> str:
        """The policy, or the runs of layers that share one: ``0-1 Full(...); 2-29 H2O(...)``."""
        runs: list[tuple[int, int, str]] = []
        for i, policy in enumerate(self.policies):
            if policy is None:
                continue
            text = repr(policy)
            if runs and runs[-1][2] == text:
                runs[-1] = (runs[-1][0], i, text)
            else:
                runs.append((i, i, text))
        if len(runs) == 1:
            return runs[0][2]
        return "; ".join(
            f"{first}-{last} {text}" if last > first else f"{first} {text}"
            for first, last, text in runs
        )

    def __repr__(self) -> str:
        """Shape, policy and backend."""
        return (
            f"LessKVCache(layers={self.layers}, q_heads={self.q_heads}, kv_heads={self.kv_heads}, "
            f"head_dim={self.head_dim}, batch={self.batch}, policy={self._policy_text()}, "
            f"sidekick={self._kind or None}, dtype={self.dtype}, device={self.device}, "
            f"backend={self.backend})"
        )
