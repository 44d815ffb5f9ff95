"""Finds plainly coloured objects in pictures, and says how well they agree with what was asked for.

Made for procedural scenes, whose objects have one hue each, lighter and darker: pixels are put to the nearest hue of a
palette, thin seams are opened away, and what hangs together is one object. Size does not matter: pictures are reduced
to a grid. Meant for pictures beyond a model's resolution, where objects are repeated, lost and moved.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

_NEAR = 0.24
"""Largest distance of a pixel's hue (its colour divided by its largest channel) to a palette's."""
_PLAIN = 0.38
"""Below this saturation (1 - smallest / largest channel) a pixel is background, and so are pixels darker than _DARK."""
_DARK = 0.12


@dataclass(frozen=True)
class FoundObject:
    """colour: number in the palette. x, y: middle, as shares of width and height. area: share of the picture."""

    colour: int
    x: float
    y: float
    area: float


@dataclass(frozen=True)
class WantedObject:
    """An object that a picture should show: colour, and the box (left, top, right, bottom) its middle should lie in."""

    colour: int
    box: tuple[float, float, float, float]


@dataclass(frozen=True)
class Agreement:
    """right: wanted objects found exactly once, in their box. once: found exactly once, anywhere. missing: not found.

    repeated: objects beyond the first of each wanted colour. strange: objects of colours nobody asked for.
    wanted, found: how many objects there should be, and are.
    """

    wanted: int
    found: int
    right: int
    once: int
    missing: int
    repeated: int
    strange: int


def hue_masks(pictures: Tensor, palette: Tensor, grid: int = 128) -> Tensor:
    """Where each colour is: pictures [B, 3, H, W] in [0, 1], palette [C, 3] -> [B, C, h, w] bool, h, w <= grid.

    Sides that are larger are reduced to `grid` by the mean of the share of pixels of a colour.
    """
    if pictures.ndim != 4 or pictures.shape[1] != 3:
        raise ValueError(f"pictures have shape {tuple(pictures.shape)}; legal: [B, 3, H, W] in [0, 1]")
    largest, smallest = pictures.amax(1), pictures.amin(1)  # [B, H, W]
    hue = pictures / largest[:, None].clamp(min=1e-6)
    known = palette / palette.amax(1, keepdim=True)
    away = (hue[:, None] - known[None, :, :, None, None]).norm(dim=2)  # [B, C, H, W]
    coloured = (largest >= _DARK) & (1 - smallest / largest.clamp(min=1e-6) >= _PLAIN)
    mine = (away == away.amin(1, keepdim=True)) & (away <= _NEAR) & coloured[:, None]
    height, width = (min(n, grid) for n in pictures.shape[-2:])
    return F.adaptive_avg_pool2d(mine.float(), (height, width)) >= 0.5


def connected(masks: Tensor) -> Tensor:
    """Labels of what hangs together, corners included: masks [N, h, w] bool -> [N, h, w] long, 0 outside.

    A label is the largest raster number of its part, plus 1.
    """
    numbers = torch.arange(1, masks.shape[-2] * masks.shape[-1] + 1, device=masks.device, dtype=torch.float32)
    inside = masks.float()
    labels = inside * numbers.view(masks.shape[-2:])
    while True:
        spread = F.max_pool2d(labels[:, None], 3, 1, 1)[:, 0] * inside
        if torch.equal(spread, labels):
            return labels.long()
        labels = spread


def find_objects(
    pictures: Tensor, palette: Tensor, *, grid: int = 128, least: float = 0.0015
) -> list[tuple[FoundObject, ...]]:
    """The objects of each picture [B, 3, H, W] in [0, 1], largest first.

    palette [C, 3] in [0, 1]. least: smaller objects (share of the picture) do not count; nor does what vanishes when a
    seam of a cell is taken off all round.
    """
    masks = hue_masks(pictures, palette.to(pictures), grid)
    batch, colours, height, width = masks.shape
    shrunk = -F.max_pool2d(-masks.float(), 3, 1, 1)
    opened = F.max_pool2d(shrunk, 3, 1, 1) > 0.5
    labels = connected(opened.flatten(0, 1)).view(batch, colours, height, width).cpu()
    found: list[tuple[FoundObject, ...]] = []
    for picture in labels:
        objects = []
        for colour, plane in enumerate(picture):
            for label in plane.unique().tolist():
                rows, columns = (plane == label).nonzero(as_tuple=True)
                area = len(rows) / (height * width)
                if label and area >= least:
                    x, y = (columns.float().mean() + 0.5) / width, (rows.float().mean() + 0.5) / height
                    objects.append(FoundObject(colour, float(x), float(y), area))
        found.append(tuple(sorted(objects, key=lambda o: -o.area)))
    return found


def agreement(found: Sequence[FoundObject], wanted: Sequence[WantedObject]) -> Agreement:
    """How found objects agree with wanted ones, which have one colour each.

    Raises ValueError where two wanted objects share a colour.
    """
    colours = [w.colour for w in wanted]
    if len(set(colours)) < len(colours):
        raise ValueError(f"wanted objects have the colours {colours}; legal: each colour once")
    right = once = missing = repeated = 0
    for w in wanted:
        mine = [o for o in found if o.colour == w.colour]
        missing += not mine
        repeated += max(len(mine) - 1, 0)
        once += len(mine) == 1
        left, top, across, down = w.box
        right += len(mine) == 1 and left <= mine[0].x <= across and top <= mine[0].y <= down
    strange = sum(o.colour not in colours for o in found)
    return Agreement(len(wanted), len(found), right, once, missing, repeated, strange)
