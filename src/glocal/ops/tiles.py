"""Overlapping tiles that cover a map, and their blend: what large pictures go through when a model sees small ones.

Tiles overlap and are mixed with a raised cosine, so that no seam is left (MultiDiffusion, arXiv 2302.08113, averages
them evenly); tiles inside the map may be moved at random from step to step (DemoFusion, arXiv 2311.16973).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise, product

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tile:
    """Rows top to top + height, columns left to left + width."""

    top: int
    left: int
    height: int
    width: int

    def of(self, x: Tensor) -> Tensor:
        """Its part of x [..., H, W]."""
        return x[..., self.top : self.top + self.height, self.left : self.left + self.width]


def tiles(
    size: tuple[int, int], window: tuple[int, int], stride: tuple[int, int], generator: torch.Generator | None = None
) -> tuple[Tile, ...]:
    """Tiles of `window` (at most the map) at most `stride` apart, evenly spread, in raster order; all cover `size`.

    generator: moves tiles that touch no border, each axis on its own, by no more than leaves the map covered; None
    leaves them. Raises ValueError for a window or stride below 1, or a stride that leaves gaps.
    """
    for name, sides in (("window", window), ("stride", stride)):
        if min(sides) < 1:
            raise ValueError(f"tiles: {name}={sides!r} must be at least 1 on both axes.")
    rows, columns = (_starts(n, min(w, n), s, generator) for n, w, s in zip(size, window, stride, strict=True))
    sides = min(window[0], size[0]), min(window[1], size[1])
    return tuple(Tile(top, left, *sides) for top, left in product(rows, columns))


def _starts(length: int, window: int, stride: int, generator: torch.Generator | None) -> list[int]:
    if window == length:
        return [0]
    if stride > window:
        raise ValueError(f"tiles: stride={stride} leaves gaps between tiles of {window}; legal: up to {window}.")
    count = -(-(length - window) // stride) + 1
    starts = [round(n * (length - window) / (count - 1)) for n in range(count)]
    if generator is None:
        return starts
    gap = max(b - a for a, b in pairwise(starts))
    reach = (window - gap) // 2  # both neighbours may move towards or away from each other
    moves = torch.randint(-reach, reach + 1, (count,), generator=generator, device=generator.device).tolist()
    inside = range(1, count - 1)
    return [min(max(s + moves[n], 0), length - window) if n in inside else s for n, s in enumerate(starts)]


def raised_cosine(height: int, width: int) -> Tensor:
    """Weights [height, width] of a tile, largest in its middle, above 0 everywhere."""
    rows, columns = (0.5 - 0.5 * torch.cos(2 * torch.pi * (torch.arange(n) + 0.5) / n) for n in (height, width))
    return rows[:, None] * columns


def blend(parts: Sequence[Tensor], places: Sequence[Tile], size: tuple[int, int]) -> Tensor:
    """The mean of overlapping parts [..., h, w] (one a tile) under `raised_cosine`, [..., H, W]; weights sum to 1."""
    if len(parts) != len(places):
        raise ValueError(f"blend: {len(parts)} parts for {len(places)} tiles; legal: one each.")
    exact = torch.promote_types(parts[0].dtype, torch.float32)
    total = parts[0].new_zeros(*parts[0].shape[:-2], *size, dtype=exact)
    weights = torch.zeros(size, device=total.device, dtype=exact)
    for part, place in zip(parts, places, strict=True):
        weight = raised_cosine(place.height, place.width).to(weights)
        place.of(total).add_(part.to(exact) * weight)
        place.of(weights).add_(weight)
    if not bool((weights > 0).all()):
        raise ValueError(f"blend: the tiles do not cover a map of {size}.")
    return (total / weights).to(parts[0].dtype)
