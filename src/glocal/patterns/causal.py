"""Causal attention and causal sliding windows (arXiv 2004.05150, 2310.06825) in raster order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from glocal.patterns.base import Term
from glocal.patterns.relations import Products, raster_band


@dataclass(frozen=True)
class Causal(Products):
    """Nobody sees a later token; tokens of a grid are counted in raster order inside it."""

    def terms(self, shape: tuple[int, ...], head: int | None) -> Sequence[Term]:
        return raster_band(shape, -prod(shape), 0)


@dataclass(frozen=True)
class CausalWindow(Products):
    """Token i sees the `window` tokens i - window + 1 .. i, counted in raster order inside its grid."""

    window: int

    def __post_init__(self) -> None:
        if self.window < 1:
            raise ValueError(f"CausalWindow: window={self.window} must be at least 1 (a token sees itself).")

    def terms(self, shape: tuple[int, ...], head: int | None) -> Sequence[Term]:
        return raster_band(shape, 1 - self.window, 0)
