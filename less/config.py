"""``LessConfig``: a cache's settings as one frozen object that JSON can hold."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from less.budget import BETA, deal, least_tokens, page_bytes, parse_bytes
from less.calibration import Calibration
from less.config_file import ConfigFile
from less.dealing import (
    ByteBudget,
    Kept,
    TokenBudget,
    by_curves,
    check_length,
    joined,
    layer_weights,
    most,
)
from less.dtypes import FORMATS, MERGING_ROWS
from less.dtypes import name as dtype_name
from less.layer.spec import VICTIMS
from less.policies import H2O, Full, Policy
from less.policies.base import checked_at_capacity
from less.policies.default import default_policy as default_policy
from less.policies.default import merging_policy
from less.settings import check_actions, check_budget, check_folder, check_rows, check_shape
from less.sidekick import Sidekick, shipped, shipped_names
from less.sidekick.trained import trained_policy as trained_policy

if TYPE_CHECKING:
    from torch import nn

    from less.cache import LessKVCache
    from less.hf.models import ModelFacts


@dataclass(frozen=True)
class LessConfig(ConfigFile):
    """A budget, how the layers share it, the policy, and the sidekick.

    One of ``tokens``, ``share`` and ``bytes`` is the budget; the rest has defaults::

        config = LessConfig(bytes="64MiB", calibration="my-model")
        cache = config.cache(model, batch=8)

    A budget in bytes with no ``policy``, ``dtype``, ``rows``, ``victim``, ``sidekick`` or
    ``preset`` means what loses least at these bytes without training (docs/memory.md):
    rows of four bits, victims merged into the nearest slot, H2O with a quarter of recent tokens
    and scores that decay; and, with a calibration that has curves, slots dealt out to heads by
    them. ``settled`` shows it.

    Attributes:
        tokens: Tokens per kv head, the mean over layers; or a list of one number per layer.
        share: Tokens per kv head as a share of the prompt's, the mean over layers, in (0, 1].
        bytes: The most that pages (slots, low-rank state, headers) and the windows of sliding
            layers take, over all layers and rows: a number, or a text such as "64MiB". For a
            sharded model, of this process. The sidekick's maps are weights and come on top.
        shape: "uniform", "pyramid" (``less.budget.pyramid``), a list of one weight per layer, in
            proportion to which the budget is dealt out; or "calibrated": every kv head gets what
            its slots are worth by the curves of ``calibration`` (``less.budget.deal_curves``).
            None: uniform, unless it is left open as above.
        beta: For the pyramid: the last layer gets 1 / beta of the mean.
        full_layers: The number of first layers that keep every token (``Full``), not counting
            sliding layers. Their weights in ``shape`` are not used. A budget in bytes includes
            them; a budget in tokens or as a share is that of the other layers.
        max_tokens: Room of full layers in tokens: prompt, new tokens and padding.
        policy: Which tokens stay; its proportions count, its capacity is replaced. None: the policy
            that the sidekick was trained with, or ``default_policy``.
        dtype: Of the slots, by name; None: the model's.
        sidekick: Folder or shipped name of the feature maps; None: evicted tokens are forgotten.
        rows: In place of ``dtype``: one of its names, or a packed format such as "k4v4".
        sinks: First tokens in finer rows, of packed formats; None: 4.
        hot: Last tokens in finer rows, of packed formats; None: 16.
        hot_dtype: Of the finer rows: "int8", "float16" or "float32".
        calibration: Folder that ``less-kv calibrate`` wrote, or a shipped name: means and scales of
            rows, and curves for ``shape``; None: rows are rotated alone.
        victim: What becomes of evicted tokens, as in ``LessKVCache``.
        preset: ``"paper"``: the method of arXiv:2402.09398: half heavy hitters without decay, half
            recent tokens, rows in the model's dtype, victims folded through a sidekick, which must
            be given. None: none.

    Raises:
        ValueError: A setting is wrong, or contradicts another; the message names it.
    """

    tokens: int | Sequence[int] | None = None
    share: float | None = None
    bytes: int | str | None = None
    shape: str | Sequence[float] | None = None
    beta: float = BETA
    full_layers: int = 0
    max_tokens: int | None = None
    policy: Policy | None = None
    dtype: str | None = None
    sidekick: str | None = None
    rows: str | None = None
    sinks: int | None = None
    hot: int | None = None
    hot_dtype: str = "int8"
    calibration: str | None = None
    victim: str | None = None
    preset: str | None = None

    def __post_init__(self) -> None:
        """Check every setting by itself, and those that go together."""
        for name in ("tokens", "shape"):  # hashable, and equal to what JSON gives back
            if isinstance(value := getattr(self, name), list):
                object.__setattr__(self, name, tuple(value))
        for name in ("dtype", "rows", "hot_dtype"):
            if isinstance(value := getattr(self, name), torch.dtype):
                object.__setattr__(self, name, dtype_name(value))
        for name in ("sidekick", "calibration"):
            if isinstance(value := getattr(self, name), os.PathLike):
                object.__setattr__(self, name, os.fspath(value))
        check_budget(self.tokens, self.share, self.bytes)
        check_shape(self.shape, self.beta, self.tokens)
        for name in ("full_layers", "max_tokens"):
            value = getattr(self, name)
            if name == "max_tokens" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise ValueError(f"LessConfig: {name} must be a whole number >= 0, got {value!r}")
        if self.policy is not None and not isinstance(self.policy, Policy):
            raise ValueError(
                f"LessConfig: policy must be a Policy, got {type(self.policy).__name__}; a list of "
                "one per layer goes to less.hf.cache_for"
            )
        if isinstance(self.policy, Full):
            raise ValueError("LessConfig: policy Full has no budget; see full_layers")
        check_rows(self.dtype, self.rows, self.sinks, self.hot, self.hot_dtype)
        check_actions(
            self.victim,
            self.preset,
            {n: getattr(self, n) for n in ("policy", "dtype", "rows", "victim")},
            self.sidekick,
        )
        check_folder("sidekick", self.sidekick, "a folder or a shipped name")
        check_folder("calibration", self.calibration, "a folder or a shipped name")

    @property
    def _format(self) -> torch.dtype | str | None:
        """Dtype of the slots, or a packed format; None: the model's dtype."""
        chosen = self.rows or self.dtype
        return chosen if chosen is None or chosen in FORMATS else getattr(torch, chosen)

    @property
    def _hot(self) -> dict[str, Any]:
        """The settings of hot rows, by the names that caches take."""
        return {
            "sinks": self.sinks,
            "hot": self.hot,
            "hot_dtype": getattr(torch, self.hot_dtype),
        }

    @property
    def _least(self) -> int:
        """The fewest tokens of a head."""
        return least_tokens(self._format or torch.float16, self.sinks, self.hot)

    # -- the cache -----------------------------------------------------------------------------

    def cache(
        self,
        model: nn.Module,
        batch: int = 1,
        prompt_tokens: int | None = None,
        sidekick: Sidekick | None = None,
        max_tokens: int | None = None,
        backend: str | None = None,
        calibration: Calibration | None = None,
    ) -> LessKVCache:
        """Build the cache for a transformers model.

        Args:
            model: As in ``less.hf.cache_for``.
            batch: Rows.
            prompt_tokens: Length of the (longest) prompt, of which ``share`` is a share.
            sidekick: In place of the one that the config names.
            max_tokens: In place of the config's.
            backend: As in ``LessKVCache``.
            calibration: In place of the one that the config names.

        Raises:
            UnsupportedModelError: The model cannot run on a bounded cache.
            ValueError: The budget is too small for every layer to keep a token, or something that
                it needs is not given; the message says what.
        """
        from less.hf import cache_for
        from less.hf.models import describe

        facts = describe(model, "LessConfig")
        settings = self.arguments(facts, batch, prompt_tokens, sidekick, max_tokens, calibration)
        return cache_for(model, batch=batch, backend=backend, **settings)

    def arguments(
        self,
        facts: ModelFacts,
        batch: int = 1,
        prompt_tokens: int | None = None,
        sidekick: Sidekick | None = None,
        max_tokens: int | None = None,
        calibration: Calibration | None = None,
    ) -> dict[str, Any]:
        """What ``less.hf.cache_for`` takes beside the model, rows and backend; as in ``cache``."""
        if sidekick is None:
            sidekick = self.load_sidekick()
        if calibration is None:
            calibration = self.load_calibration()
        settled = self.settled(sidekick, calibration)
        dealt = [
            settled._dealt(facts, rank, batch, prompt_tokens, sidekick, max_tokens, calibration)
            for rank in range(facts.part[1])
        ]
        return {
            "policy": settled._policies(facts, dealt[facts.part[0]], sidekick),
            "sidekick": sidekick,
            "dtype": settled._format,
            "calibration": calibration,
            "victim": settled.victim,
            "capacities": [joined(layer) for layer in zip(*dealt, strict=True)],
            **settled._hot,
        }

    def settled(
        self, sidekick: Sidekick | None = None, calibration: Calibration | None = None
    ) -> LessConfig:
        """The same with all that is left open said: what ``cache`` builds.

        Args:
            sidekick: One that is passed on its own.
            calibration: Likewise.

        Raises:
            ValueError: A preset needs a sidekick, and there is none.
        """
        folds = sidekick is not None or self.sidekick is not None
        if self.preset == "paper":
            if not folds:
                raise ValueError(
                    "LessConfig: preset 'paper' needs a sidekick, whose maps fold what is evicted: "
                    "a folder of less-kv train --kind paper, or one of the shipped "
                    f"{', '.join(shipped_names())}"
                )
            return dataclasses.replace(
                self, preset=None, policy=H2O(heavy=1, recent=1), victim="fold"
            )
        said = (self.policy, self.dtype, self.rows, self.victim)
        if self.bytes is None or folds or any(x is not None for x in said):
            return self
        shape = self.shape
        if shape is None and calibration is not None and calibration.capacities:
            shape = "calibrated"
        return dataclasses.replace(self, rows=MERGING_ROWS, victim="merge", shape=shape)

    def policies(
        self,
        model: nn.Module,
        batch: int = 1,
        prompt_tokens: int | None = None,
        sidekick: Sidekick | None = None,
        max_tokens: int | None = None,
        calibration: Calibration | None = None,
    ) -> list[Policy | None]:
        """One policy per layer, as ``cache`` gives them to the cache; nothing is allocated.

        Args and errors are those of ``cache``; the model's weights are not read, so it may be on
        the device ``meta``. Layers that slide have None. Where heads differ, the policy is that of
        the layer's head with the most slots.
        """
        from less.hf.models import describe

        if calibration is None:
            calibration = self.load_calibration()
        settled = self.settled(sidekick, calibration)
        facts = describe(model, "LessConfig")
        dealt = settled._dealt(
            facts, facts.part[0], batch, prompt_tokens, sidekick, max_tokens, calibration
        )
        return settled._policies(facts, dealt, sidekick)

    def _policies(
        self, facts: ModelFacts, dealt: Sequence[Kept], sidekick: Sidekick | None
    ) -> list[Policy | None]:
        full = self._full(facts.layers, facts.windows)
        return [
            None
            if kept is None
            else Full(most(kept))
            if layer in full
            else self.policy_at(most(kept), sidekick)
            for layer, kept in enumerate(dealt)
        ]

    def _dealt(
        self,
        facts: ModelFacts,
        rank: int,
        batch: int,
        prompt_tokens: int | None,
        sidekick: Sidekick | None,
        max_tokens: int | None,
        calibration: Calibration | None,
    ) -> list[Kept]:
        """``capacities`` of the kv heads of one process."""
        dtype = facts.dtype if self._format is None else self._format
        state = sidekick.rank if sidekick is not None else 0
        weighs = self.victim is not None and VICTIMS[self.victim].weighs
        if calibration is not None and self.shape == "calibrated":
            calibration.check_model(facts.config)
            calibration = calibration.shard(rank, facts.part[1])
        return self.capacities(
            facts.layers,
            lambda tokens, evicts: (
                batch
                * page_bytes(
                    facts.kv_heads,
                    facts.head_dim,
                    dtype,
                    tokens,
                    state if evicts else 0,
                    **self._hot,
                    weights=(evicts and weighs) or None,
                )
            ),
            native=tuple(facts.windows),
            native_bytes=batch * facts.kv_heads * facts.window_bytes,
            prompt_tokens=prompt_tokens,
            max_tokens=max_tokens,
            calibration=calibration,
        )

    def capacities(
        self,
        layers: int,
        layer_bytes: Callable[[int, bool], int] | None = None,
        native: Sequence[int] = (),
        prompt_tokens: int | None = None,
        max_tokens: int | None = None,
        native_bytes: int = 0,
        calibration: Calibration | None = None,
    ) -> list[Kept]:
        """Tokens that each layer keeps per kv head; None for layers that slide.

        A number for all heads, or with ``shape="calibrated"`` a tuple of one per head.

        Args:
            layers: Number of layers.
            layer_bytes: For ``bytes``: a function from the tokens per head that a layer keeps, and
                whether it evicts and so may have a state, to the layer's bytes over all rows.
            native: Indices of layers that slide.
            prompt_tokens: For ``share``.
            max_tokens: In place of the config's.
            native_bytes: What those hold together once their windows are full.
            calibration: For ``shape="calibrated"``: whose curves.

        Raises:
            ValueError: As in ``cache``.
        """
        full = self._full(layers, native)
        bounded = [i for i in range(layers) if i not in native and i not in full]
        if not bounded:
            raise ValueError(
                f"LessConfig: full_layers={self.full_layers} leaves none of {len(full)} layers "
                "to be bounded" + (f" ({len(native)} others slide)" if native else "")
            )
        room = self.max_tokens if max_tokens is None else max_tokens
        if full and not room:
            raise ValueError(
                "LessConfig: full_layers needs max_tokens, the most that prompt and new tokens "
                "come to: memory is allocated once"
            )
        out: list[Kept] = [None] * layers
        for i in full:
            out[i] = room
        if isinstance(self.tokens, Sequence):
            check_length("tokens", self.tokens, layers)
            for i in bounded:
                out[i] = self.tokens[i]
            return out
        budget: ByteBudget | TokenBudget
        if self.bytes is None:
            budget = TokenBudget.of(self.tokens, self.share, prompt_tokens)
        elif layer_bytes is None:
            raise ValueError("LessConfig: a budget in bytes needs layer_bytes")
        else:
            held = {
                "the windows of layers that slide": native_bytes,
                "full layers": len(full) * layer_bytes(room, False) if full and room else 0,
            }
            budget = ByteBudget(parse_bytes("LessConfig", self.bytes), layer_bytes, held)
        shape = self.shape or "uniform"
        if shape == "calibrated":
            dealt = by_curves(calibration, layers, bounded, budget, self._least)
            for i, kept in zip(bounded, dealt, strict=True):
                out[i] = kept
            return out
        weights = [layer_weights(shape, self.beta, layers)[i] for i in bounded]
        total = budget.tokens(weights, self._least)
        for i, tokens in zip(bounded, deal(total, weights), strict=True):
            if tokens < self._least:
                few = f", and {self.rows} keeps {self._least} or more" if self._least > 1 else ""
                raise ValueError(
                    f"LessConfig: layer {i} would keep {tokens} tokens{few}: {total} for "
                    f"{len(bounded)} layers with shape={shape!r}; raise the budget"
                    + ("" if shape == "uniform" else " or flatten the shape")
                )
            out[i] = tokens
        return out

    def _full(self, layers: int, sliding: Collection[int]) -> list[int]:
        """The layers that keep every token: the first of those that do not slide."""
        return [i for i in range(layers) if i not in sliding][: self.full_layers]

    def policy_at(self, capacity: int, sidekick: Sidekick | None = None) -> Policy:
        """The policy of a layer that keeps ``capacity`` tokens."""
        policy = self.policy
        if policy is None and sidekick is not None:
            policy = trained_policy(sidekick, capacity)
        if policy is None:
            return (merging_policy if self.victim == "merge" else default_policy)(capacity)
        return checked_at_capacity(policy, capacity)

    def load_sidekick(self) -> Sidekick | None:
        """Read the sidekick that the config names; None where it names none."""
        if self.sidekick is None:
            return None
        name = self.sidekick
        return Sidekick.from_pretrained(shipped(name) if name in shipped_names() else name)

    def load_calibration(self) -> Calibration | None:
        """Read the calibration that the config names; None where it names none."""
        return None if self.calibration is None else Calibration.from_pretrained(self.calibration)
