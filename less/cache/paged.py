"""One layer over a pool of pages that its caller owns: an engine, or ``LessKVCache``."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from less import backend as backends
from less._check import require_int, require_tensor
from less.backend import Backend
from less.cache.checks import (
    check_call,
    check_dtype,
    check_weighing,
    positive,
    same_key_mean,
)
from less.layer import (
    Call,
    LayerPlan,
    LayerSpec,
    PackedMaps,
    Paged,
    PageLayout,
    PageRows,
    Rows,
    Slots,
    Space,
    allocate,
    plain_space,
)
from less.layer.kinds import KEY_MEAN, kind_of
from less.layer.spec import VICTIMS
from less.policies import Policy
from less.policies.base import checked_rank
from less.reference import Attended, candidates


class PagedLayer:
    """A layer without memory of its own: it attends on a pool of pages that it is given.

    A pool holds one page for each sequence. The caller says which page each row of a call uses, so
    sequences come and go without a copy::

        layout = PageLayout(kv_heads=8, head_dim=128, capacity=256)
        layer = PagedLayer(H2O(heavy=128, recent=128), layout, q_heads=32)
        pool = layer.new_pool(pages=64)
        out = layer.attend(pool, q, k, v, pages=pages, fresh=fresh)

    Args:
        policy: Which tokens stay. Its capacity must be the layout's, unless that differs per head.
        layout: The page.
        q_heads: Query heads Q, a multiple of the kv heads.
        maps: Feature maps: a layer of a ``Sidekick`` by name, of the layout's rank. None: no state.
        kind: Their kind, a name in ``less.layer.kinds.KINDS``.
        space: The space of the rows of a packed format, or of any other; None: that of the maps'
            ``key_mean`` where they have one; else that without means and scales for packed
            formats, none for others.
        victim: ``"fold"``, ``"merge"`` or ``"forget"``: what becomes of an evicted token. Merging
            needs a policy with scores, and a layout with weights. None: ``"fold"`` with maps,
            ``"forget"`` without.
        scale: Factor of q.k; 1/sqrt(D) by default.
        softcap: Logits become softcap * tanh(scale q.k / softcap), plus log-weights. None: no cap.
        null_page: A page number that means no page, besides negative numbers.
        device: Device of maps and pools.
        backend: As in ``LessKVCache``.

    Raises:
        ValueError: An argument is wrong; the message names it.

    Source: arXiv:2402.09398.
    """

    def __init__(
        self,
        policy: Policy,
        layout: PageLayout,
        q_heads: int,
        *,
        maps: Mapping[str, Tensor] | None = None,
        kind: str = "exp",
        space: Space | None = None,
        victim: str | None = None,
        scale: float | None = None,
        softcap: float | None = None,
        null_page: int = -1,
        device: torch.device | str = "cpu",
        backend: str | Backend | None = None,
    ) -> None:
        op = "PagedLayer"
        if not isinstance(policy, Policy):
            raise ValueError(f"{op}: policy must be a Policy, got {type(policy).__name__}")
        if not isinstance(layout, PageLayout):
            raise ValueError(f"{op}: layout must be a PageLayout, got {type(layout).__name__}")
        require_int(op, "q_heads", q_heads, 1)
        if not layout.per_head and layout.capacity != policy.capacity:
            raise ValueError(
                f"{op}: layout must have the policy's capacity, {policy.capacity}, got "
                f"{layout.capacity}"
            )
        if victim in VICTIMS:  # others are refused by the spec
            check_weighing(op, victim, policy)
        self.policy, self.layout, self.device = policy, layout, torch.device(device)
        if backend is None or isinstance(backend, str):
            backend = backends.choose(backend, self.device)
        self.backend = backend
        check_dtype(op, "layout's dtype", layout.dtype, backend, self.device)
        least, most = -(1 << 31), (1 << 31) - 1
        if require_int(op, "null_page", null_page, least) > most:
            raise ValueError(f"{op}: null_page must be at most {most}, got {null_page}")
        if maps is not None and kind_of(op, kind).centred:
            space = self._centred(op, maps, space, softcap)
            maps = {n: x for n, x in maps.items() if n != KEY_MEAN}
        packed = None if maps is None else PackedMaps.pack(maps, kind, self.device)
        spec = LayerSpec(
            q_heads=q_heads,
            scale=positive(
                op, "scale", 1.0 / math.sqrt(layout.head_dim) if scale is None else scale
            ),
            softcap=0.0 if softcap is None else positive(op, "softcap", softcap),
            decay=policy.decay,
            scores=policy.needs_scores,
            rule=policy.rule,
            victim=victim or ("forget" if packed is None else "fold"),
            null_page=null_page,
        )
        if space is None and layout.format.packed:
            space = plain_space(layout.kv_heads, layout.head_dim, self.device)
        if space is not None:
            space = (space if not spec.softcap else space.without_key_mean()).to(self.device)
        self.plan = LayerPlan(spec, layout, packed, space)

    def _centred(
        self, op: str, maps: Mapping[str, Tensor], space: Space | None, softcap: float | None
    ) -> Space | None:
        """The space of the rows, whose mean of keys must be the one that maps were trained with."""
        mean = maps.get(KEY_MEAN)
        if mean is not None and softcap is not None:
            raise ValueError(f"{op}: maps must have no key_mean under a soft-cap")
        if space is None:
            heads, dim = self.layout.kv_heads, self.layout.head_dim
            return None if mean is None else Space.of(heads, dim, key_mean=mean)
        if softcap is None and not same_key_mean(space, mean):
            raise ValueError(
                f"{op}: space must have the key_mean that the maps were trained with"
                + (", 0" if mean is None else "")
            )
        return space

    def new_pool(self, pages: int) -> Tensor:
        """A pool of empty pages, uint8 [pages, page]."""
        return allocate([self.layout], require_int("new_pool", "pages", pages, 1), self.device)[0]

    def attend(
        self,
        pool: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        pages: Tensor | PageRows | None = None,
        fresh: Tensor | None = None,
        valid: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """Attend with T new tokens of every row, which then join the row's page.

        Args:
            pool: Bytes [N, page], in any shape that ``PageLayout.check_pool`` accepts. Written.
            q: [B, Q, T, D], float32, bfloat16 or float16. Tokens may lie before heads: a view of
                [tokens, heads, D] costs no copy; so for k, v and out.
            k: [B, K, T, D].
            v: [B, K, T, D].
            pages: int32 [B], the page of each row. With the null page or a negative number the row
                reads and writes nothing, and its output is 0. None: row b uses page b. A
                ``PageRows`` made once serves all layers of a step.
            fresh: bool [B]: True clears the row's page before it is used, whatever bytes it
                contains. Only with ``pages``.
            valid: bool [B, T], False for padding. None: all valid.
            out: [B, Q, T, D] of q's dtype: where to write the result.

        Returns:
            [B, Q, T, D] in q's dtype; ``out`` where it is given.

        Raises:
            ValueError: An argument is wrong, or a ``Full`` policy has no room; nothing was written.
            RuntimeError: A page is not in the pool, or two rows share it; nothing was written.
        """
        op = "attend"
        pool = self.layout.check_pool(op, pool)
        rows = pages if isinstance(pages, PageRows) else None
        if isinstance(pages, PageRows):
            if fresh is not None:
                raise ValueError(f"{op}: fresh must be in the PageRows, got both")
        elif pages is not None:
            rows = PageRows(pages, fresh, null_page=self.plan.spec.null_page)
        elif fresh is not None:
            raise ValueError(f"{op}: fresh must come with pages")
        B = pool.shape[0] if rows is None else rows.pages.shape[0]
        if rows is None and require_tensor(op, "q", q).dim() == 4:
            B = min(B, q.shape[0])
        call = Call(q, k, v, valid, out)
        check_call(op, call, self.plan, B, pool.device)
        at = Paged(pool, rows)
        if not self.policy.evicts:
            self._check_room(op, at, call)
        return self.run(call, at)

    def _check_room(self, op: str, at: Paged, call: Call) -> None:
        """Refuse more tokens than a layer that keeps every token has slots; waits for a GPU."""
        B, _, T, _ = call.q.shape
        seen = self.plan.seen(at, B) + (T if call.valid is None else call.valid.sum(1))
        room = min(self.layout.capacities)
        if bool((seen > room).any()):
            raise ValueError(
                f"{op}: the layer keeps every token and has room for {room}, got "
                f"{int(seen.max())}; give it more slots"
            )

    def run(self, call: Call, at: Paged) -> Tensor:
        """``attend`` without its checks."""
        if self.policy.rule is not None and call.q.shape[2] == 1:
            return self.backend.decode_step(call, at, self.plan)
        new = self.backend.rounded(call.k, call.v, self.plan)
        step = self.backend.attend(call, new, at, self.plan)
        at = at if at.rows is None else Paged(at.pool, at.rows.used())
        rank = self._rank(step, new, call.valid, at) if self.policy.rule is None else None
        self.backend.compact(new, call.valid, step, at, self.plan, rank)
        return step.out

    def _rank(self, step: Attended, new: Rows, valid: Tensor | None, at: Paged) -> Tensor:
        slots, seen = self.held(at, new.k.shape[0])
        tokens = candidates(slots, new, step.score, seen, valid, self.plan.space)
        return checked_rank(self.policy, tokens)

    def held(self, at: Paged, B: int) -> tuple[Slots, Tensor]:
        """Copies of the slots and of the number of tokens seen in each row's page.

        Heads with fewer slots than the largest are padded with empty ones; a row without a page
        counts as an empty sequence.

        Args:
            at: The layer's pages.
            B: Rows.

        Returns:
            The slots [B, K, S, ...] and int64 [B].
        """
        index, there = at.index(B, self.plan.spec.null_page)
        S = self.layout.slots
        views = self.layout.views(at.pool)
        runs = [v.slots.select(index) for v in views]
        tensors = {}
        for name in runs[0].tensors():
            empty = -1 if name == "position" else 0
            parts = []
            for run in runs:
                x = getattr(run, name)
                lacks = S - run.position.shape[2] if not name.startswith("hot_") else 0
                missing = x.new_full((*x.shape[:2], lacks, *x.shape[3:]), empty)
                parts.append(torch.cat([x, missing], 2))
            tensors[name] = torch.cat(parts, 1)
        tensors["position"].masked_fill_(~there[:, None, None], -1)
        return runs[0].holding(tensors), self.plan.seen(at, B)
