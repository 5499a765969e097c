"""A pool of pages, as a serving engine holds it: sequences come and go without a copy."""

import torch

from less import H2O, PagedLayer, PageLayout

Q, K, D = 8, 2, 64
torch.manual_seed(0)
policy = H2O(heavy=24, recent=8)
layout = PageLayout(kv_heads=K, head_dim=D, capacity=policy.capacity, dtype=torch.float16)
layer = PagedLayer(policy, layout, q_heads=Q)  # no memory of its own
pool = layer.new_pool(pages=4)  # uint8 [4, layout.nbytes]; an engine may pass its own bytes


def step(pages: list[int], fresh: list[bool], tokens: int) -> torch.Tensor:
    """A call with one batch row per entry of `pages`."""
    q, k, v = (torch.randn(len(pages), heads, tokens, D) for heads in (Q, K, K))
    where = {"pages": torch.tensor(pages, dtype=torch.int32), "fresh": torch.tensor(fresh)}
    return layer.attend(pool, q, k, v, **where)


step([2], [True], tokens=100)  # sequence A begins on page 2: whatever lay there is cleared
step([0], [True], tokens=60)  # sequence B begins on page 0
for _ in range(5):  # both decode in one batch; the third row is padding and has no page
    out = step([2, 0, -1], [False, False, False], tokens=1)
assert not out[2].any()  # a row without a page writes nothing, and its output is 0
step([2], [True], tokens=30)  # A has ended, and sequence C begins on its page
out = step([0, 2], [False, False], tokens=1)

(views,) = layout.views(pool)  # every field of every page, as tensors [N, ...]
print(f"{pool.shape[0]} pages of {layout.nbytes:,} bytes")
print(f"tokens seen by page: {views.seen.tolist()}")
