"""One process of a tensor-parallel run, started by tests/test_parallel.py through torchrun.

Arguments: a folder of saved models (one folder each, with a sidekick in sidekick/ where one is
wanted). Each process writes what it computed to rank<i>.pt in the folder.
"""

import sys
from pathlib import Path

import torch

CASES = {
    # name -> family, arguments of generate
    "llama": ("llama", {}),
    "qwen2-beams": ("qwen2", {"num_beams": 2}),
    "qwen3-sample": ("qwen3", {"do_sample": True, "top_k": 20}),
    "phi3-gathered": ("phi3", {}),  # its plan gathers the heads: each process holds them all
    "gemma3-mixed": ("gemma3_text", {}),
}


def inputs():
    """Two prompts, the second padded on the left."""
    ids = torch.randint(2, 61, (2, 21), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    ids[1, :6], mask[1, :6] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def run(model, sidekick, options):
    """Generate on a small cache; what came of it, heads in the last dim but two."""
    import less.hf
    from less import H2O

    torch.manual_seed(11)
    rows = 2 * options.get("num_beams", 1)
    cache = less.hf.cache_for(model, H2O(heavy=4, recent=4), sidekick, batch=rows)
    with less.hf.attach(model, cache):
        tokens = model.generate(
            **inputs(),
            past_key_values=cache,
            **{"max_new_tokens": 12, "do_sample": False, **options},
        )
    held = [i for i in range(cache.layers) if i not in cache.native]
    return {
        "tokens": tokens,
        "kv_heads": cache.kv_heads,
        "positions": [cache.positions(i) for i in held],
        "state": [cache.state(i)[0] for i in held],
        "memory": cache.memory(),
    }


def dealt(model):
    """Slots of the heads, and bytes, of a budget of this process that curves deal out."""
    from less import LessConfig
    from less.evaluate.families import D, K
    from tests.test_curves import with_curves

    calibration = with_curves(model, len(model.model.layers), K, D)
    config = LessConfig(bytes=40_000, shape="calibrated", dtype="float32")
    cache = config.cache(model, calibration=calibration)
    return [layout.capacities for layout in cache.layouts], cache.memory()["slots"]


def refusal(function):
    """The message of the error that a call raises."""
    try:
        function()
    except ValueError as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def main(root):
    """All cases in one process group, since starting it is what costs."""
    import torch.distributed as dist
    import transformers
    from transformers.distributed import DistributedConfig

    import less.hf
    from less import H2O, Sidekick

    def load(family):
        config = DistributedConfig(tp_size=2)
        folder = root / family
        kind = transformers.AutoModelForCausalLM
        return kind.from_pretrained(folder, distributed_config=config).eval()

    models = {family: load(family) for family in {family for family, _ in CASES.values()}}
    rank, world = dist.get_rank(), dist.get_world_size()
    got = {}
    for name, (family, options) in CASES.items():
        # The maps as a whole, which cache_for cuts; in one case as read part by part.
        shard = (rank, world) if name == "llama" else (0, 1)
        sidekick = Sidekick.from_pretrained(root / family / "sidekick", shard=shard)
        got[name] = run(models[family], sidekick, options)
    other = Sidekick.from_pretrained(root / "llama" / "sidekick", shard=(1 - rank, world))
    small = H2O(heavy=4, recent=4)
    got["wrong part"] = refusal(lambda: less.hf.cache_for(models["llama"], small, other))
    got["one kv head"] = refusal(lambda: less.hf.cache_for(load("llama-mqa"), small))
    got["dealt"] = dealt(models["llama"])
    torch.save(got, root / f"rank{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
