"""One page on both sides of the border: less/layer/layout.py and csrc/common/layout.h."""

from __future__ import annotations

import pytest
import torch

from less.dtypes import FORMATS
from less.layer import LayerSpec, PageLayout, Space, encode

pytest.importorskip("less._C")

FIELDS = (
    *("position", "hot_k", "hot_k_scale", "k", "k_scale", "weight"),
    *("hot_v", "hot_v_scale", "v", "v_scale", "z", "H", "score"),
)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.float8_e4m3fn)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rank", [0, 8])
@pytest.mark.parametrize("capacity", [1, 205, (7, 64, 1, 33), (820, 12, 205, 205)])
@pytest.mark.parametrize("head_dim", [24, 128])
def test_python_and_cpp_find_a_field_at_the_same_place(
    dtype: torch.dtype, rank: int, capacity: int | tuple[int, ...], head_dim: int
) -> None:
    layout = PageLayout(4, head_dim, capacity, dtype, rank)
    told = torch.ops.less.page_offsets(encode(LayerSpec(8, 1.0), layout))
    begins = [head["position"].offset for head in layout.heads] + [layout.nbytes]
    wanted = [
        [begins[h], *(head[f].offset if f in head else -1 for f in FIELDS), begins[h + 1]]
        for h, head in enumerate(layout.heads)
    ]
    assert told.tolist() == wanted


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("rank", [0, 8])
@pytest.mark.parametrize("head_dim", [24, 128])
@pytest.mark.parametrize("hot_dtype", [torch.int8, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("weights", [False, True])
def test_a_packed_page_too(
    dtype: str, rank: int, head_dim: int, hot_dtype: torch.dtype, weights: bool
) -> None:
    layout = PageLayout(
        3, head_dim, (64, 9, 205), dtype, rank, sinks=3, hot=5, hot_dtype=hot_dtype, weights=weights
    )
    space = Space.of(3, head_dim)
    told = torch.ops.less.page_offsets(encode(LayerSpec(6, 1.0), layout, None, space))
    begins = [head["position"].offset for head in layout.heads] + [layout.nbytes]
    wanted = [
        [begins[h], *(head[f].offset if f in head else -1 for f in FIELDS), begins[h + 1]]
        for h, head in enumerate(layout.heads)
    ]
    assert told.tolist() == wanted
