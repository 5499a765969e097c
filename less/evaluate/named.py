"""Methods by name: a ``LessConfig`` each, brought to any number of bytes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from less.budget import page_bytes
from less.cache import LessKVCache
from less.calibration import Calibration
from less.config import LessConfig
from less.dtypes import MERGING_ROWS
from less.evaluate.methods import SINKS
from less.hf.models import ModelFacts
from less.policies import H2O, SinkRecent
from less.sidekick import Sidekick

FULL = "full"
BASELINE = "h2o"  # whose loss to full attention the others recover
_UNSET = 1  # bytes of a config whose budget is set later


@dataclass(frozen=True)
class NamedMethod:
    """A way to hold the cache.

    Attributes:
        name: As a user names it.
        config: Its settings, whose budget is replaced; None is the full cache.
        sidekick: Its maps, in place of those that the config names.
        calibration: Likewise.
    """

    name: str
    config: LessConfig | None
    sidekick: Sidekick | None = None
    calibration: Calibration | None = None

    def cache(self, model: Any, rows: int, room: int) -> LessKVCache | None:
        """Its cache; None for the full one.

        Args:
            model: As in ``LessConfig.cache``.
            rows: Of the batch.
            room: Bytes of a row: slots, state and headers, and means and scales as if there were
                no other row. A sidekick's maps come on top: they alone are larger than budgets of
                small models.

        Raises:
            ValueError: The bytes are too few for it.
        """
        config = self.config
        if config is None:
            return None

        def of(room: int) -> LessKVCache:
            return replace(config, bytes=room * rows).cache(
                model, rows, sidekick=self.sidekick, calibration=self.calibration
            )

        made = of(room)
        shared = made.memory()["maps"] if made.sidekick is None else 0
        return made if shared == 0 else of(room - shared)

    def identity(self) -> dict[str, Any]:
        """JSON-ready: all that its scores follow from but the budget."""
        if self.config is None:
            return {"full": True}
        settled = self.config.settled(self.sidekick, self.calibration).to_dict()
        for given in ("bytes", "sidekick", "calibration"):
            del settled[given]
        sidekick = self.sidekick or self.config.load_sidekick()
        calibration = self.calibration or self.config.load_calibration()
        counted = {"counted": "calibration"} if calibration and not sidekick else {}
        return {
            **settled,
            **counted,
            "sidekick": None if sidekick is None else sidekick.digest,
            "calibration": None if calibration is None else calibration.digest,
        }


@dataclass(frozen=True)
class Budget:
    """The bytes that bounded caches get, as those of so many 16-bit tokens per kv head.

    Attributes:
        text: ``"64"``, a number of tokens; or ``"5%"``, a share of the example's tokens.
    """

    text: str

    def __post_init__(self) -> None:
        """Refuse what is neither.

        Raises:
            ValueError: naming the text.
        """
        try:
            ok = 0 < float(self.text[:-1]) <= 100 if self.is_share else int(self.text) >= 1
        except ValueError:
            ok = False
        if not ok:
            raise ValueError(
                "--budgets must be numbers of tokens such as 64, or shares such as 12.5%, got "
                f"{self.text!r}"
            )

    @property
    def is_share(self) -> bool:
        """Whether it follows the length."""
        return self.text.endswith("%")

    def tokens(self, length: int) -> int:
        """16-bit tokens per kv head for an example of so many tokens."""
        if self.is_share:
            return max(1, round(length * float(self.text[:-1]) / 100))
        return int(self.text)

    def room(self, facts: ModelFacts, length: int) -> int:
        """Bytes of a row, over all layers that do not slide, and the windows of those that do."""
        import torch

        layers = facts.layers - len(facts.windows)
        one = page_bytes(facts.kv_heads, facts.head_dim, torch.float16, self.tokens(length))
        return layers * one + facts.kv_heads * facts.window_bytes


def built_in() -> dict[str, str]:
    """Name -> what it is, of the methods that need no file."""
    return {
        FULL: "every token is kept, in the model's dtype; bytes are counted in 16 bits",
        "sinks": "4 sinks and the most recent tokens, float16 (StreamingLLM)",
        BASELINE: "half heavy hitters, half recent tokens, float16 (H2O)",
        "less-paper": "H2O with the paper's low-rank state, float16 (LESS as published)",
        "less": "decayed H2O with the low-rank state of this package's sidekick, float16",
        "decayed-h2o": "H2O whose scores decay by 0.98 per token, float16",
        "i8": "decayed H2O, rows of 8 bits",
        "k4v4": "decayed H2O, rows of 4 bits, hot rows of 8",
        "merge": f"rows in {MERGING_ROWS}, victims merged into the nearest slot",
        "best": "what LessConfig(bytes=...) means: merge, with calibrated heads where calibrated",
    }


def methods_for(
    names: Sequence[str],
    sidekick: Sidekick | None,
    paper: Sidekick | None,
    calibration: Calibration | None,
    own: Mapping[str, LessConfig] | None = None,
) -> tuple[list[NamedMethod], dict[str, str]]:
    """The methods of these names, and why others are left out.

    Args:
        names: Of ``built_in``, or of ``own``.
        sidekick: Maps for ``less``.
        paper: Maps for ``less-paper``.
        calibration: For ``best``.
        own: A user's configs by name.

    Returns:
        Methods in order; name -> one sentence for each that this model has nothing for.

    Raises:
        ValueError: There is none of a name.
    """
    own = own or {}
    configs: dict[str, tuple[LessConfig | None, Sidekick | None]] = {
        FULL: (None, None),
        "sinks": (_sixteen(policy=SinkRecent(SINKS, 1)), None),
        BASELINE: (_sixteen(policy=H2O(1, 1)), None),
        "less-paper": (_sixteen(policy=H2O(1, 1)), paper),
        "less": (_sixteen(), sidekick),
        "decayed-h2o": (_sixteen(), None),
        "i8": (LessConfig(bytes=_UNSET, rows="int8", victim="forget"), None),
        "k4v4": (LessConfig(bytes=_UNSET, rows="k4v4", victim="forget"), None),
        "merge": (LessConfig(bytes=_UNSET, rows=MERGING_ROWS, victim="merge"), None),
        "best": (LessConfig(bytes=_UNSET), None),
    }
    found: list[NamedMethod] = []
    left_out: dict[str, str] = {}
    for name in names:
        if name in own:
            found.append(NamedMethod(name, own[name]))
            continue
        if name not in configs:
            known = ", ".join([*configs, *own])
            raise ValueError(f"--methods must be among {known}, got {name!r}")
        config, maps = configs[name]
        if name.startswith("less") and maps is None:
            left_out[name] = "no sidekick fits this model; less-kv train makes one"
            continue
        method = NamedMethod(name, config, maps, calibration if name == "best" else None)
        same = [other.name for other in found if other.identity() == method.identity()]
        if same:
            left_out[name] = f"it is the same as {same[0]} without a calibration of this model"
            continue
        found.append(method)
    return found, left_out


def _sixteen(**settings: Any) -> LessConfig:
    return LessConfig(bytes=_UNSET, rows="float16", **settings)


def own_method(text: str) -> tuple[str, LessConfig]:
    """A user's method out of ``NAME=FOLDER`` or ``NAME={...}``.

    The folder holds a ``less_config.json``; the braces are settings of ``LessConfig`` as JSON,
    without a budget.

    Raises:
        ValueError: It is neither, or a setting is wrong.
    """
    name, _, said = text.partition("=")
    if not name or not said:
        raise ValueError(f"--method must be NAME=FOLDER or NAME={{...}}, got {text!r}")
    if not said.startswith("{"):
        config = LessConfig.from_pretrained(Path(said).expanduser())
        return name, replace(config, tokens=None, share=None, bytes=_UNSET)
    try:
        settings = json.loads(said)
    except ValueError as error:
        raise ValueError(f"--method {name}: {error}") from None
    whole = {**LessConfig(bytes=_UNSET).to_dict(), **settings}
    return name, LessConfig.from_dict(whole)
