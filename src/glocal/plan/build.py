"""Compile a pattern for a layout: choose token orders, classify blocks, make the table of distinct masks."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from glocal._kept import ordinary
from glocal.canvas import Canvas, Layout, Order, raster, tile
from glocal.patterns.base import Pattern
from glocal.plan.blockplan import BlockLists, BlockPlan, pack
from glocal.plan.facts import declare_lasting, declare_order, declare_sound, order_facts
from glocal.plan.states import FULL, NONE, OPEN, PART, Side, classify, mix
from glocal.plan.tiling import UNIT, best_cuts, best_tiles

_CACHE: OrderedDict[Hashable, BlockPlan] = OrderedDict()
_CACHE_SIZE = 64
_CHUNK = 1 << 22  # pairs evaluated at once


@dataclass(frozen=True)
class PlanSpec:
    """How to cut a layout into blocks.

    q_block, kv_block: tokens a block.
    q_order, kv_order: orders of the two canvases; None lets the planner choose: boxes of the grid where the pattern
        has a closed form, raster otherwise.
    """

    q_block: int = 128
    kv_block: int = 128
    q_order: Order | None = None
    kv_order: Order | None = None

    def __post_init__(self) -> None:
        for name in ("q_block", "kv_block"):
            if getattr(self, name) < 1:
                raise ValueError(f"PlanSpec: {name}={getattr(self, name)} must be at least 1.")
        for side, order, block in (("q", self.q_order, self.q_block), ("kv", self.kv_order, self.kv_block)):
            if order is not None and order.regions and order.block != block:
                raise ValueError(
                    f"PlanSpec: {side}_order {order.name!r} has blocks of {order.block} tokens, but "
                    f"{side}_block={block}."
                )


def plan(
    pattern: Pattern,
    canvas: Canvas | Layout,
    spec: PlanSpec | None = None,
    *,
    device: torch.device | str = "cpu",
) -> BlockPlan:
    """Compile `pattern` for `canvas`; cached by content.

    Never holds an N x N array: blocks are classified from one-axis tables, and only one block of each kind is
    evaluated. Raises ValueError where the pattern does not fit the canvas.
    """
    layout = Layout.of(canvas)
    if not isinstance(pattern, Pattern):
        raise TypeError(f"plan: pattern is a {type(pattern).__name__}; legal: a Pattern, such as Neighborhood((3, 3)).")
    if not isinstance(spec, (PlanSpec, type(None))):
        raise TypeError(f"plan: spec={spec!r}; legal: PlanSpec(q_block, kv_block), None.")
    pattern.check(layout)
    spec = PlanSpec() if spec is None else spec
    orders = [o.name if o is not None else None for o in (spec.q_order, spec.kv_order)]
    key = (pattern.key, layout.key, spec.q_block, spec.kv_block, *orders, str(device))
    if key in _CACHE:
        _CACHE.move_to_end(key)
        return _CACHE[key]
    with ordinary():
        built = _build(pattern, layout, _orders(pattern, layout, spec), spec, torch.device(device))
    _CACHE[key] = built
    if len(_CACHE) > _CACHE_SIZE:
        _CACHE.popitem(last=False)
    return built


def clear_cache() -> None:
    """Forget all cached plans."""
    _CACHE.clear()


def _orders(pattern: Pattern, layout: Layout, spec: PlanSpec) -> tuple[Order, Order]:
    q_order, kv_order = spec.q_order, spec.kv_order
    if q_order is None and kv_order is None and len(layout.q.grids) == 1 and layout.q.grids == layout.kv.grids:
        grid = layout.q.grid
        boxes = best_tiles(pattern, grid.axes, spec.q_block, spec.kv_block)
        if boxes is not None:
            (q_shape, q_step), (k_shape, k_step) = boxes
            wide = min(spec.q_block, spec.kv_block) >= 2 * UNIT
            q_cut, k_cut = best_cuts(pattern, grid.axes, boxes) if wide else (0, 0)
            q_tiles = tile(layout.q, q_shape, q_step, block=spec.q_block, slowest=q_cut)
            return q_tiles, tile(layout.kv, k_shape, k_step, block=spec.kv_block, slowest=k_cut)
    return (
        raster(layout.q, spec.q_block) if q_order is None else q_order,
        raster(layout.kv, spec.kv_block) if kv_order is None else kv_order,
    )


def _side(order: Order, block: int, start: int, count: int, device: torch.device) -> Side:
    """The blocks that hold at least one present token; token indices stay those of the canvas."""
    if order.gather.dim() != 1:
        raise ValueError(f"Order {order.name!r} differs by head or sample; compile it head by head or as a Selection.")
    gather = torch.nn.functional.pad(order.gather, (0, -order.gather.numel() % block), value=-1).to(device)
    index = gather.reshape(-1, block)
    index = torch.where((index >= start) & (index < start + count), index, -1)
    numbers = (index >= 0).any(1).nonzero().flatten()
    return Side(order, index[numbers], numbers)


def _build(
    pattern: Pattern, layout: Layout, orders: tuple[Order, Order], spec: PlanSpec, device: torch.device
) -> BlockPlan:
    q = _side(orders[0], spec.q_block, layout.q_start, layout.nq, device)
    k = _side(orders[1], spec.kv_block, layout.kv_start, layout.nk, device)
    heads: list[int | None] = [None] if pattern.heads is None else list(range(pattern.heads))
    table = _MaskTable(device, spec)
    unique: dict[Hashable, int] = {}
    states, rows, owner = [], [], []
    for head in heads:
        state, row = _settle(pattern, layout, q, k, head, table)
        name = (state.cpu().numpy().tobytes(), row.cpu().numpy().tobytes())
        if name not in unique:
            unique[name] = len(states)
            states.append(state)
            rows.append(row)
        owner.append(unique[name])
    state, row = torch.stack(states), torch.stack(rows)  # [U, q blocks, kv blocks]
    full, partial = BlockLists.from_dense(state == FULL), BlockLists.from_dense(state == PART, row)
    declare_sound(full, partial)
    declare_lasting(full.index)
    return BlockPlan(
        layout=layout,
        q_block=spec.q_block,
        kv_block=spec.kv_block,
        q_order=_present(q, layout.q_start, layout.nq),
        kv_order=_present(k, layout.kv_start, layout.nk),
        full=full,
        partial=partial,
        masks=table.packed(),
        owner=torch.tensor([owner], dtype=torch.int32, device=device),
        name=f"{type(pattern).__name__} on {orders[0].name}",
    )


def _present(side: Side, start: int, tokens: int) -> Tensor:
    order = torch.where(side.index >= 0, side.index - start, -1).int().reshape(1, 1, -1)
    return declare_order(order, replace(order_facts(order, tokens), holes=False))  # masks hide the pads


class _MaskTable:
    """Distinct masks in order of first use."""

    def __init__(self, device: torch.device, spec: PlanSpec) -> None:
        self.rows: dict[bytes, int] = {}
        self.words: list[Tensor] = []
        self.empty = torch.zeros(0, spec.q_block, -(-spec.kv_block // 32), dtype=torch.int32, device=device)

    def add(self, masks: Tensor) -> Tensor:
        """Rows (int64) of bool masks [n, q, k]."""
        packed = pack(masks)
        keys, rows = packed.cpu().numpy(), []
        for i in range(packed.shape[0]):
            key = keys[i].tobytes()
            if key not in self.rows:
                self.rows[key] = len(self.words)
                self.words.append(packed[i])
            rows.append(self.rows[key])
        return torch.tensor(rows, dtype=torch.long, device=masks.device)

    def packed(self) -> Tensor:
        """All masks, int32 [M, q_block, words]."""
        return torch.stack(self.words) if self.words else self.empty


def _settle(
    pattern: Pattern, layout: Layout, q: Side, k: Side, head: int | None, table: _MaskTable
) -> tuple[Tensor, Tensor]:
    """Final states (none, part, full) and mask rows of all block pairs, padding included."""
    found = classify(pattern, layout, q, k, head)
    state, sig = found.state, found.sig
    row = torch.zeros_like(state, dtype=torch.int32)
    q_pads, k_pads = (_pad_marks(side.index) for side in (q, k))
    padded = (state == FULL) & (k_pads != 0)[None]
    state = torch.where(padded, OPEN, state)
    undecided = (state == PART) | (state == OPEN)
    a, b = undecided.nonzero(as_tuple=True)
    if a.numel() == 0:
        return state, row
    # Padded keys are hidden and padded queries see nothing, so blocks share a mask only if their padding agrees.
    kind = mix(mix(sig[a, b] + padded[a, b], q_pads[a]), k_pads[b])
    kinds, which = torch.unique(kind, return_inverse=True)
    sample = torch.empty_like(kinds).scatter_(0, which, torch.arange(a.numel(), device=a.device))
    final = torch.empty(kinds.numel(), dtype=torch.int8, device=a.device)
    rows = torch.zeros(kinds.numel(), dtype=torch.int32, device=a.device)
    step = max(1, _CHUNK // (q.index.shape[1] * k.index.shape[1]))
    for begin in range(0, kinds.numel(), step):
        part = slice(begin, begin + step)
        mine, theirs = q.index[a[sample[part]]], k.index[b[sample[part]]]
        here = _evaluate(pattern, layout, mine, theirs, head)  # [n, q, k]
        free = here | (mine < 0)[:, :, None]  # padded queries do not matter
        kind_state = torch.where(here.flatten(1).any(1), torch.where(free.flatten(1).all(1), FULL, PART), NONE).to(
            torch.int8
        )
        final[part] = kind_state
        partial = (kind_state == PART).nonzero().flatten()
        rows[begin + partial] = table.add(here[partial]).int()
    state[a, b], row[a, b] = final[which], rows[which]
    return state, row


def _pad_marks(index: Tensor) -> Tensor:
    """A hash of which slots of each block are padding; 0 where none is."""
    noise = torch.randint(1, 2**62, (index.shape[1],), generator=torch.Generator().manual_seed(3)).to(index.device)
    return ((index < 0) * noise).sum(1)


def _evaluate(pattern: Pattern, layout: Layout, q: Tensor, k: Tensor, head: int | None) -> Tensor:
    coords = layout.q.coords(q.clamp(min=0)).unsqueeze(2), layout.kv.coords(k.clamp(min=0)).unsqueeze(1)
    seen = pattern.allows(*coords, layout, head)
    return seen & (q >= 0)[:, :, None] & (k >= 0)[:, None, :]
