"""A budget in bytes: `python examples/byte_budget.py [MODEL]`; without MODEL, SmolLM2-135M."""

import sys

import less.hf
from less import H2O, LessConfig
from less.evaluate.assets import load_model

model, tokenizer = load_model(sys.argv[1] if len(sys.argv) > 1 else "smollm2")
tokenizer.padding_side = "left"
texts = ["The history of the lighthouse " * 30, "A short history of the sea " * 20]
inputs = tokenizer(texts, return_tensors="pt", padding=True)
inputs.pop("token_type_ids", None)

# The policy's proportions count here: the budget says how many tokens each layer keeps.
config = LessConfig(bytes="2MiB", dtype="int8", policy=H2O(heavy=3, recent=1, decay=0.98))
cache = config.cache(model, batch=2)
with less.hf.attach(model, cache):
    out = model.generate(**inputs, past_key_values=cache, max_new_tokens=10, do_sample=False)

memory = cache.memory()
assert memory["slots"] + memory["state"] <= 2 * 2**20
print(f"{cache.policies[0]} in every layer")
print(f"{memory['slots']:,} bytes of slots, {memory['full']:,} in a full cache")
for row in out[:, -10:]:
    print(tokenizer.decode(row))
