"""A decoding loop without transformers: LessKVCache in place of a cache and of attention."""

import torch

from less import H2O, LessKVCache

LAYERS, Q, K, D = 2, 32, 8, 128  # query heads, kv heads, head dim
torch.manual_seed(0)


def projections(layer: int, tokens: int) -> list[torch.Tensor]:
    """Stands for a model's layer: queries, keys and values after the rotary embedding."""
    return [torch.randn(1, heads, tokens, D) for heads in (Q, K, K)]


cache = LessKVCache(LAYERS, Q, K, D, batch=1, policy=H2O(heavy=96, recent=32))

for layer in range(LAYERS):  # the prompt: exact causal attention, then eviction down to capacity
    out = cache.attend(layer, *projections(layer, 500))  # [1, Q, 500, D]

snapshot = cache.state_dict()
for _ in range(10):  # one token at a time: each step evicts one token per kv head
    for layer in range(LAYERS):
        out = cache.attend(layer, *projections(layer, 1))  # [1, Q, 1, D]

positions = cache.positions(0)  # [1, K, 128]
print(f"{cache.columns} tokens seen, {positions.shape[2]} kept per kv head")
print(f"kv head 0 keeps {positions[0, 0].sort().values[:4].tolist()}, ... of the prompt")
cache.load_state_dict(snapshot)  # back to the end of the prompt
print(f"{cache.columns} tokens seen after the snapshot was loaded")
