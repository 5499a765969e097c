"""A step of the engine: which tokens go together, and on which pages.

Requests with equally many tokens in a step are one call of a layer: all that decode, and prompts
that are cut alike. Nothing here imports vLLM, and nothing loops over requests.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from less.cache import PagedLayer
from less.cache.limits import BiasedKeys
from less.layer import PageRows

NULL_BLOCK = 0  # vLLM's, of requests that pad a batch


@dataclass(frozen=True)
class Part:
    """Tokens ``first`` to ``last`` of every request of a group, evicted from at once."""

    first: int
    last: int
    rows: PageRows


@dataclass(frozen=True)
class Group:
    """B requests with T tokens each.

    Attributes:
        tokens: T.
        at: Where their tokens lie in the step: a slice, or int64 [B * T] where others lie between.
        parts: One after the other.
    """

    tokens: int
    at: slice | Tensor
    parts: tuple[Part, ...]

    def attend(
        self, layer: PagedLayer, pool: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor
    ) -> None:
        """Attend with the group's tokens, on a layer.

        Args:
            layer: The layer.
            pool: Its pages.
            q: [tokens, Q, D] of the whole step, as are the others.
            k: [tokens, K, D].
            v: [tokens, K, D].
            out: [tokens, Q, D]. Written where the group's tokens lie.
        """
        q, k, v, own = (self.heads(x) for x in (q, k, v, out))
        for part in self.parts:
            at = slice(part.first, part.last)
            layer.attend(
                pool, q[:, :, at], k[:, :, at], v[:, :, at], pages=part.rows, out=own[:, :, at]
            )
        if isinstance(self.at, Tensor):
            out.index_copy_(0, self.at, own.transpose(1, 2).flatten(0, 1))

    def heads(self, x: Tensor) -> Tensor:
        """[tokens, heads, D] of the step as [B, heads, T, D] of the group: a view of a slice."""
        own: Tensor = x[self.at].unflatten(0, (-1, self.tokens))
        return own.transpose(1, 2)


@dataclass(frozen=True)
class Step:
    """What the layers do in one step."""

    groups: tuple[Group, ...]

    def attend(
        self, layer: PagedLayer, pool: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor
    ) -> Tensor:
        """Attend with all tokens of a step; arguments and ``out`` as in ``Group.attend``."""
        for group in self.groups:
            group.attend(layer, pool, q, k, v, out)
        return out


def look(biased: BiasedKeys, step: Step, k: Tensor) -> bool:
    """Warn of a layer's keys with large means in rows of few bits, if a step shows enough of them.

    Whether keys are biased is a matter of the layer's weights: one look at each layer is enough.

    Args:
        biased: Of the engine.
        step: The step.
        k: [tokens, K, D], its keys.

    Returns:
        Whether the layer has been looked at, or need not be.
    """
    if not biased.looks:
        return True
    for group in step.groups:
        # A run that only warms the engine up has no pages, and the same token everywhere.
        if group.tokens >= biased.TOKENS and bool((group.parts[0].rows.packed[0] >= 0).all()):
            biased.heed(group.heads(k), 0)
            return True
    return False


class Steps:
    """Builds steps from vLLM's metadata of a batch.

    The pages of a batch that decodes lie where they lay in the step before: a CUDA graph that was
    captured with a batch of B reads those of every later batch of B.

    Args:
        requests: The most that a step has.
        chunk: Prompt tokens that are evicted from at once; 0: all of a step.
        device: Of the layers.
    """

    def __init__(self, requests: int, chunk: int, device: torch.device) -> None:
        self.chunk, self.device = chunk, device
        self._decoding = torch.empty(2 * requests, dtype=torch.int32, device=device)
        self._last: tuple[Tensor, int, Step] | None = None

    def of(self, batch: Any) -> Step:
        """The step of a batch: the same one for all who ask about the same batch.

        Args:
            batch: vLLM's ``CommonAttentionMetadata``: ``query_start_loc_cpu`` int32 [n + 1],
                ``query_start_loc``, ``seq_lens`` int32 [n] (this step's tokens included),
                ``block_table_tensor`` int32 [n, 1], ``num_reqs`` n and ``max_query_len``.
        """
        # Both of vLLM's runners cut seq_lens anew for each step: another step is another tensor.
        table = batch.block_table_tensor.data_ptr()
        last = self._last
        if last is None or last[0] is not batch.seq_lens or last[1] != table:
            last = self._last = (batch.seq_lens, table, Step(self._groups(batch)))
        return last[2]

    def _groups(self, batch: Any) -> tuple[Group, ...]:
        n = int(batch.num_reqs)
        starts = batch.query_start_loc_cpu[: n + 1].long()
        lengths = starts.diff()
        began = batch.query_start_loc[: n + 1]
        fresh = batch.seq_lens[:n] == began[1:] - began[:-1]
        pages = batch.block_table_tensor[:n, 0]
        pages = torch.where(pages == NULL_BLOCK, -1, pages)
        if int(batch.max_query_len) <= 1:
            return (self._decode(pages, fresh),)
        groups = []
        for tokens in lengths.unique().tolist():
            if tokens:
                which = (lengths == tokens).nonzero()[:, 0]
                groups.append(self._group(tokens, which, starts, pages, fresh))
        return tuple(groups)

    def _decode(self, pages: Tensor, fresh: Tensor) -> Group:
        """A token of each, the requests that pad the batch included."""
        n = pages.shape[0]
        packed = self._decoding[: 2 * n].view(2, n)
        packed[0].copy_(pages)
        packed[1].copy_(fresh)
        return Group(1, slice(0, n), (Part(0, 1, PageRows.of(packed)),))

    def _group(
        self, tokens: int, which: Tensor, starts: Tensor, pages: Tensor, fresh: Tensor
    ) -> Group:
        """The requests ``which``, int64 [B] on the host."""
        first, B = int(which[0]), which.shape[0]
        at: slice | Tensor
        own: slice | Tensor
        if int(which[-1]) - first + 1 == B:  # neighbours
            begin = int(starts[first])
            at, own = slice(begin, begin + B * tokens), slice(first, first + B)
        else:
            at = (starts[which].unsqueeze(1) + torch.arange(tokens)).flatten().to(self.device)
            own = which.to(self.device)
        begun = PageRows.of(torch.stack([pages[own], fresh[own].int()]))
        chunk = self.chunk or tokens
        parts = tuple(
            Part(i, min(i + chunk, tokens), begun if i == 0 else begun.used())
            for i in range(0, tokens, chunk)
        )
        return Group(tokens, at, parts)
