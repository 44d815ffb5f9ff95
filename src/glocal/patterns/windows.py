"""Window attention: the grid is cut into windows, tokens of one window see each other.

Swin's shifted windows (arXiv 2103.14030) roll the map and mask what wraps around; HiDiffusion (arXiv 2311.17528)
rolls without a mask; windows by count keep their number when the resolution changes (UltraGen, arXiv 2510.18775).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from glocal.patterns.base import AxisRelation, Term
from glocal.patterns.neighborhood import per_axis
from glocal.patterns.relations import Products


@dataclass(frozen=True)
class AxisRuns:
    """Runs of `size` tokens of one axis; the first `roll` tokens form runs of their own (they wrapped around)."""

    size: int
    roll: int = 0
    dilation: int = 1

    def span(self, place: Tensor, length: Tensor | int) -> tuple[Tensor, Tensor]:
        """First visible place and one past the last: the run that holds `place`."""
        shift = torch.where(place < self.roll, length - self.roll, -self.roll)  # place + shift is the rolled place
        start = (place + shift) // self.size * self.size - shift
        low = torch.where(place < self.roll, 0, self.roll)
        high = torch.where(place < self.roll, self.roll, length)
        return torch.maximum(start, low), torch.minimum(start + self.size, high)

    def sees(self, q: Tensor, k: Tensor, length: int) -> Tensor:
        """Whether q and k lie in one run (broadcast bool)."""
        start, end = self.span(q, length)
        return (k >= start) & (k < end)


@dataclass(frozen=True)
class AxisRing:
    """Runs of `size` tokens of an axis that was rolled by `roll` and closed to a ring."""

    size: int
    roll: int

    def sees(self, q: Tensor, k: Tensor, length: int) -> Tensor:
        """Whether q and k lie in one run after rolling (broadcast bool)."""
        return (q - self.roll) % length // self.size == (k - self.roll) % length // self.size


@dataclass(frozen=True)
class Windows(Products):
    """Tokens of one window see each other; all arguments take one value for all axes or one an axis.

    size: window length in tokens; where it does not divide the axis, the last window is smaller.
    count: windows along the axis instead, each of ceil(length / count) tokens, the last ones smaller or absent.
    roll: before cutting, the axis is rolled so that token `roll` comes first (``torch.roll(x, -roll)``).
    masked: tokens that wrapped around do not see those that did not (Swin); False lets them (HiDiffusion).

    Swin pads a map to whole windows before it rolls; pad the canvas likewise where that matters.
    """

    size: int | tuple[int, ...] | None = None
    count: int | tuple[int, ...] | None = None
    roll: int | tuple[int, ...] = 0
    masked: bool = True

    def __post_init__(self) -> None:
        for name in ("size", "count", "roll"):
            value = getattr(self, name)
            if isinstance(value, list):
                object.__setattr__(self, name, tuple(value))
        if (self.size is None) == (self.count is None):
            raise ValueError(
                f"Windows: size={self.size!r} and count={self.count!r}; give exactly one, such as size=8 or count=2."
            )
        name = "size" if self.count is None else "count"
        for entry in per_axis(getattr(self, name), 1) if isinstance(getattr(self, name), int) else getattr(self, name):
            if entry < 1:
                raise ValueError(f"Windows: {name}={getattr(self, name)!r} must be at least 1 on every axis.")

    def axes(self, shape: Sequence[int]) -> tuple[AxisRelation, ...]:
        """The runs of every axis of a grid."""
        rank = len(shape)
        rolls = per_axis(self.roll, rank, "Windows", "roll")
        if self.size is not None:
            sizes = per_axis(self.size, rank, "Windows", "size")
        else:
            assert self.count is not None
            counts = per_axis(self.count, rank, "Windows", "count")
            sizes = tuple(-(-n // c) for n, c in zip(shape, counts, strict=True))
        axes: list[AxisRelation] = []
        for length, size, roll in zip(shape, sizes, rolls, strict=True):
            roll = roll % max(length, 1)
            axes.append(AxisRuns(size, roll) if self.masked or roll == 0 else AxisRing(size, roll))
        return tuple(axes)

    def terms(self, shape: tuple[int, ...], head: int | None) -> Sequence[Term]:
        return [self.axes(shape)]
