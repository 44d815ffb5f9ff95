"""Plans for small windows (arXiv 2204.07143, 2103.14030): each tile of queries lists the keys that any of them sees.

Where windows hold a few hundred keys, blocks of a fixed token order waste most of their pairs. Here every tile of up to
16 queries (or a whole window of up to 64) has key blocks of its own: the union of what its queries see, gathered, so
that nothing else is visited. It is an ordinary `BlockPlan` whose key order repeats tokens; every executor runs it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor
from torch.nn.functional import pad

from glocal._kept import ordinary
from glocal.canvas import Canvas, Layout
from glocal.patterns.base import AxisRelation, Pattern
from glocal.plan.blockplan import BlockLists, BlockPlan, pack

TILE = 16  # queries a tile: rows of the smallest matrix product
WHOLE = 64  # rows of a tile that holds a whole window
BLOCK = 32  # keys a block: bits of a mask word
LONGEST = 4096  # tokens of an axis, which is looked at as a whole
_SHAPES = {1: (16,), 2: (4, 4), 3: (2, 2, 4)}
_CACHE: OrderedDict[Hashable, BlockPlan] = OrderedDict()


@dataclass(frozen=True, eq=False)
class _Cuts:
    """One axis cut into runs of queries. queries: int64 [runs, size], keys: int64 [runs, most], -1 pads both.

    seen: bool [runs, size, most]. part: int64 [runs], runs of equal number lie side by side in memory and share keys.
    touched: tokens that see, or are seen by, one run at most.
    """

    queries: Tensor
    keys: Tensor
    seen: Tensor
    part: Tensor
    touched: int


_CUTS: OrderedDict[Hashable, tuple[_Cuts, ...] | None] = OrderedDict()


def window_keys(pattern: Pattern, canvas: Canvas | Layout) -> int | None:
    """Keys that a tile of queries touches at most, or queries that a tile of keys does (in the gradient; near a border
    more queries see a token than it sees keys); None where there is no such plan: the pattern must be one product of
    relations of single axes on a canvas that is one grid of up to 3 axes, with all its tokens on both sides.
    """
    cuts = _cuts(pattern, Layout.of(canvas))
    return None if cuts is None else prod(c.touched for c in cuts)


def window_plan(pattern: Pattern, canvas: Canvas | Layout, *, device: torch.device | str = "cpu") -> BlockPlan:
    """Compile `pattern` for `canvas`; cached by content. Raises ValueError where `window_keys` is None."""
    layout = Layout.of(canvas)
    pattern.check(layout)
    key = (pattern.key, layout.key, str(device))
    if key not in _CACHE:
        cuts = _cuts(pattern, layout)
        if cuts is None:
            raise ValueError(
                f"window_plan: {pattern!r} on {layout.q!r} is no product of single axes on one grid of up to 3 axes; "
                "use glocal.plan.build.plan."
            )
        with ordinary():
            _CACHE[key] = _assemble(layout, cuts).to(device)
        if len(_CACHE) > 64:
            _CACHE.popitem(last=False)
    _CACHE.move_to_end(key)
    return _CACHE[key]


def _cuts(pattern: Pattern, layout: Layout) -> tuple[_Cuts, ...] | None:
    """The cuts of every axis, cached by content; None where there is no plan of windows."""
    key = (pattern.key, layout.key)
    if key not in _CUTS:
        _CUTS[key] = _cut_all(pattern, layout)
        if len(_CUTS) > 256:
            _CUTS.popitem(last=False)
    return _CUTS[key]


@ordinary()
def _cut_all(pattern: Pattern, layout: Layout) -> tuple[_Cuts, ...] | None:
    whole = len(layout.q.parts) == 1 and layout.q == layout.kv and len(layout.q.grids) == 1
    if not whole or (layout.nq, layout.nk) != (layout.q.size, layout.kv.size) or pattern.heads is not None:
        return None
    shape = layout.q.grid.axes
    if len(shape) not in _SHAPES or prod(shape) != layout.nq or max(shape) > LONGEST or min(shape) < 1:
        return None
    terms = pattern.terms(shape, None)
    if terms is None or len(terms) != 1:
        return None
    tables = [_table(relation, length) for relation, length in zip(terms[0], shape, strict=True)]
    windows = [_closed(seen) for _, seen in tables]
    sizes = _SHAPES[len(shape)] if None in windows else _inside([w for w in windows if w is not None])
    return tuple(
        _cut(order, seen, size, window) for (order, seen), size, window in zip(tables, sizes, windows, strict=True)
    )


def _table(relation: AxisRelation, length: int) -> tuple[Tensor, Tensor]:
    """Coordinates with dilation groups apart, int64 [L]; who sees whom in coordinates, bool [L, L]."""
    place = torch.arange(length, device="cpu")
    step = getattr(relation, "dilation", 1)
    order = (place % step * length + place // step).argsort(stable=True)
    return order, relation.sees(place[:, None], place[None], length).expand(length, length)


def _closed(seen: Tensor) -> int | None:
    """Size of the largest window if all tokens of a window see that window and nothing else, None otherwise."""
    if not bool(seen.diagonal().all()) or not bool((seen == seen.T).all()):
        return None
    first = seen.int().argmax(1)  # of each token's keys
    if not bool((seen == seen[first]).all()):
        return None
    return int(seen.sum(1).max())


def _inside(windows: list[int]) -> tuple[int, ...]:
    """Tile of queries inside a window: all of it where that fills most of 64 rows, else up to 16, whole rows first."""
    if WHOLE // 2 < prod(windows) <= WHOLE:
        return tuple(windows)
    sizes, left = [], TILE
    for window in reversed(windows):
        size = min(window, left)
        sizes.append(size)
        left = left // size
    return tuple(reversed(sizes))


def _cut(order: Tensor, seen: Tensor, size: int, window: int | None) -> _Cuts:
    """Runs of up to `size` queries, cut where two neighbours share no key and, in windows, evenly inside each."""
    rows = seen[order]
    apart = ~(rows[1:] & rows[:-1]).any(1)
    starts, part, parts, since = [0], [0], 0, 0
    for place in range(1, len(order)):
        if apart[place - 1]:
            parts, since = parts + 1, 0
        else:
            since += 1
        if since % size == 0 or apart[place - 1]:
            if since and window is None and since % (2 * size) == 0:
                parts += 1  # tiles two by two share most of their keys
            starts.append(place)
            part.append(parts)
    queries = [order[a:b] for a, b in zip(starts, [*starts[1:], len(order)], strict=True)]
    if window == size:
        queries = _joined(queries, size)
        part = list(range(len(queries)))
    keys = [seen[q].any(0).nonzero().flatten() for q in queries]
    most = max(map(len, keys))
    held = max(map(len, queries))
    padded_q = torch.stack([pad(q, (0, held - len(q)), value=-1) for q in queries])
    padded_k = torch.stack([pad(k, (0, most - len(k)), value=-1) for k in keys])
    found = seen[padded_q.clamp(min=0)[:, :, None], padded_k.clamp(min=0)[:, None]]
    found = found & (padded_q >= 0)[:, :, None] & (padded_k >= 0)[:, None]
    touched = max(most, *(int(seen[:, q].any(1).sum()) for q in queries))
    return _Cuts(padded_q, padded_k, found, torch.tensor(part, device="cpu"), touched)


def _joined(windows: list[Tensor], size: int) -> list[Tensor]:
    """Windows that a border cut short, two or more in the room of one; masks keep them apart."""
    found: list[Tensor] = []
    for window in windows:
        room = next((i for i, other in enumerate(found) if len(other) + len(window) <= size), None)
        if room is None:
            found.append(window)
        else:
            found[room] = torch.cat([found[room], window])
    return found


def _assemble(layout: Layout, cuts: tuple[_Cuts, ...]) -> BlockPlan:
    shape = layout.q.grid.axes
    rank = len(shape)
    runs = [len(c.queries) for c in cuts]
    tiles = prod(runs)
    q = _tokens([c.queries for c in cuts], shape)  # [tiles, queries]
    k = _tokens([c.keys for c in cuts], shape)  # [tiles, keys]
    rows = TILE if q.shape[1] <= TILE else WHOLE
    q, k = pad(q, (0, rows - q.shape[1]), value=-1), pad(k, (0, -k.shape[1] % BLOCK), value=-1)
    blocks = k.shape[1] // BLOCK

    # Masks: one for each combination of the distinct kinds of runs an axis has.
    kinds = [torch.unique(c.seen.flatten(1), dim=0, return_inverse=True) for c in cuts]
    table, number = torch.ones(1, 1, 1, dtype=torch.bool, device="cpu"), torch.zeros(1, dtype=torch.long, device="cpu")
    for (kind, which), c in zip(kinds, cuts, strict=True):
        seen = kind.reshape(-1, *c.seen.shape[1:])
        table = (table[:, None, :, None, :, None] & seen[None, :, None, :, None, :]).flatten(4, 5)
        table = table.flatten(2, 3).flatten(0, 1)  # [kinds, queries, keys]
        number = (number[:, None] * len(kind) + which[None]).flatten()  # [tiles]
    table = pad(table, (0, k.shape[1] - table.shape[2], 0, rows - table.shape[1]))
    masks = pack(table.unflatten(2, (blocks, BLOCK)).transpose(1, 2).flatten(0, 1))  # [kinds * blocks, rows, 1]

    # Tiles that share keys stand side by side.
    order = torch.arange(tiles, device="cpu").reshape(runs)
    rank_of = torch.zeros(runs, dtype=torch.long, device="cpu")
    for axis, c in enumerate(cuts):
        view = [1] * rank
        view[axis] = -1
        rank_of = rank_of * (int(c.part.max()) + 1) + c.part.reshape(view)
    order = order.flatten()[rank_of.flatten().argsort(stable=True)]
    index = torch.arange(tiles * blocks, device="cpu", dtype=torch.int32).reshape(1, tiles, blocks)
    mask = (number[order, None] * blocks + torch.arange(blocks, device="cpu")).int()[None]
    none = torch.zeros(1, tiles, dtype=torch.int32, device="cpu")
    return BlockPlan(
        layout=layout,
        q_block=rows,
        kv_block=BLOCK,
        q_order=q[order].reshape(1, 1, -1).int(),
        kv_order=k[order].reshape(1, 1, -1).int(),
        full=BlockLists(none, torch.zeros(1, tiles, 0, dtype=torch.int32, device="cpu")),
        partial=BlockLists(torch.full_like(none, blocks), index, mask),
        masks=masks,
        owner=torch.zeros(1, 1, dtype=torch.int32, device="cpu"),
        name="windows",
    )


def _tokens(axes: list[Tensor], shape: tuple[int, ...]) -> Tensor:
    """Coordinates [runs, n] of every axis -> token numbers of all products, int64 [product of runs, product of n]."""
    token = torch.zeros(1, 1, dtype=torch.long, device="cpu")
    for place, length in zip(axes, shape, strict=True):
        known = (token >= 0)[:, None, :, None] & (place >= 0)[None, :, None, :]
        token = token[:, None, :, None] * length + place[None, :, None, :]
        token = torch.where(known, token, -1).flatten(2, 3).flatten(0, 1)
    return token
