"""Falcon's attention, which does not go through transformers' attention interface.

What stands in for the ``forward`` of its attention modules while a cache is attached or training
captures: the model's own projections and rotary embedding, and between them an attention function
of the interface. Falcon repeats its keys and values for every query head before they reach a cache
(and a full cache holds the copies); here they stay one per kv head.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor


def attention_forward(
    attention: Callable[..., Any],
    original: Callable[..., Any],
    hidden_states: Tensor,
    alibi: Tensor | None,
    attention_mask: Tensor | None,
    position_ids: Tensor | None = None,
    layer_past: Any = None,
    use_cache: bool = False,
    output_attentions: bool = False,
    position_embeddings: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """``FalconAttention.forward`` through an attention function.

    Args:
        attention: As transformers' attention interface holds it.
        original: The module's own method, by which the module is found.
        hidden_states: [B, T, hidden size].
        alibi: None; models with alibi are refused before.
        attention_mask: What the mask function beside it returned.
        position_ids: Not used: ``position_embeddings`` come of them.
        layer_past: The cache; None while training captures.
        use_cache: Not used.
        output_attentions: Not used; refused before.
        position_embeddings: cos and sin of the tokens' positions.
        **kwargs: What else the layer passes on.

    Returns:
        [B, T, hidden size], and None for the attention weights.
    """
    from transformers.models.falcon.modeling_falcon import apply_rotary_pos_emb

    module: Any = original.__self__  # type: ignore[attr-defined]
    query, key, value = split_heads(module, module.query_key_value(hidden_states))
    query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
    if layer_past is not None:
        key, value = layer_past.update(key, value, module.layer_idx)
    scale = module.inv_norm_factor
    out, _ = attention(module, query, key, value, attention_mask, scaling=scale, **kwargs)
    return module.dense(out.flatten(2)), None


def split_heads(module: Any, fused: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Q [B, Q, T, D], k and v [B, K, T, D] of a projection [B, T, (Q + 2 K) D].

    A kv head lies behind the query heads of its group: K groups of Q / K + 2 rows.
    """
    B, T, _ = fused.shape
    rows = fused.view(B, T, -1, module.head_dim)
    kv_heads = (rows.shape[2] - module.num_heads) // 2
    groups = rows.view(B, T, kv_heads, -1, module.head_dim)
    query = groups[..., :-2, :].flatten(2, 3)
    key, value = groups[..., -2, :], groups[..., -1, :]
    return query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
