"""What a layer is: its constants, its page in memory, and the structs that every op takes."""

from less.layer.layout import PageLayout, PageViews
from less.layer.maps import Maps, PackedMaps
from less.layer.pool import PageRows, allocate
from less.layer.rows import Call, Rows, Slots, State
from less.layer.spec import LayerSpec, encode

__all__ = [
    "Call",
    "LayerSpec",
    "Maps",
    "PackedMaps",
    "PageLayout",
    "PageRows",
    "PageViews",
    "Rows",
    "Slots",
    "State",
    "allocate",
    "encode",
]
