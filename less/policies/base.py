"""What a policy is: how many tokens a head keeps, and which."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from less._check import require_tensor, shape_text
from less.policies.registry import register


@dataclass(frozen=True)
class Candidates:
    """The tokens that compete for the slots of a layer after one call of ``attend``.

    N counts the slots first, then the tokens of the call. An entry with ``position == -1`` is an
    empty slot or padding: it is never kept, whatever its rank.

    Attributes:
        position: Row-local position of each token, int32 [B, K, N], -1 where there is none.
        score: Attention received so far, decayed by the policy, float32 [B, K, N].
        weight: Log-weight of each token, float32 [B, K, N]; 0 stands for one token.
        seen: Tokens seen by each row, those of this call included, int64 [B].
        k: Keys after the rotary embedding [B, K, N, D].
        v: Values [B, K, N, D].
    """

    position: Tensor
    score: Tensor
    weight: Tensor
    seen: Tensor
    k: Tensor
    v: Tensor


@dataclass(frozen=True)
class Rule:
    """A ranking that the native kernels compute themselves.

    Tokens at positions >= seen - recent or < sinks are protected. The others rank by score, by
    score per token of age (``per_age``), or all alike where ``by_score`` is false.

    ``recent`` is meant for heads of ``capacity`` slots, and in proportion for others, but at least
    one unless it is 0; with a capacity of 0 it is the same for every head.
    """

    recent: int
    sinks: int
    by_score: bool
    per_age: bool
    capacity: int = 0

    def for_slots(self, slots: int) -> Rule:
        """The rule of a head with so many slots."""
        if not self.capacity or not self.recent:
            return self
        return replace(self, recent=max(1, self.recent * slots // self.capacity))


class Policy(ABC):
    """Base of every policy: a frozen dataclass that says who stays.

    Subclasses define ``capacity`` and ``rank``; ``needs_scores`` tells the cache whether to
    accumulate attention scores at all (a prompt is cheaper without).

    A concrete subclass is known by its name from then on: a config or a sidekick that names it can
    be read (``less.policies.registry``).
    """

    decay: float = 1.0
    needs_scores: ClassVar[bool] = True
    #: False: nothing ever leaves, and a token too many is refused (``Full``).
    evicts: ClassVar[bool] = True

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Enter the class into the registry.

        Raises:
            ValueError: Its name is a built-in policy's, or it overrides ``rank`` and inherits a
                ``rule``, which the kernels would follow in place of it.
        """
        super().__init_subclass__(**kwargs)
        own = vars(cls)
        if "rank" in own and "rule" not in own and cls.rule is not Policy.rule:
            raise ValueError(
                f"{cls.__name__}: rank is overridden, but rule is inherited, and the kernels "
                "follow the rule; override rule too, with None to be ranked by rank"
            )
        register(cls)

    @property
    @abstractmethod
    def capacity(self) -> int:
        """Tokens that each kv head keeps, at least 1."""

    @abstractmethod
    def rank(self, tokens: Candidates) -> Tensor:
        """Rank the candidates: the ``capacity`` highest stay, of equals the older leaves first.

        Args:
            tokens: All tokens that compete for the slots.

        Returns:
            float32 [B, K, N]. NaN ranks lowest.
        """

    @property
    def rule(self) -> Rule | None:
        """The native form of ``rank``, or None where only ``rank`` itself defines it."""
        return None

    def at_capacity(self, capacity: int) -> Policy:
        """The same policy at another capacity; override it to say how yours is scaled.

        Raises:
            ValueError: The policy does not say how, or has no place for its parts in so few tokens.
        """
        if capacity == self.capacity:
            return self
        raise ValueError(
            f"{type(self).__name__}.at_capacity: it keeps {self.capacity} tokens and does not say "
            f"how to keep {capacity}; override at_capacity"
        )

    def to_dict(self) -> dict[str, Any]:
        """The policy's name and settings, as JSON-ready values."""
        if not dataclasses.is_dataclass(self):
            raise TypeError(f"{type(self).__name__} must be a dataclass to be written down")
        return {"name": type(self).__name__, **dataclasses.asdict(self)}


def checked_rank(policy: Policy, tokens: Candidates) -> Tensor:
    """``policy.rank(tokens)`` in the scores' dtype, contiguous.

    Raises:
        TypeError: It is no tensor.
        ValueError: It is not floating point, or not one number per candidate.
    """
    name = f"{type(policy).__name__}.rank"
    rank = require_tensor(name, "its result", policy.rank(tokens))
    if rank.shape != tokens.score.shape:
        raise ValueError(
            f"{name}: its result must have shape {shape_text(tokens.score.shape)}, "
            f"got {shape_text(rank.shape)}"
        )
    if not rank.is_floating_point():
        raise ValueError(f"{name}: its result must be floating point, got {rank.dtype}")
    return rank.to(tokens.score.dtype).contiguous()


def checked_at_capacity(policy: Policy, capacity: int) -> Policy:
    """``policy.at_capacity(capacity)``, held to what it promises.

    Raises:
        ValueError: It refuses this capacity, or gives no policy of it.
    """
    scaled = policy.at_capacity(capacity)
    if not isinstance(scaled, Policy) or scaled.capacity != capacity:
        raise ValueError(
            f"{type(policy).__name__}.at_capacity: its result must be a policy that keeps "
            f"{capacity} tokens, got {scaled!r}"
        )
    return scaled


def check_count(policy: str, name: str, value: object) -> None:
    """Refuse a token count that is not a whole number >= 0, by name."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{policy}: {name} must be a whole number of tokens, got {value!r}")
    if value < 0:
        raise ValueError(f"{policy}: {name} must be 0 or more, got {value}")


def rank_by_rule(rule: Rule, position: Tensor, score: Tensor, seen: Tensor) -> Tensor:
    """Evaluate a ``Rule``: the executable definition that the native kernels are held to.

    Args:
        rule: The rule.
        position: int32 [B, K, N], -1 where there is no token.
        score: float32 [B, K, N].
        seen: int64 [B], tokens seen, those of this call included.

    Returns:
        float32 [B, K, N]: +inf for protected tokens.
    """
    n = seen.view(-1, 1, 1)
    if rule.by_score:
        age = (n - position).clamp(min=1).to(score.dtype)
        rank = score / age if rule.per_age else score
    else:
        rank = torch.full_like(score, -torch.inf)
    protected = (position >= n - rule.recent) | (position < rule.sinks)
    return torch.where(protected, torch.inf, rank)
