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
from less.cache.checks import check_call, layer_policies, positive, sliding_layers
from less.cache.limits import TrainingLimits
from less.cache.paged import PagedLayer
from less.cache.protocol import CacheProtocol
from less.cache.session import Session, sliding_tensors
from less.layer import Call, Paged, PageLayout, PageViews, allocate
from less.policies import Policy
from less.sidekick import Sidekick


class LessKVCache(CacheProtocol):
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
            what is listed for native layers is not used).
        sidekick: Feature maps of the low-rank state; None is eviction alone. A capacity outside
            of those that it was trained for, and a text that grows beyond the length that it was
            trained at, warn once by name, where its config says what they were.
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
        victim: What becomes of a token that leaves: ``"fold"``, into the low-rank state, which
            needs a sidekick, or ``"forget"``. None: folded where there is a sidekick.

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
        victim: str | None = None,
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
        try:
            self.device = torch.device(device)
        except (RuntimeError, TypeError) as e:
            raise ValueError(f"{op}: device must name a torch device, got {device!r}") from e
        chosen = backends.choose(backend, self.device)
        self.backend = chosen.name
        wanted = chosen.dtypes(self.device)
        if dtype not in wanted:
            names = ", ".join(str(d) for d in wanted)
            raise ValueError(
                f"{op}: dtype must be one of {names} with the {self.backend} backend on "
                f"{self.device.type}, got {dtype}"
            )
        self.scale = positive(op, "scale", 1.0 / math.sqrt(head_dim) if scale is None else scale)
        self.softcap = None if softcap is None else positive(op, "softcap", softcap)
        self.dtype = dtype
        self.sidekick = sidekick
        self.victim = self._victim(victim)
        if sidekick is not None:
            self._check_sidekick(sidekick)
        self.session = Session(self.layers, self.batch, self.device, self.native)
        self._build(chosen)
        self._pools = self._allocate()
        kept = [p.capacity for p in self.policies if p is not None and p.evicts]
        self._limits = TrainingLimits(sidekick, kept)
        self._reserve()

    def _victim(self, victim: str | None) -> str:
        if victim is None:
            return "forget" if self.sidekick is None else "fold"
        if victim not in ("fold", "forget"):
            raise ValueError(f"LessKVCache: victim must be 'fold' or 'forget', got {victim!r}")
        if (victim == "fold") != (self.sidekick is not None):
            raise ValueError(
                f"LessKVCache: victim 'fold' and a sidekick belong together, got victim "
                f"{victim!r} and sidekick {self.sidekick!r}"
            )
        return victim

    def _build(self, backend: Backend) -> None:
        """The layers that this cache holds; of those that slide, None."""
        self._paged: list[PagedLayer | None] = []
        for i, policy in enumerate(self.policies):
            if policy is None:
                self._paged.append(None)
                continue
            # A full layer keeps every token, hence no state.
            maps = self.sidekick[i] if self.sidekick is not None and policy.evicts else None
            layout = PageLayout(
                kv_heads=self.kv_heads,
                head_dim=self.head_dim,
                capacity=policy.capacity,
                dtype=self.dtype,
                rank=0 if maps is None or self.sidekick is None else self.sidekick.rank,
            )
            self._paged.append(
                PagedLayer(
                    policy,
                    layout,
                    self.q_heads,
                    maps=maps,
                    kind=self.kind or "exp",
                    scale=self.scale,
                    softcap=self.softcap,
                    device=self.device,
                    backend=backend,
                )
            )

    def _allocate(self) -> list[Tensor | None]:
        """A pool of empty pages for each layer that this cache holds: row b has page b."""
        pools = iter(allocate([at.layout for at in self.held], self.batch, self.device))
        return [None if at is None else next(pools) for at in self._paged]

    @property
    def held(self) -> list[PagedLayer]:
        """The layers that this cache holds: all but those that slide."""
        return [at for at in self._paged if at is not None]

    def _at(self, layer: int) -> tuple[PagedLayer, Paged]:
        """A layer that this cache holds, and its pages."""
        paged, pool = self._paged[layer], self._pools[layer]
        assert paged is not None  # callers have refused layers that slide
        assert pool is not None
        return paged, Paged(pool)

    def _views(self, layer: int) -> PageViews:
        paged, at = self._at(layer)
        return paged.layout.views(at.pool)[0]

    def _reserve(self) -> None:
        """Scratch for the decode steps, where the backend takes any."""
        for i, paged in enumerate(self._paged):
            if paged is not None:
                paged.backend.reserve(paged.plan, self._at(i)[1], self.batch)

    def _check_sidekick(self, sidekick: Sidekick) -> None:
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
        """
        op = "attend"
        self._check_layer(op, layer)
        paged, at = self._at(layer)
        call = Call(q, k, v, valid, out)
        check_call(op, call, paged.plan, self.batch, at.pool.device)
        self._check_room(op, layer, q.shape[2])
        result = paged.run(call, at)
        # What a CUDA graph captures runs when it is replayed, and is counted then: see advance.
        if not (self.device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
            self.session.columns[layer] += q.shape[2]
            self._limits.heed(self.session.columns[layer])
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
        self.session.columns = [columns + steps for columns in self.session.columns]
        self._limits.heed(self.columns)

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
        return self._views(layer).slots.position.clone()

    def scores(self, layer: int) -> Tensor:
        """Scores of the kept tokens, float32 [B, K, S]; 0 where the policy uses none."""
        self._check_layer("scores", layer)
        return self._views(layer).slots.score.clone()

    def weights(self, layer: int) -> Tensor:
        """Log-weights, float32 [B, K, S]: 0 unless a slot stands for several tokens."""
        self._check_layer("weights", layer)
        return self._views(layer).slots.weight.clone()

    def state(self, layer: int) -> tuple[Tensor, Tensor]:
        """The low-rank state: H [B, K, R, D] and z [B, K, R], float32.

        Raises:
            ValueError: The cache has no sidekick, or the layer is full, hence no state.
        """
        self._check_layer("state", layer)
        state = self._views(layer).state
        if state is None:
            if self.sidekick is not None:
                raise ValueError(f"state: layer {layer} keeps every token, hence no low-rank state")
            raise ValueError("state: this cache has no sidekick, hence no low-rank state")
        return state.H.clone(), state.z.clone()

    def _seen_of(self, layer: int) -> Tensor:
        """Tokens that a layer has seen, int64 [B]."""
        if layer in self.native:
            return self.session.sliding_seen[layer]
        return self._views(layer).seen

    @property
    def seen(self) -> Tensor:
        """Tokens seen by each row, padding left out, int64 [B]; of the layer that is furthest."""
        return torch.stack([self._seen_of(i) for i in range(self.layers)]).amax(0)

    @property
    def layouts(self) -> tuple[PageLayout | None, ...]:
        """What a page of each layer holds; None for layers that slide."""
        return tuple(None if at is None else at.layout for at in self._paged)

    def memory(self) -> dict[str, int]:
        """Bytes held, by purpose.

        Returns:
            ``slots`` (k, v, their scales, positions, scores, log-weights), ``state`` (H, z),
            ``maps`` (the sidekick's weights), ``workspace`` (counters, and the scratch of a GPU's
            kernels), ``native`` (k and v of layers that slide, which grow until their windows are
            full), ``total`` of these, and ``full``:
            the k and v that a full cache would hold of the same tokens now, in this cache's dtype,
            or in 16 bits where that has 8, which full caches are not held in; for layers that
            slide, what they hold. ``slots``, ``state`` and the counters are ``batch`` times
            ``PageLayout.nbytes`` of every layer.
        """
        state = pages = maps = 0
        for at in self.held:
            pages += at.layout.nbytes
            state += at.layout.bytes_of("H", "z")
            maps += 0 if at.plan.maps is None else at.plan.maps.memory.nbytes
        counters = sum(at.layout.header_bytes for at in self.held)
        pages, state, counters = (self.batch * n for n in (pages, state, counters))
        scratch = next((at.backend.workspace for at in self.held), 0)
        sliding_counters = sum(x.nbytes for x in self.session.sliding_seen.values())
        workspace = counters + scratch + sliding_counters
        slots = pages - state - counters
        per_token = 2 * self.kv_heads * self.head_dim * max(2, self.dtype.itemsize)
        tokens = sum(
            int(self._seen_of(i).sum()) for i in range(self.layers) if i not in self.native
        )
        native = sum(
            x.untyped_storage().nbytes()
            for _, at in self.session.made()
            for x in sliding_tensors(at).values()
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
        seen = [int(self._seen_of(i).sum()) for i in range(self.layers)]
        kept, share = [], []
        for i, n in enumerate(seen):
            if i in self.native:
                kept.append(n)
                share.append(0.0)
                continue
            at = self._views(i)
            kept.append(int((at.slots.position >= 0).sum()) // self.kv_heads)
            share.append(float(at.share.sum()) / (n * self.q_heads) if n else 0.0)
        return {
            "seen": seen,
            "kept": kept,
            "evictions": [n - h for n, h in zip(seen, kept, strict=True)],
            "memory_share": share,
        }

    def reset(self) -> None:
        """Forget everything; keep the memory."""
        for at, pool in zip(self._paged, self._pools, strict=True):
            if at is not None and pool is not None:
                at.layout.clear(pool)
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
        try:
            target = torch.empty(0, device=device).device  # "cuda" becomes "cuda:<current>"
        except (AssertionError, RuntimeError, TypeError) as e:
            reason = str(e).splitlines()[0]
            raise ValueError(
                f"to: device must be one that is here, got {device!r}: {reason}"
            ) from e
        if target.type == "meta":
            raise ValueError("to: device must hold values, got 'meta'")
        if target == self.seen.device:
            return self
        if self.session.bound is not None:
            raise RuntimeError(
                f"to: the cache is attached to a model on {self.device}; leave that block first"
            )
        self._move(target)
        return self

    def _move(self, target: torch.device) -> None:
        backend = backends.choose(self.backend, target)
        before = self.device, self._paged, self._pools
        try:
            self.device = target
            self._build(backend)
            self._pools = self._allocate()
            for mine, old in zip(self._pools, before[2], strict=True):
                if mine is not None and old is not None:
                    mine.copy_(old)
            put = self.session.moved(target)
        except BaseException:
            self.device, self._paged, self._pools = before
            raise
        put()
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
        for pool in self._pools:
            if pool is not None:
                pool.copy_(pool.index_select(0, rows))
        self.session.reorder(rows)

    @property
    def pools(self) -> dict[int, Tensor]:
        """The pages of each layer that this cache holds, uint8 [B, page]: not copies."""
        return {i: pool for i, pool in enumerate(self._pools) if pool is not None}

    def state_dict(self) -> dict[str, Any]:
        """A snapshot, of plain values and copies of the tensors; the sidekick is not in it.

        Returns:
            ``tensors`` (``"<layer>.page"``: uint8 [B, page]; and the keys and values of layers that
            slide), ``columns``, ``fed`` (which text a model was fed, as counts and digests) and
            ``cache``, the settings that a cache must share to load it.
        """
        return snapshot.save(self)

    def load_state_dict(self, d: dict[str, Any]) -> None:
        """Continue from a snapshot; decoding goes on bit for bit.

        Raises:
            ValueError: The snapshot is of another kind of cache, incomplete or damaged; the
                message names what differs and the cache is as it was.
        """
        snapshot.load(self, d)
        self._limits.heed(self.columns)

    @property
    def kind(self) -> str:
        """The kind of the sidekick's maps; "" without one."""
        return "" if self.sidekick is None else self.sidekick.kind

    def policy_text(self) -> str:
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
            f"head_dim={self.head_dim}, batch={self.batch}, policy={self.policy_text()}, "
            f"sidekick={self.kind or None}, dtype={self.dtype}, device={self.device}, "
            f"backend={self.backend})"
        )
