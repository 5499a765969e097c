"""What a layer is: its constants, its page in memory, and the structs that every op takes."""

from less.layer.layout import PageLayout, PageViews
from less.layer.maps import Maps, PackedMaps
from less.layer.pool import Paged, PageRows, allocate
from less.layer.rows import Call, Rows, Slots, State, put_rows
from less.layer.space import Space, plain_space
from less.layer.spec import LayerPlan, LayerSpec, encode

__all__ = [
    "Call",
    "LayerPlan",
    "LayerSpec",
    "Maps",
    "PackedMaps",
    "PageLayout",
    "PageRows",
    "PageViews",
    "Paged",
    "Rows",
    "Slots",
    "Space",
    "State",
    "allocate",
    "encode",
    "plain_space",
    "put_rows",
]
