"""Which model a sidekick belongs to: what shapes its q and k."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def model_identity(model: Any) -> dict[str, Any]:
    """What makes a sidekick belong to a model: the fields that shape its q and k.

    Args:
        model: A transformers model or its config (for a composed model the text config counts).

    Returns:
        name, model_type, layers, q_heads, kv_heads, head_dim, hidden_size, vocab_size, rope (its
        parameters), and fingerprint, a sha256 over all of them but the name.

    Raises:
        ValueError: a needed field is missing: this is no decoder's config.
    """
    config = getattr(model, "config", model)
    name = str(getattr(config, "_name_or_path", "") or "")
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    found: dict[str, int] = {}
    for field in ("num_hidden_layers", "num_attention_heads", "hidden_size"):
        value = getattr(config, field, None)
        if not isinstance(value, int) or value < 1:
            raise ValueError(
                f"model_identity: {type(config).__name__}.{field} must be a positive int, "
                f"got {value!r}"
            )
        found[field] = value
    q_heads = found["num_attention_heads"]
    rope = getattr(config, "rope_parameters", None)
    if not rope:  # transformers before 5 keeps the two apart
        rope = dict(getattr(config, "rope_scaling", None) or {})
        if getattr(config, "rope_theta", None) is not None:
            rope["rope_theta"] = config.rope_theta
    identity: dict[str, Any] = {
        "model_type": str(getattr(config, "model_type", "")),
        "layers": found["num_hidden_layers"],
        "q_heads": q_heads,
        "kv_heads": kv_heads_of(config),
        "head_dim": getattr(config, "head_dim", None) or found["hidden_size"] // q_heads,
        "hidden_size": found["hidden_size"],
        "vocab_size": getattr(config, "vocab_size", None),
        "rope": _plain({"rope_type": "default", **rope}),
    }
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    return {"name": Path(name).name or name, **identity, "fingerprint": digest}


def kv_heads_of(config: Any) -> int:
    """Kv heads K of a transformers decoder's config; some say it in fields of their own."""
    heads = int(config.num_attention_heads)
    if getattr(config, "new_decoder_architecture", False):
        return int(config.num_kv_heads)
    if getattr(config, "multi_query", False):
        return 1
    return int(getattr(config, "num_key_value_heads", None) or heads)


def _plain(x: Any) -> Any:
    """Config values as JSON gives them back: numbers as they are, None dropped, keys sorted."""
    if isinstance(x, Mapping):
        return {str(k): _plain(v) for k, v in sorted(x.items()) if v is not None}
    if isinstance(x, (list, tuple)):
        return [_plain(v) for v in x]
    return float(x) if isinstance(x, (int, float)) and not isinstance(x, bool) else x
