"""What a pattern is: who may see whom, decided by position alone.

A pattern has one definition, `within`, for pairs inside one grid. All other pairs follow the layout's policy table;
``|``, ``&`` and ``~`` never touch them. Patterns that speak about the whole sequence (such as
`Blocks`) also define `across`, and then answer for every pair. `terms` is the closed form that spares planning the
N x N mask: a union of products of one-axis relations.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from glocal.canvas import Canvas, Coords, Layout


class AxisRelation(Protocol):
    """Who sees whom along one axis of `length` tokens.

    Long axes are planned without a length x length table if the relation also has `dilation` and
    ``span(place, length) -> (start, end)``, as `glocal.patterns.axis.AxisWindow` has.
    """

    def sees(self, q: Tensor, k: Tensor, length: int) -> Tensor:
        """Whether the query at coordinate `q` sees the key at `k` (broadcast bool)."""
        ...


Term = tuple[AxisRelation, ...]
Query = int | tuple[int, ...]


class Pattern:
    """Base of all patterns; subclasses are frozen dataclasses."""

    @property
    def heads(self) -> int | None:
        """How many heads have a pattern of their own; None if all share one."""
        return None

    @property
    def key(self) -> Hashable:
        """What identifies the pattern; plans are cached by it."""
        return self

    def check(self, layout: Layout) -> None:
        """Raise ValueError, in the words of the user, if the pattern does not fit the layout."""

    def within(self, q: Coords, k: Coords, shape: tuple[int, ...], layout: Layout, head: int | None) -> Tensor:
        """Whether q sees k (broadcast bool), both inside one grid of axis lengths `shape`."""
        raise TypeError(f"{type(self).__name__} must define within().")

    def across(self, q: Coords, k: Coords, layout: Layout, head: int | None) -> Tensor | None:
        """The same for pairs that are not inside one grid; None leaves them to the policy."""
        return None

    def terms(self, shape: tuple[int, ...], head: int | None) -> Sequence[Term] | None:
        """Closed form inside a grid of axis lengths `shape`: q sees k iff all relations of some term say so."""
        return None

    def allows(self, q: Coords, k: Coords, layout: Layout, head: int | None = None) -> Tensor:
        """The definition: whether q may see k, bool of the broadcast shape.

        q, k: coordinates on ``layout.q`` and ``layout.kv`` that broadcast against each other.
        head: pattern head, needed if `heads` is not None.
        """
        seen = self.across(q, k, layout, head)
        seen = layout.outside(q, k) if seen is None else seen
        grids = {part.name for part in layout.q.grids} & {part.name for part in layout.kv.grids}
        for name in sorted(grids):
            a, b = layout.q.number(name), layout.kv.number(name)
            shape = layout.kv.parts[b].axes
            seen = torch.where((q.part == a) & (k.part == b), self.within(q, k, shape, layout, head), seen)
        return seen

    def mask(self, layout: Layout, device: torch.device | str = "cpu") -> Tensor:
        """The whole relation as bool [heads|1, Nq, Nk]; for small cases, pictures and oracles."""
        q, k = layout.q_coords(device=device).unsqueeze(1), layout.kv_coords(device=device).unsqueeze(0)
        heads: Sequence[int | None] = [None] if self.heads is None else range(self.heads)
        shape = (layout.nq, layout.nk)
        return torch.stack([self.allows(q, k, layout, head).expand(shape) for head in heads])

    def draw(
        self,
        canvas: Canvas | Layout,
        query: Query | Sequence[Query] | None = None,
        *,
        head: int | None = None,
        scale: int | None = None,
    ) -> Tensor:
        """A picture, uint8 [height, width, 3]: the whole mask of a sequence, or what chosen queries of a grid see.

        query: linear index or grid coordinates, or a list of these; None draws the mask where the grid has one axis
            and the token in the middle of it otherwise. Frames of a 3-D grid stand side by side.
        scale: pixels a token; None fits the picture to about 512 pixels.
        """
        from glocal.patterns.draw import draw  # pictures are made on request only

        return draw(self, canvas, query, head=head, scale=scale)

    def __or__(self, other: Pattern) -> Or:
        return Or(self, other)

    def __and__(self, other: Pattern) -> And:
        return And(self, other)

    def __invert__(self) -> Not:
        return Not(self)


def _order_name(pattern: Pattern) -> str | None:
    """Name of the order a pattern lives on; None if it speaks about tokens."""
    order = getattr(pattern, "order", None)
    return getattr(order, "name", order)


def same_heads(patterns: Sequence[Pattern]) -> int | None:
    """The head count that `patterns` agree on; ValueError if they differ."""
    counts = {p.heads for p in patterns if p.heads is not None}
    if len(counts) > 1:
        raise ValueError(f"Patterns with different head counts {sorted(counts)} cannot be joined.")
    return counts.pop() if counts else None


@dataclass(frozen=True)
class Dense(Pattern):
    """Everybody inside a grid sees everybody."""

    def within(self, q: Coords, k: Coords, shape: tuple[int, ...], layout: Layout, head: int | None) -> Tensor:
        return torch.ones_like(q.index == k.index)

    def terms(self, shape: tuple[int, ...], head: int | None) -> Sequence[Term]:
        return [(Everything(),) * len(shape)]


@dataclass(frozen=True)
class Everything:
    """The axis relation that hides nothing."""

    dilation: int = 1

    def sees(self, q: Tensor, k: Tensor, length: int) -> Tensor:
        return torch.ones_like(q == k)

    def span(self, place: Tensor, length: Tensor | int) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(place), torch.zeros_like(place) + length


@dataclass(frozen=True)
class _Join(Pattern):
    a: Pattern
    b: Pattern

    def __post_init__(self) -> None:
        for other in (self.a, self.b):
            if not isinstance(other, Pattern):
                raise TypeError(
                    f"Patterns join with patterns, not with a {type(other).__name__}; a mask of blocks becomes one by "
                    "glocal.patterns.Blocks."
                )
        same_heads((self.a, self.b))
        orders = [name for name in map(_order_name, (self.a, self.b)) if name is not None]
        if len(set(orders)) > 1:
            raise ValueError(f"Patterns that live on different orders cannot be joined: {orders[0]!r}, {orders[1]!r}.")

    @property
    def order(self) -> str | None:
        """The order both sides live on, if any."""
        mine = _order_name(self.a)
        return _order_name(self.b) if mine is None else mine

    @property
    def heads(self) -> int | None:
        return same_heads((self.a, self.b))

    @property
    def key(self) -> Hashable:
        return (type(self).__name__, self.a.key, self.b.key)

    def check(self, layout: Layout) -> None:
        self.a.check(layout)
        self.b.check(layout)

    def _both(self, a: Tensor | None, b: Tensor | None) -> Tensor | None:
        if a is None or b is None:
            return b if a is None else a
        return self._op(a, b)

    def _op(self, a: Tensor, b: Tensor) -> Tensor:
        raise TypeError

    def within(self, q: Coords, k: Coords, shape: tuple[int, ...], layout: Layout, head: int | None) -> Tensor:
        a = self.a.within(q, k, shape, layout, head)
        return self._op(a, self.b.within(q, k, shape, layout, head))

    def across(self, q: Coords, k: Coords, layout: Layout, head: int | None) -> Tensor | None:
        return self._both(self.a.across(q, k, layout, head), self.b.across(q, k, layout, head))


class Or(_Join):
    """What either pattern allows."""

    def _op(self, a: Tensor, b: Tensor) -> Tensor:
        return a | b


class And(_Join):
    """What both patterns allow."""

    def _op(self, a: Tensor, b: Tensor) -> Tensor:
        return a & b


@dataclass(frozen=True)
class Not(Pattern):
    """What the pattern hides."""

    a: Pattern

    @property
    def heads(self) -> int | None:
        return self.a.heads

    @property
    def key(self) -> Hashable:
        return ("Not", self.a.key)

    @property
    def order(self) -> str | None:
        """The order the pattern lives on, if any."""
        return _order_name(self.a)

    def check(self, layout: Layout) -> None:
        self.a.check(layout)

    def within(self, q: Coords, k: Coords, shape: tuple[int, ...], layout: Layout, head: int | None) -> Tensor:
        return ~self.a.within(q, k, shape, layout, head)

    def across(self, q: Coords, k: Coords, layout: Layout, head: int | None) -> Tensor | None:
        seen = self.a.across(q, k, layout, head)
        return None if seen is None else ~seen


@dataclass(frozen=True)
class PerHead(Pattern):
    """A pattern for each head; members must not depend on the head themselves."""

    patterns: tuple[Pattern, ...]

    def __post_init__(self) -> None:
        if not self.patterns or any(p.heads is not None for p in self.patterns):
            raise ValueError("per_head: needs at least one pattern, none of which is per head itself.")

    @property
    def heads(self) -> int | None:
        return len(self.patterns)

    @property
    def key(self) -> Hashable:
        return ("PerHead", *(p.key for p in self.patterns))

    def check(self, layout: Layout) -> None:
        for pattern in self.patterns:
            pattern.check(layout)

    def of(self, head: int | None) -> Pattern:
        """The pattern of one head."""
        if head is None:
            raise ValueError("per_head: this pattern differs by head; give head=.")
        return self.patterns[head]

    def within(self, q: Coords, k: Coords, shape: tuple[int, ...], layout: Layout, head: int | None) -> Tensor:
        return self.of(head).within(q, k, shape, layout, None)

    def across(self, q: Coords, k: Coords, layout: Layout, head: int | None) -> Tensor | None:
        return self.of(head).across(q, k, layout, None)

    def terms(self, shape: tuple[int, ...], head: int | None) -> Sequence[Term] | None:
        return self.of(head).terms(shape, None)


def per_head(patterns: Sequence[Pattern]) -> PerHead:
    """One pattern for each (key or query) head, in order."""
    return PerHead(tuple(patterns))
