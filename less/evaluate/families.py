"""Tiny random models of transformers' own classes: each kind that works, each that is refused.

Each is fractions of a second to build and run, needs no download, and has weights large enough that
its attention is neither flat nor one-hot. ``less.evaluate.matrix`` runs them, and so do the tests.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

LAYERS, Q, K, D, VOCAB, WINDOW = 3, 4, 2, 8, 61, 6
_TOKENS = {
    "vocab_size": VOCAB,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
SHAPE: dict[str, Any] = {
    **_TOKENS,
    "hidden_size": Q * D,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": Q,
    "num_key_value_heads": K,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,
}
#: Layers 0 and 2 slide by ``WINDOW`` tokens, 1 and 3 are full.
MIXED: dict[str, Any] = {
    **SHAPE,
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "sliding_window": WINDOW,
}
_MHA = {name: value for name, value in SHAPE.items() if name != "num_key_value_heads"}
_FALCON = {name: value for name, value in _MHA.items() if name != "intermediate_size"}
_OPT = {
    **{name: value for name, value in _FALCON.items() if name != "initializer_range"},
    "ffn_dim": 48,
    "init_std": 0.3,
}
_GPT2 = {
    **_TOKENS,
    "n_embd": Q * D,
    "n_head": Q,
    "n_layer": LAYERS,
    "n_positions": 512,
    "initializer_range": 0.3,
}


@dataclass(frozen=True)
class Family:
    """A kind of model that works.

    Attributes:
        config: Name of its config class in transformers.
        settings: What the class is given.
        attention: What its layers do, in a few words.
    """

    config: str
    settings: Mapping[str, Any] = field(default_factory=lambda: SHAPE)
    attention: str = "full"


@dataclass(frozen=True)
class Refused:
    """A kind of model that is refused.

    Attributes:
        config: Name of its config class in transformers.
        settings: What the class is given.
        message: Part of the error's message.
    """

    config: str
    settings: Mapping[str, Any]
    message: str


_MIX = "some slide"
_POSITIONS = "full; learned positions"
_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
_MANY_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
_ROUTED = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}

FAMILIES: dict[str, Family] = {
    "apertus": Family("ApertusConfig"),
    "arcee": Family("ArceeConfig"),
    "bitnet": Family("BitNetConfig"),
    "cohere": Family("CohereConfig"),
    "cohere2": Family("Cohere2Config", MIXED, _MIX),
    "cwm": Family("CwmConfig", {**MIXED, "head_dim": D}, _MIX),
    "dots1": Family(
        "Dots1Config", {**SHAPE, **_ROUTED, "n_shared_experts": 1, "sliding_window": None}
    ),
    "ernie4_5": Family("Ernie4_5Config", {**SHAPE, "head_dim": D}),
    "ernie4_5_moe": Family(
        "Ernie4_5_MoeConfig",
        {**SHAPE, "moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 24},
    ),
    "exaone4": Family(
        "Exaone4Config",
        {
            **SHAPE,
            "head_dim": D,
            "sliding_window": None,
            "layer_types": ["full_attention"] * LAYERS,
        },
    ),
    "exaone4 (mixed)": Family("Exaone4Config", {**MIXED, "head_dim": D}, _MIX),
    "falcon (7B)": Family("FalconConfig", _FALCON, "full; one kv head"),
    "falcon (40B)": Family(
        "FalconConfig", {**_FALCON, "new_decoder_architecture": True, "num_kv_heads": K}
    ),
    "falcon (all heads)": Family(
        "FalconConfig", {**_FALCON, "multi_query": False, "parallel_attn": False, "bias": True}
    ),
    "flex_olmo": Family("FlexOlmoConfig", {**SHAPE, **_MANY_EXPERTS}),
    "gemma": Family("GemmaConfig", {**SHAPE, "head_dim": D}),
    "gemma2": Family(
        "Gemma2Config",
        {**MIXED, "head_dim": 256, "query_pre_attn_scalar": 144, "attn_logit_softcapping": 3.0},
        "some slide; soft-cap",
    ),
    "gemma3_text": Family(
        "Gemma3TextConfig", {**MIXED, "head_dim": D, "query_pre_attn_scalar": 5}, _MIX
    ),
    "glm": Family("GlmConfig", {**SHAPE, "head_dim": D}, "full; partial rotary"),
    "glm4": Family("Glm4Config", {**SHAPE, "head_dim": D}),
    "glm4_moe": Family(
        "Glm4MoeConfig", {**SHAPE, **_ROUTED, "head_dim": D}, "full; partial rotary"
    ),
    "gpt2": Family("GPT2Config", _GPT2, _POSITIONS),
    "gpt_bigcode": Family("GPTBigCodeConfig", _GPT2, "full; one kv head, learned positions"),
    "gpt_neox": Family("GPTNeoXConfig", {**_MHA, "rotary_pct": 0.25}, "full; partial rotary"),
    "granite": Family("GraniteConfig", {**SHAPE, "attention_multiplier": 0.2}),
    "granitemoe": Family("GraniteMoeConfig", {**SHAPE, **_EXPERTS}),
    "granitemoeshared": Family(
        "GraniteMoeSharedConfig", {**SHAPE, **_EXPERTS, "shared_intermediate_size": 24}
    ),
    "helium": Family("HeliumConfig", {**SHAPE, "head_dim": D}),
    "hunyuan_v1_dense": Family("HunYuanDenseV1Config", {**SHAPE, "head_dim": D}),
    "llama": Family("LlamaConfig"),
    "llama (one kv head)": Family(
        "LlamaConfig", {**SHAPE, "num_key_value_heads": 1}, "full; one kv head"
    ),
    "minimax_m2": Family("MiniMaxM2Config", {**SHAPE, **_EXPERTS, "head_dim": D}),
    "ministral": Family("MinistralConfig", {**MIXED, "head_dim": D}, _MIX),
    "ministral3": Family("Ministral3Config", {**SHAPE, "head_dim": D, "sliding_window": None}),
    "mistral": Family("MistralConfig", {**SHAPE, "sliding_window": None}),
    "mixtral": Family("MixtralConfig", {**SHAPE, **_EXPERTS}),
    "nemotron": Family("NemotronConfig", SHAPE, "full; partial rotary"),
    "olmo": Family("OlmoConfig"),
    "olmo2": Family("Olmo2Config"),
    "olmo3": Family("Olmo3Config", MIXED, _MIX),
    "olmoe": Family("OlmoeConfig", {**SHAPE, **_MANY_EXPERTS}),
    "opt": Family("OPTConfig", {**_OPT, "word_embed_proj_dim": Q * D}, _POSITIONS),
    "opt (350M)": Family(
        "OPTConfig", {**_OPT, "word_embed_proj_dim": 16, "do_layer_norm_before": False}, _POSITIONS
    ),
    "phi": Family("PhiConfig", SHAPE, "full; partial rotary"),
    "phi3": Family("Phi3Config"),
    "phimoe": Family("PhimoeConfig", {**SHAPE, **_EXPERTS, "sliding_window": None}),
    "qwen2": Family("Qwen2Config"),
    "qwen2 (mixed)": Family("Qwen2Config", {**MIXED, "use_sliding_window": True}, _MIX),
    "qwen2_moe": Family("Qwen2MoeConfig", {**SHAPE, **_MANY_EXPERTS}),
    "qwen2_moe (mixed)": Family(
        "Qwen2MoeConfig",
        {**MIXED, **_MANY_EXPERTS, "use_sliding_window": True, "max_window_layers": 4},
        _MIX,
    ),
    "qwen3": Family("Qwen3Config", {**SHAPE, "head_dim": D}),
    "qwen3 (mixed)": Family(
        "Qwen3Config", {**MIXED, "head_dim": D, "use_sliding_window": True}, _MIX
    ),
    "qwen3_moe": Family("Qwen3MoeConfig", {**SHAPE, **_MANY_EXPERTS, "head_dim": D}),
    "seed_oss": Family("SeedOssConfig", {**SHAPE, "head_dim": D}),
    "smollm3": Family("SmolLM3Config"),
    "smollm3 (mixed)": Family("SmolLM3Config", {**MIXED, "use_sliding_window": True}, _MIX),
    "stablelm": Family("StableLmConfig", SHAPE, "full; partial rotary"),
    "starcoder2": Family("Starcoder2Config", {**SHAPE, "sliding_window": None}),
}

_ONE_WINDOW = {**SHAPE, "sliding_window": WINDOW}
_IMAGES = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}

REFUSED: dict[str, Refused] = {
    "bart (encoder-decoder)": Refused("BartConfig", {"d_model": 16}, "encoder-decoder"),
    "bloom": Refused("BloomConfig", {"n_head": Q, "hidden_size": Q * D, "n_layer": 2}, "alibi"),
    "codegen": Refused("CodeGenConfig", {**_GPT2, "rotary_dim": 4}, "does not go through"),
    "deepseek_v2": Refused("DeepseekV2Config", {**SHAPE, "n_routed_experts": 8}, "latents"),
    "deepseek_v3": Refused(
        "DeepseekV3Config", {**SHAPE, "n_routed_experts": 8, "n_group": 2}, "latents"
    ),
    "falcon (alibi)": Refused("FalconConfig", {**_FALCON, "alibi": True}, "adds alibi"),
    "falcon_h1": Refused("FalconH1Config", SHAPE, "linear"),
    "gemma3 (images)": Refused(
        "Gemma3Config",
        {
            "text_config": {**MIXED, "head_dim": D},
            "vision_config": _IMAGES,
            "mm_tokens_per_image": 4,
        },
        "attach its language model",
    ),
    "gemma3_text (both directions)": Refused(
        "Gemma3TextConfig",
        {**MIXED, "head_dim": D, "use_bidirectional_attention": True},
        "both directions",
    ),
    "gemma3n_text": Refused(
        "Gemma3nTextConfig",
        {**MIXED, "head_dim": D, "num_kv_shared_layers": 2, "vocab_size_per_layer_input": VOCAB},
        "shares keys between layers",
    ),
    "gpt2 (scaled by layer)": Refused(
        "GPT2Config",
        {**_GPT2, "scale_attn_by_inverse_layer_idx": True},
        "its layers scale q.k differently",
    ),
    "gpt_neo": Refused(
        "GPTNeoConfig",
        {"hidden_size": Q * D, "num_heads": Q, "num_layers": 2}
        | {"attention_types": [[["global", "local"], 1]]},
        "does not go through",
    ),
    "gpt_oss": Refused("GptOssConfig", {**MIXED, **_EXPERTS, "head_dim": D}, "learned sinks"),
    "gptj": Refused("GPTJConfig", {**_GPT2, "rotary_dim": 4}, "does not go through"),
    "jamba": Refused("JambaConfig", {**SHAPE, "num_experts": 2}, "linear"),
    "llama4_text": Refused("Llama4TextConfig", {**SHAPE, "head_dim": D}, "chunked_attention"),
    "mamba": Refused("MambaConfig", {"num_hidden_layers": 2}, "linear"),
    "mamba2": Refused("Mamba2Config", {"num_hidden_layers": 2}, "linear"),
    "mistral (v0.1)": Refused("MistralConfig", _ONE_WINDOW, "every layer slides"),
    "mpt": Refused("MptConfig", {"d_model": Q * D, "n_heads": Q, "n_layers": 2}, "alibi"),
    "phi3 (one window)": Refused("Phi3Config", _ONE_WINDOW, "every layer slides"),
    "qwen2 (one window)": Refused(
        "Qwen2Config",
        {**_ONE_WINDOW, "use_sliding_window": True, "max_window_layers": 0},
        "every layer slides",
    ),
    "qwen3_next": Refused("Qwen3NextConfig", {**SHAPE, "head_dim": D, "num_experts": 2}, "linear"),
    "recurrent_gemma": Refused("RecurrentGemmaConfig", SHAPE, "linear_attention"),
}


def build(name: str, attention: str | None = None, **changes: Any) -> Any:
    """The model of ``FAMILIES[name]``, with the same weights every time, ready to generate.

    Args:
        name: Of the family.
        attention: The attention implementation; the model's own choice by default.
        **changes: To the family's settings.
    """
    import torch
    import transformers

    family = FAMILIES[name]
    config = getattr(transformers, family.config)(**{**family.settings, **changes})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    model.generation_config.pad_token_id = 0
    return model.eval()


def build_refused(name: str) -> Any:
    """The model of ``REFUSED[name]``, without memory for its weights."""
    import torch
    import transformers

    config = getattr(transformers, REFUSED[name].config)(**REFUSED[name].settings)
    with torch.device("meta"):
        return transformers.AutoModel.from_config(config).eval()
