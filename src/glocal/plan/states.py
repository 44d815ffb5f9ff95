"""Block states: is a block pair hidden, partly visible or wholly visible, decided without an N x N mask.

Every pattern leaf with a closed form classifies blocks exactly from one-axis tables; ``|``, ``&`` and ``~`` combine
states by table; what stays open is settled by evaluating the pattern's definition, once for each distinct signature.
A signature is a 64-bit hash: blocks of equal signature hold the same mask.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from glocal._kept import ordinary
from glocal.canvas import Layout, Order, Region
from glocal.patterns.base import And, AxisRelation, Not, Or, Pattern, PerHead, Term
from glocal.patterns.runs import runs_see

NONE, PART, FULL, OPEN, SILENT = range(5)
with ordinary():
    _OR = torch.tensor(
        [[0, 1, 2, 3, 0], [1, 3, 2, 3, 1], [2, 2, 2, 2, 2], [3, 3, 2, 3, 3], [0, 1, 2, 3, 4]], dtype=torch.int8
    )
    _AND = torch.tensor(
        [[0, 0, 0, 0, 0], [0, 3, 1, 3, 1], [0, 1, 2, 3, 2], [0, 3, 3, 3, 3], [0, 1, 2, 3, 4]], dtype=torch.int8
    )
    _NOT = torch.tensor([2, 1, 0, 3, 4], dtype=torch.int8)
TABLE_LIMIT = 2048  # axes up to this length are classified from a length x length table


@dataclass(frozen=True)
class States:
    """State (int8) and signature (int64) of every block pair, both [query blocks, key blocks]."""

    state: Tensor
    sig: Tensor


@dataclass(frozen=True)
class Side:
    """The blocks of one side that are looked at: their order, token indices [n, block] (-1 pads) and numbers."""

    order: Order
    index: Tensor
    numbers: Tensor

    def region(self, region: Region) -> Tensor:
        """Rows of this side that lie in `region` (positions into `numbers`)."""
        inside = (self.numbers >= region.first) & (self.numbers < region.first + region.blocks)
        return inside.nonzero().flatten()


def classify(pattern: Pattern, layout: Layout, q: Side, k: Side, head: int | None) -> States:
    """States of all block pairs under `pattern` (the policy table included, padding not yet)."""
    inner = _tree(pattern, layout, q, k, head)
    if not bool((inner.state == SILENT).any()):
        return inner
    outer = _policy(layout, q, k)
    silent = inner.state == SILENT
    return States(torch.where(silent, outer.state, inner.state), torch.where(silent, outer.sig, inner.sig))


def mix(a: Tensor, b: Tensor) -> Tensor:
    """One 64-bit hash of two."""
    h = (a ^ (b * -7046029254386353131)) * -4417276706812531889
    return h ^ (h >> 29)


def settle(state: Tensor, sig: Tensor) -> States:
    """States with the signature cleared wherever it carries nothing."""
    return States(state, torch.where((state == PART) | (state == OPEN), sig, 0))


def _tree(pattern: Pattern, layout: Layout, q: Side, k: Side, head: int | None) -> States:
    if isinstance(pattern, PerHead):
        return _tree(pattern.of(head), layout, q, k, None)
    if isinstance(pattern, Not):
        a = _tree(pattern.a, layout, q, k, head)
        return States(_NOT.to(a.state.device)[a.state.long()], a.sig)
    if isinstance(pattern, (Or, And)):
        a, b = (_tree(p, layout, q, k, head) for p in (pattern.a, pattern.b))
        table = (_OR if isinstance(pattern, Or) else _AND).to(a.state.device)
        return settle(table[a.state.long(), b.state.long()], mix(a.sig, b.sig))
    block_mask = getattr(pattern, "block_mask", None)
    if block_mask is not None:
        return _explicit(pattern, layout, q, k, head)
    return _leaf(pattern, layout, q, k, head)


def _unknown(q: Side, k: Side) -> States:
    n, m = q.numbers.numel(), k.numbers.numel()
    sig = torch.arange(1, n * m + 1, device=q.index.device).reshape(n, m)
    return States(torch.full((n, m), OPEN, dtype=torch.int8, device=q.index.device), sig)


def _explicit(pattern: Pattern, layout: Layout, q: Side, k: Side, head: int | None) -> States:
    """A pattern that is a mask over blocks of its own: count how many of its blocks each of ours touches."""
    mask = pattern.block_mask(layout)  # type: ignore[attr-defined]  # [heads|1, its query blocks, its key blocks]
    mask = mask[0 if mask.shape[0] == 1 or head is None else head].to(q.index.device, torch.float32)
    touch = []
    for side, name, count in ((q, "q", mask.shape[0]), (k, "kv", mask.shape[1])):
        ids = pattern.block_ids(side.index.clamp(min=0), name, layout)  # type: ignore[attr-defined]
        hit = torch.zeros(side.index.shape[0], count + 1, device=mask.device)
        hit.scatter_(1, torch.where(side.index < 0, count, ids), 1.0)
        touch.append(hit[:, :count])
    if all(bool((t.sum(1) == 1).all()) for t in touch):  # ours lie inside its blocks
        rows, columns = (t.argmax(1) for t in touch)
        state = torch.where(mask[rows[:, None], columns] > 0, FULL, NONE).to(torch.int8)
    else:
        seen = touch[0] @ mask @ touch[1].T  # [q blocks, k blocks]
        total = touch[0].sum(1)[:, None] * touch[1].sum(1)[None]
        state = torch.where(seen == 0, NONE, torch.where(seen == total, FULL, PART)).to(torch.int8)
    return settle(state, _unknown(q, k).sig)


def _policy(layout: Layout, q: Side, k: Side) -> States:
    """What the policy table says about blocks of different parts (or of flat parts)."""
    out = _unknown(q, k)
    for a in q.order.regions:
        rows = q.region(a)
        for b in k.order.regions:
            if layout.inside(a.part, b.part):
                continue
            columns = k.region(b)
            rule = layout.rule(layout.q.parts[a.part].name, layout.kv.parts[b.part].name)
            if rule == "causal":
                mine, theirs = q.index[rows], k.index[columns]
                state, sig = _causal(mine, theirs)
            else:
                state = torch.full((rows.numel(), columns.numel()), FULL if rule == "all" else NONE, dtype=torch.int8)
                sig = torch.zeros(1, dtype=torch.long)
            out.state[rows[:, None], columns] = state.to(out.state.device)
            out.sig[rows[:, None], columns] = sig.to(out.sig.device).expand(state.shape)
    return out


def _causal(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    far = torch.iinfo(torch.long).max // 2
    q_low, q_high = torch.where(q < 0, far, q).amin(1)[:, None], q.amax(1)[:, None]
    k_low, k_high = torch.where(k < 0, far, k).amin(1)[None], k.amax(1)[None]
    state = torch.where(k_low > q_high, NONE, torch.where(k_high <= q_low, FULL, PART)).to(torch.int8)
    sig = torch.where(state == PART, (q_low - k_low) * 8191 + (q_low + k_low) * 131071, 0)
    return state, sig


def _leaf(pattern: Pattern, layout: Layout, q: Side, k: Side, head: int | None) -> States:
    """A grid pattern: exact from its terms where both orders consist of boxes, else open.

    Runs of raster tokens are decided where they are hidden or plainly full, and else open.
    """
    out = _unknown(q, k)
    if not q.order.regions or not k.order.regions:
        return _raster_runs(pattern, layout, q, k, head, out)
    for a in q.order.regions:
        rows = q.region(a)
        for b in k.order.regions:
            columns = k.region(b)
            where = (rows[:, None], columns)
            if not layout.inside(a.part, b.part):
                out.state[where] = SILENT
                continue
            shapes = layout.q.parts[a.part].axes, layout.kv.parts[b.part].axes
            terms = pattern.terms(shapes[1], head) if shapes[0] == shapes[1] else None
            if terms is None:
                continue
            found = _union(terms, shapes[1], (a, q.numbers[rows] - a.first), (b, k.numbers[columns] - b.first))
            if found is not None:
                out.state[where], out.sig[where] = found.state, found.sig
    return out


def _raster_runs(pattern: Pattern, layout: Layout, q: Side, k: Side, head: int | None, out: States) -> States:
    grids = layout.q.grids
    if len(grids) != 1 or layout.kv.grids != grids or {layout.q.size, layout.kv.size} != {grids[0].tokens}:
        return out
    terms = pattern.terms(grids[0].axes, head)
    found = None if terms is None else runs_see(terms, grids[0].axes, q.index, k.index)
    if found is None:
        return out
    state = torch.where(found[0], torch.where(found[1], FULL, OPEN), NONE).to(torch.int8)
    return settle(state, out.sig)


def _union(terms: object, shape: tuple[int, ...], q: tuple[Region, Tensor], k: tuple[Region, Tensor]) -> States | None:
    total: States | None = None
    for term in terms:  # type: ignore[attr-defined]
        state = _product(term, shape, q, k)
        if state is None:
            return None
        if total is None:
            total = state
        else:
            joined = _OR.to(state.state.device)[total.state.long(), state.state.long()]
            total = settle(joined, mix(total.sig, state.sig))
    return total


def _product(term: Term, shape: tuple[int, ...], q: tuple[Region, Tensor], k: tuple[Region, Tensor]) -> States | None:
    some = every = sig = None
    for axis, (relation, length) in enumerate(zip(term, shape, strict=True)):
        table = axis_states(relation, length, q[0], k[0], axis, q[1].device)
        if table is None:
            return None
        slots = (_slots(q[0], q[1], axis)[:, None], _slots(k[0], k[1], axis)[None])
        any_, all_, hash_ = (t[slots] for t in table)
        some = any_ if some is None else some & any_
        every = all_ if every is None else every & all_
        sig = hash_ if sig is None else mix(sig, hash_)
    assert some is not None and every is not None and sig is not None
    return settle(torch.where(some, torch.where(every, FULL, PART), NONE).to(torch.int8), sig)


def _slots(region: Region, numbers: Tensor, axis: int) -> Tensor:
    """Slot (dilation group x tile) along `axis` of blocks `numbers` of the region."""
    left, counts = numbers, (*region.dilation, *region.tiles)
    place: list[Tensor] = []
    for count in reversed(counts):
        place.append(left % count)
        left = left // count
    place.reverse()
    rank = len(region.tile)
    return place[axis] * region.tiles[axis] + place[rank + axis]


def axis_states(
    relation: AxisRelation, length: int, q: Region, k: Region, axis: int, device: torch.device | str
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Along one axis, for every (query slot, key slot): any pair visible, all pairs visible, signature."""
    a, b = q.axis(axis, length).to(device), k.axis(axis, length).to(device)  # [slots, tile]
    if length > TABLE_LIMIT:
        steps = (getattr(relation, "dilation", None), q.dilation[axis], k.dilation[axis])
        if not hasattr(relation, "span") or len(set(steps)) > 1:
            return None
        return _spans(relation, length, a, b)
    valid = (a >= 0)[:, None, :, None] & (b >= 0)[None, :, None, :]
    seen = relation.sees(a.clamp(min=0)[:, None, :, None], b.clamp(min=0)[None, :, None, :], length)
    seen, free = seen & valid, seen | ~valid  # [q slots, k slots, q tile, k tile]
    generator = torch.Generator(device="cpu").manual_seed(axis + 1)
    noise = torch.randint(-(2**62), 2**62, (a.shape[1] * b.shape[1],), generator=generator).to(device)
    sig = (seen.flatten(2).long() * noise).sum(-1)
    return seen.flatten(2).any(-1), free.flatten(2).all(-1), sig


def _spans(relation: AxisRelation, length: int, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same from intervals: slot b is one run of places of one dilation group."""
    step: int = relation.dilation  # type: ignore[attr-defined]
    group = a.clamp(min=0) % step
    places = -((group - length) // step)
    start, end = relation.span(a.clamp(min=0) // step, places)  # type: ignore[attr-defined]
    same = group[:, :1] == (b[:, 0].clamp(min=0) % step)[None]  # [q slots, k slots]
    low = b[:, 0] // step  # a slot of padding only has low = high = -1
    high = b.amax(1) // step
    valid = a >= 0
    some, every = torch.zeros_like(same), torch.ones_like(same)
    for i in range(a.shape[1]):
        here = valid[:, i, None] & (b[:, 0] >= 0)[None]
        some |= here & (start[:, i, None] <= high) & (end[:, i, None] > low)
        every &= ~here | ((start[:, i, None] <= low) & (end[:, i, None] > high))
    some, every = some & same, every & same
    sig = torch.zeros(same.shape, dtype=torch.long, device=a.device)
    rows, columns = (some & ~every).nonzero(as_tuple=True)
    tile = b.shape[1]
    first = (start[rows] - low[columns, None]).clamp(0, tile)  # [pairs, q tile]
    last = (end[rows] - low[columns, None]).clamp(0, tile)
    generator = torch.Generator(device="cpu").manual_seed(7)
    noise = torch.randint(-(2**62), 2**62, (2, a.shape[1]), generator=generator).to(a.device)
    part = (torch.where(valid[rows], first * noise[0] + last * noise[1], 0)).sum(-1)
    sig[rows, columns] = mix(part, (high - low)[columns])
    return some, every, sig
