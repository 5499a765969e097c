"""Tensor parallel: which heads of a sharded model this process holds.

transformers shards a model by a plan, layer name -> style. Where the plan cuts the projections of
queries, keys and values by columns and leaves them cut ("colwise"), each process computes its own
heads, and its cache holds theirs alone. Where it gathers them again ("colwise_gather_output"), or
does not name them, every process computes every head and holds the whole cache.
"""

from __future__ import annotations

from typing import Any

# The projections whose outputs are heads, fused or not; the plan's names end in them.
_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "qkv_proj", "query_key_value")
_WHOLE = (None, "colwise_gather_output")


def part_of(model: Any, q_heads: int, kv_heads: int) -> tuple[int, int]:
    """Which part of the heads this process computes.

    Args:
        model: A transformers model, sharded or not.
        q_heads: Query heads Q of the whole model.
        kv_heads: Kv heads K of the whole model.

    Returns:
        rank and world: this process computes heads rank * Q / world on, Q / world of them, and kv
        heads likewise. (0, 1) where it computes all.

    Raises:
        ValueError: The heads cannot be dealt out evenly, or the plan cuts keys and queries apart;
            the message says which, for a sentence that begins with the model's name.
    """
    world = getattr(model, "tp_size", None) or 1
    if world == 1:
        return 0, 1
    plan = {name.rsplit(".", 1)[-1]: str(style) for name, style in (model.tp_plan or {}).items()}
    styles = {name: plan.get(name) for name in _PROJECTIONS if name in plan}
    if all(style in _WHOLE for style in styles.values()):
        return 0, 1
    cut = {"q_proj", "k_proj", "v_proj"}
    if set(styles) != cut or set(styles.values()) != {"colwise"}:
        raise ValueError(
            "its tensor-parallel plan must cut q_proj, k_proj and v_proj alike (colwise), got "
            f"{styles}"
        )
    if kv_heads % world or q_heads % world:
        raise ValueError(
            f"its {q_heads} query heads and {kv_heads} kv heads cannot be dealt out evenly to "
            f"{world} processes (tensor parallel)"
        )
    # The mesh that the weights lie on knows this process's place in it.
    for name, weight in model.named_parameters():
        if name.endswith("k_proj.weight") and hasattr(weight, "device_mesh"):
            mesh = weight.device_mesh
            axis = mesh.mesh_dim_names.index("tp") if mesh.ndim > 1 else 0
            return int(mesh.get_local_rank(axis)), int(world)
    raise ValueError(
        f"it says tp_size={world}, but its k_proj weights are not sharded (no DTensor)"
    )
