"""One of two processes of a tensor-parallel run, of which the second dies amid a pass.

Started by test_kills.py with the folder of a model. The first prints by what its pass was ended,
and what its cache says to the next.
"""

from __future__ import annotations

import os
import sys

import torch
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

import less.hf
from less import H2O


def main() -> None:
    model = AutoModelForCausalLM.from_pretrained(
        sys.argv[1], distributed_config=DistributedConfig(tp_size=2)
    ).eval()
    cache = less.hf.cache_for(model, H2O(heavy=4, recent=4))
    ids = torch.arange(2, 13)[None]

    def die(*_: object) -> None:
        if cache.columns > 14:
            os._exit(9)

    if os.environ["RANK"] == "1":
        model.model.layers[1].register_forward_pre_hook(die)
    with less.hf.attach(model, cache):
        try:
            model.generate(ids, past_key_values=cache, max_new_tokens=30, do_sample=False)
        except RuntimeError as error:
            print(f"ended by {error}")
        try:
            with torch.no_grad():
                model(ids, past_key_values=cache)
        except RuntimeError as error:
            print(f"refused: {error}")
    sys.stdout.flush()
    os._exit(0)  # nobody is left to say goodbye to


if __name__ == "__main__":
    main()
