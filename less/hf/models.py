"""Which models can run on a bounded cache: one table of facts, and the checks that go with it.

A model is in the table when ``less.evaluate.matrix`` runs it. Others are refused by name: a model
that scores its keys in another way (sinks, alibi) would run without an error and be wrong. Layers
that slide bound themselves: they stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from less.hf import falcon
from less.hf.parallel import part_of
from less.sidekick.identity import kv_heads_of

if TYPE_CHECKING:
    from less.cache import LessKVCache

# (an attention function, the module's own forward, its arguments...) -> (output, no weights)
Forward = Callable[..., tuple[Tensor, None]]


class UnsupportedModelError(ValueError):
    """The model cannot run on a bounded cache; the message says why."""


@dataclass(frozen=True)
class Architecture:
    """What is known of a model type.

    Attributes:
        attention: Class name of its attention modules, which must carry ``layer_idx``, call
            ``past_key_values.update`` and go through transformers' attention interface.
        scale: Attribute of such a module that holds the factor of q.k, or the factor itself.
        dropout: Attribute that holds its dropout rate, or its dropout.
        decoder: Attribute of the base model that holds the decoder, where a model with a head
            calls that directly.
        learned_positions: Whether positions are learned, so that the text has a longest length.
        forward: For attention modules that go past the interface: what stands in for their own
            ``forward`` and goes through it (``less.hf.switch``).
    """

    attention: str
    scale: str | float = "scaling"
    dropout: str = "attention_dropout"
    decoder: str = ""
    learned_positions: bool = False
    forward: Forward | None = None


# model_type -> facts
ARCHITECTURES: dict[str, Architecture] = {
    "apertus": Architecture("ApertusAttention"),
    "arcee": Architecture("ArceeAttention"),
    "bitnet": Architecture("BitNetAttention"),
    "cohere": Architecture("CohereAttention"),
    "cohere2": Architecture("Cohere2Attention"),
    "cwm": Architecture("CwmAttention"),
    "dots1": Architecture("Dots1Attention"),
    "ernie4_5": Architecture("Ernie4_5Attention"),
    "ernie4_5_moe": Architecture("Ernie4_5_MoeAttention"),
    "exaone4": Architecture("Exaone4Attention"),
    "falcon": Architecture(
        "FalconAttention", scale="inv_norm_factor", forward=falcon.attention_forward
    ),
    "flex_olmo": Architecture("FlexOlmoAttention"),
    "gemma": Architecture("GemmaAttention"),
    "gemma2": Architecture("Gemma2Attention"),
    "gemma3_text": Architecture("Gemma3Attention"),
    "glm": Architecture("GlmAttention"),
    "glm4": Architecture("Glm4Attention"),
    "glm4_moe": Architecture("Glm4MoeAttention"),
    "gpt2": Architecture("GPT2Attention", dropout="attn_dropout", learned_positions=True),
    "gpt_bigcode": Architecture(
        "GPTBigCodeAttention", dropout="attn_dropout", learned_positions=True
    ),
    "gpt_neox": Architecture("GPTNeoXAttention"),
    "granite": Architecture("GraniteAttention"),
    "granitemoe": Architecture("GraniteMoeAttention"),
    "granitemoeshared": Architecture("GraniteMoeSharedAttention"),
    "helium": Architecture("HeliumAttention"),
    "hunyuan_v1_dense": Architecture("HunYuanDenseV1Attention"),
    "llama": Architecture("LlamaAttention"),
    "minimax_m2": Architecture("MiniMaxM2Attention"),
    "ministral": Architecture("MinistralAttention"),
    "ministral3": Architecture("Ministral3Attention"),
    "mistral": Architecture("MistralAttention"),
    "mixtral": Architecture("MixtralAttention"),
    "nemotron": Architecture("NemotronAttention"),
    "olmo": Architecture("OlmoAttention"),
    "olmo2": Architecture("Olmo2Attention"),
    "olmo3": Architecture("Olmo3Attention"),
    "olmoe": Architecture("OlmoeAttention"),
    # Its queries come scaled; so a sidekick sees them.
    "opt": Architecture(
        "OPTAttention", scale=1.0, dropout="dropout", decoder="decoder", learned_positions=True
    ),
    "phi": Architecture("PhiAttention"),
    "phi3": Architecture("Phi3Attention"),
    "phimoe": Architecture("PhimoeAttention"),
    "qwen2": Architecture("Qwen2Attention"),
    "qwen2_moe": Architecture("Qwen2MoeAttention"),
    "qwen3": Architecture("Qwen3Attention"),
    "qwen3_moe": Architecture("Qwen3MoeAttention"),
    "seed_oss": Architecture("SeedOssAttention"),
    "smollm3": Architecture("SmolLM3Attention"),
    "stablelm": Architecture("StableLmAttention"),
    "starcoder2": Architecture("Starcoder2Attention"),
}
SUPPORTED = tuple(sorted(ARCHITECTURES))

# model_type -> why not
_OWN_ATTENTION = "its attention does not go through transformers' attention interface"
_LATENT = "its keys are compressed latents whose head dim differs from the values'"
_STATE = "some of its layers are linear (state-space) and keep no keys"
REFUSED: dict[str, str] = {
    "bloom": _OWN_ATTENTION + ", and it adds alibi to its logits",
    "codegen": _OWN_ATTENTION,
    "deepseek_v2": _LATENT,
    "deepseek_v3": _LATENT,
    "falcon_h1": _STATE,
    "gemma3": "it takes images; attach its language model, model.model.language_model",
    "gpt_neo": _OWN_ATTENTION,
    "gptj": _OWN_ATTENTION,
    "gpt_oss": "its attention has learned sinks, and some of its layers slide",
    "jamba": _STATE,
    "mamba": _STATE,
    "mamba2": _STATE,
    "mpt": _OWN_ATTENTION + ", and it adds alibi to its logits",
    "qwen3_next": _STATE,
}


@dataclass(frozen=True)
class ModelFacts:
    """A model as the cache sees it; ``modules[i]`` is the attention of layer i.

    ``windows`` has the length of the window of each layer that slides: those bound themselves.
    ``softcap`` is what the others hold scale q.k within, None where they do not. ``longest`` is
    the number of learned positions, None where positions are computed. ``device`` is the first
    layer's. ``dropout`` and ``forward`` are as in ``Architecture``.

    Heads are those that this process computes: ``part`` is (rank, world) of a model sharded by
    tensor parallelism, else (0, 1).
    """

    name: str
    config: Any
    decoder: nn.Module
    modules: tuple[nn.Module, ...]
    q_heads: int
    kv_heads: int
    head_dim: int
    scale: float
    softcap: float | None
    dtype: torch.dtype
    device: torch.device
    windows: dict[int, int]
    part: tuple[int, int]
    longest: int | None
    dropout: str
    forward: Forward | None

    @property
    def layers(self) -> int:
        """Number of attention layers."""
        return len(self.modules)

    @property
    def window_bytes(self) -> int:
        """Bytes of k and v of one kv head and row in all sliding layers, once they are full."""
        return 2 * self.head_dim * self.dtype.itemsize * sum(self.windows.values())


def describe(model: nn.Module, op: str) -> ModelFacts:
    """Read a transformers model's shape and refuse what cannot work.

    Args:
        model: A decoder, with or without its language-model head.
        op: Caller's name, for messages.

    Raises:
        TypeError: It is no transformers model.
        UnsupportedModelError: It cannot run on a bounded cache; the message says why.
    """
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        hint = ""
        if isinstance(getattr(model, "_orig_mod", None), PreTrainedModel):
            hint = "; attach the model that was compiled, not torch.compile's wrapper"
        elif callable(getattr(model, "get_base_model", None)):
            hint = "; pass model.get_base_model(), the adapters stay in it"
        raise TypeError(
            f"{op}: model must be a transformers PreTrainedModel, got {type(model).__name__}{hint}"
        )
    config = model.config
    kind = str(getattr(config, "model_type", ""))
    name = f"{type(model).__name__} (model_type {kind!r})"
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(f"{op}: {name}: it is an encoder-decoder; only decoders work")
    why = REFUSED.get(kind) or _unfit(config)
    if why:
        raise UnsupportedModelError(f"{op}: {name}: {why}")
    if kind not in ARCHITECTURES:
        raise UnsupportedModelError(
            f"{op}: {name}: it is not among the tested models: {', '.join(SUPPORTED)}"
        )
    facts = ARCHITECTURES[kind]
    decoder = model.base_model
    decoder = getattr(decoder, facts.decoder, decoder) if facts.decoder else decoder
    modules = _attention_modules(op, name, decoder, facts)
    scales = {_scale(m, facts) for m in modules}
    if len(scales) != 1:
        factors = ", ".join(f"{scale:.4g}" for scale in sorted(scales))
        raise UnsupportedModelError(f"{op}: {name}: its layers scale q.k differently: {factors}")
    windows = _windows(op, name, config, modules)
    q_heads = int(config.num_attention_heads)
    kv_heads = kv_heads_of(config)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // q_heads
    try:
        part = part_of(model, q_heads, kv_heads)
    except ValueError as error:
        raise UnsupportedModelError(f"{op}: {name}: {error}") from None
    return ModelFacts(
        name=name,
        config=config,
        decoder=decoder,
        modules=modules,
        q_heads=q_heads // part[1],
        kv_heads=kv_heads // part[1],
        head_dim=int(head_dim),
        scale=scales.pop(),
        softcap=_softcap(op, name, config, modules),
        dtype=next(modules[0].parameters()).dtype,
        device=next(modules[0].parameters()).device,
        windows=windows,
        part=part,
        longest=int(config.max_position_embeddings) if facts.learned_positions else None,
        dropout=facts.dropout,
        forward=facts.forward,
    )


def check_ready(op: str, facts: ModelFacts) -> None:
    """Refuse a model that cannot run on a cache as it stands: with dropout, or on many devices.

    Raises:
        UnsupportedModelError: The message says why.
    """
    for module in facts.modules:
        rate = getattr(module, facts.dropout, 0.0)
        rate = getattr(rate, "p", rate)
        if module.training and rate:
            raise UnsupportedModelError(
                f"{op}: {facts.name} is in training mode with {facts.dropout}={rate}; call "
                "model.eval()"
            )
    where = {p.device for m in facts.modules for p in m.parameters()}
    if len(where) != 1:
        raise UnsupportedModelError(
            f"{op}: {facts.name}: its attention layers are spread over {sorted(map(str, where))}; "
            "a cache lives on one device"
        )


def _scale(module: Any, facts: Architecture) -> float:
    return float(getattr(module, facts.scale) if isinstance(facts.scale, str) else facts.scale)


def _unfit(config: Any) -> str:
    """What a model is configured to do that a bounded cache cannot; empty if nothing."""
    kinds = getattr(config, "layer_types", None) or []
    others = sorted({str(k) for k in kinds} - {"full_attention", "sliding_attention"})
    if others:
        return f"it has layers of other kinds: {', '.join(others)}"
    if getattr(config, "is_causal", True) is False:
        return "its attention is not causal"
    for field, why in (
        ("alibi", "adds alibi to its logits"),
        ("attention_chunk_size", "attends within chunks"),
        ("add_cross_attention", "attends to an encoder"),
        ("num_kv_shared_layers", "shares keys between layers"),
        ("use_bidirectional_attention", "attends in both directions"),
    ):
        if getattr(config, field, None):
            return f"it {why} (config.{field}={getattr(config, field)})"
    return ""


def _softcap(op: str, name: str, config: Any, modules: tuple[nn.Module, ...]) -> float | None:
    """What the attention modules hold scale q.k within, as they pass it on."""
    caps = {getattr(m, "attn_logit_softcapping", None) for m in modules}
    wanted = getattr(config, "attn_logit_softcapping", None)
    if caps != {wanted}:
        raise UnsupportedModelError(
            f"{op}: {name}: config.attn_logit_softcapping is {wanted}, but its attention modules "
            f"cap by {', '.join(map(str, caps))}"
        )
    return None if wanted is None else float(wanted)


def _windows(op: str, name: str, config: Any, modules: tuple[nn.Module, ...]) -> dict[int, int]:
    """Layer -> window, of the layers that slide: as their modules say, not the config alone."""
    of_all = getattr(config, "sliding_window", None)  # where modules have no window of their own
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * len(modules)
    windows = {}
    for i, module in enumerate(modules):
        of_config = of_all if kinds[i] == "sliding_attention" else None
        window = getattr(module, "sliding_window", of_config)
        if window and getattr(module, "is_sliding", True):
            windows[i] = int(window)
    if len(windows) == len(modules):
        raise UnsupportedModelError(
            f"{op}: {name}: every layer slides (sliding_window={windows[0]}), so its own cache is "
            "bounded already and there is nothing to bound"
        )
    kinds = getattr(config, "layer_types", None)
    listed = [i for i, k in enumerate(kinds or ()) if k == "sliding_attention"]
    if kinds is not None and listed != sorted(windows):
        raise UnsupportedModelError(
            f"{op}: {name}: layers {sorted(windows)} slide, but config.layer_types names {listed}"
        )
    if any(w < 2 for w in windows.values()):
        raise UnsupportedModelError(f"{op}: {name}: windows must be 2 or longer, got {windows}")
    return windows


def _attention_modules(
    op: str, name: str, decoder: nn.Module, facts: Architecture
) -> tuple[nn.Module, ...]:
    found = {
        int(m.layer_idx): m  # type: ignore[arg-type]
        for m in decoder.modules()
        if type(m).__name__ == facts.attention
    }
    if not found or sorted(found) != list(range(len(found))):
        raise UnsupportedModelError(
            f"{op}: {name}: expected one {facts.attention} for each layer from 0 on, "
            f"got layers {sorted(found)}"
        )
    return tuple(found[i] for i in range(len(found)))


def check_fits(op: str, cache: LessKVCache, facts: ModelFacts) -> None:
    """Refuse a cache of another shape, scale, device, sidekick or calibration than the model's.

    Raises:
        ValueError: The message names the field and both values.
    """
    for field in ("layers", "q_heads", "kv_heads", "head_dim"):
        wanted, got = getattr(facts, field), getattr(cache, field)
        if wanted != got:
            raise ValueError(
                f"{op}: cache.{field} must be {wanted} for {facts.name}, got {got}; "
                "less.hf.cache_for builds a cache that fits"
            )
    if cache.part != facts.part:
        raise ValueError(
            f"{op}: cache.part must be {facts.part} (rank, world), the heads of {facts.name} that "
            f"this process computes, got {cache.part}; less.hf.cache_for builds a cache that fits"
        )
    if cache.native != tuple(sorted(facts.windows)):
        raise ValueError(
            f"{op}: cache.native must be {tuple(sorted(facts.windows))}, the layers of "
            f"{facts.name} that slide, got {cache.native}; less.hf.cache_for builds a cache "
            "that fits"
        )
    if abs(cache.scale - facts.scale) > 1e-6 * facts.scale:
        raise ValueError(
            f"{op}: cache.scale must be {facts.scale!r} for {facts.name}, got {cache.scale!r}"
        )
    if cache.softcap != facts.softcap:
        raise ValueError(
            f"{op}: cache.softcap must be {facts.softcap} for {facts.name}, got {cache.softcap}"
        )
    if _full(torch.device(cache.device)) != _full(facts.device):
        raise ValueError(
            f"{op}: cache must be on {facts.device} where the model's attention is, "
            f"got {cache.device}"
        )
    floats = (torch.float32, torch.bfloat16, torch.float16)
    if facts.dtype not in floats and facts.dtype != cache.dtype:
        raise ValueError(
            f"{op}: model's dtype must be float32, bfloat16 or float16 (or the cache's, "
            f"{cache.dtype}), got {facts.dtype}"
        )
    if cache.sidekick is not None:
        cache.sidekick.check_model(facts.config, facts.part)
    if cache.calibration is not None:
        cache.calibration.check_model(facts.config)


def _full(device: torch.device) -> torch.device:
    """``cuda`` as ``cuda:<current>``, so that devices compare."""
    return torch.empty(0, device=device).device
