"""Which key tiles the query tiles of one axis visit under a window rule (the visit count of GNA, arXiv 2504.16922).

One axis needs only the spans of the first and the last query of each tile: spans are monotone, and strides that stay
within their window leave no holes between them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from glocal.patterns.axis import AxisWindow

Tiling = Literal["static", "dynamic"]


@dataclass(frozen=True)
class AxisVisits:
    """Tile counts of one axis. Tiles are listed dilation group by dilation group (no tile crosses groups)."""

    length: int
    window: AxisWindow
    q_tile: int
    kv_tile: int
    visits: tuple[int, ...]  # key tiles with a visible pair, per query tile
    full: tuple[int, ...]  # unpadded key tiles seen whole by every query of the tile, per query tile
    inverse: tuple[int, ...]  # query tiles with a visible pair, per key tile (static grid)
    visible: int  # visible (query, key) pairs along the axis
    perfect: bool  # every visited tile is seen whole, as far as it holds tokens

    @property
    def dense_kv_tiles(self) -> int:
        """Key tiles a dense query tile visits."""
        return math.ceil(self.length / self.kv_tile)

    @property
    def dense_q_tiles(self) -> int:
        """Query tiles of the undilated axis."""
        return math.ceil(self.length / self.q_tile)


def visit_axis(length: int, window: AxisWindow, q_tile: int, kv_tile: int, tiling: Tiling = "static") -> AxisVisits:
    """Tile counts of one axis of `length` tokens (arguments already checked)."""
    visits: list[Tensor] = []
    full: list[Tensor] = []
    inverse: list[Tensor] = []
    visible, perfect = 0, True
    by_places: dict[int, tuple[Tensor, Tensor, Tensor, int, bool]] = {}
    for group in range(window.dilation):
        places = math.ceil((length - group) / window.dilation)  # groups differ by at most one token
        if places not in by_places:
            by_places[places] = _visit_group(places, window, q_tile, kv_tile, tiling)
        tiles, whole, back, pairs, tight = by_places[places]
        visits.append(tiles)
        full.append(whole)
        inverse.append(back)
        visible += pairs
        perfect &= tight
    return AxisVisits(
        length=length,
        window=window,
        q_tile=q_tile,
        kv_tile=kv_tile,
        visits=tuple(torch.cat(visits).tolist()),
        full=tuple(torch.cat(full).tolist()),
        inverse=tuple(torch.cat(inverse).tolist()),
        visible=visible,
        perfect=perfect,
    )


def _visit_group(
    places: int, window: AxisWindow, q_tile: int, kv_tile: int, tiling: Tiling
) -> tuple[Tensor, Tensor, Tensor, int, bool]:
    """One dilation group: visits and full tiles per query tile, query tiles per key tile, visible pairs, perfect."""
    place = torch.arange(places)
    start, end = window.span(place, places)  # [places]
    first = place[::q_tile]  # first query of each tile, [tiles]
    last = (first + q_tile - 1).clamp(max=places - 1)
    low, high = start[first], end[last]  # spans are monotone and strides stay within windows: no holes
    base = torch.zeros_like(low) if tiling == "static" else low
    visits = _ceil_div(high - base, kv_tile) - (low - base) // kv_tile
    # Whole tiles lie between the last start and the first end.
    begin, reach = _ceil_div(start[last] - base, kv_tile), end[first] - base
    full = (reach // kv_tile - begin).clamp(min=0)
    whole = (
        torch.where(end[first] == places, _ceil_div(reach, kv_tile), reach // kv_tile) - begin
    )  # ragged tile included
    steps = torch.zeros(math.ceil(places / kv_tile) + 1, dtype=torch.int64)
    ones = torch.ones_like(low)
    steps.index_add_(0, low // kv_tile, ones)
    steps.index_add_(0, _ceil_div(high, kv_tile), -ones)
    return visits, full, steps.cumsum(0)[:-1], int((end - start).sum()), bool((whole == visits).all())


def _ceil_div(a: Tensor, b: int) -> Tensor:
    return -((-a) // b)
