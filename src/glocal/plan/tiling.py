"""Which boxes of the grid should be blocks: those for which the pattern touches fewest block pairs."""

from __future__ import annotations

from functools import lru_cache
from itertools import product
from math import prod

import torch

from glocal.canvas import Region
from glocal.patterns.base import And, AxisRelation, Not, Or, Pattern, PerHead
from glocal.plan.states import TABLE_LIMIT, axis_states

Boxes = tuple[tuple[int, ...], tuple[int, ...]]  # tile and dilation per axis


def best_tiles(pattern: Pattern, shape: tuple[int, ...], q_block: int, kv_block: int) -> tuple[Boxes, Boxes] | None:
    """Boxes of `q_block` and `kv_block` tokens for a grid, or None if the pattern has no closed form.

    The cost of a choice is the number of block pairs visited, exact for one product term and summed over terms; ties
    go to the choice with less padding, then to the squarer one.
    """
    terms = _terms(pattern, shape)
    if not terms or max(shape) > TABLE_LIMIT:
        return None
    steps = tuple(min(getattr(t[axis], "dilation", 1) for t in terms) for axis in range(len(shape)))
    cuts = {side: [t for t in _factors(block, shape, steps)] for side, block in (("q", q_block), ("k", kv_block))}
    best: tuple[float, ...] | None = None
    found: tuple[Boxes, Boxes] | None = None
    for q_tile, k_tile in product(cuts["q"], cuts["k"]):
        visits = sum(
            prod(
                _visits(r, n, q_tile[a], k_tile[a], steps[a]) for a, (r, n) in enumerate(zip(term, shape, strict=True))
            )
            for term in terms
        )
        padding = prod(-(-n // (t * d)) * t * d for n, t, d in zip(shape, q_tile, steps, strict=True))
        cost = (float(visits), float(padding), float(sum(q_tile) + sum(k_tile)))
        if best is None or cost < best:
            best, found = cost, ((q_tile, steps), (k_tile, steps))
    return found


def _terms(pattern: Pattern, shape: tuple[int, ...]) -> list[tuple[AxisRelation, ...]] | None:
    """Product terms that bound the pattern from above; a negation has none."""
    if isinstance(pattern, Not):
        return None
    if isinstance(pattern, PerHead):
        lists = [_terms(p, shape) for p in pattern.patterns]
        return None if any(t is None for t in lists) else [t for ts in lists for t in (ts or [])]
    if isinstance(pattern, Or):
        a, b = _terms(pattern.a, shape), _terms(pattern.b, shape)
        return None if a is None or b is None else a + b
    if isinstance(pattern, And):
        a, b = _terms(pattern.a, shape), _terms(pattern.b, shape)
        return b if a is None else a
    terms = pattern.terms(shape, None if pattern.heads is None else 0)
    return None if terms is None else list(terms)


@lru_cache(maxsize=256)
def _factors(block: int, shape: tuple[int, ...], steps: tuple[int, ...]) -> list[tuple[int, ...]]:
    """All boxes of `block` tokens, none longer than twice what its axis needs (all of them if none is left)."""

    def split(rest: int, axes: int) -> list[tuple[int, ...]]:
        if axes == 1:
            return [(rest,)]
        return [(n, *tail) for n in range(1, rest + 1) if rest % n == 0 for tail in split(rest // n, axes - 1)]

    every = split(block, len(shape))
    fits = [b for b in every if all(t * d < 2 * n for t, d, n in zip(b, steps, shape, strict=True))]
    return fits if fits else every


@lru_cache(maxsize=4096)
def _visits(relation: AxisRelation, length: int, q_tile: int, k_tile: int, step: int) -> int:
    regions = [Region(0, 0, (t,), (step,), (-(-length // (t * step)),)) for t in (q_tile, k_tile)]
    table = axis_states(relation, length, regions[0], regions[1], 0, torch.device("cpu"))
    assert table is not None
    return int(table[0].sum())
