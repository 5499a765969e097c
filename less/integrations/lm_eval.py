"""lm-evaluation-harness (0.4.13): ``--model less-kv``, its HF model on a bounded cache.

Importing this module registers the model. The harness's own command line, with it registered::

    python -m less.integrations.lm_eval run --model less-kv \
        --model_args pretrained=FOLDER,tokens=64,sidekick=FOLDER --tasks TASK

Log-likelihoods come through the real cache: the first tokens, as many as ``LessKVCache.at_once``
says, at once (nothing leaves there, so it is the same), then ``chunk`` tokens per step, one by
default.
A single forward pass over prompt and answer would be exact attention, with nothing evicted.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from torch import Tensor

from less.cache import LessKVCache
from less.calibration import Calibration
from less.config import LessConfig
from less.dtypes import FORMATS
from less.hf import attach
from less.policies import import_policies, policy_from_text
from less.sidekick import Sidekick

_TRAINED = "trained"  # of ``policy=``: the sidekick's own
_SETTINGS = (  # of LessConfig, by the same names
    *("tokens", "share", "bytes", "shape", "beta", "full_layers", "max_tokens"),
    *("rows", "sinks", "hot", "hot_dtype"),
)


@register_model("less-kv")
class LessLM(HFLM):  # type: ignore[misc]
    """The harness's HF model, every request on a bounded cache that was reset before.

    Args:
        pretrained: As in the harness: a folder, a name, or a model (then with ``tokenizer``).
        config: Folder with a ``less_config.json``, or a ``LessConfig``; or leave it out, and give
            the settings below.
        sidekick: A ``Sidekick``, or in place of the config's: a folder or a shipped name.
        policy: "h2o", "sinks", "trained" (the sidekick's own, else the default policy), or any
            policy's name and settings, ``Policy.to_dict``'s result, as JSON or as it is.
        imports: Module or file that defines policies, or several; imported first.
        slots: Dtype of the slots, "float16" say, or a packed format.
        calibration: A ``Calibration``, or in place of the config's: a folder.
        chunk: Tokens per step once something may be evicted.
        **kwargs: ``tokens``, ``share``, ``bytes``, ``shape``, ``beta``, ``full_layers``,
            ``max_tokens``, ``rows``, ``sinks``, ``hot`` and ``hot_dtype`` are ``LessConfig``'s;
            the rest is the harness's.

    Raises:
        ValueError: A setting is wrong or given twice; the message names it.
        UnsupportedModelError: The model cannot run on a bounded cache.
    """

    def __init__(
        self,
        pretrained: Any,
        config: str | LessConfig | None = None,
        sidekick: str | Sidekick | None = None,
        policy: str | Mapping[str, Any] | None = None,
        imports: str | Sequence[str] = (),
        slots: str | None = None,
        calibration: str | Calibration | None = None,
        chunk: int = 1,
        **kwargs: Any,
    ) -> None:
        if isinstance(chunk, bool) or not isinstance(chunk, int) or chunk < 1:
            raise ValueError(f"less-kv: chunk must be a whole number of tokens >= 1, got {chunk!r}")
        settings = {name: kwargs.pop(name) for name in _SETTINGS if name in kwargs}
        for module in [imports] if isinstance(imports, str) else imports:
            import_policies("less-kv: imports", module)
        if policy is not None:
            settings["policy"] = (
                None
                if policy == _TRAINED
                else policy_from_text("less-kv: policy", policy, [_TRAINED])
            )
        if slots is not None:
            if "rows" in settings:
                raise ValueError("less-kv: slots and rows say the same; give one of them")
            settings["rows" if slots in FORMATS else "dtype"] = slots
        if config is not None and settings:
            raise ValueError(f"less-kv: config has these settings already: {sorted(settings)}")
        if config is None:
            config = LessConfig(**settings)
        elif not isinstance(config, LessConfig):
            config = LessConfig.from_pretrained(config)
        if isinstance(sidekick, str):
            sidekick = LessConfig(tokens=1, sidekick=sidekick).load_sidekick()
        self.less_config = config
        self.less_sidekick = config.load_sidekick() if sidekick is None else sidekick
        if isinstance(calibration, str):
            calibration = Calibration.from_pretrained(calibration)
        self.less_calibration = config.load_calibration() if calibration is None else calibration
        self.chunk = chunk
        self._held: tuple[tuple[int, int], LessKVCache] | None = None
        super().__init__(pretrained, **kwargs)
        if self.backend != "causal":
            raise ValueError(f"less-kv: the model must be a decoder, got backend {self.backend!r}")
        self._cache(1, self.max_length)  # what is wrong shows now, not after the task is loaded

    def _cache(self, rows: int, prompt_tokens: int) -> LessKVCache:
        """An empty cache: the last one reset, where it fits."""
        key = (rows, prompt_tokens if self.less_config.share is not None else 0)
        if self._held is None or self._held[0] != key:
            self._held = None  # two at once would be too many
            cache = self.less_config.cache(
                self.model,
                rows,
                prompt_tokens=prompt_tokens,
                sidekick=self.less_sidekick,
                calibration=self.less_calibration,
            )
            self._held = (key, cache)
        self._held[1].reset()
        return self._held[1]

    def _model_call(
        self, inps: Tensor, attn_mask: Tensor | None = None, labels: Tensor | None = None
    ) -> Tensor:
        """Logits [batch, length, vocabulary] of texts that are padded on the right.

        Padding comes after all that is asked for, and rows know nothing of each other: what the
        cache makes of it touches no answer.
        """
        cache = self._cache(*inps.shape)
        length = inps.shape[1]
        cuts = [0, *range(min(cache.at_once, length), length, self.chunk), length]
        with (
            torch.no_grad(),
            torch.autocast(
                device_type=self.device.type,
                dtype=self.mixed_precision_dtype,
                enabled=self.mixed_precision_dtype is not None,
            ),
            attach(self.model, cache),
        ):
            return torch.cat(
                [
                    self.model(inps[:, start:stop], past_key_values=cache).logits
                    for start, stop in itertools.pairwise(cuts)
                ],
                1,
            )

    def _model_generate(
        self, context: Tensor, max_length: int, stop: list[str], **kwargs: Any
    ) -> Tensor:
        """The harness's own, on the cache; prompts padded on the left, with their mask."""
        copies = max(kwargs.get("num_beams") or 1, kwargs.get("num_return_sequences") or 1)
        cache = self._cache(context.shape[0] * copies, context.shape[1])
        with attach(self.model, cache):
            out: Tensor = super()._model_generate(
                context, max_length, stop, past_key_values=cache, **kwargs
            )
        return out

    def get_model_info(self) -> dict[str, Any]:
        """The harness's record of the model, and the cache's settings."""
        info: dict[str, Any] = super().get_model_info()
        return {**info, "less": {**self.less_config.to_dict(), "chunk": self.chunk}}


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
