"""What every pattern holds: its definition equals plain loops, its closed form and spans equal the definition."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import pytest
import torch
from torch import Tensor

from glocal.canvas import Canvas, Layout, Policy
from glocal.patterns import Pattern

Place = tuple[int, ...]
Rule = Callable[[Place, Place], bool]


def loops(shape: Place, rule: Rule) -> Tensor:
    """Bool [tokens, tokens] of a rule between places of a grid, in raster order."""
    places = list(product(*map(range, shape)))
    return torch.tensor([[rule(q, k) for k in places] for q in places])


def from_terms(pattern: Pattern, shape: Place, head: int | None) -> Tensor | None:
    """The closed form as bool [tokens, tokens]; spans are compared with `sees` on the way."""
    terms = pattern.terms(shape, head)
    if terms is None:
        return None
    coords = Canvas(shape).coords()
    q, k = coords.unsqueeze(1), coords.unsqueeze(0)
    some = torch.zeros(coords.index.numel(), coords.index.numel(), dtype=torch.bool)
    for term in terms:
        assert len(term) == len(shape)
        every = torch.ones_like(some)
        for axis, (relation, length) in enumerate(zip(term, shape, strict=True)):
            every &= relation.sees(q.axes[axis], k.axes[axis], length)
            if hasattr(relation, "span"):
                compare_span(relation, length)
        some |= every
    return some


def compare_span(relation: object, length: int) -> None:
    """``span(place, length)`` counts places of a dilation group and says the same as `sees`."""
    at = torch.arange(length)
    d: int = relation.dilation  # type: ignore[attr-defined]
    places = -((at % d - length) // d)
    start, end = relation.span(at // d, places)  # type: ignore[attr-defined]
    key = at // d
    seen = (at[:, None] % d == at[None] % d) & (key >= start[:, None]) & (key < end[:, None])
    torch.testing.assert_close(seen, relation.sees(at[:, None], at[None], length))  # type: ignore[attr-defined]


def check(pattern: Pattern, shape: Place, rule: Rule, head: int | None = None) -> Tensor:
    """All of it on the bare grid and between text on both sides; returns the mask of the grid."""
    index = 0 if head is None else head
    want = loops(shape, rule)
    layout = Layout.of(Canvas(shape))
    pattern.check(layout)
    torch.testing.assert_close(pattern.mask(layout)[index], want)
    closed = from_terms(pattern, shape, head)
    if closed is not None:
        torch.testing.assert_close(closed, want)
    n = want.shape[0]
    hidden: dict[tuple[str, str], Policy] = {("before", "grid"): "none", ("grid", "after"): "causal"}
    for policy in ({}, hidden):
        canvas = Canvas(shape, before=2, after=3)
        inside = Layout(canvas, canvas, policy)
        got = pattern.mask(inside)[index]
        torch.testing.assert_close(got[2 : 2 + n, 2 : 2 + n], want)
        other = torch.ones(n + 5, n + 5, dtype=torch.bool)
        other[2 : 2 + n, 2 : 2 + n] = False
        if policy:
            other[:2, 2 : 2 + n] = False
            other[2 : 2 + n, 2 + n :] = False
            assert not bool(got[:2, 2 : 2 + n].any()) and not bool(got[2 : 2 + n, 2 + n :].any())
        assert bool(got[other].all())
    return want


@pytest.fixture
def agrees() -> Callable[..., Tensor]:
    """`agrees(pattern, shape, rule, head=None)` checks a pattern against a rule between two places."""
    return check
