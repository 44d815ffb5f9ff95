"""One-axis relations that patterns are built from, and what raster order means as a union of their products.

A range of raster distances (causal order, sliding windows, the bands of Radial Attention, arXiv 2506.19852) couples
the axes of a grid; `raster_band` writes it as few products of one-axis offsets, so that planning stays free of N x N.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod

import torch
from torch import Tensor

from glocal.canvas import Coords, Layout
from glocal.patterns.base import Everything, Pattern, Term


@dataclass(frozen=True)
class Offset:
    """Keys whose coordinate is between `low` and `high` steps after the query's (negative: before it)."""

    low: int
    high: int
    dilation: int = 1

    def sees(self, q: Tensor, k: Tensor, length: int) -> Tensor:
        return (k - q >= self.low) & (k - q <= self.high)

    def span(self, place: Tensor, length: Tensor | int) -> tuple[Tensor, Tensor]:
        last = torch.as_tensor(length, device=place.device)
        start, end = ((place + step).clamp(min=0) for step in (self.low, self.high + 1))
        return torch.minimum(start, last), torch.minimum(end, last)


SAME = Offset(0, 0)


@dataclass(frozen=True)
class Residue:
    """Tokens at whole multiples of `dilation` from each other see each other."""

    dilation: int

    def sees(self, q: Tensor, k: Tensor, length: int) -> Tensor:
        return q % self.dilation == k % self.dilation

    def span(self, place: Tensor, length: Tensor | int) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(place), torch.zeros_like(place) + length


@dataclass(frozen=True)
class Keys:
    """Everybody sees the keys at coordinates start..stop-1."""

    start: int
    stop: int
    dilation: int = 1

    def sees(self, q: Tensor, k: Tensor, length: int) -> Tensor:
        return torch.ones_like(q == k) & (k >= self.start) & (k < self.stop)

    def span(self, place: Tensor, length: Tensor | int) -> tuple[Tensor, Tensor]:
        last = torch.zeros_like(place) + length
        return last.clamp(max=self.start), last.clamp(max=self.stop)


@dataclass(frozen=True)
class Queries:
    """Queries at coordinates start..stop-1 see everybody, the others nobody."""

    start: int
    stop: int
    dilation: int = 1

    def sees(self, q: Tensor, k: Tensor, length: int) -> Tensor:
        return torch.ones_like(q == k) & (q >= self.start) & (q < self.stop)

    def span(self, place: Tensor, length: Tensor | int) -> tuple[Tensor, Tensor]:
        inside = (place >= self.start) & (place < self.stop)
        return torch.zeros_like(place), torch.where(inside, length, 0)


class Products(Pattern):
    """A pattern that is its closed form: subclasses give `terms`, the definition follows from them."""

    def check(self, layout: Layout) -> None:
        for name in sorted({p.name for p in layout.q.grids} & {p.name for p in layout.kv.grids}):
            q, k = (side.parts[side.number(name)].axes for side in (layout.q, layout.kv))
            if q != k:
                raise ValueError(
                    f"{type(self).__name__}: grid {name!r} has axes {q} for queries but {k} for keys; give both sides "
                    f"the same grid (q_start and q_tokens of the Layout take a part of it)."
                )
            self.terms(k, None if self.heads is None else 0)

    def terms(self, shape: tuple[int, ...], head: int | None) -> Sequence[Term]:
        raise TypeError(f"{type(self).__name__} must define terms().")

    def within(self, q: Coords, k: Coords, shape: tuple[int, ...], layout: Layout, head: int | None) -> Tensor:
        some = torch.zeros_like(q.index == k.index)
        for term in self.terms(shape, head):
            every = torch.ones_like(some)
            for axis, (relation, length) in enumerate(zip(term, shape, strict=True)):
                every = every & relation.sees(q.axes[axis], k.axes[axis], length)
            some = some | every
        return some


@lru_cache(maxsize=1024)
def raster_band(shape: tuple[int, ...], low: int, high: int) -> tuple[tuple[Offset | Everything, ...], ...]:
    """Closed form of ``low <= k - q <= high`` for raster indices of a grid of axis lengths `shape`.

    Leading-axis steps after which the rest may be anything share one product; the few others recurse.
    """
    if not shape or low > high:
        return ((),) if not shape and low <= 0 <= high else ()
    rest = prod(shape[1:])
    whole: list[int] = []
    terms: list[tuple[Offset | Everything, ...]] = []
    for step in range(
        max(-(shape[0] - 1), -(-(low - rest + 1) // rest)), min(shape[0] - 1, (high + rest - 1) // rest) + 1
    ):
        first, last = low - step * rest, high - step * rest
        if first <= 1 - rest and last >= rest - 1:
            whole.append(step)  # such steps are consecutive
        else:
            terms += [(Offset(step, step), *tail) for tail in raster_band(shape[1:], first, last)]
    if whole:
        terms.append((Offset(whole[0], whole[-1]), *(Everything() for _ in shape[1:])))
    return tuple(terms)


def raster_prefix(shape: tuple[int, ...], tokens: int) -> tuple[Term, ...]:
    """Closed form of "the key is among the first `tokens` of the grid in raster order"."""
    terms: list[Term] = []
    fixed: tuple[Keys, ...] = ()
    for axis, length in enumerate(shape):
        rest = prod(shape[axis + 1 :])
        rows = min(tokens // rest, length)
        tail = tuple(Everything() for _ in shape[axis + 1 :])
        if rows > 0:
            terms.append((*fixed, Keys(0, rows), *tail))
        if rows == length:
            break
        fixed, tokens = (*fixed, Keys(rows, rows + 1)), tokens - rows * rest
    return tuple(terms)
