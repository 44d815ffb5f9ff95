"""Token geometry: parts, layouts and orders."""

from glocal.canvas.layout import Layout, Policy
from glocal.canvas.names import named, per_head_orders
from glocal.canvas.orders import Order, Region, from_gather, raster, tile
from glocal.canvas.parts import Canvas, Coords, Part

__all__ = [
    "Canvas",
    "Coords",
    "Layout",
    "Order",
    "Part",
    "Policy",
    "Region",
    "from_gather",
    "named",
    "per_head_orders",
    "raster",
    "tile",
]
