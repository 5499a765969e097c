"""``LessConfig``: a cache's settings as one frozen object that JSON can hold."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from less.budget import BETA, deal, least_tokens, most_within, page_bytes, parse_bytes, pyramid
from less.calibration import Calibration
from less.dtypes import FORMATS
from less.dtypes import name as dtype_name
from less.policies import H2O, Full, Policy, policy_from_dict, policy_to_dict
from less.policies.base import checked_at_capacity
from less.policies.default import default_policy as default_policy
from less.policies.default import merging_policy
from less.settings import check_actions, check_budget, check_folder, check_rows, check_shape
from less.sidekick import Sidekick, shipped, shipped_names
from less.sidekick.trained import trained_policy as trained_policy

if TYPE_CHECKING:
    from torch import nn

    from less.cache import LessKVCache

CONFIG_FILE = "less_config.json"
FORMAT = "less-config"
_VERSION = 1


@dataclass(frozen=True)
class LessConfig:
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
        shape: "uniform", "pyramid" (``less.budget.pyramid``), or a list of one weight per layer, in
            proportion to which the budget is dealt out.
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
        calibration: Folder that ``less-kv calibrate`` wrote; None: rows are rotated alone.
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
    shape: str | Sequence[float] = "uniform"
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
        check_folder("calibration", self.calibration, "a folder")

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

        if sidekick is None:
            sidekick = self.load_sidekick()
        if calibration is None:
            calibration = self.load_calibration()
        settled = self.settled(sidekick)
        return cache_for(
            model,
            settled.policies(model, batch, prompt_tokens, sidekick, max_tokens),
            sidekick,
            batch=batch,
            dtype=settled._format,
            backend=backend,
            calibration=calibration,
            victim=settled.victim,
            **settled._hot,
        )

    def settled(self, sidekick: Sidekick | None = None) -> LessConfig:
        """The same with all that is left open said: what ``cache`` builds.

        Args:
            sidekick: One that is passed on its own.

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
        return dataclasses.replace(self, rows="k4v4", victim="merge")

    def policies(
        self,
        model: nn.Module,
        batch: int = 1,
        prompt_tokens: int | None = None,
        sidekick: Sidekick | None = None,
        max_tokens: int | None = None,
    ) -> list[Policy | None]:
        """One policy per layer, as ``cache`` gives them to the cache; nothing is allocated.

        Args and errors are those of ``cache``; the model's weights are not read, so it may be on
        the device ``meta``. Layers that slide have None.
        """
        from less.hf.models import describe

        settled = self.settled(sidekick)
        if settled is not self:
            return settled.policies(model, batch, prompt_tokens, sidekick, max_tokens)
        facts = describe(model, "LessConfig")
        dtype = facts.dtype if self._format is None else self._format
        rank = sidekick.rank if sidekick is not None else 0
        capacities = self.capacities(
            facts.layers,
            lambda tokens, evicts: (
                batch
                * page_bytes(
                    facts.kv_heads,
                    facts.head_dim,
                    dtype,
                    tokens,
                    rank if evicts else 0,
                    **self._hot,
                    weights=(evicts and self.victim == "merge") or None,
                )
            ),
            native=tuple(facts.windows),
            native_bytes=batch * facts.kv_heads * facts.window_bytes,
            prompt_tokens=prompt_tokens,
            max_tokens=max_tokens,
        )
        return [
            None
            if capacity is None
            else Full(capacity)
            if layer in self._full(facts.layers, facts.windows)
            else self.policy_at(capacity, sidekick)
            for layer, capacity in enumerate(capacities)
        ]

    def capacities(
        self,
        layers: int,
        layer_bytes: Callable[[int, bool], int] | None = None,
        native: Sequence[int] = (),
        prompt_tokens: int | None = None,
        max_tokens: int | None = None,
        native_bytes: int = 0,
    ) -> list[int | None]:
        """Tokens that each layer keeps per kv head; None for layers that slide.

        Args:
            layers: Number of layers.
            layer_bytes: For ``bytes``: a function from the tokens per head that a layer keeps, and
                whether it evicts and so may have a state, to the layer's bytes over all rows.
            native: Indices of layers that slide.
            prompt_tokens: For ``share``.
            max_tokens: In place of the config's.
            native_bytes: What those hold together once their windows are full.

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
        out: list[int | None] = [None] * layers
        for i in full:
            out[i] = room
        if isinstance(self.tokens, tuple):
            _check_length("tokens", self.tokens, layers)
            for i in bounded:
                out[i] = self.tokens[i]
            return out
        weights = [self._weights(layers)[i] for i in bounded]
        if self.bytes is not None:
            if layer_bytes is None:
                raise ValueError("LessConfig: a budget in bytes needs layer_bytes")
            held = {
                "the windows of layers that slide": native_bytes,
                "full layers": len(full) * layer_bytes(room, False) if full and room else 0,
            }
            total = self._total_in_bytes(weights, layer_bytes, held)
        else:
            total = self._total_in_tokens(len(bounded), prompt_tokens)
        for i, tokens in zip(bounded, deal(total, weights), strict=True):
            if tokens < self._least:
                few = f", and {self.rows} keeps {self._least} or more" if self._least > 1 else ""
                raise ValueError(
                    f"LessConfig: layer {i} would keep {tokens} tokens{few}: {total} for "
                    f"{len(bounded)} layers with shape={self.shape!r}; raise the budget"
                    + ("" if self.shape == "uniform" else " or flatten the shape")
                )
            out[i] = tokens
        return out

    def _full(self, layers: int, sliding: Collection[int]) -> list[int]:
        """The layers that keep every token: the first of those that do not slide."""
        return [i for i in range(layers) if i not in sliding][: self.full_layers]

    def _total_in_bytes(
        self,
        weights: Sequence[float],
        layer_bytes: Callable[[int, bool], int],
        held: dict[str, int],
    ) -> int:
        """Tokens of all bounded layers together; ``held`` is what the budget pays for besides."""
        assert self.bytes is not None
        budget, spent = parse_bytes("LessConfig", self.bytes), sum(held.values())
        fewest = self._least
        least = spent + len(weights) * layer_bytes(fewest, True)
        if budget < least:
            beside = " and ".join(f"{n:,} bytes of {what}" for what, n in held.items() if n)
            count = "one token" if fewest == 1 else f"{fewest} tokens"
            raise ValueError(
                f"LessConfig: bytes={budget:,} cannot hold {count} per head in each of "
                f"{len(weights)} layers{' beside ' if beside else ''}{beside}: that takes {least:,}"
            )

        def cost(total: int) -> int:
            return sum(layer_bytes(max(tokens, fewest), True) for tokens in deal(total, weights))

        return most_within(budget - spent, cost)

    def _total_in_tokens(self, bounded: int, prompt_tokens: int | None) -> int:
        """Tokens of all bounded layers together."""
        if self.share is not None:
            if prompt_tokens is None:
                raise ValueError("LessConfig: share needs prompt_tokens, the prompt's length")
            tokens = round(self.share * prompt_tokens)
            if tokens < 1:
                raise ValueError(
                    f"LessConfig: share={self.share} of {prompt_tokens} tokens is less than one"
                )
            return tokens * bounded
        assert isinstance(self.tokens, int)
        return self.tokens * bounded

    def _weights(self, layers: int) -> list[float]:
        if self.shape == "uniform":
            return [1.0] * layers
        if self.shape == "pyramid":
            return pyramid(layers, self.beta)
        assert not isinstance(self.shape, str)
        _check_length("shape", self.shape, layers)
        return [float(weight) for weight in self.shape]

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

    # -- JSON ----------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """All settings, as JSON-ready values; ``from_dict`` takes them back."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        for name in ("tokens", "shape"):
            if isinstance(values[name], tuple):
                values[name] = list(values[name])
        if self.policy is not None:
            values["policy"] = policy_to_dict(self.policy)
        return {"format": FORMAT, "version": _VERSION, **values}

    @classmethod
    def from_dict(cls, d: dict[str, Any]) -> LessConfig:
        """Build the config from ``to_dict``'s result.

        Raises:
            ValueError: It is of another format or version, or a setting is unknown or wrong.
        """
        settings = dict(d)
        kind, version = settings.pop("format", None), settings.pop("version", None)
        if (kind, version) != (FORMAT, _VERSION):
            raise ValueError(
                f"LessConfig: format must be {FORMAT!r} version {_VERSION}, got {kind!r} {version}"
            )
        unknown = sorted(settings.keys() - {f.name for f in dataclasses.fields(cls)})
        if unknown:
            raise ValueError(f"LessConfig: unknown settings {unknown}")
        if settings.get("policy") is not None:
            settings["policy"] = policy_from_dict(settings["policy"])
        return cls(**settings)

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write ``less_config.json`` into a folder: the sidekick's, or one of its own.

        A sidekick in that folder is named relative to it, so the folder can be moved; another one
        by its whole path.
        """
        here = Path(folder)
        values = self.to_dict()
        for setting in ("sidekick", "calibration"):
            folder_of = getattr(self, setting)
            if folder_of is not None and folder_of not in shipped_names():
                path = Path(folder_of).resolve()
                inside = path.is_relative_to(here.resolve())
                values[setting] = (
                    path.relative_to(here.resolve()).as_posix() if inside else str(path)
                )
        here.mkdir(parents=True, exist_ok=True)
        text = json.dumps(values, indent=2) + "\n"
        (here / CONFIG_FILE).write_text(text, encoding="utf-8")

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str]) -> LessConfig:
        """Read ``less_config.json`` from a folder.

        Raises:
            ValueError: There is none, or it cannot be read; the message names the file.
        """
        file = Path(folder) / CONFIG_FILE
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(f"LessConfig: cannot read {file}: {error}") from error
        if not isinstance(values, dict):
            raise ValueError(f"LessConfig: {file} must hold an object")
        for setting in ("sidekick", "calibration"):
            named = values.get(setting)
            if isinstance(named, str) and named not in shipped_names():
                values[setting] = str(Path(folder) / named)  # a whole path stays what it is
        return cls.from_dict(values)


def _check_length(name: str, values: Sequence[object], layers: int) -> None:
    if len(values) != layers:
        raise ValueError(
            f"LessConfig: {name} must list {layers} numbers, one per layer, got {len(values)}"
        )
