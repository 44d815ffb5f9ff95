"""Sliding tile attention (arXiv 2502.04507): a neighbourhood counted in whole tiles, so that no block is cut."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral

import torch
from torch import Tensor

from glocal.patterns.axis import AxisWindow, Border, Oversize
from glocal.patterns.base import Term
from glocal.patterns.neighborhood import per_axis
from glocal.patterns.relations import Products


@dataclass(frozen=True)
class AxisTiles:
    """Along one axis, a query sees `window` tiles of `tile` tokens around its own."""

    tile: int
    window: int
    border: Border = "shift"
    dilation: int = 1

    def span(self, place: Tensor, length: Tensor | int) -> tuple[Tensor, Tensor]:
        """First visible place and one past the last."""
        whole = torch.as_tensor(length, device=place.device)
        tiles = -(-whole // self.tile)
        start, end = AxisWindow(self.window, border=self.border).span(place // self.tile, tiles)
        return start * self.tile, torch.minimum(end * self.tile, whole)

    def sees(self, q: Tensor, k: Tensor, length: int) -> Tensor:
        """Whether the key's tile lies in the window of the query's tile (broadcast bool)."""
        start, end = self.span(q, length)
        return (k >= start) & (k < end)


@dataclass(frozen=True)
class TileWindows(Products):
    """Every tile of queries sees the window of tiles around it; one value for all axes or one an axis.

    tile: tokens of a tile; where it does not divide the axis, the last tile is smaller.
    window: tiles seen along the axis, the query's own included; an even window has one more before than after.
    border: "shift" moves windows inwards at the border, "clip" cuts them off.
    oversize: a window of more tiles than the axis has is an "error", or "full" sees the whole axis.

    With an odd window on a divisible axis this is ``Neighborhood(tile * window, stride=tile)``.
    """

    tile: int | tuple[int, ...]
    window: int | tuple[int, ...]
    border: Border = "shift"
    oversize: Oversize = "error"

    def __post_init__(self) -> None:
        for name in ("tile", "window"):
            value = getattr(self, name)
            if isinstance(value, list):
                object.__setattr__(self, name, tuple(value))
            sizes = value if isinstance(value, (tuple, list)) else (value,)
            if not all(isinstance(size, Integral) for size in sizes):
                raise TypeError(f"TileWindows: {name}={value!r} must be whole numbers, one an axis.")
            if min(sizes) < 1:
                raise ValueError(f"TileWindows: {name}={value!r} must be at least 1 on every axis.")
        for name, words in (("border", ("shift", "clip")), ("oversize", ("error", "full"))):
            if getattr(self, name) not in words:
                raise ValueError(f"TileWindows: {name}={getattr(self, name)!r}; legal: {', '.join(map(repr, words))}.")

    def terms(self, shape: tuple[int, ...], head: int | None) -> Sequence[Term]:
        tiles = per_axis(self.tile, len(shape), "TileWindows", "tile")
        windows = per_axis(self.window, len(shape), "TileWindows", "window")
        axes: list[AxisTiles] = []
        for axis, (length, tile, window) in enumerate(zip(shape, tiles, windows, strict=True)):
            held = -(-length // tile)
            if window > held and self.oversize == "error":
                raise ValueError(
                    f"TileWindows: window={window} tiles of {tile} do not fit axis {axis} of length {length} in "
                    f"{shape}; largest window there: {held}. oversize='full' lets it see the whole axis."
                )
            axes.append(AxisTiles(tile, min(window, held), self.border if window <= held else "shift"))
        return [tuple(axes)]
