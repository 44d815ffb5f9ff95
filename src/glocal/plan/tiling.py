"""Which boxes of the grid should be blocks: those for which the pattern touches fewest block pairs."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from itertools import product
from math import prod

import torch
from torch import Tensor

from glocal.canvas import Region
from glocal.patterns.base import And, AxisRelation, Not, Or, Pattern, PerHead, Term
from glocal.plan.states import TABLE_LIMIT, axis_states

Tile = tuple[int, ...]
Boxes = tuple[Tile, Tile]  # tile and dilation per axis
UNIT = 64  # tokens that a kernel takes at once, of blocks that are larger
_BUDGET = 1 << 27  # block pairs times product terms that may be looked at to settle a shortlist
_SHORTLIST = 24
_LOOSE = 48  # boxes with padding that are considered, those with least of it
_MASKED = 1.25  # a key block with padding inside needs a mask wherever it is visited; that costs about so much more

Cost = tuple[float, int, int]


def best_tiles(pattern: Pattern, shape: tuple[int, ...], q_block: int, kv_block: int) -> tuple[Boxes, Boxes] | None:
    """Boxes of at most `q_block` and `kv_block` tokens for a grid, or None if the pattern has no closed form.

    The cost of a choice is the number of block pairs visited, padding included, with a surcharge for boxes that leave
    a part of their key block empty. One product term is counted exactly for every choice. Terms that overlap are first
    summed, which bounds the cost from above; then the union is counted for a shortlist: the squarest and the longest
    boxes and those of the smallest sums. Ties go to the choice with less padding, then to the squarer one.
    """
    terms = _terms(pattern, shape)
    if not terms:
        return None
    steps = tuple(min(getattr(t[axis], "dilation", 1) for t in terms) for axis in range(len(shape)))
    if len(shape) == 1:
        return _of_sequence(shape[0], steps[0], q_block, kv_block)
    if max(shape) > TABLE_LIMIT:
        return None

    def ranked(visits: int, choice: tuple[Tile, Tile]) -> Cost:
        padding = prod(-(-n // (t * d)) * t * d for n, t, d in zip(shape, choice[0], steps, strict=True))
        loose = _MASKED if prod(choice[1]) < kv_block else 1.0
        return visits * loose, padding, sum(choice[0]) + sum(choice[1])

    def bound(choice: tuple[Tile, Tile]) -> int:
        sides = list(zip(*choice, steps, strict=True))
        total = sum(prod(_visits(r, n, *side) for r, n, side in zip(term, shape, sides, strict=True)) for term in terms)
        return min(total, prod(_slots(n, q, d) * _slots(n, k, d) for n, (q, k, d) in zip(shape, sides, strict=True)))

    cost = {c: ranked(bound(c), c) for c in _choices(shape, steps, q_block, kv_block)}
    if len(terms) > 1:
        shortlist = list(_shortlist(cost, shape, steps, len(terms)))
        cost = {c: ranked(_touches(pattern, shape, *c, steps), c) for c in shortlist}
    q_tile, k_tile = min(cost, key=lambda choice: cost[choice])
    return (q_tile, steps), (k_tile, steps)


def best_cuts(pattern: Pattern, shape: tuple[int, ...], boxes: tuple[Boxes, Boxes]) -> tuple[int, int]:
    """Axes along which the boxes of best_tiles are cut into halves so that halves see fewest halves; 0 if no matter.

    Kernels take halves of blocks of 128 tokens at once and leave out those pairs of them that see nothing.
    """
    (q_tile, q_step), (k_tile, k_step) = boxes
    terms = _terms(pattern, shape)
    if not terms or q_step != k_step:
        return 0, 0

    def halves(tile: Tile) -> dict[int, Tile]:
        return {a: (*tile[:a], t // 2, *tile[a + 1 :]) for a, t in enumerate(tile) if t % 2 == 0}

    def visits(q_half: Tile, k_half: Tile) -> int:
        sides = list(zip(q_half, k_half, q_step, strict=True))
        return sum(prod(_visits(r, n, *side) for r, n, side in zip(term, shape, sides, strict=True)) for term in terms)

    cost = {
        (visits(q_half, k_half), a, b) for a, q_half in halves(q_tile).items() for b, k_half in halves(k_tile).items()
    }
    return min(cost)[1:] if cost else (0, 0)


def _of_sequence(length: int, step: int, q_block: int, kv_block: int) -> tuple[Boxes, Boxes] | None:
    """Blocks of one dilation group each, where that pads little; else a sequence stays as it lies."""
    padded = max(_slots(length, block, step) * block for block in (q_block, kv_block))
    if step == 1 or padded > _MASKED * length:
        return None
    return ((q_block,), (step,)), ((kv_block,), (step,))


def _choices(shape: tuple[int, ...], steps: Tile, q_block: int, kv_block: int) -> list[tuple[Tile, Tile]]:
    """Pairs of boxes: all that fill their blocks, and boxes with a little padding that fit the grid well."""
    full = list(product(_factors(q_block, shape, steps), _factors(kv_block, shape, steps)))
    q_loose, k_loose = _loose(q_block, shape, steps), _loose(kv_block, shape, steps)
    if q_block == kv_block:
        return full + [(t, t) for t in q_loose]
    return full + list(product(q_loose[:8], k_loose[:8]))


def _shortlist(
    cost: dict[tuple[Tile, Tile], Cost], shape: tuple[int, ...], steps: Tile, terms: int
) -> Iterator[tuple[Tile, Tile]]:
    """Choices worth an exact count, as many as the budget allows and at least three."""
    equal = [c for c in cost if c[0] == c[1]]
    pool = equal if equal else list(cost)
    squarest = min(pool, key=lambda c: (sum(c[0]), cost[c]))
    longest = min(pool, key=lambda c: (tuple(c[0]), cost[c]))  # short leading axes: close to raster order
    order = dict.fromkeys([squarest, longest, *sorted(cost, key=lambda c: cost[c])])
    spent = 0
    for number, choice in enumerate(order):
        if number >= _SHORTLIST or (number >= 3 and spent > _BUDGET):
            return
        spent += terms * prod(
            _slots(n, q, d) * _slots(n, k, d) for n, q, k, d in zip(shape, *choice, steps, strict=True)
        )
        yield choice


def _slots(length: int, tile: int, step: int) -> int:
    return -(-length // (tile * step)) * step


def _terms(pattern: Pattern, shape: tuple[int, ...]) -> list[Term] | None:
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


def _touches(pattern: Pattern, shape: tuple[int, ...], q_tile: Tile, k_tile: Tile, steps: Tile) -> int:
    """Block pairs with a visible pair, summed over heads: exact for unions, from above for intersections."""
    heads = pattern.patterns if isinstance(pattern, PerHead) else (pattern,)
    found = [_touched(p, shape, q_tile, k_tile, steps) for p in heads]
    return sum(int(t.sum()) for t in found if t is not None)


def _touched(pattern: Pattern, shape: tuple[int, ...], q_tile: Tile, k_tile: Tile, steps: Tile) -> Tensor | None:
    """Bool over (query slot, key slot) of every axis; None where the pattern says nothing."""
    if isinstance(pattern, (Or, And)):
        a, b = (_touched(p, shape, q_tile, k_tile, steps) for p in (pattern.a, pattern.b))
        if a is None or b is None:
            return b if a is None else a
        return a | b if isinstance(pattern, Or) else a & b
    terms = None if isinstance(pattern, Not) else pattern.terms(shape, None if pattern.heads is None else 0)
    if terms is None:
        return None
    some: Tensor | None = None
    for term in terms:
        every: Tensor | None = None
        for axis, (relation, length) in enumerate(zip(term, shape, strict=True)):
            table = _table(relation, length, q_tile[axis], k_tile[axis], steps[axis])  # [query slots, key slots]
            every = table if every is None else every[..., None, None] & table
        assert every is not None
        some = every if some is None else some.logical_or_(every) if some.shape == every.shape else some | every
    return some


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


@lru_cache(maxsize=256)
def _loose(block: int, shape: tuple[int, ...], steps: tuple[int, ...]) -> list[Tile]:
    """Boxes that fill at least three quarters of a block, those with least padding (in blocks and grid) first."""
    found: list[tuple[float, Tile]] = []

    def grow(tile: Tile) -> None:
        axis = len(tile)
        if axis < len(shape):
            for n in range(1, min(block // prod(tile), -(-shape[axis] // steps[axis])) + 1):
                grow((*tile, n))
        elif 4 * prod(tile) >= 3 * block and prod(tile) < block:
            slots = prod(_slots(n, t, d) for n, t, d in zip(shape, tile, steps, strict=True)) * block
            found.append((slots / prod(shape), tile))

    grow(())
    found.sort()
    return [tile for _, tile in found[:_LOOSE]]


@lru_cache(maxsize=4096)
def _table(relation: AxisRelation, length: int, q_tile: int, k_tile: int, step: int) -> Tensor:
    """Whether any pair of two slots of one axis is visible, bool [query slots, key slots]."""
    regions = [Region(0, 0, (t,), (step,), (-(-length // (t * step)),)) for t in (q_tile, k_tile)]
    table = axis_states(relation, length, regions[0], regions[1], 0, torch.device("cpu"))
    assert table is not None
    return table[0]


@lru_cache(maxsize=16384)
def _visits(relation: AxisRelation, length: int, q_tile: int, k_tile: int, step: int) -> int:
    return int(_table(relation, length, q_tile, k_tile, step).sum())
