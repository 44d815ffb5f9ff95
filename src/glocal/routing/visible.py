"""Which groups of keys a pattern lets a group of queries see at all: at least one visible pair.

Runs of raster tokens and boxes of one grid are decided axis by axis where the pattern has a closed form; all else by
the pattern's definition, chunk by chunk. Results for fixed groups are cached.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable

import torch
from torch import Tensor

from glocal.canvas import Layout, Region
from glocal.patterns.base import Pattern
from glocal.patterns.runs import LIMIT, runs_see
from glocal.routing.partition import Partition

_CACHE: OrderedDict[Hashable, Tensor] = OrderedDict()
_CACHE_SIZE = 32
_CHUNK = 1 << 22  # pairs evaluated at once


def visible_groups(pattern: Pattern, layout: Layout, q_part: Partition, kv_part: Partition) -> Tensor:
    """Bool [batch|1, heads|1, query groups, key groups]: whether any query of the one sees any key of the other.

    Run-time lengths and documents of the layout are not looked at.
    """
    pattern.check(layout)
    fixed = q_part.shared and kv_part.shared
    device = q_part.members.device
    key = (pattern.key, layout.key, _name(q_part), _name(kv_part), str(device)) if fixed else None
    if key is not None and key in _CACHE:
        _CACHE.move_to_end(key)
        return _CACHE[key]
    heads: list[int | None] = [None] if pattern.heads is None else list(range(pattern.heads))
    masks = []
    for head in heads:
        closed = _closed(pattern, layout, q_part, kv_part, head) if fixed else None
        masks.append(_defined(pattern, layout, q_part, kv_part, head) if closed is None else closed)
    found = torch.cat(masks, 1) if len(masks) > 1 else masks[0]
    if key is not None:
        _CACHE[key] = found
        if len(_CACHE) > _CACHE_SIZE:
            _CACHE.popitem(last=False)
    return found


def _name(part: Partition) -> Hashable:
    """What identifies fixed groups, without a look at the device where an order made them."""
    if part.order is not None and part.order.regions:
        return part.canvas, part.order.name
    return part.fingerprint


def _defined(pattern: Pattern, layout: Layout, q_part: Partition, kv_part: Partition, head: int | None) -> Tensor:
    mine, theirs = q_part.members, kv_part.members.to(q_part.members.device)
    b, h = (max(mine.shape[i], theirs.shape[i]) for i in (0, 1))
    if head is not None and h > 1:  # groups that differ by head meet the pattern of their own head only
        mine, theirs = (t[:, head : head + 1] if t.shape[1] > 1 else t for t in (mine, theirs))
        h = 1
    out = torch.zeros(b, h, q_part.groups, kv_part.groups, dtype=torch.bool, device=mine.device)
    step = max(1, _CHUNK // max(1, q_part.most * kv_part.groups * kv_part.most))
    for i in range(b):
        for j in range(h):
            rows = mine[i if mine.shape[0] > 1 else 0, j if mine.shape[1] > 1 else 0].long()
            columns = theirs[i if theirs.shape[0] > 1 else 0, j if theirs.shape[1] > 1 else 0].long()
            keys = layout.kv_coords(columns.clamp(min=0).flatten()).unsqueeze(0)
            for first in range(0, q_part.groups, step):
                some = rows[first : first + step]  # [n, most]
                queries = layout.q_coords(some.clamp(min=0).flatten()).unsqueeze(1)
                seen = pattern.allows(queries, keys, layout, head)
                seen = seen & (some >= 0).flatten()[:, None] & (columns >= 0).flatten()[None]
                seen = seen.reshape(some.shape[0], q_part.most, kv_part.groups, kv_part.most)
                out[i, j, first : first + step] = seen.any(3).any(1)
    return out


def _closed(pattern: Pattern, layout: Layout, q_part: Partition, kv_part: Partition, head: int | None) -> Tensor | None:
    """From one-axis tables, [1, 1, query groups, key groups]; None where the shapes do not allow it."""
    whole = (layout.nq, layout.nk) == (layout.q.size, layout.kv.size) and layout.q == layout.kv
    if not whole or len(layout.q.grids) != 1 or layout.q.grid.tokens != layout.q.size:
        return None
    shape = layout.q.grid.axes
    terms = pattern.terms(shape, head)
    if terms is None:
        return None
    runs = runs_see(terms, shape, q_part.members[0, 0].long(), kv_part.members[0, 0].long().to(q_part.members.device))
    if runs is not None:
        return runs[0][None, None]
    boxes = [p.order.regions for p in (q_part, kv_part) if p.order is not None and p.canvas == layout.q]
    if [len(regions) for regions in boxes] != [1, 1]:
        return None
    q, k = boxes[0][0], boxes[1][0]
    if max(shape) > LIMIT:
        return None
    device = q_part.members.device
    out = torch.zeros(q_part.groups, kv_part.groups, dtype=torch.bool, device=device)
    for term in terms:
        here = torch.ones_like(out)
        for axis, relation in enumerate(term):
            a, b = q.axis(axis, shape[axis]).to(device), k.axis(axis, shape[axis]).to(device)  # [slots, tile]
            seen = relation.sees(a.clamp(min=0)[:, :, None, None], b.clamp(min=0)[None, None], shape[axis])
            seen = (seen & (a >= 0)[:, :, None, None] & (b >= 0)[None, None]).any(3).any(1)  # [slots, slots]
            here &= seen[_slot(q, axis, device)[:, None], _slot(k, axis, device)[None]]
        out |= here
    return out[None, None]


def _slot(region: Region, axis: int, device: torch.device) -> Tensor:
    """Slot (dilation group x tile) along `axis` of every block of a region."""
    places = torch.unravel_index(torch.arange(region.blocks, device=device), (*region.dilation, *region.tiles))
    return places[axis] * region.tiles[axis] + places[len(region.tile) + axis]
