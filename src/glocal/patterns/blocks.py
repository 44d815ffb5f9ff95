"""Patterns that live on blocks: who sees whom is decided by block numbers, for every token of the two blocks.

A block pattern is by definition its expansion to tokens, over the whole sequence (text and padding tokens included);
executing it with other block sizes gives the same relation. Radial Attention (arXiv 2506.19852), PAROAttention
(arXiv 2506.16054) and Scale-DiT (arXiv 2510.16325) publish masks of this kind.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from glocal._kept import ordinary
from glocal.canvas import Canvas, Coords, Layout, Order, named
from glocal.patterns.base import Pattern

BlockRule = Callable[[Tensor, Tensor, "int | None"], Tensor]


class BlockPattern(Pattern):
    """Base of block patterns: subclasses give sizes as attributes and `block_mask`.

    Token i of the canvas (linear index) belongs to block ``(place + offset) // block``, where place is i in raster
    order and otherwise the position of i in the order's gather list (pads of the list count).
    """

    q_block: int
    kv_block: int
    order: str | Order = "raster"
    offset: int = 0

    def block_mask(self, layout: Layout) -> Tensor:
        """Which blocks of the two canvases see each other, bool [heads|1, query blocks, key blocks]."""
        raise TypeError(f"{type(self).__name__} must define block_mask().")

    def blocks(self, layout: Layout) -> tuple[int, int]:
        """Query blocks and key blocks of the two whole canvases."""
        sides = ((layout.q, self.q_block), (layout.kv, self.kv_block))
        nq, nk = (-(-(_length(self.order, canvas) + self.offset) // block) for canvas, block in sides)
        return nq, nk

    def block_ids(self, index: Tensor, side: str, layout: Layout) -> Tensor:
        """Block number of the tokens at linear indices `index` (any shape); side: "q" or "kv"."""
        canvas, block = (layout.q, self.q_block) if side == "q" else (layout.kv, self.kv_block)
        places = _places(self.order, canvas)
        place = index if places is None else places.to(index.device)[index]
        return (place + self.offset) // block

    def check(self, layout: Layout) -> None:
        for canvas in (layout.q, layout.kv):
            _places(self.order, canvas)

    def _lookup(self, q: Coords, k: Coords, layout: Layout, head: int | None) -> Tensor:
        mask = self.block_mask(layout)
        if head is None and mask.shape[0] > 1:
            raise ValueError(f"{type(self).__name__}: this pattern differs by head; give head=.")
        mask = mask[0 if head is None or mask.shape[0] == 1 else head].to(q.index.device)
        return mask[self.block_ids(q.index, "q", layout), self.block_ids(k.index, "kv", layout)]

    def within(self, q: Coords, k: Coords, shape: tuple[int, ...], layout: Layout, head: int | None) -> Tensor:
        return self._lookup(q, k, layout, head)

    def across(self, q: Coords, k: Coords, layout: Layout, head: int | None) -> Tensor:
        return self._lookup(q, k, layout, head)


@dataclass(frozen=True, eq=False)
class Blocks(BlockPattern):
    """Blocks given as data or by rule.

    kept: bool [heads|1, query blocks, key blocks] or [query blocks, key blocks]; or a function
        ``(i, j, head) -> bool`` of broadcast block numbers (pure: plans are cached by the function itself).
    q_block, kv_block: tokens of a block.
    order: "raster", a name that `glocal.canvas.named` knows, or an `Order` that lists every token once. Orders per
        head go through ``per_head([Blocks(..., order=o) for o in ...])``.
    offset: tokens the blocks start before the first token (the first block then holds so many fewer).
    rule_heads: how many heads a function tells apart; None if it ignores `head`.
    """

    kept: Tensor | BlockRule
    q_block: int
    kv_block: int
    order: str | Order = "raster"
    offset: int = 0
    rule_heads: int | None = None

    def __post_init__(self) -> None:
        if self.q_block < 1 or self.kv_block < 1:
            raise ValueError(f"Blocks: q_block={self.q_block}, kv_block={self.kv_block} must be at least 1.")
        if not 0 <= self.offset < max(self.q_block, self.kv_block):
            raise ValueError(
                f"Blocks: offset={self.offset} must lie in 0..{max(self.q_block, self.kv_block) - 1} "
                f"(less than a block)."
            )
        if isinstance(self.kept, Tensor):
            mask = self.kept.detach().bool().clone()  # what the caller does to its tensor later changes nothing
            mask = mask[None] if mask.dim() == 2 else mask
            if mask.dim() != 3:
                raise ValueError(
                    f"Blocks: kept of shape {tuple(self.kept.shape)} must be [heads|1, query blocks, key blocks]."
                )
            object.__setattr__(self, "kept", mask)

    @property
    def heads(self) -> int | None:
        if isinstance(self.kept, Tensor):
            return self.kept.shape[0] if self.kept.shape[0] > 1 else None
        return self.rule_heads

    @property
    def key(self) -> Hashable:
        return self._key

    @cached_property
    def _key(self) -> Hashable:
        content = digest(self.kept) if isinstance(self.kept, Tensor) else self.kept
        order = self.order if isinstance(self.order, str) else (self.order.name, digest(self.order.gather))
        return ("Blocks", content, self.q_block, self.kv_block, order, self.offset, self.rule_heads)

    def check(self, layout: Layout) -> None:
        super().check(layout)
        self.block_mask(layout)

    def block_mask(self, layout: Layout) -> Tensor:
        nq, nk = self.blocks(layout)
        if not isinstance(self.kept, Tensor):
            i, j = torch.arange(nq)[:, None], torch.arange(nk)[None]
            heads = [None] if self.rule_heads is None else range(self.rule_heads)
            return torch.stack([self.kept(i, j, head).expand(nq, nk) for head in heads])
        if self.kept.shape[1:] != (nq, nk):
            raise ValueError(
                f"Blocks: kept of shape {tuple(self.kept.shape)} does not fit {layout.q.size} queries and "
                f"{layout.kv.size} keys in blocks of {self.q_block} x {self.kv_block} (offset {self.offset}); "
                f"it must be [heads|1, {nq}, {nk}]."
            )
        return self.kept


def coarsen(
    pattern: Pattern,
    layout: Canvas | Layout,
    q_block: int,
    kv_block: int,
    rule: str | float = "any",
    order: str | Order = "raster",
) -> Blocks:
    """The block pattern that keeps a block if "any" or "all" of its pairs are visible, or at least a `share` of them.

    rule: "any", "all", or a share t with 0 < t <= 1 (kept if visible pairs >= t * pairs). Pads of an order and the
        missing tokens of a last block do not count; a block of pads only is dropped.
    The pattern is evaluated chunk by chunk on the whole canvases: memory stays linear, time is queries x keys.
    """
    if not (rule in ("any", "all") or (isinstance(rule, (int, float)) and 0 < rule <= 1)):
        raise ValueError(f"coarsen: rule={rule!r}; legal: 'any', 'all' or a share t with 0 < t <= 1, such as 0.5.")
    layout = Layout.of(layout)
    whole = Layout(layout.q, layout.kv, layout.policy)
    pattern.check(whole)
    blank = Blocks(_nobody, q_block, kv_block, order)
    nq, nk = blank.blocks(whole)
    rows = _members(order, whole.q, q_block, nq)  # [query blocks, q_block], -1 pads
    columns = _members(order, whole.kv, kv_block, nk)  # [key blocks, kv_block]
    step = max(1, 2**22 // (q_block * nk * kv_block))
    pairs = (rows >= 0).sum(1)[:, None] * (columns >= 0).sum(1)[None]  # [query blocks, key blocks]
    k = whole.kv.coords(columns.clamp(min=0).flatten())
    heads = [None] if pattern.heads is None else range(pattern.heads)
    masks = []
    for head in heads:
        seen = torch.zeros(nq, nk, dtype=torch.long)
        for first in range(0, nq, step):
            chunk = rows[first : first + step]
            q = whole.q.coords(chunk.clamp(min=0).flatten())
            allowed = pattern.allows(q.unsqueeze(1), k.unsqueeze(0), whole, head)
            valid = (chunk >= 0).flatten()[:, None] & (columns >= 0).flatten()[None]
            grid = (allowed & valid).reshape(-1, q_block, nk, kv_block)
            seen[first : first + step] = grid.sum((1, 3))
        masks.append(_decide(seen, pairs, rule))
    return Blocks(torch.stack(masks), q_block, kv_block, order)


def _decide(seen: Tensor, pairs: Tensor, rule: str | float) -> Tensor:
    if rule == "any":
        return seen > 0
    least = pairs if rule == "all" else pairs * float(rule)
    return (seen >= least) & (pairs > 0)


def _nobody(i: Tensor, j: Tensor, head: int | None) -> Tensor:
    return torch.zeros_like(i == j)


def digest(tensor: Tensor) -> str:
    """Content hash of a tensor: shape, type and values."""
    data = tensor.detach().cpu().contiguous()
    head = f"{data.dtype}{tuple(data.shape)}".encode()
    return hashlib.sha256(head + data.view(torch.uint8).numpy().tobytes()).hexdigest()


def _gather(order: str | Order, canvas: Canvas) -> Tensor | None:
    """The one-dimensional gather list of an order; None for the raster."""
    if order == "raster":
        return None
    found = named(canvas, order) if isinstance(order, str) else order
    gather = found.gather.reshape(-1) if found.gather.shape[:-1].numel() == 1 else found.gather
    if gather.dim() != 1:
        raise ValueError(
            f"Blocks: order {found.name!r} differs by head or sample, shape {tuple(gather.shape)}; "
            f"give each head its own: per_head([Blocks(..., order=o) for o in ...])."
        )
    return gather


def _length(order: str | Order, canvas: Canvas) -> int:
    gather = _gather(order, canvas)
    return canvas.size if gather is None else gather.numel()


@lru_cache(maxsize=64)
@ordinary()
def _places(order: str | Order, canvas: Canvas) -> Tensor | None:
    gather = _gather(order, canvas)
    if gather is None:
        return None
    name = order if isinstance(order, str) else order.name
    return Order(name, gather).inverse(canvas.size)


def _members(order: str | Order, canvas: Canvas, block: int, count: int) -> Tensor:
    """Token indices of every block, int64 [count, block], -1 pads."""
    gather = _gather(order, canvas)
    gather = torch.arange(canvas.size) if gather is None else gather
    return torch.nn.functional.pad(gather, (0, count * block - gather.numel()), value=-1).reshape(count, block)
