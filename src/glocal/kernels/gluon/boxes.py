"""Tiles that are boxes of a grid of tokens, so that TMA reads them where they lie: the token permutation of tiled
attention (arXiv 2504.16922) then costs nothing.

A descriptor has five axes: two that hold samples, heads and the first axis of the grid, two more of the grid, and the
head size. Axes of the grid come in the order in which a tile runs through them, whichever that is. What a box has
beyond the edge of the grid reads as 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from glocal._kept import ordinary
from glocal.plan.facts import capturing

Three = tuple[int, int, int]

BITS = 20  # of each coordinate of a corner

_KNOWN: WeakIdKeyDictionary = WeakIdKeyDictionary()


@dataclass(frozen=True, eq=False)
class Boxes:
    """grid, box: tokens along three axes in the order in which a tile runs, the last one fastest; axes may be 1. steps:
    tokens from one place of an axis to the next. corners: int64 [tiles], the first token of each tile as
    x + (y << BITS) + (t << 2 * BITS). raster: int32 [1, 1, tokens], the tokens as they lie.
    """

    grid: Three
    box: Three
    steps: Three
    corners: Tensor
    raster: Tensor


@dataclass(frozen=True)
class Seen:
    """A tensor [B, H, N, D] as a descriptor reads its boxes: sizes and strides of the four axes before the head size,
    a box of them, and the coordinates (b * lead[0] + h * lead[1], b * lead[2] + h * lead[3] + t, y, x) of a corner.
    """

    shape: tuple[int, int, int, int]
    strides: tuple[int, int, int, int]
    box: tuple[int, int, int, int]
    lead: tuple[int, int, int, int]


def boxes_of(order: Tensor, tokens: int, rows: int) -> Boxes | None:
    """The boxes that tiles of `rows` slots of an order [1, 1, room] are, or None if they are no boxes of one grid.

    Looked at once for each order, which waits for the device; None while a CUDA graph is captured.
    """
    mark = (order.data_ptr(), 0 if order.is_inference() else order._version, tokens)
    known = _KNOWN.get(order)
    if known is None or known[0] != mark:
        known = _KNOWN[order] = (mark, {})
    if rows not in known[1]:
        if capturing(order):
            return None
        known[1][rows] = _found(order, tokens, rows)
    return known[1][rows]


@ordinary()
def _found(order: Tensor, tokens: int, rows: int) -> Boxes | None:
    if order.shape[:2] != (1, 1) or order.shape[2] % rows:
        return None
    slots = order[0, 0].cpu().long()
    for size in (rows, 2 * rows):  # a tile may show the grid only together with its neighbour
        axes = _axes(slots, tokens, size)
        if axes is None:
            continue
        grid, box, steps = axes
        if size > rows:
            cut = next(i for i, n in enumerate(box) if n > 1)
            box = tuple(n // 2 if i == cut else n for i, n in enumerate(box))
        corners = _corners(slots.reshape(-1, rows), grid, box, steps)
        if corners is not None:
            raster = torch.arange(tokens, dtype=torch.int32)[None, None]
            return Boxes(grid, box, steps, corners.to(order.device), raster.to(order.device))  # type: ignore[arg-type]
    return None


def _corners(tiles: Tensor, grid: tuple[int, ...], box: tuple[int, ...], steps: tuple[int, ...]) -> Tensor | None:
    """Corners int64 [tiles] if every tile [tiles, rows] is a box of the grid, with -1 beyond its edge."""
    ends, step = torch.tensor(grid), torch.tensor(steps)
    at = tiles[:, :1] // step % ends  # [tiles, 3]
    place = at[:, None] + torch.cartesian_prod(*(torch.arange(n) for n in box))  # [tiles, rows, 3]
    want = torch.where((place < ends).all(2), (place * step).sum(2), -1)
    none = (tiles < 0).all(1)
    if not bool(((want == tiles).all(1) | none).all()):
        return None
    return torch.where(none, grid[1] << BITS, at[:, 2] + (at[:, 1] << BITS) + (at[:, 0] << 2 * BITS))


def _axes(slots: Tensor, tokens: int, rows: int) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]] | None:
    """Grid, box and steps of the first whole tile, from the nested runs of its tokens, three axes each."""
    tiles = slots.reshape(-1, rows) if len(slots) % rows == 0 else slots[:0, None]
    whole = (tiles >= 0).all(1).nonzero()
    if not len(whole):
        return None
    offsets = tiles[whole[0, 0]] - tiles[whole[0, 0], 0]
    box, steps, inner = [], [], 1
    while inner < rows:
        heads = offsets[::inner]
        equal = heads == torch.arange(len(heads)) * heads[1]
        box.append(len(heads) if bool(equal.all()) else int((~equal).nonzero()[0, 0]))
        steps.append(int(heads[1]))
        inner *= box[-1]
    above = dict(pairwise([*sorted(steps), tokens]))
    if inner != rows or len(box) > 3 or min(steps) != 1 or any(above[s] % s for s in above) or len(above) < len(steps):
        return None
    grid = [above[s] // s for s in steps]
    fill = [1] * (3 - len(box))
    return None if max(grid) >> BITS else tuple((*fill, *axis[::-1]) for axis in (grid, box, steps))  # type: ignore


def seen(t: Tensor, boxes: Boxes) -> Seen | None:
    """How a descriptor reads boxes of t [B, H, N, D], rows contiguous and steps of 16 bytes; None: it cannot."""
    return _seen(*t.shape[:2], t.stride()[:3], boxes.grid, boxes.box, boxes.steps)


@lru_cache
def _seen(b: int, h: int, strides: Three, grid: Three, box: Three, steps: Three) -> Seen | None:
    sb, sh, sn = strides
    axes = tuple((n, step * sn) for n, step in zip(grid, steps, strict=True))
    first, second, lead = (b, sb), (h, sh), (1, 0, 0, 1)
    length = grid[0]
    if length > 1:
        second = axes[0]
        if h == 1:
            lead = (1, 0, 0, 0)
        elif b == 1 or sb == h * sh:
            first, lead = (b * h, sh), (h, 1, 0, 0)
        elif sb == length * second[1]:
            first, second, lead = (h, sh), (b * length, second[1]), (0, 1, length, 0)
        else:
            return None
    sizes, steps_of = zip(first, second, *axes[1:], strict=True)
    return Seen(sizes, steps_of, (1, *box), lead)
