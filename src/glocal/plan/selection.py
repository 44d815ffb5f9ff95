"""Compile a router's Selection into a BlockPlan: groups become blocks, pads and patterns become bit masks.

A pattern inside the selection (`within`) is compiled once for the groups and cached; each step then only looks up which
listed blocks are full, partial or hidden. Groups that differ by sample or head are settled by definition.

On CUDA nothing waits for the device: lists are as wide as the selection's, and what is to be known of groups that
follow from a canvas is looked at once.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn.functional import pad

from glocal.canvas import Canvas, Order
from glocal.patterns.base import Dense, Pattern
from glocal.plan.blockplan import BlockLists, BlockPlan, pack
from glocal.plan.build import PlanSpec, plan
from glocal.plan.facts import UNKNOWN, declare_order, declare_sound, order_facts
from glocal.plan.lists import rising
from glocal.plan.states import FULL, NONE, PART
from glocal.routing.partition import Partition
from glocal.routing.selection import Selection

_CHUNK = 1 << 22  # pairs evaluated at once
_SMALL = 16  # smaller key groups are gathered into blocks
_GATHERED = 64  # keys of such a block
_KNOWN_PADS: WeakKeyDictionary[Partition, WeakKeyDictionary[Partition, PadTable | None]] = WeakKeyDictionary()
_ROWS: WeakKeyDictionary[Partition, Tensor] = WeakKeyDictionary()
_TABLES: WeakKeyDictionary[BlockPlan, tuple[Tensor, Tensor]] = WeakKeyDictionary()


def plan_selection(selection: Selection, *, device: torch.device | str = "cpu") -> BlockPlan:
    """A BlockPlan of `selection`: one block a group, a list for each sample and head.

    Key groups smaller than 16 tokens (token selections) are gathered, query group by query group, into blocks of 64.
    Repeats are kept: a group listed m times stands m times in its list. Entries beyond a count list nothing, nor do
    numbers outside the groups on CUDA (on the CPU: ValueError). Waits for the device remain where groups differ by
    sample or head inside a pattern, and for `dedupe`.
    Raises ValueError if groups and pattern disagree about heads, or the pattern does not fit the layout.
    """
    selection = _moved(selection, torch.device(device))
    if 0 < selection.kv_part.most < _SMALL:
        selection = gathered(selection, _GATHERED)
    layout = selection.layout
    within = Dense() if selection.within is None and layout.policy else selection.within
    if within is not None:
        within.check(layout)
    if selection.dedupe or (within is not None and not (selection.q_part.shared and selection.kv_part.shared)):
        found = _evaluated(selection, within)
    elif within is not None:
        found = _looked_up(selection, within)
    else:
        found = padded(selection)
    return assemble(selection, found)


@dataclass(frozen=True, eq=False)
class _Settled:
    """State and mask row of every listed entry, [B, H, query groups, most]; a state of None is FULL throughout.
    masks: bit masks [M, q_block, words].
    """

    index: Tensor
    count: Tensor
    state: Tensor | None
    row: Tensor | None
    masks: Tensor


def gathered(selection: Selection, block: int) -> Selection:
    """The same selection with key blocks of its own for each query group: the listed keys, side by side.

    block: keys a block. The key order of the result lists a key as often as it is selected.
    """
    index, count, members = selection.index, selection.count, selection.kv_groups
    b, h = _sizes(index, members)
    groups, most = index.shape[2:]
    index, count = index.expand(b, h, -1, -1).long(), count.expand(b, h, -1)
    members = members.expand(b, h, -1, -1)
    live = torch.arange(most, device=index.device) < count[..., None]
    keys = members.gather(2, index.flatten(2)[..., None].expand(-1, -1, -1, members.shape[3]))
    keys = torch.where(live.flatten(2)[..., None], keys, -1)
    keys = keys.unflatten(2, (groups, most)).flatten(3)  # [B, H, groups, most * size]
    keys = keys.gather(-1, (keys < 0).long().argsort(dim=-1, stable=True))  # pads go last
    length = (keys >= 0).sum(-1)
    longest = keys.shape[-1] if keys.is_cuda else (int(length.max()) if length.numel() else 0)
    blocks = -(-longest // block)
    keys = pad(keys[..., :longest], (0, blocks * block - longest), value=-1)
    own = torch.arange(groups * blocks, device=index.device, dtype=torch.int32).reshape(1, 1, groups, blocks)
    return Selection(
        selection.layout,
        selection.q_part,
        Partition(keys.reshape(b, h, groups * blocks, block).int(), "gathered keys"),
        own.expand(b, h, -1, -1),
        (-(-length // block)).int(),
        within=selection.within,
        dedupe=selection.dedupe,
    )


def _moved(selection: Selection, device: torch.device) -> Selection:
    return Selection(
        selection.layout,
        selection.q_part.to(device),
        selection.kv_part.to(device),
        selection.index.to(device),
        selection.count.to(device),
        within=selection.within,
        dedupe=selection.dedupe,
    )


def _empty_masks(selection: Selection) -> Tensor:
    q, k = selection.q_part.most, selection.kv_part.most
    return torch.zeros(0, q, -(-k // 32), dtype=torch.int32, device=selection.index.device)


@dataclass(frozen=True, eq=False)
class PadTable:
    """Where two partitions have pads. masks: all pairs of kinds of padding; the kinds of each group, and of each key
    kind whether some and every token is there. padded: groups of keys that have pads and are not empty.
    """

    masks: Tensor
    which_q: Tensor
    which_k: Tensor
    kinds: int
    some: Tensor
    every: Tensor
    padded: int


def _pads(q_part: Partition, kv_part: Partition) -> PadTable | None:
    """None if no key group has pads."""
    valid_q, valid_k = q_part.members >= 0, kv_part.members >= 0  # [b|1, h|1, groups, tokens]
    if bool(valid_k.all()):
        return None
    kinds_q, which_q = _kinds(valid_q)
    kinds_k, which_k = _kinds(valid_k)
    masks = pack((kinds_q[:, None, :, None] & kinds_k[None, :, None, :]).flatten(0, 1))
    some, every = kinds_k.any(-1), kinds_k.all(-1)
    padded = int((some & ~every)[which_k].sum(-1).max())
    return PadTable(masks, which_q, which_k, kinds_k.shape[0], some, every, padded)


def known_pads(q_part: Partition, kv_part: Partition) -> PadTable | None:
    """Pads of groups that follow from a canvas and that all heads share, looked at once; None: no pads, or others."""
    if not (q_part.fixed and kv_part.fixed and q_part.shared and kv_part.shared):
        return None
    return _looked_at(q_part, kv_part)


def _looked_at(q_part: Partition, kv_part: Partition) -> PadTable | None:
    """`_pads`, once for groups that follow from a canvas."""
    if not (q_part.fixed and kv_part.fixed):
        return _pads(q_part, kv_part)
    known = _KNOWN_PADS.setdefault(q_part, WeakKeyDictionary())
    if kv_part not in known:
        known[kv_part] = _pads(q_part, kv_part)
    return known[kv_part]


def padded(selection: Selection) -> _Settled:
    """No pattern: a block is partial where its key group has pads."""
    index, count = selection.index, selection.count
    q_part, kv_part = selection.q_part, selection.kv_part
    if index.is_cuda and not kv_part.fixed:  # a look would wait: the order says where pads are, and kernels read it
        return _Settled(index, count, None, None, _empty_masks(selection))
    pads = _looked_at(q_part, kv_part)
    if pads is None:
        return _Settled(index, count, None, None, _empty_masks(selection))
    b, h = _sizes(index, pads.which_q, pads.which_k)
    index, count = index.expand(b, h, -1, -1), count.expand(b, h, -1)
    place = index.flatten(2).long().clamp(0, kv_part.groups - 1)
    key_kind = pads.which_k.expand(b, h, -1).gather(2, place).reshape(index.shape)
    row = pads.which_q.expand(b, h, -1)[..., None] * pads.kinds + key_kind
    state = torch.where(pads.some[key_kind], torch.where(pads.every[key_kind], FULL, PART), NONE)
    return _Settled(index, count, state, row, pads.masks)


def _kinds(valid: Tensor) -> tuple[Tensor, Tensor]:
    """Distinct rows of bool [b, h, groups, tokens], and which of them each group has, int64 [b, h, groups]."""
    kinds, which = torch.unique(valid.flatten(0, 2), dim=0, return_inverse=True)
    return kinds, which.reshape(valid.shape[:3])


def _sizes(*tensors: Tensor) -> tuple[int, int]:
    b, h = torch.broadcast_shapes(*(t.shape[:2] for t in tensors))  # a batch of none stays one
    return b, h


def _looked_up(selection: Selection, within: Pattern) -> _Settled:
    """A pattern on fixed groups: compiled once, then a table of block states."""
    layout = selection.layout
    spec = PlanSpec(
        selection.q_part.most,
        selection.kv_part.most,
        _order(selection.q_part, layout.q, layout.q_start, layout.nq),
        _order(selection.kv_part, layout.kv, layout.kv_start, layout.nk),
    )
    compiled = plan(within, layout, spec, device=selection.index.device)
    state, row = _table(compiled, selection.q_part, selection.kv_part)  # [pattern heads|1, groups, groups]
    index, count = _per_head(selection, state.shape[0])
    h, groups = index.shape[1:3]
    head = torch.arange(h, device=index.device) * state.shape[0] // h
    place = index.long().clamp(0, max(selection.kv_part.groups - 1, 0))
    where = (head[None, :, None, None], torch.arange(groups, device=index.device)[:, None], place)
    return _Settled(index, count, state[where], row[where], compiled.masks)


def _order(part: Partition, canvas: Canvas, start: int, tokens: int) -> Order:
    """The groups as an order of the canvas; with its boxes where the partition has them."""
    if part.order is not None and part.canvas == canvas and tokens == canvas.size:
        return part.order
    members = part.members[0, 0].flatten().long()
    return Order(f"groups {part.fingerprint}+{start}", torch.where(members < 0, -1, members + start), part.most)


def _table(compiled: BlockPlan, q_part: Partition, kv_part: Partition) -> tuple[Tensor, Tensor]:
    """State and mask row of all pairs of groups, [heads|1, query groups, key groups]; empty groups see nothing."""
    if compiled in _TABLES:  # a cached plan has one pair of partitions: their orders are part of its key
        return _TABLES[compiled]
    filled = [(p.members[0, 0] >= 0).any(-1).nonzero().flatten() for p in (q_part, kv_part)]
    shape = (compiled.full.count.shape[0], q_part.groups, kv_part.groups)
    state = torch.full(shape, NONE, dtype=torch.long, device=compiled.device)
    row = torch.zeros(shape, dtype=torch.long, device=compiled.device)
    u, i, j, _ = compiled.full.entries()
    state[u, filled[0][i], filled[1][j]] = FULL
    u, i, j, mask = compiled.partial.entries()
    assert mask is not None
    state[u, filled[0][i], filled[1][j]] = PART
    row[u, filled[0][i], filled[1][j]] = mask
    owner = compiled.owner[0].long()
    _TABLES[compiled] = state[owner], row[owner]
    return _TABLES[compiled]


def _per_head(selection: Selection, pattern_heads: int) -> tuple[Tensor, Tensor]:
    """Lists for as many heads as lists, groups and pattern ask for."""
    index, count = selection.index, selection.count
    b, h = _sizes(index, selection.q_groups, selection.kv_groups)
    if max(h, pattern_heads) % min(h, pattern_heads) != 0:
        raise ValueError(
            f"Selection: lists for {h} heads do not fit a pattern with {pattern_heads} heads; "
            "one must divide the other."
        )
    index, count = index.expand(b, h, -1, -1), count.expand(b, h, -1)
    if pattern_heads > h:
        index, count = (t.repeat_interleave(pattern_heads // h, 1) for t in (index, count))
    return index, count


def _evaluated(selection: Selection, within: Pattern | None) -> _Settled:
    """Every listed entry by definition, chunk by chunk: groups that differ by sample or head, or keys counted once."""
    layout, device = selection.layout, selection.index.device
    pattern_heads = 1 if within is None or within.heads is None else within.heads
    index, count = _per_head(selection, pattern_heads)
    b, h, _, most = index.shape
    q, k = (_spread(t, b, h) for t in (selection.q_groups, selection.kv_groups))
    live = torch.arange(most, device=device) < count[..., None]
    first = _first(index, live, k) if selection.dedupe else None
    state = torch.full(index.shape, NONE, device=device)
    row = torch.zeros(index.shape, dtype=torch.long, device=device)
    table = _Distinct(selection)
    step = max(1, _CHUNK // max(1, q.shape[-1] * k.shape[-1]))
    for head in range(h):
        kind = None if within is None or within.heads is None else head * within.heads // h
        sample, group, place = live[:, head].nonzero(as_tuple=True)
        for begin in range(0, sample.numel(), step):
            part = slice(begin, begin + step)
            i, g, p = sample[part], group[part], place[part]
            mine = q[i, head, g].long()  # [n, q_block]
            theirs = k[i, head, index[i, head, g, p].long()].long()  # [n, kv_block]
            if first is not None:
                theirs = torch.where(first[i, head, g, p], theirs, -1)
            seen = (mine >= 0)[:, :, None] & (theirs >= 0)[:, None]
            if within is not None:
                at = layout.q_coords(mine.clamp(min=0)).unsqueeze(2), layout.kv_coords(theirs.clamp(min=0)).unsqueeze(1)
                seen = seen & within.allows(*at, layout, kind)
            free = seen | (mine < 0)[:, :, None]  # padded queries do not matter
            some, every = seen.flatten(1).any(1), free.flatten(1).all(1)
            state[i, head, g, p] = torch.where(some, torch.where(every, FULL, PART), NONE)
            part_of = (some & ~every).nonzero().flatten()
            row[i[part_of], head, g[part_of], p[part_of]] = table.add(seen[part_of])
    return _Settled(index, count, state, row, table.masks())


def _spread(members: Tensor, b: int, h: int) -> Tensor:
    """Members for h heads; groups of fewer heads serve several."""
    return members.repeat_interleave(h // members.shape[1], 1).expand(b, -1, -1, -1)


def _first(index: Tensor, live: Tensor, k: Tensor) -> Tensor:
    """Whether a listed key stands for the first time in the list of its query group, [B, H, groups, most, kv_block]."""
    b, h, groups, most = index.shape
    flat = index.flatten(2).long()[..., None].expand(-1, -1, -1, k.shape[-1])
    keys = torch.where(live.flatten(2)[..., None], k.gather(2, flat), -1).reshape(b, h, groups, -1)
    order = keys.argsort(dim=-1, stable=True)
    sorted_ = keys.gather(-1, order)
    new = torch.ones_like(sorted_, dtype=torch.bool)
    new[..., 1:] = sorted_[..., 1:] != sorted_[..., :-1]
    return torch.zeros_like(new).scatter_(-1, order, new).reshape(b, h, groups, most, -1)


class _Distinct:
    """The distinct masks met so far, in order of first use."""

    def __init__(self, selection: Selection) -> None:
        self.rows: dict[bytes, int] = {}
        self.words = [_empty_masks(selection)]

    def add(self, masks: Tensor) -> Tensor:
        """Rows of bool masks [n, q, k]."""
        packed = pack(masks)
        kinds, which = torch.unique(packed.flatten(1), dim=0, return_inverse=True)
        numbers = []
        for kind, words in zip(kinds.cpu().numpy(), kinds, strict=True):
            name = kind.tobytes()
            if name not in self.rows:
                self.rows[name] = len(self.rows)
                self.words.append(words.reshape(1, *packed.shape[1:]))
            numbers.append(self.rows[name])
        return torch.tensor(numbers, dtype=torch.long, device=masks.device)[which]

    def masks(self) -> Tensor:
        """All of them, int32 [M, q_block, words]."""
        return torch.cat(self.words)


def assemble(selection: Selection, found: _Settled, *, rising_already: bool = False) -> BlockPlan:
    """The plan of settled entries. rising_already: lists are sorted, and their numbers legal."""
    b, h, groups, most = found.index.shape
    listed = found.count.reshape(b * h, groups).int().contiguous()
    index = found.index.reshape(b * h, groups, most).int().contiguous()
    place, count = None, listed
    if not rising_already:  # key blocks in the order of memory, [U, groups, most]
        index, place, count = rising(index, listed, selection.kv_part.groups)
    if not count.is_cuda and not torch.equal(count, listed):
        raise ValueError(
            f"Selection: a list names a key group outside 0 to {selection.kv_part.groups - 1}, or more than {most} "
            "groups."
        )
    full = BlockLists(count, index)
    if found.state is None or found.row is None:
        none = torch.zeros(b * h, groups, 0, dtype=torch.int32, device=index.device)
        partial = BlockLists(torch.zeros_like(full.count), none, none)
    else:
        live = full.live
        state, row = (t.reshape(b * h, groups, most) for t in (found.state, found.row))
        if place is not None:
            state, row = (t.gather(-1, place.long()) for t in (state, row))
        full = _list(live & (state == FULL), index, None)
        partial = _list(live & (state == PART), index, row)
    return assemble_lists(selection, (b, h), (full, partial), found.masks)


def assemble_lists(
    selection: Selection, lead: tuple[int, int], lists: tuple[BlockLists, BlockLists], masks: Tensor
) -> BlockPlan:
    """The plan of full and partial lists that hold legal numbers, one of each for `lead` samples and heads."""
    (b, h), (full, partial) = lead, lists
    declare_sound(full, partial)
    return BlockPlan(
        layout=selection.layout,
        q_block=selection.q_part.most,
        kv_block=selection.kv_part.most,
        q_order=_row(selection.q_part, h, selection.layout.nq),
        kv_order=_row(selection.kv_part, h, selection.layout.nk),
        full=full,
        partial=partial,
        masks=masks,
        owner=torch.arange(b * h, dtype=torch.int32, device=full.count.device).reshape(b, h),
        name=f"{selection.q_part.name} x {selection.kv_part.name}",
    )


def _row(part: Partition, heads: int, tokens: int) -> Tensor:
    """The members as an order, and what is known of it; the same tensor at every step for groups that stay."""
    samples, own = part.members.shape[:2]
    if part.fixed:
        if part not in _ROWS:
            row = part.members.flatten(2)
            _ROWS[part] = declare_order(row, replace(order_facts(row, tokens), holes=False))  # masks hide the pads
        return _ROWS[part]
    row = _spread(part.members, samples, heads if own > 1 else 1).flatten(2)
    return declare_order(row, UNKNOWN) if row.is_cuda else row


def _list(chosen: Tensor, index: Tensor, row: Tensor | None) -> BlockLists:
    """The chosen entries of each row, moved to its front."""
    count = chosen.sum(-1, dtype=torch.int32)
    most = index.shape[-1] if count.is_cuda else (int(count.max()) if count.numel() else 0)
    front = (~chosen).int().argsort(dim=-1, stable=True)[..., :most]
    keep = torch.arange(most, device=index.device) < count[..., None]
    entries = torch.where(keep, index.gather(-1, front), 0).int()
    return BlockLists(count, entries, None if row is None else torch.where(keep, row.gather(-1, front), 0).int())
