"""Keys or queries that take part in everything: attention sinks (arXiv 2309.17453), first frames, slices of an axis."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from glocal.patterns.base import Everything, Term
from glocal.patterns.relations import Keys, Products, Queries, raster_prefix


@dataclass(frozen=True)
class Sinks(Products):
    """Everybody sees the first `tokens` tokens of the grid (raster order)."""

    tokens: int

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise ValueError(f"Sinks: tokens={self.tokens} must be at least 1.")

    def terms(self, shape: tuple[int, ...], head: int | None) -> Sequence[Term]:
        return raster_prefix(shape, self.tokens)


@dataclass(frozen=True)
class AxisSlice(Products):
    """Everybody sees the keys at start..stop-1 of `axis` (side "kv"), or the queries there see everybody (side "q").

    start, stop: as in a Python slice: None is the end of the axis, negative numbers count from it.
    """

    axis: int
    start: int | None = None
    stop: int | None = None
    side: Literal["kv", "q"] = "kv"

    def __post_init__(self) -> None:
        if self.side not in ("kv", "q"):
            raise ValueError(f"AxisSlice: side={self.side!r}; legal: 'kv' (keys all see), 'q' (queries that see all).")

    def terms(self, shape: tuple[int, ...], head: int | None) -> Sequence[Term]:
        rank = len(shape)
        if not -rank <= self.axis < rank:
            raise ValueError(f"AxisSlice: axis={self.axis}, but the grid {shape} has axes 0 to {rank - 1}.")
        start, stop, _ = slice(self.start, self.stop).indices(shape[self.axis])
        if start >= stop:
            raise ValueError(
                f"AxisSlice: start={self.start}, stop={self.stop} holds no token of axis {self.axis} with length "
                f"{shape[self.axis]}; legal: start < stop inside 0..{shape[self.axis]}."
            )
        held = Keys(start, stop) if self.side == "kv" else Queries(start, stop)
        return [tuple(held if axis == self.axis % rank else Everything() for axis in range(rank))]


def frame(index: int, side: Literal["kv", "q"] = "kv") -> AxisSlice:
    """One frame (place on axis 0, negative from the end) as keys that everybody sees, or as queries that see all."""
    return AxisSlice(0, index, None if index == -1 else index + 1, side)
